"""Weighted sums of rows too long for one tile, by panels of weights that are stored.

    u_i = Σ_j W_ij ŷ_j                      v_j = Σ_i W_ij x̂_i

A program that keeps a block of u in registers makes its weights anew for each block of features.
Here the weights of a panel, at most PANEL² of them, are made once, stored, and serve both sums as
factor of a plain product: G for the scores, and G for each sum. The panel is 64 MiB in float32 and
32 MiB in half precision whatever N and M are, so that extra memory stays O((N + M) D). Panels
follow each other in a fixed order, as do the parts of a sum: the same bits every time.

One panel for both sums holds 2^shift r_i r_j W_ij, in the operands' type: r_j for u and r_i for v
are wanted there, as the rows are summed as they are stored, and the other is divided out. _bounds
has the shift. In float16 factors of very different size would not leave W the range it needs: rows
are first multiplied by powers of two, which changes no bit of a mantissa and brings r to [½, 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from fastcl.kernels import configs
from fastcl.kernels._tiles import Pair, in_groups, in_whole_blocks, load_tile, wide
from fastcl.kernels._weighted_sums import splits_of

# Rows and columns of a panel. With few rows it has more columns, and the other way round.
PANEL = 4096


@triton.jit
def store_weights(
    W, w, start, y_start, top, left, NX, NY, width,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
):  # fmt: skip
    """Stores a tile of the panel that begins at (top, left); zeros beyond the last row and column,
    so that sums_kernel reads without a mask."""
    i = start + tl.arange(0, BLOCK_X)
    j = y_start + tl.arange(0, BLOCK_Y)
    if (start + BLOCK_X > NX) | (y_start + BLOCK_Y > NY):
        w = tl.where((i < NX)[:, None] & (j < NY)[None, :], w, 0.0)
    at = W + (i - top)[:, None] * width + (j - left)[None, :]
    tl.store(at, w.to(W.dtype.element_ty))


@triton.jit(do_not_specialize=["start", "y_start", "NX", "NY", "rows", "splits", "chunk"])
def sums_kernel(
    W,  # (·, width): 2^shift r_i r_j W_ij of NX × NY; of NY × NX, if TRANSPOSED
    Y,  # (all y, D)
    X_FACTOR,  # (all x padded,) r_i, if NORMALIZE
    BOUNDS,  # (5,) from bounds_kernel, if USE_BOUNDS
    PART,  # (splits, rows, D) in and out: u_i += Σ_j W_ij ŷ_j over a part of y
    start, y_start, NX, NY,  # the panel's x and y
    rows, D, width, splits, chunk,
    TRANSPOSED: tl.constexpr, NORMALIZE: tl.constexpr, USE_BOUNDS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_Y: tl.constexpr,
):  # fmt: skip
    """A panel's share of one block of u: BLOCK_X rows, BLOCK_V features."""
    pid = tl.program_id(0)
    features = tl.cdiv(D, BLOCK_V)
    v = pid % features * BLOCK_V + tl.arange(0, BLOCK_V)
    block, split = in_groups(pid // features, tl.cdiv(NX, BLOCK_X), splits, 8)
    i = block * BLOCK_X + tl.arange(0, BLOCK_X)
    j = tl.arange(0, BLOCK_Y)
    u = tl.zeros([BLOCK_X, BLOCK_V], tl.float32)
    first = split * chunk
    for tile in tl.range(first, tl.minimum(first + chunk, tl.cdiv(NY, BLOCK_Y))):
        row = tile * BLOCK_Y
        y = load_tile(Y, y_start + row, y_start + NY, D, v, BLOCK_Y, True)
        if TRANSPOSED:
            w = tl.trans(tl.load(W + (row + j)[:, None] * width + i[None, :]))
        else:
            w = tl.load(W + i[:, None] * width + (row + j)[None, :])
        u = tl.dot(w, y, u, input_precision=PRECISION)
    if NORMALIZE:
        u *= (1.0 / tl.load(X_FACTOR + start + i))[:, None]
    if USE_BOUNDS:
        u *= tl.exp2(0.0 - tl.load(BOUNDS + 4))
    base = PART + (wide(split) * rows + start + block * BLOCK_X) * D
    at = base + tl.arange(0, BLOCK_X)[:, None] * D + v[None, :]
    valid = (i < NX)[:, None]
    tl.store(at, tl.load(at, mask=valid, other=0.0) + u, mask=valid)


@dataclass(frozen=True)
class Panel:
    """Some rows of x against some of y."""

    weights: torch.Tensor  # (height · width,)
    start: tuple[int, int]  # the first row of x and of y
    size: tuple[int, int]  # (height, width), in whole blocks

    def programs(self, row: dict[str, Any]) -> int:
        """Tiles of the kernel that makes the weights."""
        return self.size[0] // row["BLOCK_X"] * (self.size[1] // row["BLOCK_Y"])


def panel_options(
    kernel: str, *operands: torch.Tensor, ids: bool = False
) -> tuple[dict[str, Any], dict[str, Any], list[torch.Tensor]]:
    """The launch options of the kernel that makes the weights and of sums_kernel, and the operands
    (·, D) as these need them."""
    x = operands[0]
    d, precision = x.shape[1], configs.input_precision(x)
    row, sums = configs.pick(kernel, x, d, ids=ids), configs.pick("panel_sums", x, d)
    row.update(BLOCK_D=configs.block_of(d, row["BLOCK_D"]), PRECISION=precision)
    sums.update(BLOCK_V=configs.block_of(d, sums["BLOCK_V"]), PRECISION=precision)
    multiple = max(row["BLOCK_D"], sums["BLOCK_V"])
    return row, sums, [in_whole_blocks(operand, multiple) for operand in operands]


def near_unit(
    x: torch.Tensor, factor: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float16 rows x (N, D) and their factors r: x_i 2^e_i and r_i 2^−e_i, from ½ to 1."""
    if x.dtype != torch.float16 or factor is None:
        return x, factor
    factor, exponent = torch.frexp(factor)
    power = torch.exp2(exponent[: len(x), None])
    return torch.mul(x, power, out=torch.empty_like(x)), factor


def edge_of(row: dict[str, Any], sums: dict[str, Any]) -> int:
    """Rows and columns of a panel come in blocks of these many: powers of two, all of them."""
    return max(options[b] for options in (row, sums) for b in ("BLOCK_X", "BLOCK_Y"))


def panel_shape(n: int, m: int, row: dict[str, Any], sums: dict[str, Any]) -> tuple[int, int]:
    """(height, width) of the largest panel of N × M weights."""
    edge = edge_of(row, sums)
    side = max(PANEL // edge * edge, edge)
    rows, columns = triton.cdiv(n, edge) * edge, triton.cdiv(m, edge) * edge
    height = min(rows, side * side // min(columns, side) // edge * edge)
    return height, min(columns, side * side // height // edge * edge)


def panel_sums(
    make_weights: Callable[[Panel], None],
    operands: tuple[torch.Tensor, torch.Tensor],
    factors: Pair,
    bounds: torch.Tensor | None,
    row: dict[str, Any],
    sums: dict[str, Any],
    *,
    wanted: tuple[bool, bool],
    symmetric: bool = False,
) -> list[torch.Tensor | None]:
    """Parts (splits, N, D) of u, of x's rows, and parts (splits, M, D) of v, where wanted.

    make_weights launches the kernel that fills a panel. symmetric: x is y and W_ij = W_ji; a panel
    above the diagonal then serves u on both of its sides, and only u is wanted.
    """
    (n, d), m = operands[0].shape, operands[1].shape[0]
    device = operands[0].device
    features = triton.cdiv(d, sums["BLOCK_V"])
    edge = edge_of(row, sums)
    height, width = panel_shape(n, m, row, sums)
    weights = torch.empty(height * width, dtype=operands[0].dtype, device=device)

    parts: list[torch.Tensor | None] = [None, None]
    for own, owners, streamed in ((0, height, width), (1, width, height)):
        if wanted[own]:
            programs = triton.cdiv(owners, sums["BLOCK_X"]) * features
            splits, _ = splits_of(operands[0], programs, triton.cdiv(streamed, sums["BLOCK_Y"]))
            parts[own] = torch.zeros(
                splits, operands[own].shape[0], d, dtype=torch.float32, device=device
            )

    def add(panel: Panel, count: tuple[int, int], part: torch.Tensor, own: int, other: int) -> None:
        splits, rows, _ = part.shape
        tiles = triton.cdiv(count[other], sums["BLOCK_Y"])
        programs = triton.cdiv(count[own], sums["BLOCK_X"]) * splits * features
        sums_kernel[(programs,)](
            panel.weights, operands[other], factors[own], bounds, part,
            panel.start[own], panel.start[other], count[own], count[other],
            rows, d, panel.size[1], splits, triton.cdiv(tiles, splits),
            TRANSPOSED=own == 1, NORMALIZE=factors[own] is not None,
            USE_BOUNDS=bounds is not None, **sums,
        )  # fmt: skip

    for top in range(0, n, height):
        for left in range(top if symmetric else 0, m, width):
            count = min(height, n - top), min(width, m - left)
            size = triton.cdiv(count[0], edge) * edge, triton.cdiv(count[1], edge) * edge
            panel = Panel(weights, (top, left), size)
            make_weights(panel)
            u, v = (parts[0], parts[0] if left > top else None) if symmetric else parts
            if u is not None:
                add(panel, count, u, 0, 1)
            if v is not None:
                add(panel, count, v, 1, 0)
    return parts
