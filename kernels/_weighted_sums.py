"""Weighted sums of rows, with weights made from scores that are never stored.

    u_i    = Σ_j W_ij ŷ_j                  W_ij = g_i exp(s_ij − own_i)       gradient_kernel
                                                + h_j exp(s_ij − other_j)
    dx_i   = t r_i (u_i − x̂_i <x̂_i, u_i>)    Σ_i <x̂_i, u_i> = dt

x are the rows that own the result, y the rows that stream by. For similarity_lse x is the query
and y the key (own: the rows' log-sum-exp, other: the columns'), and the other way round for the
key's gradient; for self_similarity_lse both are z, and so are own and other.

Both products use tensor cores, W in the operands' type: _bounds has the power of two that fits W
into it. Rows longer than a tile, and float32, whose products leave no room for a block of u beside
them, go by way of _panels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastcl.kernels import configs
from fastcl.kernels._bounds import Weights, log2_sum
from fastcl.kernels._tiles import (
    NORM_CLAMP,
    PADDING,
    in_groups,
    in_whole_blocks,
    load_tile,
    magnitude_and_sign,
    wide,
)

# With more features than this a block of x beside a block of u would not fit the registers.
FUSED_FEATURES = 64


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
    BOUNDS,  # (5,) from bounds_kernel, if USE_BOUNDS
    DX,  # (NX, D) out, if FUSED
    DOT,  # (NX,) out: <x̂_i, u_i>, if FUSED
    PART,  # (splits, NX, D) out: u_i over a part of y, otherwise
    NX, NY, D, splits, chunk, side,
    OWN: tl.constexpr, OTHER: tl.constexpr, SELF: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_IDS: tl.constexpr, USE_BOUNDS: tl.constexpr, FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """u for one block of x and one part of y. BLOCK_D has all D features.

    What varies with y inside the loop is kept to one or two vectors. Where a g_i could be folded
    into the exponent it is not: it may be negative.
    """
    block, split = in_groups(tl.program_id(0), tl.cdiv(NX, BLOCK_X), splits, 8)
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
    x = load_tile(X, start, NX, D, d, BLOCK_X, True)
    x = tl.where(sign < 0, -x, x)

    u = tl.zeros([BLOCK_X, BLOCK_D], tl.float32)
    first = split * chunk
    last = tl.minimum(first + chunk, tl.cdiv(NY, BLOCK_Y))
    for tile in tl.range(first, last):
        y_start = tile * BLOCK_Y
        j = y_start + tl.arange(0, BLOCK_Y)
        y = load_tile(Y, y_start, NY, D, d, BLOCK_Y, True)
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION)  # (BLOCK_X, BLOCK_Y)
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
        x = load_tile(X, start, NX, D, d, BLOCK_X, True).to(tl.float32)
        dx, dot = through_normalisation(
            x, u, tl.sum(x * x, axis=1), tl.sum(x * u, axis=1), SCALE, NORMALIZE
        )
        tl.store(DOT + i, dot, mask=i < NX)
        at = DX + wide(start) * D + tl.arange(0, BLOCK_X)[:, None] * D + d[None, :]
        tl.store(at, dx.to(DX.dtype.element_ty), mask=(i < NX)[:, None] & (d < D)[None, :])
    else:
        at = PART + (wide(split) * NX + start) * D + tl.arange(0, BLOCK_X)[:, None] * D + d[None, :]
        tl.store(at, u, mask=(i < NX)[:, None] & (d < D)[None, :])


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
) -> tuple[dict[str, Any], list[torch.Tensor]] | None:
    """The launch options of a kernel that sums weighted rows, and the operands (·, D) as it needs
    them; None where its blocks do not hold D features."""
    x = operands[0]
    d = x.shape[1]
    if not configs.knows(kernel, x):
        return None
    row: dict[str, Any] = configs.pick(kernel, x, d, ids=ids)
    if d > row.get("BLOCK_V", row["BLOCK_D"]):
        return None
    for block in row.keys() & {"BLOCK_D", "BLOCK_V"}:
        row[block] = configs.block_of(d, row[block])
    row["PRECISION"] = configs.input_precision(x)
    multiple = row.get("BLOCK_V", row["BLOCK_D"])
    return row, [in_whole_blocks(operand, multiple) for operand in operands]


def combine_blocks(d: int) -> dict[str, int]:
    block_d = max(16, min(triton.next_power_of_2(d), 128))
    return dict(BLOCK=max(2048 // block_d, 16), BLOCK_D=block_d, num_warps=4)


def combine(
    x: torch.Tensor, part: torch.Tensor, scale: torch.Tensor, normalize: bool, asked: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """part (splits, N, D) of u -> dx (N, asked) in x's dtype, and <x̂_i, u_i> (N,).

    asked: the features of dx; beyond them x has columns of zeros.
    """
    (n, d), splits = x.shape, part.shape[0]
    dx = torch.empty_like(x)
    dot = torch.empty(n, dtype=torch.float32, device=x.device)
    options = combine_blocks(d)
    combine_gradient_kernel[(triton.cdiv(n, options["BLOCK"]),)](
        x, part, scale, dx, dot, n, d, splits, NORMALIZE=normalize, **options
    )
    return dx[:, :asked].contiguous(), dot


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
    row: dict[str, Any],
    asked: int,
    *,
    side: int,
    is_self: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (NX, asked) in x's type, and <x̂_i, u_i> (NX,) float32; row and operands are those of
    sum_options.

    own, other: (lse, its gradient) of x's rows and of y's, or None. side: 0 when x is the query,
    1 when it is the key; it says which of the bounds' shifts is meant.
    """
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
    blocks = triton.cdiv(nx, row["BLOCK_X"])
    splits, chunk = splits_of(x, blocks, triton.cdiv(ny, row["BLOCK_Y"]))
    fused = splits == 1 and row["BLOCK_D"] <= FUSED_FEATURES
    dx = dot = part = None
    if fused:
        dx, dot = torch.empty_like(x), torch.empty(nx, dtype=torch.float32, device=device)
    else:
        part = torch.empty(splits, nx, d, dtype=torch.float32, device=device)
    own_lse, own_grad = own if own is not None else (None, None)
    gradient_kernel[(blocks * splits,)](
        x, y, scale, x_factor, y_factor, x_ids, y_ids,
        own_lse, own_grad, offset, weight, folded, bounds, dx, dot, part,
        nx, ny, d, splits, chunk, side,
        OWN=own is not None, OTHER=other is not None, SELF=is_self,
        NORMALIZE=normalize, HAS_IDS=x_ids is not None, USE_BOUNDS=bounds is not None,
        FUSED=fused, **row,
    )  # fmt: skip
    if part is not None:
        return combine(x, part, scale, normalize, asked)
    return dx[:, :asked].contiguous(), dot
