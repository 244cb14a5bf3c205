"""The gradients of similarity_lse for rows longer than a tile, and their means, by panels.

    W_ij = g_i exp(s_ij − row_i) + h_j exp(s_ij − column_j)
    dq̂_i = t Σ_j W_ij k̂_j               dk̂_j = t Σ_i W_ij q̂_i
    mean_i = Σ_j exp(s_ij − row_i) k̂_j    g = 1 and h = 0

One panel of W serves both gradients (3G), and in self_similarity_lse, where W is symmetric, both of
the panel's sets of rows (1.5G to 2G). See _panels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastcl.kernels._bounds import Weights, log2_sum, weights_bounds
from fastcl.kernels._panels import Panel, near_unit, panel_options, panel_sums, store_weights
from fastcl.kernels._tiles import Pair, in_groups, magnitude_and_sign, products
from fastcl.kernels._weighted_sums import combine

Gradient = tuple[torch.Tensor, torch.Tensor]  # dx (N, D), and <x̂_i, u_i> (N,)


@triton.jit(do_not_specialize=["NX", "NY", "top", "left", "height"])
def weights_kernel(
    X, Y, SCALE, X_FACTOR, Y_FACTOR, X_IDS, Y_IDS,
    X_LSE, X_GRAD,  # (NX,) row_i and g_i, if HAS_ROWS
    Y_LSE, Y_GRAD,  # (NY,) column_j and h_j, if HAS_COLUMNS
    BOUNDS,  # (5,) from bounds_kernel, if USE_BOUNDS
    W,  # (height, width) out: 2^shift r_i r_j W_ij, from (top, left) on
    NX, NY, D, top, left, height, width,
    HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, SELF: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_IDS: tl.constexpr, USE_BOUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of a panel."""
    block, tile = in_groups(tl.program_id(0), height // BLOCK_X, width // BLOCK_Y, 8)
    start = top + block * BLOCK_X
    y_start = left + tile * BLOCK_Y
    i = start + tl.arange(0, BLOCK_X)
    j = y_start + tl.arange(0, BLOCK_Y)
    bound, sign = magnitude_and_sign(SCALE)
    s = products(X, Y, start, y_start, NX, NY, D, BLOCK_X, BLOCK_Y, BLOCK_D, PRECISION)
    f = tl.zeros([BLOCK_X], tl.float32) + sign * bound
    if NORMALIZE:
        r_x = tl.load(X_FACTOR + i)
        r_y = tl.load(Y_FACTOR + j)
        s *= r_y[None, :]
        f *= r_x
    s *= f[:, None]
    if HAS_IDS:
        x_id = tl.load(X_IDS + i, mask=i < NX, other=0)
        y_id = tl.load(Y_IDS + j, mask=j < NY, other=0)
        s = tl.where(x_id[:, None] != y_id[None, :], s, float("-inf"))
    if SELF:  # noqa: SIM102 (one is decided when compiling, one when running)
        if (y_start < start + BLOCK_X) & (start < y_start + BLOCK_Y):
            s = tl.where(i[:, None] != j[None, :], s, float("-inf"))
    up = 1.0
    if USE_BOUNDS:
        highest = tl.load(BOUNDS)
        one_exponential = tl.load(BOUNDS + 1) > 0.0
        up = tl.exp2(tl.load(BOUNDS + 4))
    if HAS_ROWS:
        row = log2_sum(X_LSE, i, i < NX)
        g = tl.load(X_GRAD + i, mask=i < NX, other=0.0) * up
    if HAS_COLUMNS:
        column = log2_sum(Y_LSE, j, j < NY)
        h = tl.load(Y_GRAD + j, mask=j < NY, other=0.0) * up
    if HAS_ROWS and HAS_COLUMNS:
        if one_exponential:
            a = g * tl.exp2(highest - row)
            b = h * tl.exp2(highest - column)
            w = tl.exp2(s - highest) * (a[:, None] + b[None, :])
        else:
            w = g[:, None] * tl.exp2(s - row[:, None])
            w += h[None, :] * tl.exp2(s - column[None, :])
    elif HAS_ROWS:
        w = g[:, None] * tl.exp2(s - row[:, None])
    else:
        w = h[None, :] * tl.exp2(s - column[None, :])
    if NORMALIZE:
        w *= r_y[None, :]
        w *= r_x[:, None]
    store_weights(W, w, start, y_start, top, left, NX, NY, width, BLOCK_X, BLOCK_Y)


def sums(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: torch.Tensor,
    factors: Pair,
    ids: Pair,
    rows: Weights | None,
    columns: Weights | None,
    *,
    wanted: tuple[bool, bool],
    is_self: bool,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
    """Parts of Σ_j W_ij k̂_j and of Σ_i W_ij q̂_i, where wanted, and the operands in whole blocks."""
    row, product, operands = panel_options("similarity_weights", query, key, ids=ids[0] is not None)
    (x, x_factor), (y, y_factor) = map(near_unit, operands, factors)
    bounds = weights_bounds(rows, columns, x, y, x_factor, y_factor)

    def make_weights(panel: Panel) -> None:
        weights_kernel[(panel.programs(row),)](
            x, y, scale, x_factor, y_factor, *ids,
            *(rows or (None, None)), *(columns or (None, None)), bounds, panel.weights,
            len(x), len(y), x.shape[1], *panel.start, *panel.size,
            HAS_ROWS=rows is not None, HAS_COLUMNS=columns is not None, SELF=is_self,
            NORMALIZE=x_factor is not None, HAS_IDS=ids[0] is not None,
            USE_BOUNDS=bounds is not None, **row,
        )  # fmt: skip

    parts = panel_sums(
        make_weights, (x, y), (x_factor, y_factor), bounds, row, product,
        wanted=wanted, symmetric=is_self,
    )  # fmt: skip
    return parts, operands


def gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: torch.Tensor,
    factors: Pair,
    ids: Pair,
    rows: Weights | None,
    columns: Weights | None,
    *,
    wanted: tuple[bool, bool],
    is_self: bool,
) -> list[Gradient | None]:
    """Those of the query and of the key, where wanted."""
    asked, normalize = query.shape[1], factors[0] is not None
    parts, operands = sums(
        query, key, scale, factors, ids, rows, columns, wanted=wanted, is_self=is_self
    )
    return [
        None if part is None else combine(x, part, scale, normalize, asked)
        for x, part in zip(operands, parts)
    ]


def mean(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: torch.Tensor,
    factors: Pair,
    ids: Pair,
    row_lse: torch.Tensor,
) -> torch.Tensor:
    """Σ_j exp(s_ij − row_i) k̂_j (N, D) float32."""
    rows = row_lse, torch.ones_like(row_lse)
    (part, _), _ = sums(
        query, key, scale, factors, ids, rows, None, wanted=(True, False), is_self=False
    )
    assert part is not None
    return part.sum(0)[:, : query.shape[1]].contiguous()
