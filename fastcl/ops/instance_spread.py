"""The registered operation fastcl::instance_spread.

Formula in fastcl/reference/instance_spread.py.
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

WORD = "instance_spread"


class Cpp:
    """Allocates the outputs and calls csrc/instance_spread.cpp."""

    @staticmethod
    def forward(
        z: Tensor, scale: Tensor, *, negative_weight: float, normalize: bool
    ) -> tuple[Tensor, ...]:
        outputs = [z.new_empty(len(z), dtype=torch.float32) for _ in range(5)]
        _C.kernels.instance_spread_forward(
            *map(pointer, (z, scale, *outputs)),
            *(*z.shape, negative_weight, normalize),
            *(DTYPE_CODES[z.dtype], torch.get_num_threads()),
        )
        return tuple(outputs)

    @staticmethod
    def backward(
        grad: Tensor,
        z: Tensor,
        scale: Tensor,
        log_d: Tensor,
        log_o: Tensor,
        b: Tensor,
        log_large: Tensor,
        *,
        negative_weight: float,
        normalize: bool,
        detach_columns: bool,
    ) -> tuple[Tensor, Tensor]:
        grad_z, grad_scale = torch.empty_like(z), torch.empty_like(scale)
        _C.kernels.instance_spread_backward(
            *map(pointer, (grad, z, scale, log_d, log_o, b, log_large, grad_z, grad_scale)),
            *(*z.shape, negative_weight, normalize, detach_columns),
            *(DTYPE_CODES[z.dtype], torch.get_num_threads()),
        )
        return grad_z, grad_scale


def run_forward(
    z: Tensor, scale: Tensor, negative_weight: float, normalize: bool, detach_columns: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, log_d, log_o, b, log_large = implementation(WORD, z, Cpp).forward(
        *contiguous(z, scale), negative_weight=negative_weight, normalize=normalize
    )
    return loss, log_d, log_o, b, log_large


def fake_forward(
    z: Tensor, scale: Tensor, negative_weight: float, normalize: bool, detach_columns: bool
) -> tuple[Tensor, ...]:
    return tuple(z.new_empty(z.shape[0], dtype=statistics_dtype(z)) for _ in range(5))


def run_backward(
    grad: Tensor,
    z: Tensor,
    scale: Tensor,
    log_d: Tensor,
    log_o: Tensor,
    b: Tensor,
    log_large: Tensor,
    negative_weight: float,
    normalize: bool,
    detach_columns: bool,
) -> tuple[Tensor, Tensor]:
    grad_z, grad_scale = implementation(WORD, z, Cpp).backward(
        *contiguous(grad, z, scale, log_d, log_o, b, log_large),
        negative_weight=negative_weight,
        normalize=normalize,
        detach_columns=detach_columns,
    )
    return grad_z, grad_scale


def fake_backward(
    grad: Tensor,
    z: Tensor,
    scale: Tensor,
    log_d: Tensor,
    log_o: Tensor,
    b: Tensor,
    log_large: Tensor,
    negative_weight: float,
    normalize: bool,
    detach_columns: bool,
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), scale.new_empty(())


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, scale, *ctx.options = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, scale, *output[1:])


def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grad_z, grad_scale = instance_spread_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (
        grad_z if ctx.needs_input_grad[0] else None,
        grad_scale if ctx.needs_input_grad[1] else None,
        *(None,) * 3,
    )


instance_spread = define(
    "instance_spread(Tensor z, Tensor scale, float negative_weight, bool normalize, "
    "bool detach_columns) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    run_forward,
    fake_forward,
)
instance_spread_backward = define(
    "instance_spread_backward(Tensor grad, Tensor z, Tensor scale, Tensor log_d, Tensor log_o, "
    "Tensor b, Tensor log_large, float negative_weight, bool normalize, bool detach_columns) "
    "-> (Tensor, Tensor)",
    run_backward,
    fake_backward,
)
differentiate(instance_spread, backward, setup_context)
