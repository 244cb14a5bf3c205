"""SigLIP's pairwise sigmoid loss, of a matrix of scores that is never stored.

    s_ij   = t · x̂_i·ŷ_j + b,   z_ij = 1 on the diagonal, −1 off it,   a_ij = −z_ij s_ij
    loss_i = Σ_j softplus(a_ij)
    W_ij   = g_i c_ij,   c_ij = ∂softplus(a_ij)/∂s_ij = −z_ij σ(a_ij)
    dx̂_i   = t Σ_j W_ij ŷ_j     dŷ_j = t Σ_i W_ij x̂_i     dt = Σ_ij W_ij x̂_i·ŷ_j     db = Σ_ij W_ij
    dx_i   = r_i (dx̂_i − x̂_i <x̂_i, dx̂_i>)                  r_i = 1/‖x_i‖; x̂ = x/max(‖x‖, 1e-12)

where normalize, else x̂ = x. No row maximum is needed: softplus(a) = max(a, 0) + log(1 + exp −|a|).
One pass over the tiles forward (G), one for each gradient (2G each), or by way of _panels one for
both (3G); a program owns a block of rows of the result and the parts are added in a fixed order: no
atomics, the same bits every time. Extra memory O(N D).
Plain version: fastcl/reference/pair_sigmoid.py. CPU twin: csrc/pair_sigmoid.cpp.
Source: Zhai et al. 2023, arXiv:2303.15343, equation 1.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastcl.kernels import configs
from fastcl.kernels._bounds import weights_bounds
from fastcl.kernels._panels import (
    Panel,
    near_unit,
    panel_options,
    panel_shape,
    panel_sums,
    store_weights,
)
from fastcl.kernels._tiles import (
    LN2,
    LOG2E,
    Pair,
    factors_of,
    in_groups,
    in_whole_blocks,
    load_tile,
    products,
    wide,
)
from fastcl.kernels._weighted_sums import combine, splits_of, sum_options
from fastcl.kernels.similarity_lse import chunk_of, options_of, whole_blocks


@triton.jit
def log1p_of(e):
    """log(1 + e) for −1 ≤ e ≤ 1, to float32's accuracy where e is small, too."""
    series = e * (1.0 - e * (0.5 - e * (0.33333333 - e * 0.25)))  # next term: e⁵/5
    return tl.where(tl.abs(e) < 0.01, series, tl.log2(1.0 + e) * LN2)


@triton.jit
def _log2_scores(s, f, r, bias, i, j, M, crosses, ragged, NORMALIZE: tl.constexpr):
    """a log₂ e of a tile of products; −∞, where softplus and σ vanish, beyond the last column.

    crosses: whether the tile has entries of the diagonal. ragged: or columns beyond the last.
    """
    if NORMALIZE:
        s *= r[None, :]
    a = s * f[:, None] + bias
    if crosses:
        a = tl.where(i[:, None] == j[None, :], -a, a)
    if ragged:
        a = tl.where((j < M)[None, :], a, float("-inf"))
    return a


@triton.jit(do_not_specialize=["N", "M", "chunks", "chunk"])
def loss_kernel(
    X,  # (N, D)
    Y,  # (M, D), M = N
    SCALE, BIAS,  # ()
    X_FACTOR, Y_FACTOR,  # (N padded,), if NORMALIZE
    PART,  # (chunks, N) out: Σ_j softplus(a_ij) over a chunk of columns
    N, M, D, chunks, chunk,
    NORMALIZE: tl.constexpr,
    WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of rows against `chunk` tiles of columns."""
    block, c = in_groups(tl.program_id(0), tl.cdiv(N, BLOCK_N), chunks, 8)
    start = block * BLOCK_N
    i = start + tl.arange(0, BLOCK_N)
    bias = tl.load(BIAS) * LOG2E
    f = tl.zeros([BLOCK_N], tl.float32) + tl.load(SCALE) * LOG2E
    if NORMALIZE:
        f *= tl.load(X_FACTOR + i)
    d = tl.arange(0, BLOCK_D)
    if WHOLE_D:
        x = load_tile(X, start, N, D, d, BLOCK_N, True)
    loss = tl.zeros([BLOCK_N], tl.float32)
    first = c * chunk
    for tile in tl.range(first, tl.minimum(first + chunk, tl.cdiv(M, BLOCK_M))):
        y_start = tile * BLOCK_M
        j = y_start + tl.arange(0, BLOCK_M)
        if WHOLE_D:
            y = load_tile(Y, y_start, M, D, d, BLOCK_M, True)
            s = tl.dot(x, tl.trans(y), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        else:
            s = products(X, Y, start, y_start, N, M, D, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION)
        r = f
        if NORMALIZE:
            r = tl.load(Y_FACTOR + j)
        crosses = (y_start < start + BLOCK_N) & (start < y_start + BLOCK_M)
        ragged = y_start + BLOCK_M > M
        a = _log2_scores(s, f, r, bias, i, j, M, crosses, ragged, NORMALIZE)
        loss += tl.sum(tl.maximum(a, 0.0) * LN2 + log1p_of(tl.exp2(-tl.abs(a))), axis=1)
    tl.store(PART + wide(c) * N + i, loss, mask=i < N)


@triton.jit(do_not_specialize=["NX", "NY", "splits", "chunk", "side"])
def gradient_kernel(
    X, Y, SCALE, BIAS, X_FACTOR, Y_FACTOR,
    GRAD,  # (N,): of x's rows, if OWN; else of y's
    BOUNDS,  # (5,) from _bounds.bounds_kernel, if USE_BOUNDS
    PART,  # (splits, NX, D) out: u_i = Σ_j W_ij ŷ_j over a part of y
    SUM_PART,  # (splits, NX) out: Σ_j W_ij, if OWN
    NX, NY, D, splits, chunk, side,
    OWN: tl.constexpr, NORMALIZE: tl.constexpr, USE_BOUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """u for one block of x and one part of y. BLOCK_D has all D features.

    OWN: x are the images, whose g_i multiplies the finished sum. Otherwise the texts, and the g_j
    of the images that stream by multiply each weight.
    """
    block, split = in_groups(tl.program_id(0), tl.cdiv(NX, BLOCK_X), splits, 8)
    start = block * BLOCK_X
    i = start + tl.arange(0, BLOCK_X)
    bias = tl.load(BIAS) * LOG2E
    f = tl.zeros([BLOCK_X], tl.float32) + tl.load(SCALE) * LOG2E
    if NORMALIZE:
        f *= tl.load(X_FACTOR + i)
    up = 1.0  # a power of two that makes the most of float16
    if USE_BOUNDS:
        up = tl.exp2(tl.load(BOUNDS + 2 + side))
    d = tl.arange(0, BLOCK_D)
    x = load_tile(X, start, NX, D, d, BLOCK_X, True)
    u = tl.zeros([BLOCK_X, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_X], tl.float32)
    first = split * chunk
    for tile in tl.range(first, tl.minimum(first + chunk, tl.cdiv(NY, BLOCK_Y))):
        y_start = tile * BLOCK_Y
        j = y_start + tl.arange(0, BLOCK_Y)
        y = load_tile(Y, y_start, NY, D, d, BLOCK_Y, True)
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION)  # (BLOCK_X, BLOCK_Y)
        r = f
        if NORMALIZE:
            r = tl.load(Y_FACTOR + j)
        crosses = (y_start < start + BLOCK_X) & (start < y_start + BLOCK_Y)
        ragged = y_start + BLOCK_Y > NY
        a = _log2_scores(s, f, r, bias, i, j, NY, crosses, ragged, NORMALIZE)
        w = 1.0 / (1.0 + tl.exp2(-a))  # σ(a) = |c|
        if crosses:
            w = tl.where(i[:, None] == j[None, :], -w, w)
        if OWN:
            sums += tl.sum(w, axis=1)
        else:
            w *= tl.load(GRAD + j, mask=j < NY, other=0.0)[None, :]
        if NORMALIZE:
            w *= (r * up)[None, :]
        else:
            w *= up
        u = tl.dot(w.to(y.dtype), y, u, input_precision=PRECISION)
    u *= 1.0 / up
    if OWN:
        g = tl.load(GRAD + i, mask=i < NX, other=0.0)
        u *= g[:, None]
        tl.store(SUM_PART + wide(split) * NX + i, g * sums, mask=i < NX)
    at = PART + (wide(split) * NX + start) * D + tl.arange(0, BLOCK_X)[:, None] * D + d[None, :]
    tl.store(at, u, mask=(i < NX)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["NX", "NY", "top", "left", "height"])
def weights_kernel(
    X, Y, SCALE, BIAS, X_FACTOR, Y_FACTOR, GRAD,
    BOUNDS,  # (5,) from _bounds.bounds_kernel, if USE_BOUNDS
    W,  # (height, width) out: 2^shift r_i r_j W_ij, from (top, left) on
    SUMS,  # (tiles,) in and out: Σ_ij W_ij of the panels' tiles
    NX, NY, D, top, left, height, width,
    NORMALIZE: tl.constexpr, USE_BOUNDS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of a panel; rows are images."""
    block, tile = in_groups(tl.program_id(0), height // BLOCK_X, width // BLOCK_Y, 8)
    start = top + block * BLOCK_X
    y_start = left + tile * BLOCK_Y
    i = start + tl.arange(0, BLOCK_X)
    j = y_start + tl.arange(0, BLOCK_Y)
    s = products(X, Y, start, y_start, NX, NY, D, BLOCK_X, BLOCK_Y, BLOCK_D, PRECISION)
    f = tl.zeros([BLOCK_X], tl.float32) + tl.load(SCALE) * LOG2E
    r_x = f
    r_y = f
    if NORMALIZE:
        r_x = tl.load(X_FACTOR + i)
        r_y = tl.load(Y_FACTOR + j)
        f *= r_x
    crosses = (y_start < start + BLOCK_X) & (start < y_start + BLOCK_Y)
    ragged = y_start + BLOCK_Y > NY
    bias = tl.load(BIAS) * LOG2E
    a = _log2_scores(s, f, r_y, bias, i, j, NY, crosses, ragged, NORMALIZE)
    w = 1.0 / (1.0 + tl.exp2(-a))  # σ(a) = |c|
    if crosses:
        w = tl.where(i[:, None] == j[None, :], -w, w)
    w *= tl.load(GRAD + i, mask=i < NX, other=0.0)[:, None]
    at = SUMS + tl.program_id(0)
    tl.store(at, tl.load(at) + tl.sum(tl.sum(w, axis=1), axis=0))
    if NORMALIZE:
        w *= r_y[None, :]
        w *= r_x[:, None]
    if USE_BOUNDS:
        w *= tl.exp2(tl.load(BOUNDS + 4))
    store_weights(W, w, start, y_start, top, left, NX, NY, width, BLOCK_X, BLOCK_Y)


def forward(
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    normalize: bool,
) -> torch.Tensor:
    """image (N, D), text (N, D), scale (), bias () -> loss (N,) float32."""
    configs.assert_supported(image, text)
    assert image.shape == text.shape and image.dtype == text.dtype
    n = image.shape[0]
    if n == 0:
        return torch.empty(0, dtype=torch.float32, device=image.device)
    kernels = ("pair_sigmoid_loss",)
    image, text = whole_blocks(image, text, kernels=kernels, ids=False)
    d = image.shape[1]
    options = options_of("pair_sigmoid_loss", image, ids=False)
    blocks = triton.cdiv(n, options["BLOCK_N"])
    chunks, chunk = chunk_of(image, blocks, triton.cdiv(n, options["BLOCK_M"]))
    part = torch.empty(chunks, n, dtype=torch.float32, device=image.device)
    with torch.cuda.device_of(image):
        loss_kernel[(blocks * chunks,)](
            image, text, scale, bias, *factors_of(image, text, normalize), part,
            n, n, d, chunks, chunk, NORMALIZE=normalize, **options,
        )  # fmt: skip
    return part.sum(0)


def _sums(
    grad: torch.Tensor,
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    factors: Pair,
    options: dict[str, Any],
    operands: list[torch.Tensor],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Parts (splits, N, D) of the images' u and of the texts', and what Σ_ij W_ij adds up."""
    n, d = operands[0].shape
    blocks = triton.cdiv(n, options["BLOCK_X"])
    splits, chunk = splits_of(image, blocks, triton.cdiv(n, options["BLOCK_Y"]))
    new = dict(dtype=torch.float32, device=image.device)
    sum_part = torch.empty(splits, n, **new)
    # Of the bounds only the shifts are read, for weights up to 1 and up to max g; they do not
    # depend on a log-sum-exp, in whose place anything may stand.
    bounds = weights_bounds((grad, grad), None, image, text, *factors)
    parts = [torch.empty(splits, n, d, **new) for _ in operands]
    for side, part in enumerate(parts):
        gradient_kernel[(blocks * splits,)](
            operands[side], operands[1 - side], scale, bias, factors[side], factors[1 - side],
            grad, bounds, part, sum_part, n, n, d, splits, chunk, side,
            OWN=side == 0, NORMALIZE=factors[0] is not None, USE_BOUNDS=bounds is not None,
            **options,
        )  # fmt: skip
    return parts, sum_part


def _sums_by_panels(
    grad: torch.Tensor,
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    factors: Pair,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The same for rows longer than a tile."""
    row, product, operands = panel_options("pair_sigmoid_weights", image, text)
    (x, x_factor), (y, y_factor) = map(near_unit, operands, factors)
    bounds = weights_bounds((grad, grad), None, x, y, x_factor, y_factor)
    height, width = panel_shape(len(x), len(y), row, product)
    tiles = height // row["BLOCK_X"] * (width // row["BLOCK_Y"])
    sums = torch.zeros(tiles, dtype=torch.float32, device=x.device)

    def make_weights(panel: Panel) -> None:
        weights_kernel[(panel.programs(row),)](
            x, y, scale, bias, x_factor, y_factor, grad, bounds, panel.weights, sums,
            len(x), len(y), x.shape[1], *panel.start, *panel.size,
            NORMALIZE=x_factor is not None, USE_BOUNDS=bounds is not None, **row,
        )  # fmt: skip

    parts = panel_sums(
        make_weights, (x, y), (x_factor, y_factor), bounds, row, product, wanted=(True, True)
    )
    return parts, sums


def backward(
    grad: torch.Tensor,
    image: torch.Tensor,
    text: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad (N,) -> grad_image (N, D), grad_text (N, D), grad_scale (), grad_bias ()."""
    configs.assert_supported(image, text)
    assert image.shape == text.shape and image.dtype == text.dtype
    n, asked = image.shape
    if n == 0:
        zero = torch.zeros((), dtype=torch.float32, device=image.device)
        return torch.empty_like(image), torch.empty_like(text), zero, zero.clone()
    with torch.cuda.device_of(image):
        factors = factors_of(image, text, normalize)
        whole = sum_options("pair_sigmoid_gradient", image, text)
        given = grad, image, text, scale, bias, factors
        parts, sums = _sums_by_panels(*given) if whole is None else _sums(*given, *whole)
        operands = [in_whole_blocks(x, part.shape[2]) for x, part in zip((image, text), parts)]
        (grad_image, dot), (grad_text, _) = (
            combine(x, part, scale, normalize, asked) for x, part in zip(operands, parts)
        )
    return grad_image, grad_text, dot.sum(), sums.sum()
