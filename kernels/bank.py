"""Momentum update of rows of a memory bank.

    u_b           = m · bank[index_b] + (1 − m) · x_b
    bank[index_b] ← u_b / max(‖u_b‖, 1e-12)

Every row is made from the bank as it was; of equal indices the last one wins. A program has one
row of the batch and looks for its index further down, B²/2 compares of integers in the L2 cache in
all. If it is there the program leaves, so that each row of the bank has one reader and one writer:
no race, the same bits every time.
Bytes moved: B·D·(b_x + 2 b_bank). Rows longer than 4,096 are read twice.
Plain version: fastcl/reference/bank.py. CPU twin: csrc/bank.cpp.
Source: Wu et al. 2018, arXiv:1805.01978, as its authors' code updates it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import configs
from fastcl.kernels._tiles import NORM_CLAMP, wide

# Warps for the rows that a block just holds: 4 to 16 elements a thread. Longer rows are looped
# over in the last one's blocks.
WARPS = {128: 1, 256: 1, 512: 1, 1024: 2, 2048: 4, 4096: 8}
SCAN = 512  # indices compared at a time


@triton.jit
def _updated(bank_ptr, x_ptr, slot, b, D, d, momentum, rest):
    """u at the features d."""
    old = tl.load(bank_ptr + slot * D + d, mask=d < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * D + d, mask=d < D, other=0.0).to(tl.float32)
    return momentum * old + rest * x


@triton.jit(do_not_specialize=["B", "D"])
def update_kernel(
    bank_ptr,  # (M, D)
    index_ptr,  # (B,) int64
    x_ptr,  # (B, D)
    B,
    D,
    momentum,
    rest,  # 1 − momentum, from float64
    WHOLE_ROW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCAN: tl.constexpr,
    ALIGN: tl.constexpr,
):
    D = (D // ALIGN) * ALIGN  # the same number, known to be a multiple: 128-bit loads
    row = tl.program_id(0)
    b = wide(row)
    slot = tl.load(index_ptr + b)
    found = tl.zeros((SCAN,), tl.int32)
    for start in range((row + 1) // SCAN * SCAN, B, SCAN):
        later = start + tl.arange(0, SCAN)
        other = tl.load(index_ptr + later, mask=(later > row) & (later < B), other=-1)
        found += (other == slot).to(tl.int32)
    if tl.sum(found, axis=0) == 0:
        squares = tl.zeros((BLOCK_D,), tl.float32)
        if WHOLE_ROW:
            d = tl.arange(0, BLOCK_D)
            u = _updated(bank_ptr, x_ptr, slot, b, D, d, momentum, rest)
            norm = tl.maximum(tl.sqrt(tl.sum(u * u, axis=0)), NORM_CLAMP)
            tl.store(bank_ptr + slot * D + d, (u / norm).to(bank_ptr.dtype.element_ty), mask=d < D)
        else:
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                u = _updated(bank_ptr, x_ptr, slot, b, D, d, momentum, rest)
                squares += u * u
            norm = tl.maximum(tl.sqrt(tl.sum(squares, axis=0)), NORM_CLAMP)
            for d0 in range(0, D, BLOCK_D):
                d = d0 + tl.arange(0, BLOCK_D)
                u = _updated(bank_ptr, x_ptr, slot, b, D, d, momentum, rest)
                u = (u / norm).to(bank_ptr.dtype.element_ty)
                tl.store(bank_ptr + slot * D + d, u, mask=d < D)


def update_(bank: Tensor, index: Tensor, features: Tensor, *, momentum: float) -> None:
    """bank (M, D) in place; index int64 (B,) in [0, M), features (B, D)."""
    configs.assert_supported(bank, features)
    (B,), D = index.shape, bank.shape[1]
    assert features.shape == (B, D) and index.dtype == torch.int64
    assert bank.is_contiguous() and index.is_contiguous() and features.is_contiguous()
    if B == 0:
        return
    block_d = min(max(triton.next_power_of_2(D), min(WARPS)), max(WARPS))
    with torch.cuda.device_of(bank):
        update_kernel[(B,)](
            bank,
            index,
            features,
            B,
            D,
            float(momentum),
            1 - float(momentum),
            WHOLE_ROW=block_d >= D,
            BLOCK_D=block_d,
            SCAN=SCAN,
            ALIGN=math.gcd(D, 8),
            num_warps=WARPS[block_d],
        )
