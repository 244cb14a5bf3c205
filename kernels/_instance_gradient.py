"""The gradient of instance_spread: its weights, whole rows at once or by panels.

    G_rc = p_rc (1 − m B_r) + m R_rc [negative] − [partner]
    W_rc = g_r G_rc + g_c G_cr            the second term unless columns are detached
    u_r  = Σ_c W_rc ẑ_c                   dẑ_r = t u_r

kernels/instance_spread.py has the meaning of p, B and R. W is symmetric where both terms are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from fastcl.kernels._bounds import weights_bounds
from fastcl.kernels._instance_scores import LARGE_SHARE, is_partner, is_special, log2_scores
from fastcl.kernels._panels import Panel, near_unit, panel_options, panel_sums, store_weights
from fastcl.kernels._tiles import LOG2E, in_groups, load_tile, products, wide
from fastcl.kernels._weighted_sums import splits_of, sum_options

# W / g is up to 2^5: |G| ≤ 3 where m = 1, and grows with m; two directions are added.
HEADROOM = 5

Statistics = tuple[torch.Tensor, ...]  # log D, log o, B and log R of the large, each (2N,)


@triton.jit
def _from_statistics(log2_d, log_o, b, log_large, weight):
    """What a row's weights are made of, for `_weights`.

    With q = 1 − p, free of cancellation, and R' the one large R, or 0:
    G = p (1 − m B − m R') + m R on a negative, of which the large one is p (1 − m B) + m R q, and
    −q − m p B − m p R' on the partner. p R' is at most 1 where p and R' are out of range: both are
    kept in units of κ = 1 / max(R', 1), p = κ e.
    """
    lift = tl.maximum(log_large, 0.0) * LOG2E
    kappa = tl.exp2(-lift)
    slope = kappa * (1.0 - weight * b) - weight * tl.exp2(log_large * LOG2E - lift)
    o = tl.exp2(log_o * LOG2E)
    limit = tl.where(o < LARGE_SHARE, lift - 1.0, float("inf"))  # log₂ e of p = ½
    ratio_q = tl.where(weight == 1.0, 1.0 - o, weight * (1.0 - o) * o / (weight - 1.0 + o))
    own_large = -o - weight * (1.0 - o) * b
    return log2_d - lift, kappa, slope, limit, own_large + 1.0 + ratio_q, own_large


@triton.jit
def _terms(LOG_D, LOG_O, B, LOG_LARGE, i, rows, weight):
    """The same of rows i, from memory."""
    inside = i < rows
    return _from_statistics(
        tl.load(LOG_D + i, mask=inside, other=0.0) * LOG2E,
        tl.load(LOG_O + i, mask=inside, other=0.0),
        tl.load(B + i, mask=inside, other=0.0),
        tl.load(LOG_LARGE + i, mask=inside, other=float("-inf")),
        weight,
    )


@triton.jit
def _weights(s, partner, shift, kappa, slope, limit, large, own_large, weight, special):
    """G of a tile; the vectors come with the shape of the rows they belong to, (·, 1) or (1, ·)."""
    x = s - shift
    e = tl.exp2(x)
    p = kappa * e
    g = tl.where(x > limit, large, e * slope + weight * p / (weight - p))
    if special:
        g = tl.where(partner, tl.where(x > limit, own_large, e * slope - 1.0), g)
    return g


@triton.jit(do_not_specialize=["rows", "splits", "chunk"])
def gradient_kernel(
    Z, SCALE, FACTOR, GRAD, LOG_D, LOG_O, B, LOG_LARGE,
    BOUNDS,  # (5,) from bounds_kernel, if USE_BOUNDS
    PART,  # (splits, 2N, D) out: u over a part of the columns
    log2_m, weight, rows, D, splits, chunk,
    OTHER: tl.constexpr,  # whether columns carry a gradient
    NORMALIZE: tl.constexpr, USE_BOUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """u for one block of rows and one part of the columns. BLOCK_D has all D features."""
    block, split = in_groups(tl.program_id(0), tl.cdiv(rows, BLOCK_X), splits, 8)
    start = block * BLOCK_X
    i = start + tl.arange(0, BLOCK_X)
    half = rows // 2
    f = tl.zeros([BLOCK_X], tl.float32) + tl.load(SCALE) * LOG2E
    if NORMALIZE:
        f *= tl.load(FACTOR + i)
    up = 1.0
    if USE_BOUNDS:
        up = tl.exp2(tl.load(BOUNDS + 3))
    shift, kappa, slope, limit, large, own_large = _terms(
        LOG_D, LOG_O, B, LOG_LARGE, i, rows, weight
    )
    g = tl.load(GRAD + i, mask=i < rows, other=0.0)
    d = tl.arange(0, BLOCK_D)
    z = load_tile(Z, start, rows, D, d, BLOCK_X, True)
    u = tl.zeros([BLOCK_X, BLOCK_D], tl.float32)
    first = split * chunk
    for tile in tl.range(first, tl.minimum(first + chunk, tl.cdiv(rows, BLOCK_Y))):
        y_start = tile * BLOCK_Y
        j = y_start + tl.arange(0, BLOCK_Y)
        y = load_tile(Z, y_start, rows, D, d, BLOCK_Y, True)
        s = tl.dot(z, tl.trans(y), input_precision=PRECISION)  # (BLOCK_X, BLOCK_Y)
        r = f
        if NORMALIZE:
            r = tl.load(FACTOR + j)
        special = is_special(start, y_start, half, BLOCK_X, BLOCK_Y)
        ragged = y_start + BLOCK_Y > rows
        s = log2_scores(s, f, r, log2_m, i, j, rows, special, ragged, NORMALIZE)
        partner = is_partner(i, j, rows)
        w = g[:, None] * _weights(
            s, partner, shift[:, None], kappa[:, None], slope[:, None], limit[:, None],
            large[:, None], own_large[:, None], weight, special,
        )  # fmt: skip
        if OTHER:
            shift_y, kappa_y, slope_y, limit_y, large_y, own_large_y = _terms(
                LOG_D, LOG_O, B, LOG_LARGE, j, rows, weight
            )
            w += tl.load(GRAD + j, mask=j < rows, other=0.0)[None, :] * _weights(
                s, partner, shift_y[None, :], kappa_y[None, :], slope_y[None, :], limit_y[None, :],
                large_y[None, :], own_large_y[None, :], weight, special,
            )  # fmt: skip
        if NORMALIZE:
            w *= (r * up)[None, :]
        else:
            w *= up
        u = tl.dot(w.to(y.dtype), y, u, input_precision=PRECISION)
    u *= 1.0 / up
    at = PART + (wide(split) * rows + start) * D + tl.arange(0, BLOCK_X)[:, None] * D + d[None, :]
    tl.store(at, u, mask=(i < rows)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["rows", "top", "left", "height"])
def weights_kernel(
    Z, SCALE, FACTOR, GRAD, LOG_D, LOG_O, B, LOG_LARGE,
    BOUNDS,  # (5,) from bounds_kernel, if USE_BOUNDS
    W,  # (height, width) out: 2^shift r_r r_c W_rc, from (top, left) on
    log2_m, weight, rows, D, top, left, height, width,
    OTHER: tl.constexpr,  # whether columns carry a gradient
    NORMALIZE: tl.constexpr, USE_BOUNDS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of a panel."""
    block, tile = in_groups(tl.program_id(0), height // BLOCK_X, width // BLOCK_Y, 8)
    start = top + block * BLOCK_X
    y_start = left + tile * BLOCK_Y
    i = start + tl.arange(0, BLOCK_X)
    j = y_start + tl.arange(0, BLOCK_Y)
    s = products(Z, Z, start, y_start, rows, rows, D, BLOCK_X, BLOCK_Y, BLOCK_D, PRECISION)
    f = tl.zeros([BLOCK_X], tl.float32) + tl.load(SCALE) * LOG2E
    r_x = f
    r_y = f
    if NORMALIZE:
        r_x = tl.load(FACTOR + i)
        r_y = tl.load(FACTOR + j)
        f *= r_x
    special = is_special(start, y_start, rows // 2, BLOCK_X, BLOCK_Y)
    ragged = y_start + BLOCK_Y > rows
    s = log2_scores(s, f, r_y, log2_m, i, j, rows, special, ragged, NORMALIZE)
    partner = is_partner(i, j, rows)
    shift, kappa, slope, limit, large, own_large = _terms(
        LOG_D, LOG_O, B, LOG_LARGE, i, rows, weight
    )
    w = tl.load(GRAD + i, mask=i < rows, other=0.0)[:, None] * _weights(
        s, partner, shift[:, None], kappa[:, None], slope[:, None], limit[:, None],
        large[:, None], own_large[:, None], weight, special,
    )  # fmt: skip
    if OTHER:
        shift, kappa, slope, limit, large, own_large = _terms(
            LOG_D, LOG_O, B, LOG_LARGE, j, rows, weight
        )
        w += tl.load(GRAD + j, mask=j < rows, other=0.0)[None, :] * _weights(
            s, partner, shift[None, :], kappa[None, :], slope[None, :], limit[None, :],
            large[None, :], own_large[None, :], weight, special,
        )  # fmt: skip
    if NORMALIZE:
        w *= r_y[None, :]
        w *= r_x[:, None]
    if USE_BOUNDS:
        w *= tl.exp2(tl.load(BOUNDS + 4))
    store_weights(W, w, start, y_start, top, left, rows, rows, width, BLOCK_X, BLOCK_Y)


def sums(
    grad: torch.Tensor,
    z: torch.Tensor,
    scale: torch.Tensor,
    statistics: Statistics,
    factor: torch.Tensor | None,
    *,
    negative_weight: float,
    detach_columns: bool,
) -> torch.Tensor:
    """Parts (splits, 2N, D) of u, D in whole blocks."""
    options = sum_options("instance_spread_gradient", z)
    m = math.log2(negative_weight), float(negative_weight)
    both: dict[str, Any] = dict(OTHER=not detach_columns, NORMALIZE=factor is not None)
    if options is None:
        row, product, (z,) = panel_options("instance_spread_weights", z)
        z, factor = near_unit(z, factor)
    else:
        row, (z,) = options
    # Only the shifts for weights up to max g are read.
    bounds = weights_bounds((statistics[0], grad), None, z, z, factor, factor, headroom=HEADROOM)
    both["USE_BOUNDS"] = bounds is not None
    given = z, scale, factor, grad, *statistics, bounds
    rows, d = z.shape
    if options is not None:
        blocks = triton.cdiv(rows, row["BLOCK_X"])
        splits, chunk = splits_of(z, blocks, triton.cdiv(rows, row["BLOCK_Y"]))
        part = torch.empty(splits, rows, d, dtype=torch.float32, device=z.device)
        gradient_kernel[(blocks * splits,)](*given, part, *m, rows, d, splits, chunk, **both, **row)
        return part

    def make_weights(panel: Panel) -> None:
        weights_kernel[(panel.programs(row),)](
            *given, panel.weights, *m, rows, d, *panel.start, *panel.size, **both, **row
        )

    part, _ = panel_sums(
        make_weights, (z, z), (factor, factor), bounds, row, product,
        wanted=(True, False), symmetric=not detach_columns,
    )  # fmt: skip
    assert part is not None
    return part
