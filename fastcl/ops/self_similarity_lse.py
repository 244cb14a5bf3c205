"""The registered operation fastcl::self_similarity_lse.

The losses pass a pair's number as its rows' id, so that the positive is left out (they add it by
softplus, without cancellation). Such ids come in ascending runs, so kernels skip the comparison in
every tile whose ranges of row ids and column ids do not meet: the mask then costs nothing.
Formula in fastcl/reference/self_similarity_lse.py.
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

WORD = "self_similarity_lse"


class Cpp:
    """Allocates the outputs and calls csrc/self_similarity_lse.cpp."""

    @staticmethod
    def forward(z: Tensor, scale: Tensor, ids: Tensor | None, *, normalize: bool) -> Tensor:
        n, d = z.shape
        scale, lse = scale.float(), z.new_empty(n, dtype=torch.float32)
        _C.kernels.self_similarity_lse_forward(
            *map(pointer, (z, scale, ids, lse)),
            *(n, d, normalize, DTYPE_CODES[z.dtype], torch.get_num_threads()),
        )
        return lse

    @staticmethod
    def backward(
        grad: Tensor, z: Tensor, scale: Tensor, ids: Tensor | None, lse: Tensor, *, normalize: bool
    ) -> tuple[Tensor, Tensor]:
        n, d = z.shape
        scale = scale.float()
        grad_z, grad_scale = torch.empty_like(z), torch.empty_like(scale)
        _C.kernels.self_similarity_lse_backward(
            *map(pointer, (grad, z, scale, ids, lse, grad_z, grad_scale)),
            *(n, d, normalize, DTYPE_CODES[z.dtype], torch.get_num_threads()),
        )
        return grad_z, grad_scale


def run_forward(z: Tensor, scale: Tensor, ids: Tensor | None, normalize: bool) -> Tensor:
    lse: Tensor = implementation(WORD, z, Cpp).forward(
        *contiguous(z, scale, ids), normalize=normalize
    )
    return lse


def fake_forward(z: Tensor, scale: Tensor, ids: Tensor | None, normalize: bool) -> Tensor:
    return z.new_empty(z.shape[0], dtype=statistics_dtype(z))


def run_backward(
    grad: Tensor, z: Tensor, scale: Tensor, ids: Tensor | None, lse: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    grad_z, grad_scale = implementation(WORD, z, Cpp).backward(
        *contiguous(grad, z, scale, ids, lse), normalize=normalize
    )
    return grad_z, grad_scale


def fake_backward(
    grad: Tensor, z: Tensor, scale: Tensor, ids: Tensor | None, lse: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), scale.new_empty(())


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, scale, ids, ctx.normalize = inputs
    ctx.save_for_backward(z, scale, ids, output)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    z, scale, ids, lse = ctx.saved_tensors
    grad_z, grad_scale = self_similarity_lse_backward(grad, z, scale, ids, lse, ctx.normalize)
    return (
        grad_z if ctx.needs_input_grad[0] else None,
        grad_scale if ctx.needs_input_grad[1] else None,
        None,
        None,
    )


self_similarity_lse = define(
    "self_similarity_lse(Tensor z, Tensor scale, Tensor? ids, bool normalize) -> Tensor",
    run_forward,
    fake_forward,
)
self_similarity_lse_backward = define(
    "self_similarity_lse_backward(Tensor grad, Tensor z, Tensor scale, Tensor? ids, Tensor lse, "
    "bool normalize) -> (Tensor, Tensor)",
    run_backward,
    fake_backward,
)
differentiate(self_similarity_lse, backward, setup_context)
