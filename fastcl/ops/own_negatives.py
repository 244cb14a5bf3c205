"""The registered operation fastcl::own_negatives: info_nce's negatives of each query's own.

As torch's own operations it would write the negatives' gradient three times.
Formula in fastcl/reference/own_negatives.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl import _C
from fastcl.ops._backend import DTYPE_CODES, backend_of, implementation, pointer
from fastcl.ops._library import contiguous, define, differentiate, statistics_dtype
from fastcl.reference import own_negatives as plain

WORD = "own_negatives"
LONGEST = 8192  # features of a row: as in kernels/own_negatives.py


class Cpp:
    """Allocates the outputs and calls csrc/own_negatives.cpp."""

    @staticmethod
    def forward(query: Tensor, negatives: Tensor, scale: Tensor, *, normalize: bool) -> Tensor:
        lse = query.new_empty(len(query), dtype=statistics_dtype(query))
        _C.kernels.own_negatives_forward(
            *map(pointer, (query, negatives, scale, lse)),
            *(*negatives.shape, normalize, DTYPE_CODES[query.dtype], torch.get_num_threads()),
        )
        return lse

    @staticmethod
    def backward(
        grad: Tensor,
        query: Tensor,
        negatives: Tensor,
        scale: Tensor,
        lse: Tensor,
        *,
        normalize: bool,
        need_query: bool,
        need_negatives: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        grad_query = query.new_empty(query.shape) if need_query else None
        grad_negatives = negatives.new_empty(negatives.shape) if need_negatives else None
        grad_scale = scale.new_empty(())
        grads = (grad_query, grad_negatives, grad_scale)
        _C.kernels.own_negatives_backward(
            *map(pointer, (grad, query, negatives, scale, lse, *grads)),
            *(*negatives.shape, normalize, DTYPE_CODES[query.dtype], torch.get_num_threads()),
        )
        return grads


def implementation_of(query: Tensor) -> Any:
    if query.shape[1] > LONGEST and backend_of(query).name == "triton":
        return plain
    return implementation(WORD, query, Cpp)


def run_forward(query: Tensor, negatives: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    lse: Tensor = implementation_of(query).forward(
        *contiguous(query, negatives), scale, normalize=normalize
    )
    return lse


def fake_forward(query: Tensor, negatives: Tensor, scale: Tensor, normalize: bool) -> Tensor:
    return query.new_empty(query.shape[0], dtype=statistics_dtype(query))


def run_backward(
    grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    scale: Tensor,
    lse: Tensor,
    normalize: bool,
    need_query: bool,
    need_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_negatives, grad_scale = implementation_of(query).backward(
        *contiguous(grad, query, negatives, scale, lse),
        normalize=normalize,
        need_query=need_query,
        need_negatives=need_negatives,
    )
    return (
        query.new_empty(0) if grad_query is None else grad_query,
        negatives.new_empty(0) if grad_negatives is None else grad_negatives,
        grad_scale,
    )


def fake_backward(
    grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    scale: Tensor,
    lse: Tensor,
    normalize: bool,
    need_query: bool,
    need_negatives: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape if need_query else 0),
        negatives.new_empty(negatives.shape if need_negatives else 0),
        scale.new_empty(()),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, negatives, scale, ctx.normalize = inputs
    ctx.save_for_backward(query, negatives, scale, output)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_query, need_negatives, need_scale, _ = ctx.needs_input_grad
    grad_query, grad_negatives, grad_scale = own_negatives_backward(
        grad, *ctx.saved_tensors, ctx.normalize, need_query, need_negatives
    )
    return (
        grad_query if need_query else None,
        grad_negatives if need_negatives else None,
        grad_scale if need_scale else None,
        None,
    )


own_negatives = define(
    "own_negatives(Tensor query, Tensor negatives, Tensor scale, bool normalize) -> Tensor",
    run_forward,
    fake_forward,
)
own_negatives_backward = define(
    "own_negatives_backward(Tensor grad, Tensor query, Tensor negatives, Tensor scale, Tensor lse, "
    "bool normalize, bool need_query, bool need_negatives) -> (Tensor, Tensor, Tensor)",
    run_backward,
    fake_backward,
)
differentiate(own_negatives, backward, setup_context)
