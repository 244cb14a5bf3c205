"""The similarity of each row to the mean of its label's other rows: SupCon's positives.

    r_i    = Σ_{j≠i of i's label} ẑ_j,     n_i how many those are
    mean_i = ẑ_i · r_i / n_i
    dẑ_i   = w_i r_i + Σ_{j≠i of i's label} w_j ẑ_j,     w_i = g_i / n_i

with ẑ = z / max(‖z‖, 1e-12) where normalize, else z. torch sorts the labels; a label's rows are cut
into chunks, of which each is a program's: one launch adds up every chunk, the next adds the sums of
a label's chunks, in their order, and goes through its own rows again. No atomics, the same bits on
every run. Whole rows are in registers, so up to LONGEST features. Accumulates in float32.
Plain version: fastcl/reference/label_similarity.py. CPU twin: csrc/label_similarity.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import configs
from fastcl.kernels._tiles import NORM_CLAMP, wide

LONGEST = 8192
TILE = 2048  # elements of a program's rows: two to four 128-bit loads a thread in flight
CHUNK = tl.constexpr(64)  # rows: four tiles of them at D = 128, and a 64th of the sums again


def options_of(z: Tensor) -> dict[str, Any]:
    """Rows and features of a program's tile, its warps (16 elements a thread) and registers."""
    d = z.shape[1]
    block_d = max(triton.next_power_of_2(d), 32)
    return dict(
        BLOCK_N=max(TILE // block_d, 1),
        BLOCK_D=block_d,
        ALIGN=math.gcd(d, 8),
        num_warps=max(block_d // 512, 4),
        **configs.registers(z, 168),  # ptxas would spill for one more block
    )


@triton.jit
def _chunk(first_ptr, last_ptr):
    """Where the label of this program's place begins and ends, and the chunk that begins at it: its
    first place, and where it ends, the same place where none begins."""
    place = wide(tl.program_id(0))
    first, last = tl.load(first_ptr + place), tl.load(last_ptr + place)
    begins = (place - first) % CHUNK == 0
    return first, last, place, tl.where(begins, tl.minimum(place + CHUNK, last), place)


@triton.jit
def _rows(z_ptr, order_ptr, place, last, d, D, NORMALIZE: tl.constexpr):
    """Which rows the places are, ẑ (BLOCK_N, BLOCK_D) with zeros outside, and ‖z‖, 1 outside."""
    i = tl.load(order_ptr + place, mask=place < last, other=0)
    inside = (place < last)[:, None] & (d < D)[None, :]
    x = tl.load(z_ptr + i[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    norm = tl.where(place < last, tl.sqrt(tl.sum(x * x, axis=1)), 1.0)  # (BLOCK_N,)
    if NORMALIZE:
        x /= tl.maximum(norm, NORM_CLAMP)[:, None]
    return i, x, norm


@triton.jit
def _weights(grad_ptr, i, inside, first, last):
    """w (BLOCK_N,)."""
    share = 1.0 / tl.maximum(last - first - 1, 1)
    return share * tl.load(grad_ptr + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _total(sums_ptr, first, last, d, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sum of a label's chunks (BLOCK_D,)."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(first, last, BLOCK_N * CHUNK):
        place = start + tl.arange(0, BLOCK_N) * CHUNK
        inside = (place < last)[:, None] & (d < D)[None, :]
        sums = tl.load(sums_ptr + place[:, None] * D + d[None, :], mask=inside, other=0.0)
        total += tl.sum(sums, axis=0)
    return total


@triton.jit(do_not_specialize=["D"])
def chunks_kernel(
    grad_ptr,  # (N,), if WEIGHTED
    z_ptr,  # (N, D)
    order_ptr,  # (N,) rows in the order of their labels
    first_ptr,  # (N,) where the label of each place begins
    last_ptr,  # (N,) and ends
    sums_ptr,  # (N, D) out: Σ ẑ, or Σ w ẑ, of the chunks, at their first places
    D,
    WEIGHTED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    D = (D // ALIGN) * ALIGN  # the same number, known to be a multiple: 128-bit loads
    first, last, begin, end = _chunk(first_ptr, last_ptr)
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in tl.range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        i, x, _ = _rows(z_ptr, order_ptr, place, end, d, D, NORMALIZE)
        if WEIGHTED:
            x *= _weights(grad_ptr, i, place < end, first, last)[:, None]
        total += tl.sum(x, axis=0)
    tl.store(sums_ptr + begin * D + d, total, mask=(begin < end) & (d < D))


@triton.jit(do_not_specialize=["D"])
def forward_kernel(
    z_ptr,  # (N, D), and below as in chunks_kernel
    order_ptr,
    first_ptr,
    last_ptr,
    sums_ptr,
    mean_ptr,  # (N,) out
    others_ptr,  # (N,) out: n
    rest_ptr,  # (N, D) out: r
    D,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    D = (D // ALIGN) * ALIGN
    first, last, begin, end = _chunk(first_ptr, last_ptr)
    d = tl.arange(0, BLOCK_D)
    total = _total(sums_ptr, first, tl.where(begin < end, last, first), d, D, BLOCK_N, BLOCK_D)
    count = last - first - 1
    for start in tl.range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        i, x, _ = _rows(z_ptr, order_ptr, place, end, d, D, NORMALIZE)
        rest = total[None, :] - x
        mean = tl.sum(x * rest, axis=1) / tl.maximum(count, 1)
        tl.store(mean_ptr + i, mean, mask=place < end)
        tl.store(others_ptr + i, tl.zeros((BLOCK_N,), tl.int64) + count, mask=place < end)
        inside = (place < end)[:, None] & (d < D)[None, :]
        tl.store(rest_ptr + i[:, None] * D + d[None, :], rest, mask=inside)


@triton.jit(do_not_specialize=["D"])
def backward_kernel(
    grad_ptr,  # (N,)
    z_ptr,  # (N, D), and below as in chunks_kernel
    order_ptr,
    first_ptr,
    last_ptr,
    sums_ptr,
    rest_ptr,  # (N, D)
    grad_z_ptr,  # (N, D) out
    D,
    NORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    D = (D // ALIGN) * ALIGN
    first, last, begin, end = _chunk(first_ptr, last_ptr)
    d = tl.arange(0, BLOCK_D)
    total = _total(sums_ptr, first, tl.where(begin < end, last, first), d, D, BLOCK_N, BLOCK_D)
    for start in tl.range(begin, end, BLOCK_N):
        place = start + tl.arange(0, BLOCK_N)
        i, x, norm = _rows(z_ptr, order_ptr, place, end, d, D, NORMALIZE)
        w = _weights(grad_ptr, i, place < end, first, last)
        inside = (place < end)[:, None] & (d < D)[None, :]
        at = i[:, None] * D + d[None, :]
        rest = tl.load(rest_ptr + at, mask=inside, other=0.0)
        dx = w[:, None] * (rest - x) + total[None, :]
        if NORMALIZE:  # below the floor ẑ = z / floor: there is no projection
            along = tl.where(norm >= NORM_CLAMP, tl.sum(x * dx, axis=1), 0.0)
            dx = (dx - along[:, None] * x) / tl.maximum(norm, NORM_CLAMP)[:, None]
        tl.store(grad_z_ptr + at, dx.to(grad_z_ptr.dtype.element_ty), mask=inside)


def chunks(
    grad: Tensor | None, z: Tensor, labels: Tensor, options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """The rows in the order of their labels, where each place's label begins and ends, (N,) each,
    and the sums of the chunks."""
    N, D = z.shape
    names, order = labels.sort(stable=True)
    places = order, torch.searchsorted(names, names), torch.searchsorted(names, names, right=True)
    sums = torch.empty(N, D, dtype=torch.float32, device=z.device)
    chunks_kernel[(N,)](grad, z, *places, sums, D, WEIGHTED=grad is not None, **options)
    return *places, sums


def forward(z: Tensor, labels: Tensor, *, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mean (N,) float32, n (N,) and r (N, D) float32 of z (N, D) and labels (N,)."""
    configs.assert_supported(z)
    N, D = z.shape
    mean = torch.empty(N, dtype=torch.float32, device=z.device)
    others = torch.empty_like(labels)
    rest = torch.empty(N, D, dtype=torch.float32, device=z.device)
    if N == 0:
        return mean, others, rest
    options = dict(options_of(z), NORMALIZE=normalize)
    with torch.cuda.device_of(z):
        given = chunks(None, z, labels, options)
        forward_kernel[(N,)](z, *given, mean, others, rest, D, **options)
    return mean, others, rest


def backward(
    grad: Tensor, z: Tensor, labels: Tensor, others: Tensor, rest: Tensor, *, normalize: bool
) -> Tensor:
    """grad (N,) -> grad_z (N, D)."""
    configs.assert_supported(z)
    N, D = z.shape
    grad_z = torch.empty_like(z)
    if N == 0:
        return grad_z
    options = dict(options_of(z), NORMALIZE=normalize)
    with torch.cuda.device_of(z):
        given = chunks(grad, z, labels, options)
        backward_kernel[(N,)](grad, z, *given, rest, grad_z, D, **options)
    return grad_z
