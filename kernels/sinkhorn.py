"""Balanced assignment of samples to prototypes (Sinkhorn-Knopp), all in the logarithm.

    A_nk  = S_nk / ε                                                      log u = 0
    repeat:  log v_n = −LSE_k(A_nk + log u_k)                             first time: log v = 0
             log u_k ← log u_k − LSE_n(A_nk + log u_k + log v_n)          prototypes first
    codes_nk = softmax_k(A_nk + log u_k)                                  samples last

which is log u_k = −LSE_n(A_nk + log v_n); the constants −log K and −log N cancel in the softmax. A
column's terms A_nk + log u_k + log v_n are logarithms of probabilities: ≤ 0, and perhaps all far
below −88, where exp gives 0 in float32. So every column keeps its true (max, sum).

Bytes moved, for scores of b bytes, T iterations and K ≤ 8,192: N·K·(b (T + 1) + 4). Each sweep
reads S once, for the rows' LSE and the columns' sums together; the last writes the codes; Q is not
stored in between. Longer rows do not fit in one program's registers and are read twice a sweep. The
columns' parts add 8·P·K bytes a sweep for P programs. Every LSE is in base 2. Fixed order: the same
bits on every run.
Plain version: fastcl/reference/sinkhorn.py. CPU twin: csrc/sinkhorn.cpp.
Source: Cuturi 2013, arXiv:1306.0895; SwAV: Caron et al. 2020, arXiv:2006.09882, whose float32 code
overflows for S/ε > 88 and divides by 0 where a prototype's exp(S/ε) all underflow.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import configs

LOWEST = tl.constexpr(-1.0e38)  # a first maximum whose differences are finite: −∞ − (−∞) is NaN


class Config(NamedTuple):
    """Rows and prototypes of one program's tile."""

    block_n: int
    block_k: int
    num_warps: int


# Whole rows in registers, with log u and the columns' (max, sum) beside them: at most 32 scores a
# thread (SwAV's 3,000 prototypes: two blocks on a multiprocessor). The more rows a tile has, the
# fewer exponentials rescale the columns: 2 + 1/rows for each score.
SWEEP = {
    **{k: Config(4096 // k, k, 4) for k in (128, 256, 512)},
    1024: Config(2, 1024, 4),
    2048: Config(4, 2048, 8),
    4096: Config(2, 4096, 8),
    8192: Config(1, 8192, 16),
}
LONGEST = max(SWEEP)
# Columns alone: the first sweep, and rows beyond LONGEST.
COLUMNS = {k: Config(4096 // k, k, 4) for k in (128, 256, 512, 1024)}
LONG_ROW = Config(1, 4096, 8)
FINISH_PARTS, FINISH_BLOCK_K = 32, 64
WARPS_PER_MULTIPROCESSOR = 16  # that the sweep's registers leave room for


def config_of(configurations: dict[int, Config], k: int) -> Config:
    """The configuration whose block just holds k prototypes, or the longest."""
    block = min(max(triton.next_power_of_2(k), min(configurations)), max(configurations))
    return configurations[block]


@triton.jit
def _load_scores(s_ptr, n, n_end, k, K, log2e_over_eps):
    """A (rows, columns) in base 2; −∞ outside."""
    inside = (n < n_end)[:, None] & (k < K)[None, :]
    s = tl.load(s_ptr + n[:, None] * K + k[None, :], mask=inside, other=float("-inf"))
    return s.to(tl.float32) * log2e_over_eps


@triton.jit
def _add_to_columns(m, l, log_p):
    """Online (max, sum) of every column over the tile's rows: m, l (columns,)."""
    m_new = tl.maximum(m, tl.max(log_p, axis=0))
    l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(log_p - m_new[None, :]), axis=0)
    return m_new, l


@triton.jit(do_not_specialize=["N", "K", "rows"])
def sweep_kernel(
    s_ptr,  # (N, K)
    log_u_ptr,  # (K,)
    parts_ptr,  # (programs, K): LSE over the program's rows
    N,
    K,
    rows,  # of each program
    log2e_over_eps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Rows' LSE and columns' LSE from one reading of S; a row fits in BLOCK_K."""
    K = (K // ALIGN) * ALIGN  # the same number, known to be a multiple: 128-bit loads
    start = tl.program_id(0).to(tl.int64) * rows
    n_end = tl.minimum(start + rows, N)
    k = tl.arange(0, BLOCK_K)
    log_u = tl.load(log_u_ptr + k, mask=k < K, other=0.0)  # (BLOCK_K,)
    m = tl.full((BLOCK_K,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_K,), tl.float32)
    for row in range(0, rows, BLOCK_N):
        n = start + row + tl.arange(0, BLOCK_N)
        x = _load_scores(s_ptr, n, n_end, k, K, log2e_over_eps) + log_u[None, :]
        m_n = tl.maximum(tl.max(x, axis=1), LOWEST)  # rows beyond the end are −∞ throughout
        lse_n = m_n + tl.log2(tl.sum(tl.exp2(x - m_n[:, None]), axis=1))
        lse_n = tl.where(n < n_end, lse_n, 0.0)
        m, l = _add_to_columns(m, l, x - lse_n[:, None])
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * K + k, m + tl.log2(l), mask=k < K)


@triton.jit(do_not_specialize=["N", "K", "rows"])
def columns_kernel(
    s_ptr,  # (N, K)
    log_u_ptr,  # (K,)
    lse_ptr,  # (N,) LSE of the rows, if HAS_LSE, else they count as 0
    parts_ptr,  # (programs along N, K)
    N,
    K,
    rows,
    log2e_over_eps,
    HAS_LSE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Columns' LSE over the program's rows, for one block of columns."""
    K = (K // ALIGN) * ALIGN
    k_blocks = tl.cdiv(K, BLOCK_K)
    part = (tl.program_id(0) // k_blocks).to(tl.int64)
    n_end = tl.minimum(part * rows + rows, N)
    k = (tl.program_id(0) % k_blocks) * BLOCK_K + tl.arange(0, BLOCK_K)
    log_u = tl.load(log_u_ptr + k, mask=k < K, other=0.0)
    m = tl.full((BLOCK_K,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_K,), tl.float32)
    for row in range(0, rows, BLOCK_N):
        n = part * rows + row + tl.arange(0, BLOCK_N)
        log_p = _load_scores(s_ptr, n, n_end, k, K, log2e_over_eps) + log_u[None, :]
        if HAS_LSE:
            log_p -= tl.load(lse_ptr + n, mask=n < n_end, other=0.0)[:, None]
        m, l = _add_to_columns(m, l, log_p)
    tl.store(parts_ptr + part * K + k, m + tl.log2(l), mask=k < K)


@triton.jit(do_not_specialize=["K", "parts"])
def finish_kernel(
    parts_ptr,  # (parts, K)
    log_u_ptr,  # (K,), updated
    K,
    parts,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """log u_k −= LSE of the parts of column k, in the order of the parts."""
    K = (K // ALIGN) * ALIGN
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.full((BLOCK_K,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_K,), tl.float32)
    for first in range(0, parts, BLOCK_P):
        part = first + tl.arange(0, BLOCK_P)
        inside = (part < parts)[:, None] & (k < K)[None, :]
        at = parts_ptr + part.to(tl.int64)[:, None] * K + k[None, :]
        m, l = _add_to_columns(m, l, tl.load(at, mask=inside, other=float("-inf")))
    log_u = tl.load(log_u_ptr + k, mask=k < K, other=0.0)
    # A prototype that no sample may have (scores −∞) keeps its u, and gets codes of 0.
    tl.store(log_u_ptr + k, tl.where(l > 0.0, log_u - (m + tl.log2(l)), log_u), mask=k < K)


@triton.jit
def _lse_of_long_rows(
    s_ptr, log_u_ptr, n, N, K, log2e_over_eps, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """LSE_k(A + log u), (BLOCK_N,), of rows that are looped over; sums one per lane to the end."""
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    l = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        log_u = tl.load(log_u_ptr + k, mask=k < K, other=0.0)
        x = _load_scores(s_ptr, n, N, k, K, log2e_over_eps) + log_u[None, :]
        m_new = tl.maximum(m, tl.max(x, axis=1))
        l = l * tl.exp2(m - m_new)[:, None] + tl.exp2(x - m_new[:, None])
        m = m_new
    return m + tl.log2(tl.sum(l, axis=1))


@triton.jit(do_not_specialize=["N", "K"])
def rows_kernel(
    s_ptr,  # (N, K)
    log_u_ptr,  # (K,)
    lse_ptr,  # (N,)
    N,
    K,
    log2e_over_eps,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Rows' LSE alone, for rows longer than a block."""
    K = (K // ALIGN) * ALIGN
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lse = _lse_of_long_rows(s_ptr, log_u_ptr, n, N, K, log2e_over_eps, BLOCK_N, BLOCK_K)
    tl.store(lse_ptr + n, lse, mask=n < N)


@triton.jit(do_not_specialize=["N", "K"])
def codes_kernel(
    s_ptr,  # (N, K)
    log_u_ptr,  # (K,)
    codes_ptr,  # (N, K)
    N,
    K,
    log2e_over_eps,
    ONE_BLOCK: tl.constexpr,  # a row fits in BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """softmax_k(A + log u)."""
    K = (K // ALIGN) * ALIGN
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if ONE_BLOCK:
        k = tl.arange(0, BLOCK_K)
        log_u = tl.load(log_u_ptr + k, mask=k < K, other=0.0)
        x = _load_scores(s_ptr, n, N, k, K, log2e_over_eps) + log_u[None, :]
        e = tl.exp2(x - tl.maximum(tl.max(x, axis=1), LOWEST)[:, None])
        q = e / tl.sum(e, axis=1)[:, None]  # (BLOCK_N, BLOCK_K)
        inside = (n < N)[:, None] & (k < K)[None, :]
        tl.store(codes_ptr + n[:, None] * K + k[None, :], q, mask=inside)
    else:
        lse = _lse_of_long_rows(s_ptr, log_u_ptr, n, N, K, log2e_over_eps, BLOCK_N, BLOCK_K)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            log_u = tl.load(log_u_ptr + k, mask=k < K, other=0.0)
            x = _load_scores(s_ptr, n, N, k, K, log2e_over_eps) + log_u[None, :]
            inside = (n < N)[:, None] & (k < K)[None, :]
            at = codes_ptr + n[:, None] * K + k[None, :]
            tl.store(at, tl.exp2(x - lse[:, None]), mask=inside)


def _launch(kernel, programs: int, config: Config, *arguments, **constants) -> None:
    kernel[(programs,)](
        *arguments,
        **constants,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
    )


def forward(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Codes (N, K) in float32, each row a distribution, of scores (N, K): samples × prototypes."""
    configs.assert_supported(scores)
    assert iterations >= 1, iterations
    N, K = scores.shape
    align = math.gcd(K, 8)
    factor = math.log2(math.e) / epsilon
    one_block = K <= LONGEST
    sweep, columns = config_of(SWEEP, K), config_of(COLUMNS, K)

    # The rows are dealt to a fixed number of programs, whose parts of the columns' sums are then
    # merged in order: few programs, because the parts are traffic, but enough to fill the GPU.
    programs = configs.multiprocessors(scores) * WARPS_PER_MULTIPROCESSOR // sweep.num_warps
    rows = triton.cdiv(N, min(programs, triton.cdiv(N, sweep.block_n)))
    parts = triton.cdiv(N, rows)
    column_programs = parts * triton.cdiv(K, columns.block_k)

    log_u = torch.zeros(K, dtype=torch.float32, device=scores.device)
    column_parts = torch.empty(parts, K, dtype=torch.float32, device=scores.device)
    codes = torch.empty(N, K, dtype=torch.float32, device=scores.device)
    lse = None if one_block else torch.empty(N, dtype=torch.float32, device=scores.device)
    with torch.cuda.device_of(scores):
        for iteration in range(iterations):
            arguments = (column_parts, N, K, rows, factor)
            if iteration == 0:
                _launch(
                    columns_kernel, column_programs, columns,
                    scores, log_u, None, *arguments, HAS_LSE=False, ALIGN=align,
                )  # fmt: skip
            elif one_block:
                _launch(sweep_kernel, parts, sweep, scores, log_u, *arguments, ALIGN=align)
            else:
                _launch(rows_kernel, N, LONG_ROW, scores, log_u, lse, N, K, factor, ALIGN=align)
                _launch(
                    columns_kernel, column_programs, columns,
                    scores, log_u, lse, *arguments, HAS_LSE=True, ALIGN=align,
                )  # fmt: skip
            finish_kernel[(triton.cdiv(K, FINISH_BLOCK_K),)](
                column_parts, log_u, K, parts,
                BLOCK_P=FINISH_PARTS, BLOCK_K=FINISH_BLOCK_K, ALIGN=align, num_warps=4,
            )  # fmt: skip
        last = sweep if one_block else LONG_ROW
        _launch(
            codes_kernel, triton.cdiv(N, last.block_n), last,
            scores, log_u, codes, N, K, factor, ONE_BLOCK=one_block, ALIGN=align,
        )  # fmt: skip
    return codes
