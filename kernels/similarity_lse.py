"""Log-sum-exp of a similarity matrix that is never stored.

    s_ij    = t · q̂_i · k̂_j                        q̂ = q / max(‖q‖, 1e-12) where normalize, else q
    row_i   = log Σ_j exp s_ij                     j with id_j ≠ id_i
    column_j = log Σ_i exp s_ij
    mean_i  = Σ_j exp(s_ij − row_i) k̂_j            ∂row_i/∂q̂_i = t · mean_i

With g, h the gradients that arrive at row and column,

    W_ij   = g_i exp(s_ij − row_i) + h_j exp(s_ij − column_j)
    dq̂_i   = t Σ_j W_ij k̂_j        dk̂_j = t Σ_i W_ij q̂_i        dt = Σ_ij W_ij q̂_i·k̂_j
    dq_i   = r_i (dq̂_i − q̂_i <q̂_i, dq̂_i>)    r_i = 1/‖q_i‖; without the second term below 1e-12

One pass over the tiles of scores gives rows and columns (G), or rows and means (2G, after which a
query's gradient needs no tile at all); the gradient kernel is run once for each side that needs
one (2G each). Both from one tile would save G, but a tile of BLOCK_X owned rows would then add 4
bytes to the other side's sums for every 2 BLOCK_X operations saved: at a tensor core's rate, more
than an L2 cache takes. Rows longer than a tile, and float32, store the weights of one bounded panel
after the other instead, which serve both gradients (3G, or 2G for one; means then cost 3G; _panels
says how). A program leaves the log-sum-exp of its part of a row, and the parts are
added in a fixed order: no atomics, the same bits every time. Extra memory O((N + M) D).

Plain version: fastcl/reference/similarity_lse.py. CPU twin: csrc/similarity_lse.cpp.
Source: online maximum and sum: Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastcl.kernels import _long_rows, configs
from fastcl.kernels._bounds import Weights, weights_bounds
from fastcl.kernels._means import mean
from fastcl.kernels._parts import finish, finish_block_d
from fastcl.kernels._tiles import (
    BOUNDED_RANGE,
    Pair,
    factors_of,
    finite,
    in_groups,
    in_whole_blocks,
    load_tile,
    magnitude_and_sign,
    products,
    wide,
)
from fastcl.kernels._weighted_sums import gradient, sum_options

# How many column tiles one launch of pairs_kernel takes: its row parts need (this, N) floats.
TILES_PER_LAUNCH = 128


@triton.jit(do_not_specialize=["N", "M", "chunks", "chunk", "first_tile"])
def rows_kernel(
    Q,  # (N, D)
    K,  # (M, D)
    SCALE,  # ()
    Q_FACTOR,  # (N padded,) r_i, if NORMALIZE
    K_FACTOR,  # (M padded,)
    Q_IDS,  # (N,), if HAS_IDS
    K_IDS,  # (M,)
    PART,  # (chunks, N) out: log₂ Σ 2^s₂ over a chunk of columns
    N, M, D, chunks, chunk, first_tile,
    NORMALIZE: tl.constexpr, HAS_IDS: tl.constexpr, SELF: tl.constexpr, TILE: tl.constexpr,
    WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of rows against `chunk` tiles of columns.

    SELF: Q is K, and rows meet only the columns j ≠ i of their own TILE: the squares on the
    diagonal, which pairs_kernel leaves out. PART is its ROW_PART, whose slots lie empty there.
    """
    if SELF:
        block = first_tile * (TILE // BLOCK_N) + tl.program_id(0)
        c = tl.program_id(0) // (TILE // BLOCK_N)
        first = (first_tile + c) * (TILE // BLOCK_M)
        last = tl.minimum(first + TILE // BLOCK_M, tl.cdiv(M, BLOCK_M))
    else:
        block, c = in_groups(tl.program_id(0), tl.cdiv(N, BLOCK_N), chunks, 8)
        first = c * chunk
        last = tl.minimum(first + chunk, tl.cdiv(M, BLOCK_M))
    bound, sign = magnitude_and_sign(SCALE)
    bounded = NORMALIZE and not HAS_IDS and not SELF and 2 * bound < BOUNDED_RANGE
    start = block * BLOCK_N
    i = start + tl.arange(0, BLOCK_N)
    f = tl.zeros([BLOCK_N], tl.float32) + bound
    if NORMALIZE:
        f *= tl.load(Q_FACTOR + i)
    if HAS_IDS:
        q_id = tl.load(Q_IDS + i, mask=i < N, other=0)
    d = tl.arange(0, BLOCK_D)
    if WHOLE_D:
        q = load_tile(Q, start, N, D, d, BLOCK_N, True)
        q = tl.where(sign < 0, -q, q)

    m = tl.zeros([BLOCK_N], tl.float32) + tl.where(bounded, bound, float("-inf"))
    l = tl.zeros([BLOCK_N], tl.float32)
    for tile in tl.range(first, last):
        j = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        if WHOLE_D:
            k = load_tile(K, tile * BLOCK_M, M, D, d, BLOCK_M, True)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        else:
            s = sign * products(
                Q, K, start, tile * BLOCK_M, N, M, D,
                BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
            )  # fmt: skip
        if NORMALIZE:
            s *= tl.load(K_FACTOR + j)[None, :]
        if HAS_IDS or SELF:
            keep = (j < M)[None, :]
            if SELF:
                keep = keep & (i[:, None] != j[None, :])
            if HAS_IDS:
                keep = keep & (q_id[:, None] != tl.load(K_IDS + j, mask=j < M, other=0)[None, :])
            s = tl.where(keep, s, float("-inf"))
        elif tile * BLOCK_M + BLOCK_M > M:  # the last tile alone; a mask in each costs a quarter
            s = tl.where((j < M)[None, :], s, float("-inf"))
        old = m
        if not bounded:
            m = tl.maximum(old, tl.max(s, axis=1) * f)
        reference = finite(m) if HAS_IDS or SELF else m
        l = l * tl.exp2(old - reference) + tl.sum(
            tl.exp2(s * f[:, None] - reference[:, None]), axis=1
        )
    tl.store(PART + wide(c) * N + i, m + tl.log2(l), mask=i < N)


@triton.jit(do_not_specialize=["N", "M", "chunks", "chunk", "first_tile", "tiles"])
def pairs_kernel(
    Q, K, SCALE, Q_FACTOR, K_FACTOR, Q_IDS, K_IDS,  # as in rows_kernel
    ROW_PART,  # (tiles, N) out: log₂ Σ_j 2^s₂ over the tile's columns
    COLUMN_PART,  # (chunks, M) out: log₂ Σ_i 2^s₂ over a chunk of rows
    COLUMN_PEAK,  # (chunks, all tiles) out: the largest s₂ among them
    N, M, D, chunks, chunk, first_tile, tiles,
    NORMALIZE: tl.constexpr, HAS_IDS: tl.constexpr, SELF: tl.constexpr,
    WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of columns against `chunk` blocks of rows: each score counts in its row and column.

    e_ij = 2^(s_ij − m_i) with the row's maximum in the tile is the only exponential of a score. Its
    row sum is cheap (a row lies in four lanes). Column sums are not, so they stay apart for each
    of the BLOCK_N rows of the tile, as e_ij 2^(m_i − peak_i), until the last block of rows.
    A column whose scores all lie far below its peaks may lose them to underflow:
    finish_kernel sees that, by the peak, and computes it anew.
    SELF: Q is K, and only the blocks of rows above the diagonal's square are visited.
    """
    slot, c = in_groups(tl.program_id(0), tiles, chunks, 8)
    tile = first_tile + slot
    first = c * chunk
    above = tile * (BLOCK_M // BLOCK_N) if SELF else tl.cdiv(N, BLOCK_N)
    last = tl.minimum(first + chunk, above)
    bound, sign = magnitude_and_sign(SCALE)
    bounded = NORMALIZE and not HAS_IDS and 2 * bound < BOUNDED_RANGE
    j = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    if NORMALIZE:
        r = tl.load(K_FACTOR + j)
    if HAS_IDS:
        k_id = tl.load(K_IDS + j, mask=j < M, other=0)
    if WHOLE_D:
        k = load_tile(K, tile * BLOCK_M, M, D, d, BLOCK_M, True)
        k = tl.where(sign < 0, -k, k)

    peak = tl.zeros([BLOCK_N], tl.float32) + tl.where(bounded, bound, float("-inf"))
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(first, last):
        start = block * BLOCK_N
        i = start + tl.arange(0, BLOCK_N)
        if WHOLE_D:
            q = load_tile(Q, start, N, D, d, BLOCK_N, True)
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        else:
            s = sign * products(
                Q, K, start, tile * BLOCK_M, N, M, D,
                BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
            )  # fmt: skip
        f = tl.zeros([BLOCK_N], tl.float32) + bound
        if NORMALIZE:
            s *= r[None, :]
            f *= tl.load(Q_FACTOR + i)
        if HAS_IDS:
            keep = tl.load(Q_IDS + i, mask=i < N, other=0)[:, None] != k_id[None, :]
            s = tl.where(keep & (j < M)[None, :], s, float("-inf"))
        elif tile * BLOCK_M + BLOCK_M > M:
            s = tl.where((j < M)[None, :], s, float("-inf"))
        if bounded:
            m = peak
            e = tl.exp2(s * f[:, None] - tl.where(i < N, bound, float("inf"))[:, None])
            sums += e
        else:
            m = tl.max(s, axis=1) * f
            e = tl.exp2(s * f[:, None] - finite(m)[:, None])
            new = tl.maximum(peak, tl.where(i < N, m, float("-inf")))
            weight = tl.where(i < N, tl.exp2(m - finite(new)), 0.0)
            sums = sums * tl.exp2(peak - finite(new))[:, None] + e * weight[:, None]
            peak = new
        row = m + tl.log2(tl.sum(e, axis=1))
        tl.store(ROW_PART + wide(slot) * N + i, row, mask=i < N)
    top = tl.max(peak, axis=0)
    column = top + tl.log2(tl.sum(sums * tl.exp2(peak - finite(top))[:, None], axis=0))
    tl.store(COLUMN_PART + wide(c) * M + j, column, mask=j < M)
    # Bounded scores cannot have been lost.
    top = tl.where(bounded, float("-inf"), top)
    tl.store(COLUMN_PEAK + wide(c) * tl.cdiv(M, BLOCK_M) + tile, top)


def chunk_of(x: torch.Tensor, rows: int, columns: int) -> tuple[int, int]:
    """-> (chunks, chunk): how many of `columns` tiles one program takes, so that rows × chunks
    programs are several for each multiprocessor, and no more parts are left than that needs."""
    chunk = max(rows * columns // (8 * configs.multiprocessors(x)), 1)
    chunk = min(chunk, columns)
    return triton.cdiv(columns, chunk), chunk


def options_of(kernel: str, x: torch.Tensor, ids: bool) -> dict[str, Any]:
    """The launch options of a kernel of this file for operands like x (N, D)."""
    d = x.shape[1]
    row = configs.pick(kernel, x, d, ids=ids)
    row["BLOCK_D"] = block_d = configs.block_of(d, row["BLOCK_D"])
    return dict(
        row,
        WHOLE_D=d <= block_d,
        PRECISION=configs.input_precision(x),
    )


def whole_blocks(
    *operands: torch.Tensor, kernels: tuple[str, ...], ids: bool
) -> tuple[torch.Tensor, ...]:
    """The operands (·, D) as these kernels and finish_kernel need them."""
    blocks = [options_of(kernel, operands[0], ids)["BLOCK_D"] for kernel in kernels]
    multiple = max(*blocks, finish_block_d(operands[0]))
    return tuple(in_whole_blocks(x, multiple) for x in operands)


def _rows(
    query: torch.Tensor, key: torch.Tensor, scale: torch.Tensor, factors: Pair, ids: Pair
) -> torch.Tensor:
    (n, d), m = query.shape, key.shape[0]
    options = options_of("similarity_rows", query, ids[0] is not None)
    blocks = triton.cdiv(n, options["BLOCK_N"])
    chunks, chunk = chunk_of(query, blocks, triton.cdiv(m, options["BLOCK_M"]))
    part = torch.empty(chunks, n, dtype=torch.float32, device=query.device)
    rows_kernel[(blocks * chunks,)](
        query, key, scale, *factors, *ids, part, n, m, d, chunks, chunk, 0,
        NORMALIZE=factors[0] is not None, HAS_IDS=ids[0] is not None, SELF=False, TILE=0, **options,
    )  # fmt: skip
    lse = torch.empty(n, dtype=torch.float32, device=query.device)
    finish(lse, query, key, scale, factors, ids, row_part=part)
    return lse


def _rows_and_columns(
    query: torch.Tensor, key: torch.Tensor, scale: torch.Tensor, factors: Pair, ids: Pair
) -> tuple[torch.Tensor, torch.Tensor]:
    (n, d), m = query.shape, key.shape[0]
    device = query.device
    options = options_of("similarity_pairs", query, ids[0] is not None)
    tile = options["BLOCK_M"]
    blocks = triton.cdiv(n, options["BLOCK_N"])
    row_lse = torch.empty(n, dtype=torch.float32, device=device)
    column_lse = torch.empty(m, dtype=torch.float32, device=device)
    # Two tensors: the second half of one would be aligned or not, as N is.
    running = [torch.empty(n, dtype=torch.float32, device=device) for _ in range(2)]
    step = TILES_PER_LAUNCH * tile
    for launch, start in enumerate(range(0, m, step)):
        columns = slice(start, min(start + step, m))
        keys = key[columns]
        key_factor = None if factors[1] is None else factors[1][start:]
        key_ids = None if ids[1] is None else ids[1][columns]
        tiles = triton.cdiv(keys.shape[0], tile)
        chunks, chunk = chunk_of(query, tiles, blocks)
        row_part = torch.empty(tiles, n, dtype=torch.float32, device=device)
        column_part = torch.empty(chunks, keys.shape[0], dtype=torch.float32, device=device)
        peak = torch.empty(chunks, tiles, dtype=torch.float32, device=device)
        pairs_kernel[(tiles * chunks,)](
            query, keys, scale, factors[0], key_factor, ids[0], key_ids,
            row_part, column_part, peak,
            n, keys.shape[0], d, chunks, chunk, 0, tiles,
            NORMALIZE=factors[0] is not None, HAS_IDS=ids[0] is not None, SELF=False, **options,
        )  # fmt: skip
        finish(
            column_lse[columns], keys, query, scale,
            (key_factor, factors[0]), (key_ids, ids[0]),
            column_part=column_part, column_peak=peak, tile=tile,
        )  # fmt: skip
        finish(
            row_lse, query, keys, scale, (factors[0], key_factor), (ids[0], key_ids),
            row_part=row_part,
            running_in=running[launch % 2] if launch > 0 else None,
            running_out=running[(launch + 1) % 2] if columns.stop < m else None,
        )  # fmt: skip
    return row_lse, column_lse


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    *,
    normalize: bool,
    rows: bool,
    columns: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """query (N, D), key (M, D), scale () -> (row_lse (N,), column_lse (M,)), None if not asked."""
    configs.assert_supported(query, key)
    assert rows or columns, "neither rows nor columns are asked for"
    query, key = whole_blocks(
        *(query, key), kernels=("similarity_rows", "similarity_pairs"), ids=query_ids is not None
    )
    factors, ids = factors_of(query, key, normalize), (query_ids, key_ids)
    if rows and columns:
        return _rows_and_columns(query, key, scale, factors, ids)
    if rows:
        return _rows(query, key, scale, factors, ids), None
    return None, _rows(key, query, scale, factors[::-1], ids[::-1])


def forward_with_mean(
    query: torch.Tensor,
    key: torch.Tensor,
    scale: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    *,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query (N, D), key (M, D), scale () -> row_lse (N,) and mean_key (N, D), float32."""
    configs.assert_supported(query, key)
    factors, ids = factors_of(query, key, normalize), (query_ids, key_ids)
    whole = sum_options("similarity_mean", query, key, ids=query_ids is not None)
    if whole is not None:
        return mean(*whole, scale, factors, ids, query.shape[1])
    row_lse, _ = forward(query, key, scale, *ids, normalize=normalize, rows=True, columns=False)
    assert row_lse is not None
    return row_lse, _long_rows.mean(query, key, scale, factors, ids, row_lse)


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
    is_self: bool = False,
) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """(dq, <q̂_i, dq̂_i>/t) and (dk, <k̂_j, dk̂_j>/t), where wanted."""
    given = rows, columns
    whole = sum_options("similarity_gradient", query, key, ids=ids[0] is not None)
    if whole is None:
        return _long_rows.gradients(
            query, key, scale, factors, ids, *given, wanted=wanted, is_self=is_self
        )
    row, operands = whole
    bounds = weights_bounds(*given, *operands, *factors)
    return [
        gradient(
            operands[own], operands[other], scale, factors[own], factors[other],
            ids[own], ids[other], given[own], given[other], bounds, row, query.shape[1],
            side=own, is_self=is_self,
        ) if wanted[own] else None
        for own, other in ((0, 1), (1, 0))
    ]  # fmt: skip


def backward(
    grad_rows: torch.Tensor | None,
    grad_columns: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: torch.Tensor,
    query_ids: torch.Tensor | None,
    key_ids: torch.Tensor | None,
    row_lse: torch.Tensor | None,
    column_lse: torch.Tensor | None,
    *,
    normalize: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """-> (grad_query (N, D) | None, grad_key (M, D) | None, grad_scale ()).

    A side whose gradient is None is not read, whatever its log-sum-exp. grad_scale falls out of
    either gradient; with neither asked for, the query's is computed for it.
    """
    configs.assert_supported(query, key)
    rows = None if grad_rows is None or row_lse is None else (row_lse, grad_rows)
    columns = None if grad_columns is None or column_lse is None else (column_lse, grad_columns)
    assert rows is not None or columns is not None, "no gradient came"
    of_query, of_key = gradients(
        query, key, scale, factors_of(query, key, normalize), (query_ids, key_ids), rows, columns,
        wanted=(need_query or not need_key, need_key),
    )  # fmt: skip
    dot = (of_query or of_key)[1]
    grad_query = of_query[0] if need_query else None
    return grad_query, of_key[0] if need_key else None, dot.sum()
