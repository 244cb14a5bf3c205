"""The registered operation fastcl::soft_cross_entropy.

The mean of a small batch's losses, as a node of autograd's, would take a third of the whole time.
Formula in fastcl/reference/soft_cross_entropy.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl import _C
from fastcl.ops._backend import DTYPE_CODES, implementation, pointer
from fastcl.ops._library import define, differentiate, statistics_dtype

WORD = "soft_cross_entropy"


class Cpp:
    """Allocates the outputs and calls csrc/soft_cross_entropy.cpp."""

    @staticmethod
    def forward(
        logits: Tensor, targets: Tensor, scale: Tensor, reduction: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = logits.shape[0]
        loss = logits.new_empty(shape_of_loss(n, reduction), dtype=torch.float32)
        lse = logits.new_empty(n, dtype=torch.float32)
        mass = torch.empty_like(lse)
        _C.kernels.soft_cross_entropy_forward(
            *(pointer(logits), pointer(targets), scale.item(), share_of_row(n, reduction)),
            *(pointer(loss), pointer(lse), pointer(mass)),
            *sizes_and_types(logits, targets),
        )
        return loss, lse, mass

    @staticmethod
    def backward(
        grad: Tensor,
        logits: Tensor,
        targets: Tensor,
        scale: Tensor,
        lse: Tensor,
        mass: Tensor,
        reduction: str,
    ) -> tuple[Tensor, Tensor]:
        grad_logits, grad_scale = torch.empty_like(logits), scale.new_empty((), dtype=torch.float32)
        _C.kernels.soft_cross_entropy_backward(
            *(pointer(grad), pointer(logits), pointer(targets), scale.item()),
            share_of_row(logits.shape[0], reduction),
            *(pointer(lse), pointer(mass), pointer(grad_logits), pointer(grad_scale)),
            *sizes_and_types(logits, targets),
        )
        return grad_logits, grad_scale


def sizes_and_types(logits: Tensor, targets: Tensor) -> tuple[int, ...]:
    n, k = logits.shape
    return n, k, DTYPE_CODES[logits.dtype], DTYPE_CODES[targets.dtype], torch.get_num_threads()


def shape_of_loss(n: int, reduction: str) -> tuple[int, ...]:
    return (n,) if reduction == "none" else ()


def share_of_row(n: int, reduction: str) -> float:
    """What a row's loss is multiplied by in the reduced one; 0 where none is reduced."""
    if reduction == "mean":
        return 1 / n
    return 1.0 if reduction == "sum" else 0.0


def run_forward(
    logits: Tensor, targets: Tensor, scale: Tensor, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    backend = implementation(WORD, logits, Cpp)
    logits, targets, scale = logits.contiguous(), targets.contiguous(), scale.contiguous()
    if backend is Cpp:
        return Cpp.forward(logits, targets, scale, reduction)
    loss, lse, mass = backend.forward(logits, targets, scale)
    if reduction != "none":
        loss = loss.sum() * share_of_row(len(loss), reduction)
    return loss, lse, mass


def fake_forward(
    logits: Tensor, targets: Tensor, scale: Tensor, reduction: str
) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = logits.shape[0], statistics_dtype(logits)
    loss = logits.new_empty(shape_of_loss(n, reduction), dtype=dtype)
    lse, mass = (logits.new_empty(n, dtype=dtype) for _ in range(2))
    return loss, lse, mass


def run_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    lse: Tensor,
    mass: Tensor,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    backend = implementation(WORD, logits, Cpp)
    grad, logits, targets = grad.contiguous(), logits.contiguous(), targets.contiguous()
    scale, lse, mass = scale.contiguous(), lse.contiguous(), mass.contiguous()
    if backend is Cpp:
        return Cpp.backward(grad, logits, targets, scale, lse, mass, reduction)
    if reduction != "none":
        grad = (grad * share_of_row(len(lse), reduction)).expand(len(lse)).contiguous()
    grad_logits, grad_scale = backend.backward(grad, logits, targets, scale, lse, mass)
    return grad_logits, grad_scale


def fake_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    lse: Tensor,
    mass: Tensor,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), scale.new_empty(())


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reduction = inputs
    _, lse, mass = output
    ctx.mark_non_differentiable(lse, mass)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, lse, mass)


def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("fastcl::soft_cross_entropy has no gradient for the targets.")
    grad_logits, grad_scale = soft_cross_entropy_backward(grad, *ctx.saved_tensors, ctx.reduction)
    return (
        grad_logits if ctx.needs_input_grad[0] else None,
        None,
        grad_scale if ctx.needs_input_grad[2] else None,
        None,
    )


soft_cross_entropy = define(
    "soft_cross_entropy(Tensor logits, Tensor targets, Tensor scale, str reduction) "
    "-> (Tensor, Tensor, Tensor)",
    run_forward,
    fake_forward,
)
soft_cross_entropy_backward = define(
    "soft_cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, Tensor scale, "
    "Tensor lse, Tensor mass, str reduction) -> (Tensor, Tensor)",
    run_backward,
    fake_backward,
)
differentiate(soft_cross_entropy, backward, setup_context)
