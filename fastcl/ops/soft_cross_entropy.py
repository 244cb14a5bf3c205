"""The registered operation fastcl::soft_cross_entropy.

Formula in fastcl/reference/soft_cross_entropy.py.
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
from fastcl.reference import soft_cross_entropy as Cpp

WORD = "soft_cross_entropy"


def run_forward(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss, lse, mass = implementation(WORD, logits, Cpp).forward(*contiguous(logits, targets, scale))
    return loss, lse, mass


def fake_forward(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, dtype = logits.shape[0], statistics_dtype(logits)
    loss, lse, mass = (logits.new_empty(n, dtype=dtype) for _ in range(3))
    return loss, lse, mass


def run_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, scale: Tensor, lse: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor]:
    grad_logits, grad_scale = implementation(WORD, logits, Cpp).backward(
        *contiguous(grad, logits, targets, scale, lse, mass)
    )
    return grad_logits, grad_scale


def fake_backward(
    grad: Tensor, logits: Tensor, targets: Tensor, scale: Tensor, lse: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), scale.new_empty(())


def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    _, lse, mass = output
    ctx.mark_non_differentiable(lse, mass)
    ctx.save_for_backward(*inputs, lse, mass)


def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("fastcl::soft_cross_entropy has no gradient for the targets.")
    grad_logits, grad_scale = soft_cross_entropy_backward(grad, *ctx.saved_tensors)
    return (
        grad_logits if ctx.needs_input_grad[0] else None,
        None,
        grad_scale if ctx.needs_input_grad[2] else None,
    )


soft_cross_entropy = define(
    "soft_cross_entropy(Tensor logits, Tensor targets, Tensor scale) -> (Tensor, Tensor, Tensor)",
    run_forward,
    fake_forward,
)
soft_cross_entropy_backward = define(
    "soft_cross_entropy_backward(Tensor grad, Tensor logits, Tensor targets, Tensor scale, "
    "Tensor lse, Tensor mass) -> (Tensor, Tensor)",
    run_backward,
    fake_backward,
)
differentiate(WORD, backward, setup_context)
refuse_second_derivative("soft_cross_entropy_backward")
