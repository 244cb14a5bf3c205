"""The registered operation fastcl::soft_cross_entropy.

Formula in fastcl/reference/soft_cross_entropy.py.
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

WORD = "soft_cross_entropy"


class Cpp:
    """Allocates the outputs and calls csrc/soft_cross_entropy.cpp."""

    @staticmethod
    def forward(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
        lse, mass = torch.empty_like(loss), torch.empty_like(loss)
        _C.kernels.soft_cross_entropy_forward(
            pointer(logits),
            pointer(targets),
            scale.item(),
            *(pointer(loss), pointer(lse), pointer(mass)),
            *sizes_and_types(logits, targets),
        )
        return loss, lse, mass

    @staticmethod
    def backward(
        grad: Tensor, logits: Tensor, targets: Tensor, scale: Tensor, lse: Tensor, mass: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad_logits, grad_scale = torch.empty_like(logits), scale.new_empty((), dtype=torch.float32)
        _C.kernels.soft_cross_entropy_backward(
            *(pointer(grad), pointer(logits), pointer(targets)),
            scale.item(),
            *(pointer(lse), pointer(mass), pointer(grad_logits), pointer(grad_scale)),
            *sizes_and_types(logits, targets),
        )
        return grad_logits, grad_scale


def sizes_and_types(logits: Tensor, targets: Tensor) -> tuple[int, ...]:
    n, k = logits.shape
    return n, k, DTYPE_CODES[logits.dtype], DTYPE_CODES[targets.dtype], torch.get_num_threads()


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
    ctx.set_materialize_grads(False)
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
differentiate(soft_cross_entropy, backward, setup_context)
