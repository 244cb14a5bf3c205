"""The registered operation fastcl::self_distillation; teacher and centre get no gradient.

Formula in fastcl/reference/self_distillation.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastcl.ops._backend import implementation
from fastcl.ops._library import (
    contiguous,
    define,
    differentiate,
    refuse_second_derivative,
    statistics_dtype,
)
from fastcl.reference import self_distillation as Cpp

WORD = "self_distillation"


def run_forward(
    student: Tensor, teacher: Tensor, center: Tensor, student_scale: Tensor, teacher_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    loss, student_lse, teacher_lse = implementation(WORD, student, Cpp).forward(
        *contiguous(student, teacher, center, student_scale, teacher_scale)
    )
    return loss, student_lse, teacher_lse


def fake_forward(
    student: Tensor, teacher: Tensor, center: Tensor, student_scale: Tensor, teacher_scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(student)
    return (
        student.new_empty(student.shape[1], dtype=dtype),
        student.new_empty(student.shape[:2], dtype=dtype),
        student.new_empty(teacher.shape[:2], dtype=dtype),
    )


def run_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    grad_student, grad_scale = implementation(WORD, student, Cpp).backward(
        *contiguous(grad, student, teacher, center, student_scale, teacher_scale),
        *contiguous(student_lse, teacher_lse),
    )
    return grad_student, grad_scale


def fake_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    student_scale: Tensor,
    teacher_scale: Tensor,
    student_lse: Tensor,
    teacher_lse: Tensor,
) -> tuple[Tensor, Tensor]:
    return student.new_empty(student.shape), student_scale.new_empty(())


def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs, *output[1:])


def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    need_student, need_teacher, need_center, need_scale, need_teacher_scale = ctx.needs_input_grad
    if need_teacher or need_center or need_teacher_scale:
        raise NotImplementedError("fastcl::self_distillation differentiates the student only.")
    grad_student, grad_scale = self_distillation_backward(grad, *ctx.saved_tensors)
    return (
        grad_student if need_student else None,
        None,
        None,
        grad_scale if need_scale else None,
        None,
    )


self_distillation = define(
    "self_distillation(Tensor student, Tensor teacher, Tensor center, Tensor student_scale, "
    "Tensor teacher_scale) -> (Tensor, Tensor, Tensor)",
    run_forward,
    fake_forward,
)
self_distillation_backward = define(
    "self_distillation_backward(Tensor grad, Tensor student, Tensor teacher, Tensor center, "
    "Tensor student_scale, Tensor teacher_scale, Tensor student_lse, Tensor teacher_lse) "
    "-> (Tensor, Tensor)",
    run_backward,
    fake_backward,
)
differentiate(WORD, backward, setup_context)
refuse_second_derivative("self_distillation_backward")
