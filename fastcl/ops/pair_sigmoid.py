"""The registered operations fastcl::pair_sigmoid and fastcl::pair_sigmoid_sum.

`pair_sigmoid` gives each image's loss. `pair_sigmoid_sum` gives their sum, whose gradients need
nothing that comes later: they are made in the forward pass, three matrix products in all.
Formula in fastcl/reference/pair_sigmoid.py.
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

WORD = "pair_sigmoid"


class Cpp:
    """Allocates the outputs and calls csrc/pair_sigmoid.cpp."""

    @staticmethod
    def forward(
        image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, normalize: bool
    ) -> Tensor:
        loss = image.new_empty(len(image), dtype=torch.float32)
        outputs = loss, None, None, None, None
        run_cpp(None, image, text, scale, bias, outputs, normalize)
        return loss

    @staticmethod
    def backward(
        grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, normalize: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        grads = tuple(map(torch.empty_like, (image, text, scale, bias)))
        run_cpp(grad, image, text, scale, bias, (None, *grads), normalize)
        grad_image, grad_text, grad_scale, grad_bias = grads
        return grad_image, grad_text, grad_scale, grad_bias

    @staticmethod
    def forward_and_backward(
        image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, normalize: bool
    ) -> tuple[Tensor, ...]:
        """loss (N,), and the gradients of its sum, from one pass."""
        loss = image.new_empty(len(image), dtype=torch.float32)
        outputs = loss, *map(torch.empty_like, (image, text, scale, bias))
        run_cpp(None, image, text, scale, bias, outputs, normalize)
        return outputs


def run_cpp(
    grad: Tensor | None,
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    outputs: tuple[Tensor | None, ...],
    normalize: bool,
) -> None:
    _C.kernels.pair_sigmoid(
        *map(pointer, (grad, image, text, scale, bias, *outputs)),
        *(*image.shape, normalize, DTYPE_CODES[image.dtype], torch.get_num_threads()),
    )


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
differentiate(pair_sigmoid, backward, setup_context)


# ---- the sum over all pairs ----------------------------------------------------------------------


def run_sum(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend = implementation(WORD, image, Cpp)
    tensors = contiguous(image, text, scale, bias)
    if backend is Cpp:
        loss, *grads = Cpp.forward_and_backward(
            image.contiguous(), text.contiguous(), scale, bias, normalize=normalize
        )
    else:
        loss = backend.forward(*tensors, normalize=normalize)
        grads = backend.backward(torch.ones_like(loss), *tensors, normalize=normalize)
    grad_image, grad_text, grad_scale, grad_bias = grads
    return loss.sum(), grad_image, grad_text, grad_scale, grad_bias


def fake_sum(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        image.new_empty((), dtype=statistics_dtype(image)),
        image.new_empty(image.shape),
        text.new_empty(text.shape),
        scale.new_empty(()),
        bias.new_empty(()),
    )


def setup_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    # The inputs are saved for a second derivative to find them, and to raise.
    ctx.save_for_backward(*output[1:], *inputs[:4])


def backward_sum(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needed = zip(ctx.needs_input_grad, ctx.saved_tensors[:4])
    return *((grad * x).to(x.dtype) if need else None for need, x in needed), None


pair_sigmoid_sum = define(
    "pair_sigmoid_sum(Tensor image, Tensor text, Tensor scale, Tensor bias, bool normalize) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run_sum,
    fake_sum,
)
differentiate(pair_sigmoid_sum, backward_sum, setup_sum)
