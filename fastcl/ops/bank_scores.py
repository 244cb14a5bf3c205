"""The registered operation fastcl::bank_scores; the bank gets no gradient.

Formula in fastcl/reference/bank_scores.py.
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
from fastcl.reference import bank_scores as Cpp

WORD = "bank_scores"


def run_forward(query: Tensor, bank: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    scores: Tensor = implementation(WORD, query, Cpp).forward(
        *contiguous(query, bank, index, scale)
    )
    return scores


def fake_forward(query: Tensor, bank: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    return query.new_empty(index.shape, dtype=statistics_dtype(query))


def run_backward(
    grad: Tensor, query: Tensor, bank: Tensor, index: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    grad_query, grad_scale = implementation(WORD, query, Cpp).backward(
        *contiguous(grad, query, bank, index, scale)
    )
    return grad_query, grad_scale


def fake_backward(
    grad: Tensor, query: Tensor, bank: Tensor, index: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), scale.new_empty(())


def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("fastcl::bank_scores has no gradient for the bank.")
    grad_query, grad_scale = bank_scores_backward(grad, *ctx.saved_tensors)
    return (
        grad_query if ctx.needs_input_grad[0] else None,
        None,
        None,
        grad_scale if ctx.needs_input_grad[3] else None,
    )


bank_scores = define(
    "bank_scores(Tensor query, Tensor bank, Tensor index, Tensor scale) -> Tensor",
    run_forward,
    fake_forward,
)
bank_scores_backward = define(
    "bank_scores_backward(Tensor grad, Tensor query, Tensor bank, Tensor index, Tensor scale) "
    "-> (Tensor, Tensor)",
    run_backward,
    fake_backward,
)
differentiate(WORD, backward, setup_context)
refuse_second_derivative("bank_scores_backward")
