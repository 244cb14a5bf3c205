"""Log-sum-exps of this rank's rows with the rows of all ranks.

    s_ij     = t · q_i·k_j                 i of this rank, j of all ranks
    row_i    = log Σ_j exp s_ij            complete here
    column_j = log Σ_ranks exp(column_j of each rank's rows)

A column's parts meet at the rank that has the key, W · M numbers in all; the matrix of all pairs is
on no rank. One pass forward and three backward, over this rank's rows only: 4G / W. With a Ring
the keys come by one rank at a time, and in the backward pass their gradients travel with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastcl import ops
from fastcl._functional._shared import paired_dot, row_lse
from fastcl.distributed import (
    Ring,
    Share,
    around,
    exchange,
    gather,
    needs_grad,
    pass_on,
    scatter_sum,
)
from fastcl.ops.similarity_lse import similarity_lse_backward
from fastcl.reference._common import NORM_FLOOR

Ids = tuple[Tensor, Tensor]  # of this rank's queries, of all ranks' keys
# (which of all keys, these keys) -> gradients of query, these keys and scale
Gradients = Callable[[slice, Tensor], tuple[Tensor, Tensor, Tensor]]


def rows_across(
    query: Tensor, key: Tensor, scale: Tensor, normalize: bool, ids: Ids, at: Share
) -> Tensor:
    """Row log-sum-exps (N,) of query (N, D) over the keys of all ranks, of which `key` are ours."""
    if at.group is None:
        return row_lse(query, key, scale, normalize, *ids)
    if not isinstance(at.group, Ring) and not needs_grad(key):
        return row_lse(query, gather(key, at), scale, normalize, *ids)
    rows: Tensor = _Across.apply(query, key, scale, *ids, normalize, False, at)[0]
    return rows


def both_across(
    query: Tensor, key: Tensor, scale: Tensor, normalize: bool, ids: Ids, at: Share
) -> tuple[Tensor, Tensor]:
    """The same, and the column log-sum-exps (N,) of our keys over the queries of all ranks."""
    if at.group is None:
        rows, columns = ops.similarity_lse(query, key, scale, *ids, normalize, True, True)
    else:
        rows, columns = _Across.apply(query, key, scale, *ids, normalize, True, at)
    return rows, columns


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        scale: Tensor,
        query_ids: Tensor,
        key_ids: Tensor,
        normalize: bool,
        columns: bool,
        at: Share,
    ) -> tuple[Tensor, Tensor]:
        rows, parts = None, scale.new_empty(at.total if columns else 0)
        for block, keys in visited(key, at):
            row, part = ops.similarity_lse(
                query, keys, scale, query_ids, key_ids[block], normalize, True, columns
            )
            rows = row if rows is None else torch.logaddexp(rows, row)
            if columns:
                parts[block] = part
        assert rows is not None
        column_lse = meet(parts, at) if columns else parts
        ctx.normalize, ctx.columns, ctx.at = normalize, columns, at
        ctx.save_for_backward(query, key, scale, query_ids, key_ids, rows, column_lse)
        return rows, column_lse

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_columns: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("losses across ranks have no second derivative.")
        query, key, scale, query_ids, key_ids, rows, columns = ctx.saved_tensors
        at: Share = ctx.at
        if ctx.columns:
            columns, grad_columns = gather(columns, at), gather(grad_columns.contiguous(), at)

        def gradients(block: slice, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            of_block = (columns[block], grad_columns[block]) if ctx.columns else (None, None)
            grads: tuple[Tensor, Tensor, Tensor] = similarity_lse_backward(
                *(grad_rows, of_block[1], query, keys, scale, query_ids, key_ids[block]),
                *(rows, of_block[0], ctx.normalize, True, True),
            )
            return grads

        if isinstance(at.group, Ring):
            grad_query, grad_key, grad_scale = _ring_backward(query, key, scale, at, gradients)
        else:
            grad_query, grad_keys, grad_scale = gradients(slice(None), gather(key, at))
            grad_key = scatter_sum(grad_keys, at)
        needed = zip(ctx.needs_input_grad, (grad_query, grad_key, grad_scale))
        return *(grad if need else None for need, grad in needed), *(None,) * 5


def visited(key: Tensor, at: Share) -> Iterator[tuple[slice, Tensor]]:
    """(which of all keys, these keys): all at once, or with a Ring one rank's after the other."""
    if not isinstance(at.group, Ring):
        yield slice(None), gather(key.detach(), at)
        return
    for rank, keys in around(key.detach(), at):
        yield slice(at.offset(rank), at.offset(rank) + at.counts[rank]), keys


def meet(parts: Tensor, at: Share) -> Tensor:
    """Our columns' log-sum-exps (N,) from each rank's parts (total,) of all columns."""
    return exchange(parts, at).view(at.world, at.counts[at.rank]).logsumexp(0)


def _ring_backward(
    query: Tensor, key: Tensor, scale: Tensor, at: Share, gradients: Gradients
) -> tuple[Tensor, Tensor, Tensor]:
    """Each rank adds its part to the gradient of the keys that come by; the last step is home."""
    grad_query = torch.zeros_like(query, dtype=torch.promote_types(query.dtype, torch.float32))
    grad_key = torch.zeros_like(key, dtype=grad_query.dtype)
    grad_scale = torch.zeros_like(scale)
    for rank, keys in around(key, at):
        block = slice(at.offset(rank), at.offset(rank) + at.counts[rank])
        for total, part in zip((grad_query, grad_key, grad_scale), gradients(block, keys)):
            total += part
        grad_key = pass_on(grad_key, at, at.counts[(rank - 1) % at.world])
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_scale


# ---- SigLIP --------------------------------------------------------------------------------------


def pairs_across(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, normalize: bool, at: Share
) -> Tensor:
    """Each of our images' sum (N,) of SigLIP's terms over the texts of all ranks."""
    if isinstance(at.group, Ring):
        losses: Tensor = _PairsRound.apply(image, text, scale, bias, normalize, at)
        return losses
    texts = gather(text, at).split(at.counts)
    parts = [
        pair_terms(image, texts[rank], scale, bias, normalize, rank == at.rank)
        for rank in range(at.world)
    ]
    return torch.stack(parts).sum(0)


def pair_terms(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, normalize: bool, own: bool
) -> Tensor:
    """Each image's sum (N,) over one rank's texts (M, D); none of them is its own unless `own`.

    The operation is square and takes the diagonal for pairs. So rows of zeros fill up the shorter
    side, which add softplus(b) each; and of another rank's texts the diagonal, softplus(−s), gets
    s to become softplus(s).
    """
    n, m = len(image), len(text)
    size = max(n, m)
    image, text = (nn.functional.pad(x, (0, 0, 0, size - len(x))) for x in (image, text))
    losses = ops.pair_sigmoid(image, text, scale, bias, normalize)
    if not own:
        dot = -ops.cosine(image, text, NORM_FLOOR) if normalize else paired_dot(image, text)
        losses = losses + scale * dot + bias
    return losses[:n] - (size - m) * nn.functional.softplus(bias, threshold=40)


class _PairsRound(torch.autograd.Function):
    """The texts come by one rank at a time, and once more in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        normalize: bool,
        at: Share,
    ) -> Tensor:
        ctx.normalize, ctx.at = normalize, at
        ctx.save_for_backward(image, text, scale, bias)
        losses = torch.zeros(())
        for rank, texts in around(text.detach(), at):
            part = pair_terms(image, texts, scale, bias, normalize, rank == at.rank)
            losses = part if rank == at.rank else losses + part
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("losses across ranks have no second derivative.")
        image, text, scale, bias = ctx.saved_tensors
        at: Share = ctx.at
        grad_bias = torch.zeros_like(bias)

        def gradients(block: slice, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x, y, t, b = leaves = [v.detach().requires_grad_() for v in (image, texts, scale, bias)]
            with torch.enable_grad():
                terms = pair_terms(x, y, t, b, ctx.normalize, block == at.own)
            of_image, of_text, of_scale, of_bias = torch.autograd.grad(terms, leaves, grad)
            grad_bias.add_(of_bias)
            return of_image, of_text, of_scale

        grads = *_ring_backward(image, text, scale, at, gradients), grad_bias
        return *(g if need else None for need, g in zip(ctx.needs_input_grad, grads)), None, None
