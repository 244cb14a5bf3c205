"""The registered operation fastcl::self_distillation; teacher and centre get no gradient.

Formula in fastcl/reference/self_distillation.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl import _C
from fastcl.ops._backend import DTYPE_CODES, implementation, pointer
from fastcl.ops._library import (
    contiguous,
    define,
    differentiate,
    statistics_dtype,
)

WORD = "self_distillation"


class Cpp:
    """Allocates the outputs and calls csrc/self_distillation.cpp."""

    @staticmethod
    def forward(
        student: Tensor,
        teacher: Tensor,
        center: Tensor,
        student_scale: Tensor,
        teacher_scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        loss = student.new_empty(student.shape[1], dtype=torch.float32)
        student_lse = student.new_empty(student.shape[:2], dtype=torch.float32)
        teacher_lse = student.new_empty(teacher.shape[:2], dtype=torch.float32)
        inputs = student, teacher, center, student_scale, teacher_scale
        _C.kernels.self_distillation_forward(
            *map(pointer, (*inputs, loss, student_lse, teacher_lse)),
            *sizes_and_type(student, teacher),
        )
        return loss, student_lse, teacher_lse

    @staticmethod
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
        grad_student, grad_scale = torch.empty_like(student), torch.empty_like(student_scale)
        inputs = grad, student, teacher, center, student_scale, teacher_scale
        _C.kernels.self_distillation_backward(
            *map(pointer, (*inputs, student_lse, teacher_lse, grad_student, grad_scale)),
            *sizes_and_type(student, teacher),
        )
        return grad_student, grad_scale


def sizes_and_type(student: Tensor, teacher: Tensor) -> tuple[int, ...]:
    sizes = student.shape[0], teacher.shape[0], *student.shape[1:]
    return *sizes, DTYPE_CODES[student.dtype], torch.get_num_threads()


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
    ctx.set_materialize_grads(False)
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
differentiate(self_distillation, backward, setup_context)
