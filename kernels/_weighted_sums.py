"""Weighted sums of rows, with weights made from scores that are never stored.

    mean_i = Σ_j p_ij ŷ_j                  p_ij = exp(s_ij − lse_i)           mean_kernel
    u_i    = Σ_j W_ij ŷ_j                  W_ij = g_i exp(s_ij − own_i)       gradient_kernel
                                                + h_j exp(s_ij − other_j)
    dx_i   = t r_i (u_i − x̂_i <x̂_i, u_i>)    Σ_i <x̂_i, u_i> = dt

x are the rows that own the result, y the rows that stream by. For similarity_lse x is the query
and y the key (own: the rows' log-sum-exp, other: the columns'), and the other way round for the
key's gradient; for self_similarity_lse both are z, and so are own and other.

Both products use tensor cores, W in the operands' type, so each W must have a size that this type
holds. bfloat16 has float32's exponents. In float16 all W of a launch are multiplied by one power
of two that brings the largest possible weight to 2^14: the smallest that is still exact is then
2^−28 of it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastcl.kernels import configs
from fastcl.kernels._tiles import (
    BOUNDED_RANGE,
    LOG2E,
    NORM_CLAMP,
    PADDING,
    finite,
    in_groups,
    in_whole_blocks,
    load_tile,
    magnitude_and_sign,
    products,
    wide,
)

# Where the exponents of all lse lie this close together, W_ij = 2^(s_ij − top) (a_i + b_j) needs
# one exponential: a = g 2^(top − own) stays below g 2^80, and what underflows is below 2^−46 g.
ONE_EXPONENTIAL_RANGE = tl.constexpr(80.0)

# With more features than this a block of x beside a block of u would not fit the registers.
FUSED_FEATURES = 64

Weights = tuple[torch.Tensor, torch.Tensor]  # a log-sum-exp and its gradient


@triton.jit
def log2_sum(LSE, i, mask):
    """lse in powers of two; +∞ for rows with nothing left, whose weights 2^(s − lse) are then 0."""
    lse = tl.load(LSE + i, mask=mask, other=float("-inf")) * LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def half_shift(weight, factor):
    """The exponent that brings weight · factor to at most 2^14."""
    size = weight * factor
    return tl.where(size > 0.0, 14.0 - tl.ceil(tl.log2(size)), 0.0)


@triton.jit(do_not_specialize=["N", "M"])
def bounds_kernel(
    ROW_LSE, ROW_GRAD, COLUMN_LSE, COLUMN_GRAD, Q_FACTOR, K_FACTOR,
    BOUNDS,  # (4,) out: top, whether one exponential does, shift for dq, shift for dk
    N, M,
    HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
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
    weight_q = tl.max(row_weight, axis=0) + tl.max(column_weight, axis=0)
    weight_k = weight_q
    if not HAS_COLUMNS:
        weight_q = 1.0  # g_i multiplies the finished sum; a mean's weights are at most 1
    if not HAS_ROWS:
        weight_k = 1.0
    largest_q = tl.max(query_factor, axis=0) if NORMALIZE else 1.0
    largest_k = tl.max(key_factor, axis=0) if NORMALIZE else 1.0
    tl.store(BOUNDS, highest)
    tl.store(BOUNDS + 1, tl.where(spread < ONE_EXPONENTIAL_RANGE, 1.0, 0.0))
    tl.store(BOUNDS + 2, half_shift(weight_q, largest_k))
    tl.store(BOUNDS + 3, half_shift(weight_k, largest_q))


@triton.jit(do_not_specialize=["NY", "padded", "side"])
def fold_kernel(
    LSE, GRAD, FACTOR, BOUNDS,
    # (NY padded,) out: other_j, h_j r_j 2^shift, and that times 2^(top − other_j)
    OFFSET, WEIGHT, FOLDED,
    NY, padded, side,
    NORMALIZE: tl.constexpr, USE_BOUNDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What gradient_kernel needs of the streamed rows' own log-sum-exp."""
    j = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offset = log2_sum(LSE, j, j < NY)
    weight = tl.load(GRAD + j, mask=j < NY, other=0.0)
    if NORMALIZE:
        weight *= tl.load(FACTOR + j, mask=j < padded, other=0.0)
    if USE_BOUNDS:
        weight *= tl.exp2(tl.load(BOUNDS + 2 + side))
        tl.store(FOLDED + j, weight * tl.exp2(tl.load(BOUNDS) - offset), mask=j < padded)
    tl.store(OFFSET + j, offset, mask=j < padded)
    tl.store(WEIGHT + j, weight, mask=j < padded)


@triton.jit(do_not_specialize=["NX", "NY", "splits", "chunk", "side"])
def gradient_kernel(
    X, Y, SCALE, X_FACTOR, Y_FACTOR, X_IDS, Y_IDS,
    OWN_LSE, OWN_GRAD,  # (NX,) own_i and g_i, if OWN
    OFFSET, WEIGHT, FOLDED,  # (NY padded,) from fold_kernel, if OTHER
    BOUNDS,  # (4,) from bounds_kernel, if USE_BOUNDS
    DX,  # (NX, D) out, if FUSED
    DOT,  # (NX,) out: <x̂_i, u_i>, if FUSED
    PART,  # (splits, NX, D) out: u_i over a part of y, otherwise
    NX, NY, D, splits, chunk, side,
    OWN: tl.constexpr, OTHER: tl.constexpr, SELF: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_IDS: tl.constexpr, USE_BOUNDS: tl.constexpr, FUSED: tl.constexpr,
    WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """u for one block of x, one part of y, and BLOCK_V of the D features.

    What varies with y inside the loop is kept to one or two vectors. Where a g_i could be folded
    into the exponent it is not: it may be negative.
    """
    pid = tl.program_id(0)
    features = tl.cdiv(D, BLOCK_V)
    v_start = pid % features * BLOCK_V
    block, split = in_groups(pid // features, tl.cdiv(NX, BLOCK_X), splits, 8)
    bound, sign = magnitude_and_sign(SCALE)
    start = block * BLOCK_X
    i = start + tl.arange(0, BLOCK_X)
    f = tl.zeros([BLOCK_X], tl.float32) + bound
    if NORMALIZE:
        f *= tl.load(X_FACTOR + i)
    if HAS_IDS:
        x_id = tl.load(X_IDS + i, mask=i < NX, other=0)
    shift = 0.0
    if USE_BOUNDS:
        top = tl.load(BOUNDS)
        one_exponential = tl.load(BOUNDS + 1) > 0.0
        shift = tl.load(BOUNDS + 2 + side)
    if OWN:
        own = log2_sum(OWN_LSE, i, i < NX)
        g = tl.load(OWN_GRAD + i, mask=i < NX, other=0.0)
        if OTHER:
            g *= tl.exp2(shift)
            a = g * tl.exp2(top - own)
        else:
            own -= shift
    d = tl.arange(0, BLOCK_D)
    v = v_start + tl.arange(0, BLOCK_V)
    if WHOLE_D:
        x = load_tile(X, start, NX, D, d, BLOCK_X, True)
        x = tl.where(sign < 0, -x, x)

    u = tl.zeros([BLOCK_X, BLOCK_V], tl.float32)
    first = split * chunk
    last = tl.minimum(first + chunk, tl.cdiv(NY, BLOCK_Y))
    for tile in tl.range(first, last):
        y_start = tile * BLOCK_Y
        j = y_start + tl.arange(0, BLOCK_Y)
        if WHOLE_D:
            y = load_tile(Y, y_start, NY, D, d, BLOCK_Y, True)
            s = tl.dot(x, tl.trans(y), input_precision=PRECISION)  # (BLOCK_X, BLOCK_Y)
            if BLOCK_V != BLOCK_D:
                y = load_tile(Y, y_start, NY, D, v, BLOCK_Y, True)
        else:
            s = sign * products(
                X, Y, start, y_start, NX, NY, D,
                BLOCK_X, BLOCK_Y, BLOCK_D, PRECISION,
            )  # fmt: skip
            y = load_tile(Y, y_start, NY, D, v, BLOCK_Y, True)
        if NORMALIZE:
            r = tl.load(Y_FACTOR + j)
            s *= r[None, :]
        if HAS_IDS:
            keep = x_id[:, None] != tl.load(Y_IDS + j, mask=j < NY, other=0)[None, :]
            s = tl.where(keep & (j < NY)[None, :], s, float("-inf"))
        elif y_start + BLOCK_Y > NY:
            s = tl.where((j < NY)[None, :], s, float("-inf"))
        if SELF:  # noqa: SIM102 (one is decided when compiling, one when running)
            if (y_start < start + BLOCK_X) & (start < y_start + BLOCK_Y):
                s = tl.where(i[:, None] != j[None, :], s, float("-inf"))
        s2 = s * f[:, None]
        if OWN and OTHER:
            if one_exponential:
                b = tl.load(FOLDED + j)
                if NORMALIZE:
                    w = tl.exp2(s2 - top) * (a[:, None] * r[None, :] + b[None, :])
                else:
                    w = tl.exp2(s2 - top) * (a[:, None] + b[None, :])
            else:
                w = g[:, None] * tl.exp2(s2 - own[:, None])
                if NORMALIZE:
                    w *= r[None, :]
                w += tl.exp2(s2 - tl.load(OFFSET + j)[None, :]) * tl.load(WEIGHT + j)[None, :]
        elif OWN:
            w = tl.exp2(s2 - own[:, None])
            if NORMALIZE:
                w *= r[None, :]
        else:
            w = tl.exp2(s2 - tl.load(OFFSET + j)[None, :]) * tl.load(WEIGHT + j)[None, :]
        u = tl.dot(w.to(y.dtype), y, u, input_precision=PRECISION)

    if OWN and not OTHER:
        u *= (g * tl.exp2(-shift))[:, None]
    else:
        u *= tl.exp2(0.0 - shift)
    if FUSED:
        x = load_tile(X, start, NX, D, v, BLOCK_X, True).to(tl.float32)
        dx, dot = through_normalisation(
            x, u, tl.sum(x * x, axis=1), tl.sum(x * u, axis=1), SCALE, NORMALIZE
        )
        tl.store(DOT + i, dot, mask=i < NX)
        at = DX + wide(start) * D + tl.arange(0, BLOCK_X)[:, None] * D + v[None, :]
        tl.store(at, dx.to(DX.dtype.element_ty), mask=(i < NX)[:, None] & (v < D)[None, :])
    else:
        at = PART + (wide(split) * NX + start) * D + tl.arange(0, BLOCK_X)[:, None] * D + v[None, :]
        tl.store(at, u, mask=(i < NX)[:, None] & (v < D)[None, :])


@triton.jit
def through_normalisation(x, u, square, product, SCALE, NORMALIZE: tl.constexpr):
    """-> dx = t r (u − x̂ <x̂, u>) and <x̂, u>, from ‖x‖² and <x, u> of each row."""
    scale = tl.load(SCALE).to(tl.float32)
    if NORMALIZE:
        norm = tl.sqrt(square)
        r = 1.0 / tl.maximum(norm, NORM_CLAMP)
        dot = product * r
        along = tl.where(norm > NORM_CLAMP, dot * r, 0.0)  # a clamped norm is a constant
        return (scale * r)[:, None] * (u - x * along[:, None]), dot
    else:
        return scale * u, product


@triton.jit(do_not_specialize=["NX", "splits"])
def combine_gradient_kernel(
    X, PART, SCALE, DX, DOT, NX, D, splits,
    NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """u = Σ PART in the order of the splits, then as at the end of gradient_kernel."""
    start = tl.program_id(0) * BLOCK
    i = start + tl.arange(0, BLOCK)
    square = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for d_start in tl.range(0, D, BLOCK_D):
        d = d_start + tl.arange(0, BLOCK_D)
        x = load_tile(X, start, NX, D, d, BLOCK, False).to(tl.float32)
        u = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for split in tl.range(0, splits):
            u += load_tile(PART + wide(split) * NX * D, start, NX, D, d, BLOCK, False)
        square += tl.sum(x * x, axis=1)
        product += tl.sum(x * u, axis=1)
    for d_start in tl.range(0, D, BLOCK_D):
        d = d_start + tl.arange(0, BLOCK_D)
        x = load_tile(X, start, NX, D, d, BLOCK, False).to(tl.float32)
        u = tl.zeros([BLOCK, BLOCK_D], tl.float32)
        for split in tl.range(0, splits):
            u += load_tile(PART + wide(split) * NX * D, start, NX, D, d, BLOCK, False)
        dx, dot = through_normalisation(x, u, square, product, SCALE, NORMALIZE)
        at = DX + wide(start) * D + tl.arange(0, BLOCK)[:, None] * D + d[None, :]
        tl.store(at, dx.to(DX.dtype.element_ty), mask=(i < NX)[:, None] & (d < D)[None, :])
        tl.store(DOT + i, dot, mask=(i < NX) & (d_start == 0))


@triton.jit(do_not_specialize=["N", "M", "splits", "chunk"])
def mean_kernel(
    Q, K, SCALE, Q_FACTOR, K_FACTOR, Q_IDS, K_IDS,
    BOUNDS,  # (4,), if USE_BOUNDS
    LSE_PART,  # (splits, N) out: log₂ Σ_j 2^s₂ over a part of the keys
    MEAN_PART,  # (splits, N, D) out: the mean of that part
    N, M, D, splits, chunk,
    NORMALIZE: tl.constexpr, HAS_IDS: tl.constexpr, USE_BOUNDS: tl.constexpr,
    WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One block of queries against a part of the keys: attention whose values are its keys."""
    pid = tl.program_id(0)
    features = tl.cdiv(D, BLOCK_V)
    v_start = pid % features * BLOCK_V
    block, split = in_groups(pid // features, tl.cdiv(N, BLOCK_X), splits, 8)
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
    v = v_start + tl.arange(0, BLOCK_V)
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
            if BLOCK_V != BLOCK_D:
                k = load_tile(K, k_start, M, D, v, BLOCK_Y, True)
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
    tl.store(LSE_PART + wide(split) * N + i, lse, mask=valid & (v_start == 0))


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


def splits_of(x: torch.Tensor, blocks: int, tiles: int) -> tuple[int, int]:
    """-> (splits, chunk): into how many parts of chunk tiles the streamed rows are cut, so that
    few blocks of owners still fill the device. One part where the blocks alone do."""
    processors = configs.multiprocessors(x)
    if blocks >= processors:
        return 1, tiles
    chunk = max(triton.cdiv(tiles * blocks, 2 * processors), 1)
    return triton.cdiv(tiles, chunk), chunk


def sum_options(
    kernel: str, *operands: torch.Tensor, ids: bool = False
) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """The launch options of a kernel that sums weighted rows, and the operands (·, D) as it needs
    them."""
    x = operands[0]
    d = x.shape[1]
    row: dict[str, Any] = configs.pick(kernel, x, d, ids=ids)
    for block in ("BLOCK_D", "BLOCK_V"):
        row[block] = configs.block_of(d, row[block])
    multiple = max(row["BLOCK_D"], row["BLOCK_V"])
    row.update(WHOLE_D=d <= row["BLOCK_D"], PRECISION=configs.input_precision(x))
    return row, [in_whole_blocks(operand, multiple) for operand in operands]


def _combine_blocks(d: int) -> dict[str, int]:
    block_d = max(16, min(triton.next_power_of_2(d), 128))
    return dict(BLOCK=max(2048 // block_d, 16), BLOCK_D=block_d, num_warps=4)


def weights_bounds(
    rows: Weights | None,
    columns: Weights | None,
    query: torch.Tensor,
    key: torch.Tensor,
    query_factor: torch.Tensor | None,
    key_factor: torch.Tensor | None,
) -> torch.Tensor | None:
    """(4,) for gradient: see bounds_kernel. None where no kernel would read it."""
    both = rows is not None and columns is not None
    if query.dtype != torch.float16 and not both:
        return None
    bounds = torch.empty(4, dtype=torch.float32, device=query.device)
    bounds_kernel[(1,)](
        *(rows or (None, None)), *(columns or (None, None)), query_factor, key_factor, bounds,
        query.shape[0], key.shape[0],
        HAS_ROWS=rows is not None, HAS_COLUMNS=columns is not None,
        NORMALIZE=query_factor is not None, BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return bounds


def gradient(
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    x_factor: torch.Tensor | None,
    y_factor: torch.Tensor | None,
    x_ids: torch.Tensor | None,
    y_ids: torch.Tensor | None,
    own: Weights | None,
    other: Weights | None,
    bounds: torch.Tensor | None,
    *,
    side: int,
    is_self: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (NX, D) in x's type, and <x̂_i, u_i> (NX,) float32.

    own, other: (lse, its gradient) of x's rows and of y's, or None. side: 0 when x is the query,
    1 when it is the key; it says which of the bounds' shifts is meant.
    """
    features_asked = x.shape[1]
    row, (x, y) = sum_options("similarity_gradient", x, y, ids=x_ids is not None)
    (nx, d), ny = x.shape, y.shape[0]
    device = x.device
    normalize = x_factor is not None
    offset = weight = folded = None
    if other is not None:
        padded = triton.cdiv(ny, PADDING) * PADDING
        offset, weight, folded = torch.empty(3, padded, dtype=torch.float32, device=device)
        fold_kernel[(triton.cdiv(padded, 512),)](
            *other, y_factor, bounds, offset, weight, folded, ny, padded, side,
            NORMALIZE=normalize, USE_BOUNDS=bounds is not None, BLOCK=512, num_warps=4,
        )  # fmt: skip
    features = triton.cdiv(d, row["BLOCK_V"])
    blocks = triton.cdiv(nx, row["BLOCK_X"])
    tiles = triton.cdiv(ny, row["BLOCK_Y"])
    splits, chunk = splits_of(x, blocks * features, tiles)
    fused = splits == 1 and features == 1 and row["BLOCK_V"] <= FUSED_FEATURES
    dx = torch.empty_like(x)
    dot = torch.empty(nx, dtype=torch.float32, device=device)
    part = None if fused else torch.empty(splits, nx, d, dtype=torch.float32, device=device)
    own_lse, own_grad = own if own is not None else (None, None)
    gradient_kernel[(blocks * splits * features,)](
        x, y, scale, x_factor, y_factor, x_ids, y_ids,
        own_lse, own_grad, offset, weight, folded, bounds, dx, dot, part,
        nx, ny, d, splits, chunk, side,
        OWN=own is not None, OTHER=other is not None, SELF=is_self,
        NORMALIZE=normalize, HAS_IDS=x_ids is not None, USE_BOUNDS=bounds is not None,
        FUSED=fused, **row,
    )  # fmt: skip
    if part is not None:
        options = _combine_blocks(d)
        combine_gradient_kernel[(triton.cdiv(nx, options["BLOCK"]),)](
            x, part, scale, dx, dot, nx, d, splits, NORMALIZE=normalize, **options
        )
    return dx[:, :features_asked].contiguous(), dot


def mean(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: torch.Tensor,
    query_factor: torch.Tensor | None,
    key_factor: torch.Tensor | None,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' log-sum-exp (N,) and Σ_j p_ij k̂_j (N, D), both float32."""
    features_asked = query.shape[1]
    row, (query, key) = sum_options("similarity_mean", query, key, ids=query_ids is not None)
    (n, d), m = query.shape, key.shape[0]
    device = query.device
    normalize = query_factor is not None
    bounds = weights_bounds(None, None, query, key, query_factor, key_factor)
    features = triton.cdiv(d, row["BLOCK_V"])
    blocks = triton.cdiv(n, row["BLOCK_X"])
    tiles = triton.cdiv(m, row["BLOCK_Y"])
    splits, chunk = splits_of(query, blocks * features, tiles)
    lse_part = torch.empty(splits, n, dtype=torch.float32, device=device)
    mean_part = torch.empty(splits, n, d, dtype=torch.float32, device=device)
    mean_kernel[(blocks * splits * features,)](
        query, key, scale, query_factor, key_factor, query_ids, key_ids, bounds,
        lse_part, mean_part, n, m, d, splits, chunk,
        NORMALIZE=normalize, HAS_IDS=query_ids is not None, USE_BOUNDS=bounds is not None,
        **row,
    )  # fmt: skip
    lse = torch.empty(n, dtype=torch.float32, device=device)
    means = torch.empty(n, d, dtype=torch.float32, device=device)
    options = _combine_blocks(d)
    combine_means_kernel[(triton.cdiv(n, options["BLOCK"]),)](
        lse_part, mean_part, lse, means, n, d, splits, **options
    )
    return lse, means[:, :features_asked].contiguous()
