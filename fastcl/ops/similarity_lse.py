"""The registered operations fastcl::similarity_lse and fastcl::similarity_lse_mean.

`similarity_lse` differentiates in query and key: one pass forward, three backward.
`similarity_lse_mean` is for keys without a gradient: its forward also returns the mean key under
each row's softmax, from which the query's gradient follows without another pass.
The losses pass a pair's number as its rows' id, so that the positive is left out (they add it by
softplus, without cancellation). Such ids come in ascending runs, so kernels skip the comparison in
every tile whose ranges of row ids and column ids do not meet: the mask then costs nothing.
Formula in fastcl/reference/similarity_lse.py.
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
from fastcl.reference._common import in_float, normalized, through_normalization

WORD = "similarity_lse"


class Cpp:
    """Allocates the outputs and calls csrc/similarity_lse.cpp."""

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        scale: Tensor,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
        *,
        normalize: bool,
        rows: bool,
        columns: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        (n, d), m = query.shape, key.shape[0]
        query, key, scale = same_dtype(query, key, scale)
        row_lse = query.new_empty(n, dtype=torch.float32) if rows else None
        column_lse = query.new_empty(m, dtype=torch.float32) if columns else None
        _C.kernels.similarity_lse_forward(
            *map(pointer, (query, key, scale, query_ids, key_ids, row_lse, column_lse)),
            *(n, m, d, normalize, DTYPE_CODES[query.dtype], torch.get_num_threads()),
        )
        return row_lse, column_lse

    @staticmethod
    def forward_with_mean(
        query: Tensor,
        key: Tensor,
        scale: Tensor,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
        *,
        normalize: bool,
    ) -> tuple[Tensor, Tensor]:
        (n, d), m = query.shape, key.shape[0]
        query, key, scale = same_dtype(query, key, scale)
        row_lse = query.new_empty(n, dtype=torch.float32)
        mean_key = query.new_empty((n, d), dtype=torch.float32)
        _C.kernels.similarity_lse_forward_with_mean(
            *map(pointer, (query, key, scale, query_ids, key_ids, row_lse, mean_key)),
            *(n, m, d, normalize, DTYPE_CODES[query.dtype], torch.get_num_threads()),
        )
        return row_lse, mean_key

    @staticmethod
    def backward(
        grad_rows: Tensor | None,
        grad_columns: Tensor | None,
        query: Tensor,
        key: Tensor,
        scale: Tensor,
        query_ids: Tensor | None,
        key_ids: Tensor | None,
        row_lse: Tensor | None,
        column_lse: Tensor | None,
        *,
        normalize: bool,
        need_query: bool,
        need_key: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        (n, d), m = query.shape, key.shape[0]
        dtypes = query.dtype, key.dtype
        query, key, scale = same_dtype(query, key, scale)
        grad_query = torch.empty_like(query) if need_query else None
        grad_key = torch.empty_like(key) if need_key else None
        grad_scale = torch.empty_like(scale)
        _C.kernels.similarity_lse_backward(
            *map(pointer, (grad_rows, grad_columns, query, key, scale, query_ids, key_ids)),
            *map(pointer, (row_lse, column_lse, grad_query, grad_key, grad_scale)),
            *(n, m, d, normalize, DTYPE_CODES[query.dtype], torch.get_num_threads()),
        )
        return (
            None if grad_query is None else grad_query.to(dtypes[0]),
            None if grad_key is None else grad_key.to(dtypes[1]),
            grad_scale,
        )


def same_dtype(query: Tensor, key: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query and key in the dtype that torch promotes them to; the scale in float32."""
    if query.dtype != key.dtype:
        dtype = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(dtype), key.to(dtype)
    return query, key, scale.float()


def run_forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    normalize: bool,
    rows: bool,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    row_lse, column_lse = implementation(WORD, query, Cpp).forward(
        *contiguous(query, key, scale, query_ids, key_ids),
        normalize=normalize,
        rows=rows,
        columns=columns,
    )
    nothing = query.new_empty(0, dtype=statistics_dtype(query))
    return row_lse if rows else nothing, column_lse if columns else nothing


def fake_forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    normalize: bool,
    rows: bool,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(query)
    return (
        query.new_empty(query.shape[0] if rows else 0, dtype=dtype),
        query.new_empty(key.shape[0] if columns else 0, dtype=dtype),
    )


def run_backward(
    grad_rows: Tensor | None,
    grad_columns: Tensor | None,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    row_lse: Tensor | None,
    column_lse: Tensor | None,
    normalize: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_query, grad_key, grad_scale = implementation(WORD, query, Cpp).backward(
        *contiguous(grad_rows, grad_columns, query, key, scale, query_ids, key_ids),
        *contiguous(row_lse, column_lse),
        normalize=normalize,
        need_query=need_query,
        need_key=need_key,
    )
    return (
        grad_query if need_query else query.new_empty(0),
        grad_key if need_key else key.new_empty(0),
        grad_scale,
    )


def fake_backward(
    grad_rows: Tensor | None,
    grad_columns: Tensor | None,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    row_lse: Tensor | None,
    column_lse: Tensor | None,
    normalize: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape if need_query else 0),
        key.new_empty(key.shape if need_key else 0),
        scale.new_empty(()),
    )


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, scale, query_ids, key_ids, ctx.normalize, ctx.rows, ctx.columns = inputs
    ctx.save_for_backward(query, key, scale, query_ids, key_ids, *output)


def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, ...]:
    query, key, scale, query_ids, key_ids, row_lse, column_lse = ctx.saved_tensors
    need_query, need_key, need_scale = ctx.needs_input_grad[:3]
    # The scale's gradient is a by-product of the query's.
    grad_query, grad_key, grad_scale = similarity_lse_backward(
        grad_rows if ctx.rows else None,
        grad_columns if ctx.columns else None,
        *(query, key, scale, query_ids, key_ids),
        row_lse if ctx.rows else None,
        column_lse if ctx.columns else None,
        *(ctx.normalize, need_query or need_scale, need_key),
    )
    return (
        grad_query if need_query else None,
        grad_key if need_key else None,
        grad_scale if need_scale else None,
        *(None,) * 5,
    )


similarity_lse = define(
    "similarity_lse(Tensor query, Tensor key, Tensor scale, Tensor? query_ids, Tensor? key_ids, "
    "bool normalize, bool rows, bool columns) -> (Tensor, Tensor)",
    run_forward,
    fake_forward,
)
similarity_lse_backward = define(
    "similarity_lse_backward(Tensor? grad_rows, Tensor? grad_columns, Tensor query, Tensor key, "
    "Tensor scale, Tensor? query_ids, Tensor? key_ids, Tensor? row_lse, Tensor? column_lse, "
    "bool normalize, bool need_query, bool need_key) -> (Tensor, Tensor, Tensor)",
    run_backward,
    fake_backward,
)
differentiate(similarity_lse, backward, setup_context)


# ---- keys without a gradient ---------------------------------------------------------------------


def run_mean(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    row_lse, mean_key = implementation(WORD, query, Cpp).forward_with_mean(
        *contiguous(query, key, scale, query_ids, key_ids), normalize=normalize
    )
    return row_lse, mean_key


def fake_mean(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    dtype = statistics_dtype(query)
    return (
        query.new_empty(query.shape[0], dtype=dtype),
        query.new_empty(query.shape, dtype=dtype),
    )


def setup_mean(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, _, scale, _, _, ctx.normalize = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, scale, output[1])


def backward_mean(ctx: Any, grad_rows: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """∂row_i/∂q̂_i = t · mean_i and ∂row_i/∂t = q̂_i · mean_i."""
    need_query, need_key, need_scale = ctx.needs_input_grad[:3]
    if need_key:
        raise NotImplementedError("fastcl::similarity_lse_mean has no gradient for the keys.")
    query, scale, mean_key = ctx.saved_tensors
    q = in_float(query)
    grad = grad_rows[:, None] * mean_key
    grad_scale = (normalized(q, ctx.normalize) * grad).sum().to(scale.dtype) if need_scale else None
    grad_query = None
    if need_query:
        grad_query = through_normalization(scale.to(q.dtype) * grad, q, ctx.normalize)
        grad_query = grad_query.to(query.dtype)
    return grad_query, None, grad_scale, None, None, None


similarity_lse_mean = define(
    "similarity_lse_mean(Tensor query, Tensor key, Tensor scale, Tensor? query_ids, "
    "Tensor? key_ids, bool normalize) -> (Tensor, Tensor)",
    run_mean,
    fake_mean,
)
differentiate(similarity_lse_mean, backward_mean, setup_mean)
