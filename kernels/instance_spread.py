"""InvaSpread's instance loss, of a matrix of scores that is never stored.

Rows r are 2N views, row r's partner is (r + N) mod 2N, m weighs the negatives (c ≠ r, partner).

    s_rc   = t · ẑ_r·ẑ_c + [c negative] log m            c ≠ r
    p_rc   = exp(s_rc) / D_r,   D_r = Σ_{c≠r} exp s_rc
    loss_r = −log p_r,partner − m Σ_negatives log(1 − p_rc / m)
    R_rc   = p_rc / (m − p_rc),   B_r = Σ_negatives R_rc
    G_rc   = ∂loss_r/∂s_rc = p_rc (1 − m B_r) + m R_rc [negative] − [partner]
    dẑ_r   = t Σ_c (g_r G_rc + g_c G_cr) ẑ_c             the second term unless columns are detached

1 − p is never formed by a subtraction that cancels: only the largest entry of a row can exceed ½,
and its 1 − p is o_r, the others' share of D_r. To have it, the first pass keeps the largest score
apart from the others, and the largest of these apart from their sum: (M, L, rest) with
D = exp(M) + exp(L) rest. At τ = 0.01 scores differ by up to 200: o and R are then beyond float32
and only their logarithms are kept. An entry counts as large (its R goes to log_large and its
1 − p is o) where o < 0.49 and p > ½: in between, rounding could name none or two, and there 1 − p
does not cancel yet.
For m < 1 an entry may exceed m; the loss is then not defined, and NaN.

D, then the loss and B from it: two passes over the tiles (2G), one backward (2G; by way of _panels
1.5G to 2G where columns carry a gradient, too). A program owns a block of rows and the parts are
added in a fixed order: no atomics, the same bits every time. Extra memory O(N D).
Plain version: fastcl/reference/instance_spread.py. CPU twin: csrc/instance_spread.cpp.
Source: Ye et al. 2019, arXiv:1904.03436, as its authors' code computes it.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from fastcl.kernels import configs
from fastcl.kernels._instance_gradient import sums
from fastcl.kernels._instance_scores import LARGE_SHARE, is_partner, is_special, log2_scores
from fastcl.kernels._tiles import (
    LN2,
    LOG2E,
    finite,
    in_groups,
    in_whole_blocks,
    load_tile,
    products,
    row_factors,
    wide,
)
from fastcl.kernels._weighted_sums import combine
from fastcl.kernels.pair_sigmoid import log1p_of
from fastcl.kernels.similarity_lse import chunk_of, options_of, whole_blocks


@triton.jit(do_not_specialize=["rows", "chunks", "chunk"])
def shares_kernel(
    Z, SCALE, FACTOR,
    PART,  # (3, chunks, 2N) out: M and L, log₂, and rest over a chunk of columns
    OWN,  # (2N,) out: the partner's score, log₂
    log2_m, rows, D, chunks, chunk,
    NORMALIZE: tl.constexpr,
    WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """First pass. One block of rows against `chunk` tiles of columns."""
    block, c = in_groups(tl.program_id(0), tl.cdiv(rows, BLOCK_N), chunks, 8)
    start = block * BLOCK_N
    i = start + tl.arange(0, BLOCK_N)
    half = rows // 2
    f = tl.zeros([BLOCK_N], tl.float32) + tl.load(SCALE) * LOG2E
    if NORMALIZE:
        f *= tl.load(FACTOR + i)
    d = tl.arange(0, BLOCK_D)
    if WHOLE_D:
        z = load_tile(Z, start, rows, D, d, BLOCK_N, True)
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    low = tl.full([BLOCK_N], float("-inf"), tl.float32)
    rest = tl.zeros([BLOCK_N], tl.float32)
    first = c * chunk
    for tile in tl.range(first, tl.minimum(first + chunk, tl.cdiv(rows, BLOCK_M))):
        y_start = tile * BLOCK_M
        j = y_start + tl.arange(0, BLOCK_M)
        if WHOLE_D:
            y = load_tile(Z, y_start, rows, D, d, BLOCK_M, True)
            s = tl.dot(z, tl.trans(y), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
        else:
            s = products(
                Z, Z, start, y_start, rows, rows, D,
                BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
            )  # fmt: skip
        r = f
        if NORMALIZE:
            r = tl.load(FACTOR + j)
        special = is_special(start, y_start, half, BLOCK_N, BLOCK_M)
        ragged = y_start + BLOCK_M > rows
        s = log2_scores(s, f, r, log2_m, i, j, rows, special, ragged, NORMALIZE)
        if special:
            own = tl.sum(tl.where(is_partner(i, j, rows), s, 0.0), axis=1)
            partner = (i + half) % rows
            met = (i < rows) & (y_start <= partner) & (partner < y_start + BLOCK_M)
            tl.store(OWN + i, own, mask=met)
        top = tl.max(s, axis=1)
        # The others of the tile: all that lie below its largest, and what equals it but one.
        again = tl.sum(tl.where(s < top[:, None], 0.0, 1.0), axis=1) - 1.0
        s = tl.where(s < top[:, None], s, float("-inf"))
        second = tl.where(again > 0.0, top, tl.max(s, axis=1))
        others = tl.sum(tl.exp2(s - finite(second)[:, None]), axis=1) + again
        m, low, rest = _with_tile(m, low, rest, top, second, others)
    at = PART + wide(c) * rows + i
    tl.store(at, m, mask=i < rows)
    tl.store(at + wide(chunks) * rows, low, mask=i < rows)
    tl.store(at + 2 * wide(chunks) * rows, rest, mask=i < rows)


@triton.jit
def _with_tile(m, low, rest, top, second, others):
    """(M, L, rest) of two sets of scores together: the smaller of the maxima joins the others."""
    smaller = tl.minimum(m, top)
    new = tl.maximum(tl.maximum(low, second), smaller)
    reference = finite(new)
    # A set without others has L = −∞ and adds none; rest and others may be anything there.
    rest = tl.where(low > float("-inf"), rest * tl.exp2(low - reference), 0.0)
    rest += tl.where(second > float("-inf"), others * tl.exp2(second - reference), 0.0)
    return tl.maximum(m, top), new, rest + tl.exp2(smaller - reference)


@triton.jit(do_not_specialize=["rows", "chunks"])
def finish_shares_kernel(
    PART, OWN,
    LOG_D, LOG_O, OWN_LOSS,  # (2N,) out; −log p_r,partner
    rows, chunks,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    low = tl.full([BLOCK], float("-inf"), tl.float32)
    rest = tl.zeros([BLOCK], tl.float32)
    for c in tl.range(0, chunks):
        at = PART + wide(c) * rows + i
        top = tl.load(at, mask=i < rows, other=0.0)
        second = tl.load(at + wide(chunks) * rows, mask=i < rows, other=0.0)
        others = tl.load(at + 2 * wide(chunks) * rows, mask=i < rows, other=0.0)
        m, low, rest = _with_tile(m, low, rest, top, second, others)
    # log(1 + rest), rest now in units of exp(M): small where one entry has all, large otherwise.
    log2_rest = tl.log2(rest) + (low - m)
    rest = tl.exp2(log2_rest)
    log_rest = tl.where(rest < 1.0, log1p_of(tl.minimum(rest, 1.0)), tl.log2(1.0 + rest) * LN2)
    own = tl.load(OWN + i, mask=i < rows, other=0.0)
    tl.store(LOG_D + i, m * LN2 + log_rest, mask=i < rows)
    tl.store(LOG_O + i, log2_rest * LN2 - log_rest, mask=i < rows)
    tl.store(OWN_LOSS + i, log_rest + (m - own) * LN2, mask=i < rows)


@triton.jit(do_not_specialize=["rows", "chunks", "chunk"])
def loss_kernel(
    Z, SCALE, FACTOR, LOG_D, LOG_O,
    PART,  # (3, chunks, 2N) out: Σ log(1 − p/m), Σ R, and the large log R, over a chunk of columns
    log2_m, weight, rows, D, chunks, chunk,
    NORMALIZE: tl.constexpr,
    WHOLE_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Second pass. One block of rows against `chunk` tiles of columns; weight is m."""
    block, c = in_groups(tl.program_id(0), tl.cdiv(rows, BLOCK_N), chunks, 8)
    start = block * BLOCK_N
    i = start + tl.arange(0, BLOCK_N)
    half = rows // 2
    f = tl.zeros([BLOCK_N], tl.float32) + tl.load(SCALE) * LOG2E
    if NORMALIZE:
        f *= tl.load(FACTOR + i)
    log2_d = tl.load(LOG_D + i, mask=i < rows, other=0.0) * LOG2E
    log_o = tl.load(LOG_O + i, mask=i < rows, other=0.0)
    o = tl.exp2(log_o * LOG2E)
    has_large = o < LARGE_SHARE
    large_rest = tl.where(weight == 1.0, log_o, tl.log2((o + (weight - 1.0)) / weight) * LN2)
    d = tl.arange(0, BLOCK_D)
    if WHOLE_D:
        z = load_tile(Z, start, rows, D, d, BLOCK_N, True)
    log_rest = tl.zeros([BLOCK_N], tl.float32)
    small = tl.zeros([BLOCK_N], tl.float32)
    large = tl.zeros([BLOCK_N], tl.float32)
    first = c * chunk
    for tile in tl.range(first, tl.minimum(first + chunk, tl.cdiv(rows, BLOCK_M))):
        y_start = tile * BLOCK_M
        j = y_start + tl.arange(0, BLOCK_M)
        if WHOLE_D:
            y = load_tile(Z, y_start, rows, D, d, BLOCK_M, True)
            s = tl.dot(z, tl.trans(y), input_precision=PRECISION)
        else:
            s = products(
                Z, Z, start, y_start, rows, rows, D,
                BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
            )  # fmt: skip
        r = f
        if NORMALIZE:
            r = tl.load(FACTOR + j)
        special = is_special(start, y_start, half, BLOCK_N, BLOCK_M)
        ragged = y_start + BLOCK_M > rows
        s = log2_scores(s, f, r, log2_m, i, j, rows, special, ragged, NORMALIZE)
        if special:  # the partner adds nothing here
            s = tl.where(is_partner(i, j, rows), float("-inf"), s)
        p = tl.exp2(s - log2_d[:, None])
        is_large = has_large[:, None] & (p > 0.5)
        large += tl.sum(tl.where(is_large, 1.0, 0.0), axis=1)
        p = tl.where(is_large, 0.0, p)
        log_rest += tl.sum(log1p_of(-p / weight), axis=1)
        small += tl.sum(p / (weight - p), axis=1)
    log_rest += tl.where(large > 0.0, large_rest, 0.0)
    log_large = log1p_of(-tl.minimum(o, 0.5)) - large_rest - log2_m * LN2
    large = tl.where(large > 0.0, log_large, float("-inf"))
    at = PART + wide(c) * rows + i
    tl.store(at, log_rest, mask=i < rows)
    tl.store(at + wide(chunks) * rows, small, mask=i < rows)
    tl.store(at + 2 * wide(chunks) * rows, large, mask=i < rows)


@triton.jit(do_not_specialize=["rows", "chunks"])
def finish_loss_kernel(
    PART, OWN_LOSS, LOSS, B, LOG_LARGE, weight, rows, chunks, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    log_rest = tl.zeros([BLOCK], tl.float32)
    small = tl.zeros([BLOCK], tl.float32)
    large = tl.full([BLOCK], float("-inf"), tl.float32)
    for c in tl.range(0, chunks):
        at = PART + wide(c) * rows + i
        log_rest += tl.load(at, mask=i < rows, other=0.0)
        small += tl.load(at + wide(chunks) * rows, mask=i < rows, other=0.0)
        large = tl.maximum(large, tl.load(at + 2 * wide(chunks) * rows, mask=i < rows, other=0.0))
    own = tl.load(OWN_LOSS + i, mask=i < rows, other=0.0)
    tl.store(LOSS + i, own - weight * log_rest, mask=i < rows)
    tl.store(B + i, small, mask=i < rows)
    tl.store(LOG_LARGE + i, large, mask=i < rows)


def forward(
    z: torch.Tensor, scale: torch.Tensor, *, negative_weight: float, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """z (2N, D), scale () -> loss, log D, log o, B of the entries up to ½ and log R of one above
    (or −∞), each (2N,) float32."""
    configs.assert_supported(z)
    kernels = "instance_spread_shares", "instance_spread_loss"
    (z,) = whole_blocks(z, kernels=kernels, ids=False)
    rows, d = z.shape
    new = dict(dtype=torch.float32, device=z.device)
    loss, log_d, log_o, b, log_large, own, own_loss = (torch.empty(rows, **new) for _ in range(7))
    if rows == 0:
        return loss, log_d, log_o, b, log_large
    weight, log2_m = float(negative_weight), math.log2(negative_weight)
    factor = row_factors(z) if normalize else None
    finish = (triton.cdiv(rows, 128),)
    with torch.cuda.device_of(z):
        options = options_of("instance_spread_shares", z, ids=False)
        blocks = triton.cdiv(rows, options["BLOCK_N"])
        chunks, chunk = chunk_of(z, blocks, triton.cdiv(rows, options["BLOCK_M"]))
        part = torch.empty(3, chunks, rows, **new)
        shares_kernel[(blocks * chunks,)](
            z, scale, factor, part, own, log2_m, rows, d, chunks, chunk,
            NORMALIZE=normalize, **options,
        )  # fmt: skip
        finish_shares_kernel[finish](
            part, own, log_d, log_o, own_loss, rows, chunks, BLOCK=128, num_warps=4
        )
        options = options_of("instance_spread_loss", z, ids=False)
        blocks = triton.cdiv(rows, options["BLOCK_N"])
        chunks, chunk = chunk_of(z, blocks, triton.cdiv(rows, options["BLOCK_M"]))
        part = torch.empty(3, chunks, rows, **new)
        loss_kernel[(blocks * chunks,)](
            z, scale, factor, log_d, log_o, part, log2_m, weight, rows, d, chunks, chunk,
            NORMALIZE=normalize, **options,
        )  # fmt: skip
        finish_loss_kernel[finish](
            part, own_loss, loss, b, log_large, weight, rows, chunks, BLOCK=128, num_warps=4
        )
    return loss, log_d, log_o, b, log_large


def backward(
    grad: torch.Tensor,
    z: torch.Tensor,
    scale: torch.Tensor,
    log_d: torch.Tensor,
    log_o: torch.Tensor,
    b: torch.Tensor,
    log_large: torch.Tensor,
    *,
    negative_weight: float,
    normalize: bool,
    detach_columns: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """grad (2N,) -> grad_z (2N, D) and grad_scale (); with detach_columns only rows carry one."""
    configs.assert_supported(z)
    rows, asked = z.shape
    if rows == 0:
        return torch.empty_like(z), torch.zeros((), dtype=torch.float32, device=z.device)
    with torch.cuda.device_of(z):
        factor = row_factors(z) if normalize else None
        part = sums(
            grad, z, scale, (log_d, log_o, b, log_large), factor,
            negative_weight=negative_weight, detach_columns=detach_columns,
        )  # fmt: skip
        whole = in_whole_blocks(z, part.shape[2])
        grad_z, dot = combine(whole, part, scale, normalize, asked)
    # S is symmetric: with both directions each G has counted twice.
    return grad_z, dot.sum() if detach_columns else dot.sum() / 2
