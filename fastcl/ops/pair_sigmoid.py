"""The registered operation fastcl::pair_sigmoid.

Formula in fastcl/reference/pair_sigmoid.py.
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
from fastcl.reference import pair_sigmoid as Cpp

WORD = "pair_sigmoid"


def run_forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, normalize: bool
) -> Tensor:
    loss: Tensor = implementation(WORD, image, Cpp).forward(
        *contiguous(image, text, scale, bias), normalize=normalize
    )
    return loss


def fake_forward(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, normalize: bool
) -> Tensor:
    return image.new_empty(image.shape[0], dtype=statistics_dtype(image))


def run_backward(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_image, grad_text, grad_scale, grad_bias = implementation(WORD, image, Cpp).backward(
        *contiguous(grad, image, text, scale, bias), normalize=normalize
    )
    return grad_image, grad_text, grad_scale, grad_bias


def fake_backward(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        image.new_empty(image.shape),
        text.new_empty(text.shape),
        scale.new_empty(()),
        bias.new_empty(()),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.normalize = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = pair_sigmoid_backward(grad, *ctx.saved_tensors, ctx.normalize)
    needed = zip(ctx.needs_input_grad, grads)
    return *(x if need else None for need, x in needed), None


pair_sigmoid = define(
    "pair_sigmoid(Tensor image, Tensor text, Tensor scale, Tensor bias, bool normalize) -> Tensor",
    run_forward,
    fake_forward,
)
pair_sigmoid_backward = define(
    "pair_sigmoid_backward(Tensor grad, Tensor image, Tensor text, Tensor scale, Tensor bias, "
    "bool normalize) -> (Tensor, Tensor, Tensor, Tensor)",
    run_backward,
    fake_backward,
)
differentiate(WORD, backward, setup_context)
refuse_second_derivative("pair_sigmoid_backward")
