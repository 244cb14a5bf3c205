"""Log-sum-exps of rows, and in the same pass the mean of the streamed rows that they weigh.

    s_ij   = t · q̂_i · k̂_j
    lse_i  = log Σ_j exp s_ij
    mean_i = Σ_j p_ij k̂_j                 p_ij = exp(s_ij − lse_i)         ∂lse_i/∂q̂_i = t · mean_i

Attention whose values are its keys (2G): where the keys need no gradient, the query's falls out of
the forward pass. The second product has its weights in the operands' type: see _bounds.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastcl.kernels._bounds import weights_bounds
from fastcl.kernels._tiles import (
    BOUNDED_RANGE,
    LOG2E,
    Pair,
    finite,
    in_groups,
    load_tile,
    magnitude_and_sign,
    products,
    wide,
)
from fastcl.kernels._weighted_sums import combine_blocks, splits_of


@triton.jit(do_not_specialize=["N", "M", "splits", "chunk"])
def mean_kernel(
    Q, K, SCALE, Q_FACTOR, K_FACTOR, Q_IDS, K_IDS,
    BOUNDS,  # (5,), if USE_BOUNDS
    LSE_PART,  # (splits, N) out: log₂ Σ_j 2^s₂ over a part of the keys
    MEAN_PART,  # (splits, N, D) out: the mean of that part
    N, M, D, splits, chunk,
    NORMALIZE: tl.constexpr, HAS_IDS: tl.constexpr, USE_BOUNDS: tl.constexpr,
    WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One block of queries against a part of the keys: attention whose values are its keys.

    BLOCK_V has all D features. BLOCK_D has them in half precision; in float32 the scores are made
    in steps of fewer, which leaves registers for the means.
    """
    block, split = in_groups(tl.program_id(0), tl.cdiv(N, BLOCK_X), splits, 8)
    bound, sign = magnitude_and_sign(SCALE)
    bounded = NORMALIZE and not HAS_IDS and 2 * bound < BOUNDED_RANGE
    start = block * BLOCK_X
    i = start + tl.arange(0, BLOCK_X)
    f = tl.zeros([BLOCK_X], tl.float32) + bound
    if NORMALIZE:
        f *= tl.load(Q_FACTOR + i)
    if HAS_IDS:
        q_id = tl.load(Q_IDS + i, mask=i < N, other=0)
    shift = 0.0
    if USE_BOUNDS:
        shift = tl.load(BOUNDS + 2)
    d = tl.arange(0, BLOCK_D)
    v = tl.arange(0, BLOCK_V)
    if WHOLE_D:
        q = load_tile(Q, start, N, D, d, BLOCK_X, True)
        q = tl.where(sign < 0, -q, q)

    m = tl.zeros([BLOCK_X], tl.float32) + tl.where(bounded, bound, float("-inf"))
    l = tl.zeros([BLOCK_X], tl.float32)
    mean = tl.zeros([BLOCK_X, BLOCK_V], tl.float32)
    first = split * chunk
    last = tl.minimum(first + chunk, tl.cdiv(M, BLOCK_Y))
    for tile in tl.range(first, last):
        k_start = tile * BLOCK_Y
        j = k_start + tl.arange(0, BLOCK_Y)
        if WHOLE_D:
            k = load_tile(K, k_start, M, D, d, BLOCK_Y, True)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_X, BLOCK_Y)
        else:
            s = sign * products(
                Q, K, start, k_start, N, M, D,
                BLOCK_X, BLOCK_Y, BLOCK_D, PRECISION,
            )  # fmt: skip
            k = load_tile(K, k_start, M, D, v, BLOCK_Y, True)
        if NORMALIZE:
            r = tl.load(K_FACTOR + j)
            s *= r[None, :]
        if HAS_IDS:
            keep = q_id[:, None] != tl.load(K_IDS + j, mask=j < M, other=0)[None, :]
            s = tl.where(keep & (j < M)[None, :], s, float("-inf"))
        elif k_start + BLOCK_Y > M:
            s = tl.where((j < M)[None, :], s, float("-inf"))
        if not bounded:
            new = tl.maximum(m, tl.max(s, axis=1) * f)
            rescale = tl.exp2(m - finite(new))
            l *= rescale
            mean *= rescale[:, None]
            m = new
        p = tl.exp2(s * f[:, None] - (finite(m) - shift)[:, None])
        l += tl.sum(p, axis=1)
        if NORMALIZE:
            p *= r[None, :]
        mean = tl.dot(p.to(k.dtype), k, mean, input_precision=PRECISION)

    mean /= tl.where(l > 0.0, l, 1.0)[:, None]
    valid = i < N
    at = MEAN_PART + (wide(split) * N + start) * D + tl.arange(0, BLOCK_X)[:, None] * D + v[None, :]
    tl.store(at, mean, mask=valid[:, None] & (v < D)[None, :])
    lse = m + tl.log2(l) - shift
    tl.store(LSE_PART + wide(split) * N + i, lse, mask=valid)


@triton.jit(do_not_specialize=["N", "splits"])
def combine_means_kernel(
    LSE_PART, MEAN_PART, LSE, MEAN, N, D, splits,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The mean of the parts' means, each weighted by its share of the sum, in a fixed order."""
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in tl.range(0, splits):
        part = tl.load(LSE_PART + wide(split) * N + i, mask=i < N, other=float("-inf"))
        m = tl.maximum(m, part)
    l = tl.zeros([BLOCK], tl.float32)
    for split in tl.range(0, splits):
        part = tl.load(LSE_PART + wide(split) * N + i, mask=i < N, other=float("-inf"))
        l += tl.exp2(part - finite(m))
    tl.store(LSE + i, (m + tl.log2(l)) / LOG2E, mask=i < N)
    for d_start in tl.range(0, D, BLOCK_D):
        d = d_start + tl.arange(0, BLOCK_D)
        mean = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for split in tl.range(0, splits):
            part = tl.load(LSE_PART + wide(split) * N + i, mask=i < N, other=float("-inf"))
            share = tl.exp2(part - finite(m)) / tl.where(l > 0.0, l, 1.0)
            row = load_tile(MEAN_PART + wide(split) * N * D, start, N, D, d, BLOCK, False)
            mean += share[:, None] * row
        at = MEAN + wide(start) * D + tl.arange(0, BLOCK)[:, None] * D + d[None, :]
        tl.store(at, mean, mask=(i < N)[:, None] & (d < D)[None, :])


def mean(
    row: dict[str, Any],
    operands: list[torch.Tensor],
    scale: torch.Tensor,
    factors: Pair,
    ids: Pair,
    asked: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' log-sum-exp (N,) and Σ_j p_ij k̂_j (N, asked), both float32; row and operands are
    those of sum_options."""
    query, key = operands
    (n, d), m = query.shape, key.shape[0]
    device = query.device
    bounds = weights_bounds(None, None, query, key, *factors)
    blocks = triton.cdiv(n, row["BLOCK_X"])
    splits, chunk = splits_of(query, blocks, triton.cdiv(m, row["BLOCK_Y"]))
    lse_part = torch.empty(splits, n, dtype=torch.float32, device=device)
    mean_part = torch.empty(splits, n, d, dtype=torch.float32, device=device)
    mean_kernel[(blocks * splits,)](
        query, key, scale, *factors, *ids, bounds,
        lse_part, mean_part, n, m, d, splits, chunk,
        NORMALIZE=factors[0] is not None, HAS_IDS=ids[0] is not None,
        USE_BOUNDS=bounds is not None, WHOLE_D=d <= row["BLOCK_D"], **row,
    )  # fmt: skip
    lse = torch.empty(n, dtype=torch.float32, device=device)
    means = torch.empty(n, d, dtype=torch.float32, device=device)
    options = combine_blocks(d)
    combine_means_kernel[(triton.cdiv(n, options["BLOCK"]),)](
        lse_part, mean_part, lse, means, n, d, splits, **options
    )
    return lse, means[:, :asked].contiguous()
