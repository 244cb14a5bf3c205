"""Similarities of queries to gathered rows of a memory bank.

    s_nk = t · q_n · bank[index_nk]
    u_n  = Σ_k g_nk bank[index_nk]
    ∂/∂q_n = t u_n,   ∂/∂t = Σ_n q_n · u_n

Rows of the bank go from memory to registers: no (N, K, D) tensor. Bytes moved, N·K·D·b_bank in each
direction, and that is all that costs. Accumulates in float32. Backward, few queries are split over
K, and the parts are added in a fixed order: no atomics, the same bits every time.
Plain version: fastcl/reference/bank_scores.py. CPU twin: csrc/bank_scores.cpp.
Source: Wu et al. 2018, arXiv:1805.01978, section 3.2.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import configs
from fastcl.kernels._tiles import wide
from fastcl.kernels._weighted_sums import combine
from fastcl.kernels.similarity_lse import chunk_of

# (rows of the bank, features) of a program's tile: 16 elements a thread with 4 warps, that is two
# to four 128-bit loads in flight. A row is read whole where it has up to 1,024 features.
BLOCKS = {d: (2048 // d, d) for d in (32, 64, 128, 256, 512, 1024)}
WARPS = 4


def blocks_of(d: int) -> tuple[int, int]:
    """The tile whose rows just hold d features, or the longest."""
    return BLOCKS[min(max(triton.next_power_of_2(d), min(BLOCKS)), max(BLOCKS))]


@triton.jit
def _gather(bank_ptr, slot, valid, d, D):
    """The rows `slot` of the bank at the features d: (BLOCK_K, BLOCK_D)."""
    inside = valid[:, None] & (d < D)[None, :]
    return tl.load(bank_ptr + slot[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["K", "D"])
def forward_kernel(
    query_ptr,  # (N, D)
    bank_ptr,  # (M, D)
    index_ptr,  # (N, K) int64
    scale_ptr,  # ()
    scores_ptr,  # (N, K) out
    K,
    D,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    D = (D // ALIGN) * ALIGN  # the same number, known to be a multiple: 128-bit loads
    blocks = tl.cdiv(K, BLOCK_K)
    n = wide(tl.program_id(0) // blocks)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    slot = tl.load(index_ptr + n * K + k, mask=k < K, other=0)
    s = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        q = tl.load(query_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
        s += _gather(bank_ptr, slot, k < K, d, D) * q[None, :]
    tl.store(scores_ptr + n * K + k, tl.load(scale_ptr) * tl.sum(s, axis=1), mask=k < K)


@triton.jit(do_not_specialize=["N", "K", "D", "splits", "chunk"])
def backward_kernel(
    grad_ptr,  # (N, K)
    bank_ptr,  # (M, D)
    index_ptr,  # (N, K) int64
    part_ptr,  # (splits, N, D) out: u over a part of K
    N,
    K,
    D,
    splits,
    chunk,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One query, `chunk` blocks of K, and BLOCK_D of the features."""
    D = (D // ALIGN) * ALIGN
    pid = tl.program_id(0)
    features = tl.cdiv(D, BLOCK_D)
    d = pid % features * BLOCK_D + tl.arange(0, BLOCK_D)
    split = pid // features % splits
    n = wide(pid // features // splits)
    u = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)  # sums stay one per lane until the end
    first = split * chunk
    for block in range(first, tl.minimum(first + chunk, tl.cdiv(K, BLOCK_K))):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        slot = tl.load(index_ptr + n * K + k, mask=k < K, other=0)
        g = tl.load(grad_ptr + n * K + k, mask=k < K, other=0.0).to(tl.float32)
        u += g[:, None] * _gather(bank_ptr, slot, k < K, d, D)
    tl.store(part_ptr + (wide(split) * N + n) * D + d, tl.sum(u, axis=0), mask=d < D)


def forward(query: Tensor, bank: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """query (N, D), bank (M, D), index int64 (N, K) in [0, M), scale () -> s (N, K) float32."""
    configs.assert_supported(query, bank)
    (N, D), K = query.shape, index.shape[1]
    scores = torch.empty(N, K, dtype=torch.float32, device=query.device)
    block_k, block_d = blocks_of(D)
    if scores.numel():
        with torch.cuda.device_of(query):
            forward_kernel[(N * triton.cdiv(K, block_k),)](
                query,
                bank,
                index,
                scale,
                scores,
                K,
                D,
                BLOCK_K=block_k,
                BLOCK_D=block_d,
                ALIGN=math.gcd(D, 8),
                num_warps=WARPS,
            )
    return scores


def backward(
    grad: Tensor, query: Tensor, bank: Tensor, index: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """grad (N, K) -> grad_query (N, D) in the query's dtype, grad_scale () float32."""
    configs.assert_supported(grad, query, bank)
    (N, D), K = query.shape, index.shape[1]
    if N == 0:
        return torch.empty_like(query), torch.zeros_like(scale)
    block_k, block_d = blocks_of(D)
    features = triton.cdiv(D, block_d)
    splits, chunk = chunk_of(query, N * features, max(triton.cdiv(K, block_k), 1))
    part = torch.empty(splits, N, D, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        backward_kernel[(N * splits * features,)](
            grad,
            bank,
            index,
            part,
            N,
            K,
            D,
            splits,
            chunk,
            BLOCK_K=block_k,
            BLOCK_D=block_d,
            ALIGN=math.gcd(D, 8),
            num_warps=WARPS,
        )
        grad_query, dot = combine(query, part, scale, False, D)  # dot: q_n · u_n
    return grad_query, dot.sum()
