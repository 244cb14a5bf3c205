"""The registered operation fastcl::label_similarity, SupCon's positives.

As a dozen of autograd's nodes it would take most of the time of a small loss.
Formula in fastcl/reference/label_similarity.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl import _C
from fastcl.ops._backend import DTYPE_CODES, backend_of, implementation, pointer
from fastcl.ops._library import contiguous, define, differentiate, statistics_dtype
from fastcl.reference import label_similarity as plain

WORD = "label_similarity"
LONGEST = 8192  # features of a row: as in kernels/label_similarity.py


class Cpp:
    """Allocates the outputs and calls csrc/label_similarity.cpp."""

    @staticmethod
    def forward(z: Tensor, labels: Tensor, *, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
        mean = z.new_empty(len(z), dtype=torch.float32)
        others, rest = torch.empty_like(labels), torch.empty_like(z, dtype=torch.float32)
        _C.kernels.label_similarity_forward(
            *map(pointer, (z, labels, mean, others, rest)),
            *(*z.shape, normalize, DTYPE_CODES[z.dtype], torch.get_num_threads()),
        )
        return mean, others, rest

    @staticmethod
    def backward(
        grad: Tensor, z: Tensor, labels: Tensor, others: Tensor, rest: Tensor, *, normalize: bool
    ) -> Tensor:
        grad_z = torch.empty_like(z)
        _C.kernels.label_similarity_backward(
            *map(pointer, (grad, z, labels, rest, grad_z)),
            *(*z.shape, normalize, DTYPE_CODES[z.dtype], torch.get_num_threads()),
        )
        return grad_z


def implementation_of(z: Tensor) -> Any:
    if z.shape[1] > LONGEST and backend_of(z).name == "triton":
        return plain
    return implementation(WORD, z, Cpp)


def run_forward(z: Tensor, labels: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    mean, others, rest = implementation_of(z).forward(*contiguous(z, labels), normalize=normalize)
    return mean, others, rest


def fake_forward(z: Tensor, labels: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = statistics_dtype(z)
    return (
        z.new_empty(z.shape[0], dtype=dtype),
        labels.new_empty(labels.shape),
        z.new_empty(z.shape, dtype=dtype),
    )


def run_backward(
    grad: Tensor, z: Tensor, labels: Tensor, others: Tensor, rest: Tensor, normalize: bool
) -> Tensor:
    grad_z: Tensor = implementation_of(z).backward(
        *contiguous(grad, z, labels, others, rest), normalize=normalize
    )
    return grad_z


def fake_backward(
    grad: Tensor, z: Tensor, labels: Tensor, others: Tensor, rest: Tensor, normalize: bool
) -> Tensor:
    return z.new_empty(z.shape)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, labels, ctx.normalize = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, labels, *output[1:])


def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return label_similarity_backward(grad, *ctx.saved_tensors, ctx.normalize), None, None


label_similarity = define(
    "label_similarity(Tensor z, Tensor labels, bool normalize) -> (Tensor, Tensor, Tensor)",
    run_forward,
    fake_forward,
)
label_similarity_backward = define(
    "label_similarity_backward(Tensor grad, Tensor z, Tensor labels, Tensor others, Tensor rest, "
    "bool normalize) -> Tensor",
    run_backward,
    fake_backward,
)
differentiate(label_similarity, backward, setup_context)
