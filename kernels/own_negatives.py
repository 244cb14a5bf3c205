"""Log-sum-exp of each query's similarities to negatives of its own.

    s_nk  = t · q̂_n · k̂_nk                        q̂ = q / max(‖q‖, 1e-12) where normalize, else q
    lse_n = log Σ_k exp s_nk
    W_nk  = g_n exp(s_nk − lse_n)
    u_n   = Σ_k W_nk k̂_nk,   ∂/∂q̂_n = t u_n,   ∂/∂t = Σ_n q̂_n · u_n
    ∂/∂k̂_nk = t W_nk q̂_n

Bytes moved: the negatives are read once in each direction and their gradient is written once, and
that is all that costs; no (N, K, D) tensor but that gradient. A program holds whole rows, so up to
LONGEST features. Accumulates in float32. Few queries are split over K, and the parts are added in
a fixed order: no atomics, the same bits every time.
Plain version: fastcl/reference/own_negatives.py. CPU twin: csrc/own_negatives.cpp.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import configs
from fastcl.kernels._tiles import LOG2E, NORM_CLAMP, wide
from fastcl.kernels._weighted_sums import combine
from fastcl.kernels.similarity_lse import chunk_of

LONGEST = 8192
TILE = 2048  # elements of a program's negatives: two to four 128-bit loads a thread in flight
LOWEST = tl.constexpr(-1.0e38)  # a first maximum whose differences are finite: −∞ − (−∞) is NaN


def options_of(query: Tensor) -> dict[str, Any]:
    """Rows and features of a program's tile, and its warps: 16 elements a thread."""
    d = query.shape[1]
    block_d = max(triton.next_power_of_2(d), 32)
    return dict(
        BLOCK_K=max(TILE // block_d, 1),
        BLOCK_D=block_d,
        ALIGN=math.gcd(d, 8),
        num_warps=max(block_d // 512, 4),
    )


@triton.jit
def _unit(query_ptr, n, d, D, NORMALIZE: tl.constexpr):
    """q̂_n (BLOCK_D,)."""
    q = tl.load(query_ptr + n * D + d, mask=d < D, other=0.0).to(tl.float32)
    return q / tl.maximum(tl.sqrt(tl.sum(q * q, axis=0)), NORM_CLAMP) if NORMALIZE else q


@triton.jit
def _negatives(negatives_ptr, n, k, d, K, D):
    """(BLOCK_K, BLOCK_D), zeros outside."""
    inside = (k < K)[:, None] & (d < D)[None, :]
    at = negatives_ptr + (n * K + k)[:, None] * D + d[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _norms(keys, NORMALIZE: tl.constexpr):
    """‖k‖ (BLOCK_K,); 1 where rows are taken as they are."""
    squares = tl.sum(keys * keys, axis=1)
    return tl.sqrt(squares) if NORMALIZE else tl.full(squares.shape, 1.0, tl.float32)


@triton.jit(do_not_specialize=["N", "K", "D", "splits", "chunk"])
def forward_kernel(
    query_ptr,  # (N, D)
    negatives_ptr,  # (N, K, D)
    scale_ptr,  # ()
    parts_ptr,  # (2, N, splits) out: maximum and sum of exponentials of a part of K
    N,
    K,
    D,
    splits,
    chunk,
    NORMALIZE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """One query and `chunk` blocks of K."""
    D = (D // ALIGN) * ALIGN  # the same number, known to be a multiple: 128-bit loads
    split = tl.program_id(0) % splits
    n = wide(tl.program_id(0) // splits)
    d = tl.arange(0, BLOCK_D)
    scale = tl.load(scale_ptr)
    q = _unit(query_ptr, n, d, D, NORMALIZE)
    m = LOWEST
    l = tl.zeros((BLOCK_K,), tl.float32)
    first = split * chunk
    for block in range(first, tl.minimum(first + chunk, tl.cdiv(K, BLOCK_K))):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        keys = _negatives(negatives_ptr, n, k, d, K, D)
        norm = tl.maximum(_norms(keys, NORMALIZE), NORM_CLAMP)
        s = scale * tl.sum(keys * q[None, :], axis=1) / norm
        s = tl.where(k < K, s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=0))
        l = l * tl.exp2((m - m_new) * LOG2E) + tl.exp2((s - m_new) * LOG2E)
        m = m_new
    part = parts_ptr + n * splits + split
    tl.store(part, m)
    tl.store(part + wide(N) * splits, tl.sum(l, axis=0))


@triton.jit(do_not_specialize=["N", "K", "D", "splits", "chunk"])
def backward_kernel(
    grad_ptr,  # (N,)
    query_ptr,  # (N, D)
    negatives_ptr,  # (N, K, D)
    scale_ptr,  # ()
    lse_ptr,  # (N,)
    grad_negatives_ptr,  # (N, K, D) out, if NEED_NEGATIVES
    part_ptr,  # (splits, N, D) out: u over a part of K
    N,
    K,
    D,
    splits,
    chunk,
    NORMALIZE: tl.constexpr,
    NEED_NEGATIVES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    D = (D // ALIGN) * ALIGN
    split = tl.program_id(0) % splits
    n = wide(tl.program_id(0) // splits)
    d = tl.arange(0, BLOCK_D)
    scale = tl.load(scale_ptr)
    g = tl.load(grad_ptr + n).to(tl.float32)
    lse = tl.load(lse_ptr + n)
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # every score −∞: then every W is 0, not NaN
    q = _unit(query_ptr, n, d, D, NORMALIZE)
    u = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)  # sums stay one per lane until the end
    first = split * chunk
    for block in range(first, tl.minimum(first + chunk, tl.cdiv(K, BLOCK_K))):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        keys = _negatives(negatives_ptr, n, k, d, K, D)
        norm = _norms(keys, NORMALIZE)
        floored = tl.maximum(norm, NORM_CLAMP)
        cosine = tl.sum(keys * q[None, :], axis=1) / floored
        w = g * tl.exp2((scale * cosine - lse) * LOG2E)
        share = tl.where(k < K, w, 0.0) / floored
        u += share[:, None] * keys
        if NEED_NEGATIVES:
            dk = q[None, :]
            if NORMALIZE:  # below the floor k̂ = k / floor: there is no projection
                along = tl.where(norm > NORM_CLAMP, cosine / floored, 0.0)
                dk = dk - along[:, None] * keys
            dk = (scale * share)[:, None] * dk
            at = grad_negatives_ptr + (n * K + k)[:, None] * D + d[None, :]
            inside = (k < K)[:, None] & (d < D)[None, :]
            tl.store(at, dk.to(grad_negatives_ptr.dtype.element_ty), mask=inside)
    tl.store(part_ptr + (wide(split) * N + n) * D + d, tl.sum(u, axis=0), mask=d < D)


def forward(query: Tensor, negatives: Tensor, scale: Tensor, *, normalize: bool) -> Tensor:
    """query (N, D), negatives (N, K, D), scale () -> lse (N,) float32."""
    configs.assert_supported(query, negatives)
    N, K, D = negatives.shape
    if N == 0:
        return torch.empty(0, dtype=torch.float32, device=query.device)
    options = options_of(query)
    splits, chunk = chunk_of(query, N, max(triton.cdiv(K, options["BLOCK_K"]), 1))
    parts = torch.empty(2, N, splits, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        forward_kernel[(N * splits,)](
            query, negatives, scale, parts, N, K, D, splits, chunk, NORMALIZE=normalize, **options
        )
    return (parts[0] + parts[1].log()).logsumexp(1)


def backward(
    grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    scale: Tensor,
    lse: Tensor,
    *,
    normalize: bool,
    need_query: bool,
    need_negatives: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """grad (N,) -> grad_query (N, D), grad_negatives (N, K, D), grad_scale () float32."""
    configs.assert_supported(query, negatives)
    N, K, D = negatives.shape
    grad_negatives = torch.empty_like(negatives) if need_negatives else None
    if N == 0:
        return torch.empty_like(query) if need_query else None, grad_negatives, scale.new_zeros(())
    options = options_of(query)
    splits, chunk = chunk_of(query, N, max(triton.cdiv(K, options["BLOCK_K"]), 1))
    part = torch.empty(splits, N, D, dtype=torch.float32, device=query.device)
    with torch.cuda.device_of(query):
        backward_kernel[(N * splits,)](
            *(grad, query, negatives, scale, lse, grad_negatives, part, N, K, D, splits, chunk),
            NORMALIZE=normalize,
            NEED_NEGATIVES=need_negatives,
            **options,
            **configs.registers(query, 128),  # ptxas would spill for more blocks
        )
        grad_query, dot = combine(query, part, scale, normalize, D)  # dot: q̂_n · u_n
    return grad_query if need_query else None, grad_negatives, dot.sum()
