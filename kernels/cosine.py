"""Negative cosine similarity of matching rows.

    n_p = max(‖p‖, ε),  n_t = max(‖t‖, ε)
    c      = p · t / (n_p n_t)
    loss   = −c
    ∂loss/∂p = −(t/n_t − c p/n_p) / n_p        the term in c only where ‖p‖ ≥ ε: below it n_p
    ∂loss/∂t = −(p/n_p − c t/n_t) / n_t        is a constant; likewise for t

One row of each input is (D,). Bytes moved, with b bytes an element: forward 2·N·D·b; backward
2·N·D·b read, and N·D·b written for each gradient asked for. Backward reads rows longer than 8,192
twice, the second time mostly from the cache. Accumulates in float32.
Plain version: fastcl/reference/cosine.py. CPU twin: csrc/cosine.cpp.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import configs


class Config(NamedTuple):
    """Rows and features of one program's tile."""

    block_n: int
    block_d: int
    num_warps: int


# Forward: 16 values of each input a thread, that is two to four 128-bit loads in flight for each;
# short rows share a program. Longer rows are looped over.
FORWARD = {d: Config(2048 // d, d, 4) for d in (128, 256, 512, 1024, 2048)}
# Backward keeps whole rows in registers, so that they are read once; 8,192 features fill 16 warps.
BACKWARD = {**FORWARD, 4096: Config(1, 4096, 8), 8192: Config(1, 8192, 16)}


def config_of(configs: dict[int, Config], d: int) -> Config:
    """The configuration whose block just holds d features, or the longest."""
    return configs[min(max(triton.next_power_of_2(d), min(configs)), max(configs))]


@triton.jit
def _load_tile(x_ptr, n, d, N, D):
    inside = (n < N)[:, None] & (d < D)[None, :]
    return tl.load(x_ptr + n[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["N", "D"])
def forward_kernel(
    p_ptr,  # (N, D)
    t_ptr,  # (N, D)
    loss_ptr,  # (N,)
    N,
    D,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    D = (D // ALIGN) * ALIGN  # the same number, known to be a multiple: 128-bit loads
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    pp = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    tt = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    pt = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        p = _load_tile(p_ptr, n, d, N, D)  # (BLOCK_N, BLOCK_D)
        t = _load_tile(t_ptr, n, d, N, D)
        pp += p * p
        tt += t * t
        pt += p * t
    n_p = tl.maximum(tl.sqrt(tl.sum(pp, axis=1)), eps)  # (BLOCK_N,)
    n_t = tl.maximum(tl.sqrt(tl.sum(tt, axis=1)), eps)
    c = tl.sum(pt, axis=1) / n_p / n_t
    tl.store(loss_ptr + n, -c, mask=n < N)


@triton.jit
def _coefficients(pp, tt, pt, g, eps):
    """The four row factors of dp = a t + b_p p and dt = a p + b_t t; each is (BLOCK_N,)."""
    norm_p = tl.sqrt(pp)
    norm_t = tl.sqrt(tt)
    n_p = tl.maximum(norm_p, eps)
    n_t = tl.maximum(norm_t, eps)
    c = pt / n_p / n_t
    a = -g / n_p / n_t
    b_p = tl.where(norm_p >= eps, g * c / n_p / n_p, 0.0)
    b_t = tl.where(norm_t >= eps, g * c / n_t / n_t, 0.0)
    return a, b_p, b_t


@triton.jit
def _store_tile(x_ptr, x, n, d, N, D):
    inside = (n < N)[:, None] & (d < D)[None, :]
    tl.store(x_ptr + n[:, None] * D + d[None, :], x.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "D"])
def backward_kernel(
    g_ptr,  # (N,)
    p_ptr,  # (N, D)
    t_ptr,  # (N, D)
    dp_ptr,  # (N, D), written if NEED_P
    dt_ptr,  # (N, D), written if NEED_T
    N,
    D,
    eps,
    NEED_P: tl.constexpr,
    NEED_T: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # a row fits in BLOCK_D
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):
    D = (D // ALIGN) * ALIGN
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    g = tl.load(g_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    if ONE_BLOCK:
        d = tl.arange(0, BLOCK_D)
        p = _load_tile(p_ptr, n, d, N, D)
        t = _load_tile(t_ptr, n, d, N, D)
        pp, tt, pt = tl.sum(p * p, axis=1), tl.sum(t * t, axis=1), tl.sum(p * t, axis=1)
        a, b_p, b_t = _coefficients(pp, tt, pt, g, eps)
        if NEED_P:
            _store_tile(dp_ptr, a[:, None] * t + b_p[:, None] * p, n, d, N, D)
        if NEED_T:
            _store_tile(dt_ptr, a[:, None] * p + b_t[:, None] * t, n, d, N, D)
    else:
        pp = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        tt = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        pt = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            p = _load_tile(p_ptr, n, d, N, D)
            t = _load_tile(t_ptr, n, d, N, D)
            pp += p * p
            tt += t * t
            pt += p * t
        pp, tt, pt = tl.sum(pp, axis=1), tl.sum(tt, axis=1), tl.sum(pt, axis=1)
        a, b_p, b_t = _coefficients(pp, tt, pt, g, eps)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            p = _load_tile(p_ptr, n, d, N, D)
            t = _load_tile(t_ptr, n, d, N, D)
            if NEED_P:
                _store_tile(dp_ptr, a[:, None] * t + b_p[:, None] * p, n, d, N, D)
            if NEED_T:
                _store_tile(dt_ptr, a[:, None] * p + b_t[:, None] * t, n, d, N, D)


def forward(prediction: Tensor, target: Tensor, *, eps: float) -> Tensor:
    """Negative cosine of each row of prediction (N, D) with the same row of target (N, D): (N,)."""
    configs.assert_supported(prediction, target)
    N, D = prediction.shape
    loss = torch.empty(N, dtype=torch.float32, device=prediction.device)
    config = config_of(FORWARD, D)
    with torch.cuda.device_of(prediction):
        forward_kernel[(triton.cdiv(N, config.block_n),)](
            prediction,
            target,
            loss,
            N,
            D,
            float(eps),  # an int would be compiled in
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            ALIGN=math.gcd(D, 8),
            num_warps=config.num_warps,
            **configs.registers(prediction, 128),  # ptxas would spill for a fifth or sixth block
        )
    return loss


def backward(
    grad: Tensor,
    prediction: Tensor,
    target: Tensor,
    *,
    eps: float,
    need_prediction: bool,
    need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of Σ_i grad_i loss_i, in the inputs' dtypes; None for what is not needed."""
    configs.assert_supported(prediction, target)
    N, D = prediction.shape
    grad_prediction = torch.empty_like(prediction) if need_prediction else None
    grad_target = torch.empty_like(target) if need_target else None
    config = config_of(BACKWARD, D)
    with torch.cuda.device_of(prediction):
        backward_kernel[(triton.cdiv(N, config.block_n),)](
            grad,
            prediction,
            target,
            grad_prediction,
            grad_target,
            N,
            D,
            float(eps),
            NEED_P=need_prediction,
            NEED_T=need_target,
            ONE_BLOCK=config.block_d >= D,
            BLOCK_N=config.block_n,
            BLOCK_D=config.block_d,
            ALIGN=math.gcd(D, 8),
            num_warps=config.num_warps,
        )
    return grad_prediction, grad_target
