"""Ring-buffer write of a batch: the oldest rows of the queue give way to the newest keys.

    queue[(pointer + b) mod M] ← key_b,  b = 0 … B−1        as if pushed one after the other:
    pointer ← (pointer + B) mod M                           of B > M keys only the last M remain

The pointer is read and advanced on the device: no host sync, and a CUDA graph replays it. Each key
that remains is read once and written once: min(B, M)·D·(b_key + b_queue) bytes.
Plain version: fastcl/reference/queue.py. CPU twin: csrc/queue.cpp.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import configs

# 2,048 elements a program, rows of up to 2,048 whole: one to four 128-bit loads a thread.
BLOCKS = {d: (2048 // d, d) for d in (128, 256, 512, 1024, 2048)}


@triton.jit
def _modulo(i, M):
    """i mod M in 0 … M−1, also of a negative i: no pointer value may lead outside the queue."""
    return (i % M + M) % M


@triton.jit(do_not_specialize=["M", "B", "D", "first"])
def write_kernel(
    queue_ptr,  # (M, D)
    pointer_ptr,  # (1,) int64
    keys_ptr,  # (B, D)
    M,
    B,
    D,
    first,  # the first key that remains: distinct keys go to distinct slots
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    D = (D // ALIGN) * ALIGN  # the same number, known to be a multiple: 128-bit loads
    b = first + tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    slot = _modulo(tl.load(pointer_ptr) % M + b, M)  # (BLOCK_B,)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        inside = (b < B)[:, None] & (d < D)[None, :]
        key = tl.load(keys_ptr + b[:, None] * D + d[None, :], mask=inside)
        at = queue_ptr + slot[:, None] * D + d[None, :]
        tl.store(at, key.to(queue_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "B"])
def advance_kernel(pointer_ptr, M, B):
    """A launch of its own: it starts when every program of the write has read the pointer."""
    tl.store(pointer_ptr, _modulo(tl.load(pointer_ptr) % M + B, M))


def push_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Writes keys (B, D) into queue (M, D) at pointer (1,) int64, and advances the pointer."""
    configs.assert_supported(queue, keys)
    M, D = queue.shape
    B = keys.shape[0]
    assert M > 0 and keys.shape[1] == D, (queue.shape, keys.shape)
    assert queue.is_contiguous() and keys.is_contiguous() and pointer.dtype == torch.int64
    if B == 0:
        return
    first = max(B - M, 0)
    block_b, block_d = BLOCKS[min(max(triton.next_power_of_2(D), min(BLOCKS)), max(BLOCKS))]
    with torch.cuda.device_of(queue):
        write_kernel[(triton.cdiv(B - first, block_b),)](
            queue,
            pointer,
            keys,
            M,
            B,
            D,
            first,
            BLOCK_B=block_b,
            BLOCK_D=block_d,
            ALIGN=math.gcd(D, 8),
            num_warps=4,
        )
        advance_kernel[(1,)](pointer, M, B, num_warps=1)
