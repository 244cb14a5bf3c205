"""How large the weights of a launch's sums can be, for _weighted_sums, _means and _panels.

    W_ij = g_i 2^(s_ij − own_i) + h_j 2^(s_ij − other_j)

Each W must have a size that the type holds. bfloat16 has float32's exponents. In float16 all W of
a launch are multiplied by one power of two that brings the largest possible weight to 2^14: the
smallest that is still exact is then 2^−28 of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastcl.kernels._tiles import LOG2E, finite

# Where the exponents of all lse lie this close together, W_ij = 2^(s_ij − top) (a_i + b_j) needs
# one exponential: a = g 2^(top − own) stays below g 2^80, and what underflows is below 2^−46 g.
ONE_EXPONENTIAL_RANGE = tl.constexpr(80.0)

Weights = tuple[torch.Tensor, torch.Tensor]  # a log-sum-exp and its gradient


@triton.jit
def log2_sum(LSE, i, mask):
    """lse in powers of two; +∞ for rows with nothing left, whose weights 2^(s − lse) are then 0."""
    lse = tl.load(LSE + i, mask=mask, other=float("-inf")) * LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def half_shift(weight, factor, HEADROOM: tl.constexpr):
    """The exponent that brings weight · factor to at most 2^(14 − HEADROOM)."""
    size = weight * factor
    return tl.where(size > 0.0, 14.0 - HEADROOM - tl.ceil(tl.log2(size)), 0.0)


@triton.jit(do_not_specialize=["N", "M"])
def bounds_kernel(
    ROW_LSE, ROW_GRAD, COLUMN_LSE, COLUMN_GRAD, Q_FACTOR, K_FACTOR,
    BOUNDS,  # (5,) out: top, whether one exponential does, shifts for dq, for dk, and for both
    N, M,
    HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, NORMALIZE: tl.constexpr,
    HEADROOM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the extremes of the log-sum-exps, gradients and factors."""
    zero = tl.zeros([BLOCK], tl.float32)
    top = zero + float("-inf")
    bottom = zero + float("inf")
    row_weight = zero
    column_weight = zero
    query_factor = zero
    key_factor = zero
    for start in tl.range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if HAS_ROWS:
            lse = log2_sum(ROW_LSE, i, i < N)
            some = lse < float("inf")
            top = tl.maximum(top, tl.where(some, lse, float("-inf")))
            bottom = tl.minimum(bottom, lse)
            g = tl.load(ROW_GRAD + i, mask=i < N, other=0.0)
            row_weight = tl.maximum(row_weight, tl.abs(g))
        if NORMALIZE:
            query_factor = tl.maximum(query_factor, tl.load(Q_FACTOR + i, mask=i < N, other=0.0))
    for start in tl.range(0, M, BLOCK):
        j = start + tl.arange(0, BLOCK)
        if HAS_COLUMNS:
            lse = log2_sum(COLUMN_LSE, j, j < M)
            some = lse < float("inf")
            top = tl.maximum(top, tl.where(some, lse, float("-inf")))
            bottom = tl.minimum(bottom, lse)
            h = tl.load(COLUMN_GRAD + j, mask=j < M, other=0.0)
            column_weight = tl.maximum(column_weight, tl.abs(h))
        if NORMALIZE:
            key_factor = tl.maximum(key_factor, tl.load(K_FACTOR + j, mask=j < M, other=0.0))
    highest = finite(tl.max(top, axis=0))
    spread = highest - tl.min(bottom, axis=0)
    weight = tl.max(row_weight, axis=0) + tl.max(column_weight, axis=0)
    weight_q = weight
    weight_k = weight
    if not HAS_COLUMNS:
        weight_q = 1.0  # g_i multiplies the finished sum; a mean's weights are at most 1
    if not HAS_ROWS:
        weight_k = 1.0
    largest_q = tl.max(query_factor, axis=0) if NORMALIZE else 1.0
    largest_k = tl.max(key_factor, axis=0) if NORMALIZE else 1.0
    tl.store(BOUNDS, highest)
    tl.store(BOUNDS + 1, tl.where(spread < ONE_EXPONENTIAL_RANGE, 1.0, 0.0))
    tl.store(BOUNDS + 2, half_shift(weight_q, largest_k, HEADROOM))
    tl.store(BOUNDS + 3, half_shift(weight_k, largest_q, HEADROOM))
    tl.store(BOUNDS + 4, half_shift(weight, largest_q * largest_k, HEADROOM))


def weights_bounds(
    rows: Weights | None,
    columns: Weights | None,
    query: torch.Tensor,
    key: torch.Tensor,
    query_factor: torch.Tensor | None,
    key_factor: torch.Tensor | None,
    *,
    headroom: int = 0,
) -> torch.Tensor | None:
    """(5,) for gradient: see bounds_kernel. None where no kernel would read it.

    headroom: weights may be 2^headroom times the largest gradient.
    """
    both = rows is not None and columns is not None
    if query.dtype != torch.float16 and not both:
        return None
    bounds = torch.empty(5, dtype=torch.float32, device=query.device)
    bounds_kernel[(1,)](
        *(rows or (None, None)), *(columns or (None, None)), query_factor, key_factor, bounds,
        query.shape[0], key.shape[0],
        HAS_ROWS=rows is not None, HAS_COLUMNS=columns is not None,
        NORMALIZE=query_factor is not None, HEADROOM=headroom, BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return bounds
