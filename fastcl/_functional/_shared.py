"""What the public functions share: scales, promotion, the positive against the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastcl import _check as check
from fastcl import ops
from fastcl.distributed import Share, needs_grad
from fastcl.ops._library import statistics_dtype
from fastcl.reference._common import NORM_FLOOR, in_float

WIDENED = 1 << 15  # rows of keys in half precision that are widened at a time


def as_scale(value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-dim tensor beside `like`, so that kernels read it without a host sync."""
    dtype = statistics_dtype(like)
    if isinstance(value, Tensor):
        return value.to(like.device, dtype)
    return torch.full((), value, dtype=dtype, device=like.device)


def inverse(function: str, temperature: float | Tensor, like: Tensor) -> Tensor:
    """scale = 1 / temperature, checked."""
    check.scalar(function, "temperature", temperature, positive=True)
    if isinstance(temperature, Tensor):
        return 1.0 / as_scale(temperature, like)
    return as_scale(1.0 / temperature, like)


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in their common dtype, as torch promotes."""
    dtype = tensors[0].dtype
    if all(x.dtype == dtype for x in tensors):
        return tensors
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors)


def stays_narrow(query: Tensor, key: Tensor) -> bool:
    """Whether fixed keys (M, D), as of a large queue in half precision, are widened part by part.

    All at once they would have a copy of twice their size.
    """
    if query.dtype == key.dtype or key.ndim != 2 or len(key) == 0 or needs_grad(key):
        return False
    return torch.promote_types(query.dtype, key.dtype) == query.dtype


def against(
    others: Tensor, query: Tensor, positive: Tensor, scale: Tensor, normalize: bool
) -> Tensor:
    """log(1 + exp(others_i − t <q_i, p_i>)): the positive's cross entropy against the others' lse.

    The positive is left out of the others' sum, so that neither a small loss nor its gradient is
    the difference of two large numbers. others (..., N), query and positive (N, D).
    """
    logit = minus_positive(others, query, positive, scale, normalize)
    return nn.functional.softplus(logit, threshold=40)  # torch's 20 shows in float64


def minus_positive(
    others: Tensor, query: Tensor, positive: Tensor, scale: Tensor, normalize: bool
) -> Tensor:
    """others_i − t <q_i, p_i>, of normalised rows or of the rows as they are."""
    if normalize:
        return torch.addcmul(others, scale, ops.cosine(query, positive, NORM_FLOOR))
    return torch.addcmul(others, scale, paired_dot(query, positive), value=-1)


def paired_dot(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> (N,) of the rows as they are."""
    return (in_float(x) * in_float(y)).sum(1)


def row_lse(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    normalize: bool,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Tensor:
    """Row log-sum-exp (N,), in one pass with the query's gradient if the keys need none."""
    if query.dtype != key.dtype:
        assert query_ids is None and stays_narrow(query, key)
        # One buffer for all parts: as no part is kept for the backward pass, and a new one each
        # time would leave the heap in pieces.
        buffer = key.new_empty((min(WIDENED, len(key)), key.shape[1]), dtype=query.dtype)
        parts = [
            row_lse(query, buffer[: len(part)].copy_(part), scale, normalize)
            for part in key.split(WIDENED)
        ]
        return torch.stack(parts).logsumexp(0)
    arguments = (query, key, scale, query_ids, key_ids, normalize)
    if not needs_grad(key) and (needs_grad(query) or needs_grad(scale)):
        lse: Tensor = ops.similarity_lse_mean(*arguments)[0]
        return lse
    lse = ops.similarity_lse(*arguments, True, False)[0]
    return lse


def reduce(loss: Tensor, reduction: str, at: Share | None = None) -> Tensor:
    """Of losses (..., N): with ranks, what makes the mean over ranks that of the whole batch."""
    if reduction == "none":
        return loss
    if at is None or at.group is None:
        return loss.mean() if reduction == "mean" else loss.sum()
    rows = loss.numel() // loss.shape[-1] * at.total
    return loss.sum() * (at.world / rows if reduction == "mean" else at.world)
