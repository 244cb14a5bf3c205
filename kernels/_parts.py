"""The log-sum-exp of rows and columns, from that of their parts.

    lse = log₂ Σ_parts 2^part, in nats

The parts come from similarity_lse's kernels, and are added in a fixed order. Those of columns may
have lost terms that lie far below their peak; a block of rows to which these matter is seen here,
by the peaks, and computed anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastcl.kernels import configs
from fastcl.kernels._tiles import LN2, Pair, finite, magnitude_and_sign, products, wide


@triton.jit
def fold_parts(PART, first, last, stride, i, valid, m, l, PARTS: tl.constexpr):
    """Adds the parts PART[first:last, i] (log₂ of sums) to the pairs (m, l) with sum = 2^m · l."""
    for start in tl.range(first, last, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < last)[:, None] & valid[None, :]
        at = PART + wide(part[:, None]) * stride + i[None, :]
        x = tl.load(at, mask=mask, other=float("-inf"))
        new = tl.maximum(m, tl.max(x, axis=0))
        l = l * tl.exp2(m - finite(new)) + tl.sum(tl.exp2(x - finite(new)[None, :]), axis=0)
        m = new
    return m, l


@triton.jit(
    do_not_specialize=["NX", "NY", "parts", "chunks", "chunk", "first_tile", "running", "final"]
)
def finish_kernel(
    LSE,  # (NX,) out, in nats, once all parts are there
    RUNNING_IN, RUNNING_OUT,  # (NX,) log₂ of what earlier launches left, and what this one leaves
    SAVED_PEAK,  # (all tiles,) the peaks of COLUMN_PART, kept for the last launch
    ROW_PART,  # (parts, NX): exact
    COLUMN_PART, COLUMN_PEAK,  # (chunks, NX), (chunks, all tiles): may have lost small scores
    X, Y, SCALE, X_FACTOR, Y_FACTOR, X_IDS, Y_IDS,
    NX, NY, D, parts, chunks, chunk, first_tile,
    RUNNING: tl.constexpr, FINAL: tl.constexpr,
    HAS_ROWS: tl.constexpr, HAS_COLUMNS: tl.constexpr, SELF: tl.constexpr,
    NORMALIZE: tl.constexpr, HAS_IDS: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr, BLOCKS_PER_TILE: tl.constexpr,
):  # fmt: skip
    """Adds the parts of a block of rows of X (the keys, where columns are wanted).

    Terms below 2^−126 of their peak have been lost from column parts. They matter only when the
    whole sum is small against the highest peak, and then the block is computed anew from X and Y.
    SELF: ROW_PART slot s is column tile first_tile + s and reaches rows of tiles ≤ its own;
    the column parts of tile I come in the launch that has I among its tiles, chunks below it.
    """
    start = tl.program_id(0) * BLOCK
    tile = start // TILE
    i = start + tl.arange(0, BLOCK)
    valid = i < NX
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    top = tl.max(m, axis=0)
    if RUNNING:  # noqa: SIM102 (one is decided when compiling, one when running)
        if (not SELF) or tile < first_tile:
            m = tl.load(RUNNING_IN + i, mask=valid, other=float("-inf"))
            l = tl.where(m == float("-inf"), 0.0, 1.0)
    if HAS_ROWS:
        lowest = tl.maximum(tile - first_tile, 0) if SELF else 0
        m, l = fold_parts(ROW_PART, lowest, parts, NX, i, valid, m, l, PARTS)
    if HAS_COLUMNS:
        if (not SELF) or tile >= first_tile:
            count = chunks
            if SELF:  # those that begin above the diagonal
                count = tl.minimum(chunks, tl.cdiv(tile * BLOCKS_PER_TILE, chunk))
            m, l = fold_parts(COLUMN_PART, 0, count, NX, i, valid, m, l, PARTS)
            for c in tl.range(0, count):
                top = tl.maximum(top, tl.load(COLUMN_PEAK + wide(c) * tl.cdiv(NX, TILE) + tile))
            if SELF:
                tl.store(SAVED_PEAK + tile, top)
        else:
            top = tl.load(SAVED_PEAK + tile)
    lse = m + tl.log2(l)
    if not FINAL:
        tl.store(RUNNING_OUT + i, lse, mask=valid)
    else:
        if HAS_COLUMNS:
            lost = valid & (lse < top - 80.0)  # 2^(80 − 126) of the sum, times its terms
            if tl.max(lost.to(tl.int32), axis=0) > 0:
                bound, sign = magnitude_and_sign(SCALE)
                f = tl.zeros([BLOCK], tl.float32) + bound
                if NORMALIZE:
                    f *= tl.load(X_FACTOR + i)
                m = tl.full([BLOCK], float("-inf"), tl.float32)
                l = tl.zeros([BLOCK], tl.float32)
                for y_start in tl.range(0, NY, BLOCK_Y):
                    j = y_start + tl.arange(0, BLOCK_Y)
                    s = sign * products(
                        X, Y, start, y_start, NX, NY, D,
                        BLOCK, BLOCK_Y, BLOCK_D, PRECISION,
                    )  # fmt: skip
                    if NORMALIZE:
                        s *= tl.load(Y_FACTOR + j)[None, :]
                    keep = (j < NY)[None, :]
                    if SELF:
                        keep = keep & (i[:, None] != j[None, :])
                    if HAS_IDS:
                        x_id = tl.load(X_IDS + i, mask=valid, other=0)
                        y_id = tl.load(Y_IDS + j, mask=j < NY, other=0)
                        keep = keep & (x_id[:, None] != y_id[None, :])
                    s = tl.where(keep, s, float("-inf"))
                    new = tl.maximum(m, tl.max(s, axis=1) * f)
                    e = tl.exp2(s * f[:, None] - finite(new)[:, None])
                    l = l * tl.exp2(m - finite(new)) + tl.sum(e, axis=1)
                    m = new
                lse = m + tl.log2(l)
        tl.store(LSE + i, lse * LN2, mask=valid)


def finish_block_d(x: torch.Tensor) -> int:
    """Features that finish_kernel takes at a time."""
    return configs.block_of(x.shape[1], 128 // x.element_size())


def finish(
    lse: torch.Tensor,
    x: torch.Tensor,
    y: torch.Tensor,
    scale: torch.Tensor,
    factors: Pair,
    ids: Pair,
    *,
    row_part: torch.Tensor | None = None,
    column_part: torch.Tensor | None = None,
    column_peak: torch.Tensor | None = None,
    running_in: torch.Tensor | None = None,
    running_out: torch.Tensor | None = None,
    saved_peak: torch.Tensor | None = None,
    chunk: int = 1,
    first_tile: int = 0,
    tile: int = 64,
    blocks_per_tile: int = 1,
    is_self: bool = False,
) -> None:
    """Launches finish_kernel: the final log-sum-exp of x's rows, or running_out where given."""
    nx, d = x.shape
    block = min(tile, 64)
    block_d = finish_block_d(x)
    reached = nx
    if is_self and row_part is not None:
        reached = min(nx, (first_tile + row_part.shape[0]) * tile)
    finish_kernel[(triton.cdiv(reached, block),)](
        lse, running_in, running_out, saved_peak, row_part, column_part, column_peak,
        x, y, scale, *factors, *ids,
        nx, y.shape[0], d,
        0 if row_part is None else row_part.shape[0],
        0 if column_part is None else column_part.shape[0],
        chunk, first_tile, RUNNING=running_in is not None, FINAL=running_out is None,
        HAS_ROWS=row_part is not None, HAS_COLUMNS=column_part is not None, SELF=is_self,
        NORMALIZE=factors[0] is not None, HAS_IDS=ids[0] is not None,
        PRECISION=configs.input_precision(x),
        TILE=tile, BLOCK=block, BLOCK_Y=min(block, 32), BLOCK_D=block_d, PARTS=16,
        BLOCKS_PER_TILE=blocks_per_tile, num_warps=8, num_stages=1, **configs.registers(x, 128),
    )  # fmt: skip
