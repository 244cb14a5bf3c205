"""Cross entropy with soft targets, for rows of any length.

    s_ik   = scale · x_ik
    lse_i  = log Σ_k exp s_ik
    mass_i = Σ_k y_ik                                            (1 for probabilities)
    loss_i = −Σ_k y_ik (s_ik − lse_i) = mass_i log l_i − c_i     m_i = max_k s_ik
                                                                 l_i = Σ_k exp(s_ik − m_i)
                                                                 c_i = Σ_k y_ik (s_ik − m_i)
    ∂loss_i/∂x_ik   = scale (mass_i p_ik − y_ik),                p_ik = exp(s_ik − lse_i)
    ∂loss_i/∂scale  = Σ_k (mass_i p_ik − y_ik) x_ik

A class with y_ik = 0 adds nothing, even where x_ik = −∞. Bytes moved, with b bytes an element:
forward N·K·(b_x + b_y), backward N·K·(2 b_x + b_y): each logit is read once forward, and backward
read once and its gradient written once. Accumulates in float32. Long rows are split over programs
and the parts merged in a fixed order: the same bits on every run.
Plain version: fastcl/reference/soft_cross_entropy.py. CPU twin: csrc/soft_cross_entropy.cpp.
Source: online max and sum: Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import configs

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e38)  # a first maximum whose differences are finite: −∞ − (−∞) is NaN


class Config(NamedTuple):
    """Rows and classes of one program's tile."""

    block_n: int
    block_k: int
    num_warps: int


# 16 values of each input a thread: two to four 128-bit loads in flight for each. Short rows share a
# program, long rows are looped over.
CONFIGS = {k: Config(2048 // k, k, 4) for k in (128, 256, 512, 1024, 2048)}
# Rows are split until there are this many programs: 16 rows of 65,536 become 512 programs, which
# keep 4 blocks on each of 132 multiprocessors. A constant, so that every GPU returns the same bits.
PROGRAMS = 1024
MAX_SPLITS = 64
SUM_BLOCK = 1024  # of the kernel that adds up the programs' parts of the scale's gradient


def config_of(k: int) -> Config:
    """The configuration whose block just holds k classes, or the longest."""
    return CONFIGS[min(max(triton.next_power_of_2(k), min(CONFIGS)), max(CONFIGS))]


@triton.jit
def _load_tile(x_ptr, inside, n, k, K):
    return tl.load(x_ptr + n[:, None] * K + k[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N", "K", "splits", "blocks_per_split"])
def forward_kernel(
    x_ptr,  # (N, K)
    y_ptr,  # (N, K)
    scale_ptr,  # ()
    loss_ptr,  # (N,), and below; or all three unused when SPLIT
    lse_ptr,
    mass_ptr,
    parts_ptr,  # (4, N, splits): m, l, c, mass of each part of a row, if SPLIT
    N,
    K,
    splits,
    blocks_per_split,
    SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    K = (K // ALIGN) * ALIGN  # the same number, known to be a multiple: 128-bit loads
    split = tl.program_id(0) % splits
    n = (tl.program_id(0) // splits).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr)
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    # Sums stay one per lane until the end; only the maximum is taken across lanes in the loop.
    l = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    c = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    mass = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (k < K)[None, :]
        x = _load_tile(x_ptr, inside, n, k, K)  # (BLOCK_N, BLOCK_K)
        y = _load_tile(y_ptr, inside, n, k, K)
        s = tl.where(inside, x * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        d = s - m_new[:, None]
        l = l * tl.exp2((m - m_new) * LOG2E)[:, None] + tl.exp2(d * LOG2E)
        c += mass * (m - m_new)[:, None] + y * tl.where(y == 0.0, 0.0, d)  # 0 · −∞ = 0
        mass += y
        m = m_new
    l_n, c_n, mass_n = tl.sum(l, axis=1), tl.sum(c, axis=1), tl.sum(mass, axis=1)
    if SPLIT:
        part = parts_ptr + n * splits + split
        stride = N.to(tl.int64) * splits
        tl.store(part, m, mask=n < N)
        tl.store(part + stride, l_n, mask=n < N)
        tl.store(part + 2 * stride, c_n, mask=n < N)
        tl.store(part + 3 * stride, mass_n, mask=n < N)
    else:
        _store_rows(loss_ptr, lse_ptr, mass_ptr, n, N, m, l_n, c_n, mass_n)


@triton.jit
def _store_rows(loss_ptr, lse_ptr, mass_ptr, n, N, m, l, c, mass):
    log_l = tl.log(l)
    lse = m + log_l
    # What rounding added to lse: 1e-3 where logits are near 25,000. It goes into the mass, so that
    # backward's mass · exp(s − lse) still sums to the mass over k.
    rounding = tl.where(l > 0.0, (lse - m) - log_l, 0.0)
    # A row without targets and without finite logits: 0 · −∞ must be 0.
    tl.store(loss_ptr + n, tl.where(mass == 0.0, 0.0, mass * log_l) - c, mask=n < N)
    tl.store(lse_ptr + n, lse, mask=n < N)
    tl.store(mass_ptr + n, mass * tl.exp(rounding), mask=n < N)


@triton.jit(do_not_specialize=["N", "splits"])
def merge_kernel(
    parts_ptr,  # (4, N, splits)
    loss_ptr,  # (N,)
    lse_ptr,  # (N,)
    mass_ptr,  # (N,)
    N,
    splits,
    BLOCK_S: tl.constexpr,
):
    """One row a program: its parts brought to their common maximum."""
    n = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    split = tl.arange(0, BLOCK_S)[None, :]
    inside = split < splits
    part = parts_ptr + n[:, None] * splits + split
    stride = N.to(tl.int64) * splits
    m_s = tl.load(part, mask=inside, other=LOWEST)  # (1, BLOCK_S)
    l_s = tl.load(part + stride, mask=inside, other=0.0)
    c_s = tl.load(part + 2 * stride, mask=inside, other=0.0)
    mass_s = tl.load(part + 3 * stride, mask=inside, other=0.0)
    m = tl.max(m_s, axis=1)
    d = m_s - m[:, None]
    l = tl.sum(l_s * tl.exp2(d * LOG2E), axis=1)
    c = tl.sum(c_s + mass_s * d, axis=1)
    _store_rows(loss_ptr, lse_ptr, mass_ptr, n, N, m, l, c, tl.sum(mass_s, axis=1))


@triton.jit(do_not_specialize=["N", "K", "splits", "blocks_per_split"])
def backward_kernel(
    g_ptr,  # (N,)
    x_ptr,  # (N, K)
    y_ptr,  # (N, K)
    scale_ptr,  # ()
    lse_ptr,  # (N,)
    mass_ptr,  # (N,)
    dx_ptr,  # (N, K)
    dscale_ptr,  # (programs,)
    N,
    K,
    splits,
    blocks_per_split,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    K = (K // ALIGN) * ALIGN
    split = tl.program_id(0) % splits
    n = (tl.program_id(0) // splits).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr)
    g = tl.load(g_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + n, mask=n < N, other=0.0)
    mass = tl.load(mass_ptr + n, mask=n < N, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # every logit −∞: then every p is 0, not NaN
    dscale = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    first = split * blocks_per_split
    for block in range(first, tl.minimum(first + blocks_per_split, tl.cdiv(K, BLOCK_K))):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = (n < N)[:, None] & (k < K)[None, :]
        x = _load_tile(x_ptr, inside, n, k, K)
        y = _load_tile(y_ptr, inside, n, k, K)
        p = tl.exp2((x * scale - lse[:, None]) * LOG2E)
        ds = g[:, None] * (mass[:, None] * p - y)  # ∂/∂s, (BLOCK_N, BLOCK_K)
        dx = (scale * ds).to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + n[:, None] * K + k[None, :], dx, mask=inside)
        dscale += tl.where(inside & (ds != 0.0), ds * x, 0.0)
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(tl.sum(dscale, axis=1), axis=0))


@triton.jit(do_not_specialize=["count"])
def sum_kernel(parts_ptr, total_ptr, count, BLOCK: tl.constexpr):
    """Adds up float32 parts in a fixed order, in one program."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(parts_ptr + i, mask=i < count, other=0.0)
    tl.store(total_ptr, tl.sum(total, axis=0))


class Grid(NamedTuple):
    """How N rows of K classes are given to programs: row blocks × splits of a row."""

    config: Config
    row_blocks: int
    splits: int
    blocks_per_split: int


def grid_of(n: int, k: int) -> Grid:
    """Splits rows only when there are too few of them to fill a GPU."""
    config = config_of(k)
    row_blocks = triton.cdiv(n, config.block_n)
    k_blocks = triton.cdiv(k, config.block_k)
    splits = max(1, min(k_blocks, MAX_SPLITS, triton.cdiv(PROGRAMS, row_blocks)))
    blocks_per_split = triton.cdiv(k_blocks, splits)
    return Grid(config, row_blocks, triton.cdiv(k_blocks, blocks_per_split), blocks_per_split)


def forward(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of logits (N, K) and targets (N, K): loss, lse and mass, each (N,) float32; scale is ().

    The mass is for backward: it is multiplied by exp(lse as rounded − lse).
    """
    configs.assert_supported(logits, targets)
    N, K = logits.shape
    grid = grid_of(N, K)
    split = grid.splits > 1
    loss = torch.empty(N, dtype=torch.float32, device=logits.device)
    lse, mass = torch.empty_like(loss), torch.empty_like(loss)
    parts = None
    if split:
        parts = torch.empty(4, N, grid.splits, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        forward_kernel[(grid.row_blocks * grid.splits,)](
            logits,
            targets,
            scale,
            loss,
            lse,
            mass,
            parts,
            N,
            K,
            grid.splits,
            grid.blocks_per_split,
            SPLIT=split,
            BLOCK_N=grid.config.block_n,
            BLOCK_K=grid.config.block_k,
            ALIGN=math.gcd(K, 8),
            num_warps=grid.config.num_warps,
        )
        if split:
            merge_kernel[(N,)](
                parts, loss, lse, mass, N, grid.splits, BLOCK_S=MAX_SPLITS, num_warps=1
            )
    return loss, lse, mass


def backward(
    grad: Tensor, logits: Tensor, targets: Tensor, scale: Tensor, lse: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of Σ_i grad_i loss_i: of logits (N, K) in their dtype, of scale () in float32."""
    configs.assert_supported(logits, targets)
    N, K = logits.shape
    grid = grid_of(N, K)
    programs = grid.row_blocks * grid.splits
    grad_logits = torch.empty_like(logits)
    parts = torch.empty(programs, dtype=torch.float32, device=logits.device)
    grad_scale = torch.empty((), dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        backward_kernel[(programs,)](
            grad,
            logits,
            targets,
            scale,
            lse,
            mass,
            grad_logits,
            parts,
            N,
            K,
            grid.splits,
            grid.blocks_per_split,
            BLOCK_N=grid.config.block_n,
            BLOCK_K=grid.config.block_k,
            ALIGN=math.gcd(K, 8),
            num_warps=grid.config.num_warps,
            **configs.registers(logits, 128),  # ptxas would spill for more blocks
        )
        sum_kernel[(1,)](parts, grad_scale, programs, BLOCK=SUM_BLOCK, num_warps=4)
    return grad_logits, grad_scale
