"""DINO's cross entropy between views, the teacher's targets made on the fly, in plain torch.

    y_i  = softmax(t_T (teacher_i − center))               i: T teacher views
    loss = 1/M Σ_{i≠v} −Σ_k y_ik log softmax(t_S student_v)_k      M pairs (i, v) of different views
         = 1/M Σ_v [ c_v lse_v − t_S Σ_k student_vk Y_vk ]
    Y_v  = Σ_{i≠v} y_i,   c_v the number of its terms
    ∂loss/∂student_v = t_S/M (c_v softmax(t_S student_v) − Y_v)
    ∂loss/∂t_S       = 1/M Σ_vk student_vk (c_v softmax_vk − Y_vk)

per sample n. Y_v is all that a student view needs: no tensor of pairs.
Source: Caron et al. 2021, arXiv:2104.14294, equation 3 and algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.reference._common import in_float


def teacher_targets(teacher: Tensor, center: Tensor, teacher_scale: Tensor) -> Tensor:
    """y (T, N, K)."""
    x = in_float(teacher)
    return (teacher_scale.to(x.dtype) * (x - center.to(x.dtype))).softmax(2)


def targets_of(y: Tensor, v: int) -> tuple[Tensor, int]:
    """Y_v (N, K) and c_v for student view v."""
    own = y[v] if v < len(y) else torch.zeros_like(y[0])
    return y.sum(0) - own, len(y) - (v < len(y))


def pair_count(students: int, teachers: int) -> int:
    return students * teachers - min(students, teachers)


def self_distillation(
    student: Tensor, teacher: Tensor, center: Tensor, student_scale: Tensor, teacher_scale: Tensor
) -> Tensor:
    """loss (N,) of student (S, N, K), teacher (T, N, K) and center (K,)."""
    x = in_float(student)
    y = teacher_targets(teacher, center, teacher_scale)
    log_q = (student_scale.to(x.dtype) * x).log_softmax(2)
    terms = [-(y[i] * log_q[v]).sum(1) for i in range(len(y)) for v in range(len(x)) if i != v]
    return torch.stack(terms).mean(0)


def forward(
    student: Tensor, teacher: Tensor, center: Tensor, student_scale: Tensor, teacher_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """loss (N,), lse of the students (S, N) and of the centred teachers (T, N)."""
    x, t = in_float(student), student_scale.to(in_float(student).dtype)
    student_lse = (t * x).logsumexp(2)
    centred = in_float(teacher) - center.to(in_float(teacher).dtype)
    teacher_lse = (teacher_scale.to(centred.dtype) * centred).logsumexp(2)
    loss = self_distillation(student, teacher, center, student_scale, teacher_scale)
    return loss, student_lse, teacher_lse


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
    """grad_student (S, N, K) and grad_student_scale (); grad (N,)."""
    x, t = in_float(student), student_scale.to(in_float(student).dtype)
    y = teacher_targets(teacher, center, teacher_scale)
    dx, dscale = torch.empty_like(x), x.new_zeros(())
    for v in range(len(x)):
        Y, c = targets_of(y, v)
        residual = c * (t * x[v] - student_lse[v, :, None]).exp() - Y
        residual = residual * (grad / pair_count(len(x), len(y)))[:, None]
        dx[v] = t * residual
        dscale = dscale + (x[v] * residual).sum()
    return dx.to(student.dtype), dscale.to(student_scale.dtype)
