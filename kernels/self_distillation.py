"""DINO's cross entropy between views, the teacher's targets made on the fly.

    y_i    = softmax(t_T (teacher_i − center))             i: T teacher views
    s_v    = t_S student_v,   lse_v = log Σ_k exp s_vk     v: S student views
    loss   = 1/P Σ_{i≠v} Σ_k y_ik (lse_v − s_vk)           P pairs (i, v) of different views
    Y_v    = Σ_{i≠v} y_i,   c_v the number of its terms
    ∂loss/∂student_v = t_S/P (c_v exp(s_v − lse_v) − Y_v)
    ∂loss/∂t_S       = 1/P Σ_vk student_vk (c_v exp(s_vk − lse_v) − Y_vk)

per sample n. One program has a sample and a block b of prototypes: it makes the teachers' e_ik
once, in registers, and goes through the student views. Forward it leaves, for each view, its
maximum m and the sum l of exponentials, and for each pair

    d_vi = Σ_{k∈b} e_ik (s_vk − m_v),   e_ik = exp(t_T (teacher_ik − center_k) − m_i)

which the finish kernel brings to the views' common maxima M, sums L, in a fixed order:

    Σ_k y_ik (lse_v − s_vk) = log L_v − Σ_b exp(m_ib − M_i)/L_i (d_vib + l_ib (m_vb − M_v))

Only differences of logits are added up, so that their offset costs no accuracy. No stored targets
and no tensor of pairs: each logit is read once forward; backward read once, and its gradient
written once. Extra memory S·T floats for each program.
Plain version: fastcl/reference/self_distillation.py. CPU twin: csrc/self_distillation.cpp.
Source: Caron et al. 2021, arXiv:2104.14294, equation 3 and algorithm 1.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcl.kernels import configs
from fastcl.kernels._tiles import LN2, LOG2E, wide

# Teacher logits of a program: 32 a thread, beside 16 of one student at 2 teacher views.
TILE = 4096
WARPS = 4
LARGEST_BLOCK = 2048
PARTS = 64  # that the finish kernel adds at a time


def block_of(teachers: int, k: int) -> tuple[int, int]:
    """-> (BLOCK_T, BLOCK_K): all teacher views, padded, and the prototypes beside them."""
    block_t = triton.next_power_of_2(teachers)
    longest = max(min(TILE // block_t, LARGEST_BLOCK), 128)
    return block_t, max(min(triton.next_power_of_2(k), longest), 128)


@triton.jit
def _centred(teacher_ptr, center_ptr, scale_ptr, i, n, k, T, N, K):
    """(BLOCK_T, BLOCK_K): log₂ e · t_T (teacher − center), −∞ outside."""
    inside = (i < T)[:, None] & (k < K)[None, :]
    at = teacher_ptr + (wide(i) * N + n)[:, None] * K + k[None, :]
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(center_ptr + k, mask=k < K, other=0.0).to(tl.float32)
    return tl.where(inside, (x - c[None, :]) * (tl.load(scale_ptr) * LOG2E), float("-inf"))


@triton.jit
def _student(student_ptr, v, n, k, N, K):
    """(1, BLOCK_K): the logits of view v."""
    at = student_ptr + (wide(v) * N + n) * K + k
    return tl.load(at, mask=k < K, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["S", "T", "N", "K"])
def forward_kernel(
    student_ptr,  # (S, N, K)
    teacher_ptr,  # (T, N, K)
    center_ptr,  # (K,)
    student_scale_ptr,  # ()
    teacher_scale_ptr,  # ()
    # Out, in powers of two, one column for each block of prototypes:
    student_part_ptr,  # (2, S, N, blocks): m / |t_S|, l
    teacher_part_ptr,  # (2, T, N, blocks): m, l
    pair_part_ptr,  # (S, T, N, blocks): d
    S,
    T,
    N,
    K,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    K = (K // ALIGN) * ALIGN  # the same number, known to be a multiple: 128-bit loads
    blocks = tl.cdiv(K, BLOCK_K)
    n = wide(tl.program_id(0) // blocks)
    block = tl.program_id(0) % blocks
    k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    i = tl.arange(0, BLOCK_T)
    x = _centred(teacher_ptr, center_ptr, teacher_scale_ptr, i, n, k, T, N, K)
    m = tl.where(i < T, tl.max(x, axis=1), 0.0)
    e = tl.exp2(x - m[:, None])  # (BLOCK_T, BLOCK_K)
    at = (wide(i) * N + n) * blocks + block
    tl.store(teacher_part_ptr + at, m, mask=i < T)
    tl.store(teacher_part_ptr + wide(T) * N * blocks + at, tl.sum(e, axis=1), mask=i < T)
    scale = tl.load(student_scale_ptr)
    for v in range(S):
        x_v = _student(student_ptr, v, n, k, N, K)
        x_v = tl.where((k < K)[None, :], tl.where(scale < 0, -x_v, x_v), float("-inf"))
        m_v = tl.max(x_v, axis=1)  # (1,)
        s = (x_v - m_v[:, None]) * (tl.abs(scale) * LOG2E)  # the product would round the offset
        s = tl.where((k < K)[None, :], s, float("-inf"))  # where the scale is 0, too
        l_v = tl.sum(tl.exp2(s), axis=1)
        d = tl.sum(tl.where(e == 0.0, 0.0, e * s), axis=1)  # 0 · −∞ = 0
        one = (wide(v) * N + n) * blocks + block + tl.arange(0, 1)
        tl.store(student_part_ptr + one, m_v)
        tl.store(student_part_ptr + wide(S) * N * blocks + one, l_v)
        pair = ((wide(v) * T + i) * N + n) * blocks + block
        tl.store(pair_part_ptr + pair, d, mask=i < T)


@triton.jit
def _common(m_ptr, l_ptr, scale, blocks, PARTS: tl.constexpr):
    """-> M, the largest of m, and L = Σ_b l 2^(scale (m − M))."""
    M = float("-inf")
    for start in range(0, blocks, PARTS):
        b = start + tl.arange(0, PARTS)
        M = tl.maximum(M, tl.max(tl.load(m_ptr + b, mask=b < blocks, other=float("-inf")), axis=0))
    L = 0.0
    for start in range(0, blocks, PARTS):
        b = start + tl.arange(0, PARTS)
        m = tl.load(m_ptr + b, mask=b < blocks, other=float("-inf"))
        l = tl.load(l_ptr + b, mask=b < blocks, other=0.0)
        L += tl.sum(l * tl.exp2(tl.where(b < blocks, scale * (m - M), 0.0)), axis=0)
    return M, L


@triton.jit(do_not_specialize=["S", "T", "N", "blocks"])
def finish_kernel(
    student_part_ptr,  # (2, S, N, blocks)
    teacher_part_ptr,  # (2, T, N, blocks)
    pair_part_ptr,  # (S, T, N, blocks)
    student_scale_ptr,  # ()
    loss_ptr,  # (S, N) out: view v's part of the loss
    student_lse_ptr,  # (S, N) out
    teacher_lse_ptr,  # (T, N) out
    S,
    T,
    N,
    blocks,
    per_pair,  # 1/P
    PARTS: tl.constexpr,
):
    """One student view of one sample."""
    v = tl.program_id(0) // N
    n = tl.program_id(0) % N
    scale = tl.abs(tl.load(student_scale_ptr)) * LOG2E
    m_v_ptr = student_part_ptr + (wide(v) * N + n) * blocks
    M_v, L_v = _common(m_v_ptr, m_v_ptr + wide(S) * N * blocks, scale, blocks, PARTS)
    log_l = tl.log2(L_v)
    tl.store(student_lse_ptr + wide(v) * N + n, (M_v * scale + log_l) * LN2)
    loss = 0.0
    for i in range(T):
        m_i_ptr = teacher_part_ptr + (wide(i) * N + n) * blocks
        l_i_ptr = m_i_ptr + wide(T) * N * blocks
        M_i, L_i = _common(m_i_ptr, l_i_ptr, 1.0, blocks, PARTS)
        if v == 0:
            tl.store(teacher_lse_ptr + wide(i) * N + n, (M_i + tl.log2(L_i)) * LN2)
        if i != v:
            mean = 0.0  # Σ_k y_ik (s_vk − M_v)
            for start in range(0, blocks, PARTS):
                b = start + tl.arange(0, PARTS)
                m_i = tl.load(m_i_ptr + b, mask=b < blocks, other=float("-inf"))
                l_i = tl.load(l_i_ptr + b, mask=b < blocks, other=0.0)
                m_v = tl.load(m_v_ptr + b, mask=b < blocks, other=0.0)
                at = ((wide(v) * T + i) * N + n) * blocks
                d = tl.load(pair_part_ptr + at + b, mask=b < blocks, other=0.0)
                share = tl.exp2(m_i - M_i) / L_i
                mean += tl.sum(share * (d + l_i * (scale * (m_v - M_v))), axis=0)
            loss += log_l - mean
    tl.store(loss_ptr + wide(v) * N + n, loss * (LN2 * per_pair))


@triton.jit(do_not_specialize=["S", "T", "N", "K"])
def backward_kernel(
    grad_ptr,  # (N,)
    student_ptr,  # (S, N, K)
    teacher_ptr,  # (T, N, K)
    center_ptr,  # (K,)
    student_scale_ptr,  # ()
    teacher_scale_ptr,  # ()
    student_lse_ptr,  # (S, N)
    teacher_lse_ptr,  # (T, N)
    grad_student_ptr,  # (S, N, K) out
    grad_scale_ptr,  # (programs,) out
    S,
    T,
    N,
    K,
    per_pair,  # 1/P
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALIGN: tl.constexpr,
):
    K = (K // ALIGN) * ALIGN
    blocks = tl.cdiv(K, BLOCK_K)
    n = wide(tl.program_id(0) // blocks)
    k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    i = tl.arange(0, BLOCK_T)
    g = tl.load(grad_ptr + n).to(tl.float32) * per_pair
    x = _centred(teacher_ptr, center_ptr, teacher_scale_ptr, i, n, k, T, N, K)
    lse = tl.load(teacher_lse_ptr + wide(i) * N + n, mask=i < T, other=0.0)
    y = tl.exp2(x - lse[:, None] * LOG2E)  # (BLOCK_T, BLOCK_K)
    scale = tl.load(student_scale_ptr)
    dscale = tl.zeros((1, BLOCK_K), tl.float32)
    for v in range(S):
        # The sum of the others, not the sum less the own: nothing cancels.
        Y = tl.sum(tl.where((i == v)[:, None], 0.0, y), axis=0)[None, :]
        c = T - tl.where(v < T, 1, 0)
        x_v = _student(student_ptr, v, n, k, N, K)
        lse_v = tl.load(student_lse_ptr + wide(v) * N + n) * LOG2E
        residual = g * (c * tl.exp2(x_v * (scale * LOG2E) - lse_v) - Y)  # (1, BLOCK_K)
        at = grad_student_ptr + (wide(v) * N + n) * K + k
        dx = (scale * residual).to(grad_student_ptr.dtype.element_ty)
        tl.store(at[None, :], dx, mask=(k < K)[None, :])
        dscale += tl.where((k < K)[None, :], residual * x_v, 0.0)
    tl.store(grad_scale_ptr + tl.program_id(0), tl.sum(tl.sum(dscale, axis=1), axis=0))


def pair_count(students: int, teachers: int) -> int:
    """P: the pairs of different views."""
    return students * teachers - min(students, teachers)


def forward(
    student: Tensor, teacher: Tensor, center: Tensor, student_scale: Tensor, teacher_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """student (S, N, K), teacher (T, N, K), center (K,) -> loss (N,), student lse (S, N) and
    centred teacher lse (T, N), float32."""
    configs.assert_supported(student, teacher, center)
    (S, N, K), T = student.shape, teacher.shape[0]
    assert teacher.shape[1:] == (N, K) and center.shape == (K,) and pair_count(S, T) > 0
    block_t, block_k = block_of(T, K)
    blocks = triton.cdiv(K, block_k)
    new = dict(dtype=torch.float32, device=student.device)
    student_part = torch.empty(2, S, N, blocks, **new)
    teacher_part = torch.empty(2, T, N, blocks, **new)
    pair_part = torch.empty(S, T, N, blocks, **new)
    view_loss = torch.empty(S, N, **new)
    student_lse = torch.empty(S, N, **new)
    teacher_lse = torch.empty(T, N, **new)
    if N:
        with torch.cuda.device_of(student):
            forward_kernel[(N * blocks,)](
                student,
                teacher,
                center,
                student_scale,
                teacher_scale,
                student_part,
                teacher_part,
                pair_part,
                S,
                T,
                N,
                K,
                BLOCK_T=block_t,
                BLOCK_K=block_k,
                ALIGN=math.gcd(K, 8),
                num_warps=WARPS,
            )
            finish_kernel[(S * N,)](
                student_part,
                teacher_part,
                pair_part,
                student_scale,
                view_loss,
                student_lse,
                teacher_lse,
                S,
                T,
                N,
                blocks,
                1 / pair_count(S, T),
                PARTS=PARTS,
                num_warps=1,
            )
    return view_loss.sum(0), student_lse, teacher_lse


def backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    """grad (N,) -> grad_student (S, N, K) in the student's dtype, grad_student_scale () float32."""
    configs.assert_supported(student, teacher, center)
    (S, N, K), T = student.shape, teacher.shape[0]
    block_t, block_k = block_of(T, K)
    programs = N * triton.cdiv(K, block_k)
    grad_student = torch.empty_like(student)
    grad_scale = torch.empty(programs, dtype=torch.float32, device=student.device)
    if programs:
        with torch.cuda.device_of(student):
            backward_kernel[(programs,)](
                grad,
                student,
                teacher,
                center,
                student_scale,
                teacher_scale,
                student_lse,
                teacher_lse,
                grad_student,
                grad_scale,
                S,
                T,
                N,
                K,
                1 / pair_count(S, T),
                BLOCK_T=block_t,
                BLOCK_K=block_k,
                ALIGN=math.gcd(K, 8),
                num_warps=WARPS,
                **configs.registers(student, 168),  # ptxas would spill for more blocks
            )
    return grad_student, grad_scale.sum()
