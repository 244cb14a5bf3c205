"""The registered operation fastcl::bank_scores; the bank gets no gradient.

Formula in fastcl/reference/bank_scores.py.
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

WORD = "bank_scores"


class Cpp:
    """Allocates the outputs and calls csrc/bank_scores.cpp."""

    @staticmethod
    def forward(query: Tensor, bank: Tensor, index: Tensor, scale: Tensor) -> Tensor:
        scores = query.new_empty(index.shape, dtype=torch.float32)
        _C.kernels.bank_scores_forward(
            *(pointer(query), pointer(bank), pointer(index), pointer(scale), pointer(scores)),
            *sizes_and_types(query, bank, index),
        )
        return scores

    @staticmethod
    def backward(
        grad: Tensor, query: Tensor, bank: Tensor, index: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad_query, grad_scale = torch.empty_like(query), torch.empty_like(scale)
        _C.kernels.bank_scores_backward(
            *(pointer(grad), pointer(query), pointer(bank), pointer(index), pointer(scale)),
            *(pointer(grad_query), pointer(grad_scale)),
            *sizes_and_types(query, bank, index),
        )
        return grad_query, grad_scale


def sizes_and_types(query: Tensor, bank: Tensor, index: Tensor) -> tuple[int, ...]:
    n, d = query.shape
    codes = DTYPE_CODES[query.dtype], DTYPE_CODES[bank.dtype]
    return n, index.shape[1], bank.shape[0], d, *codes, torch.get_num_threads()


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
differentiate(bank_scores, backward, setup_context)
