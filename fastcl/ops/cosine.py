"""The registered operation fastcl::cosine; formula in fastcl/reference/cosine.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl import _C
from fastcl.ops._backend import DTYPE_CODES, implementation, pointer
from fastcl.ops._library import (
    define,
    differentiate,
    statistics_dtype,
)

WORD = "cosine"


class Cpp:
    """Allocates the outputs and calls csrc/cosine.cpp."""

    @staticmethod
    def forward(prediction: Tensor, target: Tensor, *, eps: float) -> Tensor:
        n, d = prediction.shape
        loss = prediction.new_empty(n, dtype=torch.float32)
        _C.kernels.cosine_forward(
            pointer(prediction),
            pointer(target),
            pointer(loss),
            *(n, d, eps, DTYPE_CODES[prediction.dtype], torch.get_num_threads()),
        )
        return loss

    @staticmethod
    def backward(
        grad: Tensor,
        prediction: Tensor,
        target: Tensor,
        *,
        eps: float,
        need_prediction: bool,
        need_target: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        n, d = prediction.shape
        grad_prediction = torch.empty_like(prediction) if need_prediction else None
        grad_target = torch.empty_like(target) if need_target else None
        _C.kernels.cosine_backward(
            pointer(grad),
            pointer(prediction),
            pointer(target),
            pointer(grad_prediction),
            pointer(grad_target),
            *(n, d, eps, DTYPE_CODES[prediction.dtype], torch.get_num_threads()),
        )
        return grad_prediction, grad_target


def run_forward(prediction: Tensor, target: Tensor, eps: float) -> Tensor:
    backend = implementation(WORD, prediction, Cpp)
    loss: Tensor = backend.forward(prediction.contiguous(), target.contiguous(), eps=eps)
    return loss


def run_backward(
    grad: Tensor,
    prediction: Tensor,
    target: Tensor,
    eps: float,
    need_prediction: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    backend = implementation(WORD, prediction, Cpp)
    grad_prediction, grad_target = backend.backward(
        grad.contiguous(),
        prediction.contiguous(),
        target.contiguous(),
        eps=eps,
        need_prediction=need_prediction,
        need_target=need_target,
    )
    nothing = prediction.new_empty(0)
    return (
        nothing if grad_prediction is None else grad_prediction,
        prediction.new_empty(0) if grad_target is None else grad_target,
    )


def fake_forward(prediction: Tensor, target: Tensor, eps: float) -> Tensor:
    return prediction.new_empty(prediction.shape[0], dtype=statistics_dtype(prediction))


def fake_backward(
    grad: Tensor,
    prediction: Tensor,
    target: Tensor,
    eps: float,
    need_prediction: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    return (
        prediction.new_empty(prediction.shape if need_prediction else 0),
        target.new_empty(target.shape if need_target else 0),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    prediction, target, ctx.eps = inputs
    ctx.save_for_backward(prediction, target)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    prediction, target = ctx.saved_tensors
    need_prediction, need_target, _ = ctx.needs_input_grad
    grad_prediction, grad_target = cosine_backward(
        grad, prediction, target, ctx.eps, need_prediction, need_target
    )
    return grad_prediction if need_prediction else None, grad_target if need_target else None, None


cosine = define(
    "cosine(Tensor prediction, Tensor target, float eps) -> Tensor", run_forward, fake_forward
)
cosine_backward = define(
    "cosine_backward(Tensor grad, Tensor prediction, Tensor target, float eps, "
    "bool need_prediction, bool need_target) -> (Tensor, Tensor)",
    run_backward,
    fake_backward,
)
differentiate(cosine, backward, setup_context)
