"""The similarity of each row to the mean of its label's other rows, without a mask matrix.

    mean_i = ẑ_i·r_i / n_i,    r_i = Σ_{j≠i of i's label} ẑ_j,    n_i how many those are
    dẑ_i   = w_i r_i + Σ_{j≠i of i's label} w_j ẑ_j,              w_i = g_i / n_i

In O(N·D), from the sums of the labels' rows; plain torch on every device, as one operation: as a
dozen of autograd's nodes it would take most of the time of a small loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcl.distributed import Share, gather, sum_over_ranks
from fastcl.ops._library import define, differentiate
from fastcl.reference._common import in_float, normalized, through_normalization


def similarity_to_own_label(
    z: Tensor, labels: Tensor, normalize: bool, at: Share
) -> tuple[Tensor, Tensor]:
    """mean (N,), 0 where there are no others, and n (N,), of z (N, D) and the rows of all ranks."""
    if at.group is None:
        mean, others = label_similarity(z, labels, normalize)[:2]
        return mean, others
    x = normalized(in_float(z), normalize)
    names = gather(labels, at).sort().values
    others = _others(names, labels)
    names = names.unique()  # only as many sums as there are labels travel between the ranks
    place = torch.searchsorted(names, labels)
    rest = sum_over_ranks(_sums(x, place, len(names)), at).index_select(0, place) - x
    return (x * rest).sum(1) / others.clamp_min(1), others


def _others(names: Tensor, labels: Tensor) -> Tensor:
    """How many more of each label there are among the sorted names."""
    first = torch.searchsorted(names, labels)
    return torch.searchsorted(names, labels, right=True).sub_(first).sub_(1)


def _sums(x: Tensor, place: Tensor, count: int) -> Tensor:
    """(count, D): the sum of the rows of x (N, D) that have each place."""
    sums = x.new_zeros(count, x.shape[1])
    if x.device.type == "cpu":  # torch's deterministic scatter-add differs by device
        return sums.index_add(0, place, x)
    return sums.index_put((place,), x, accumulate=True)


def run(z: Tensor, labels: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mean, n, a place for each label and r."""
    x = normalized(in_float(z), normalize)
    names = labels.sort().values
    place = torch.searchsorted(names, labels)
    others = _others(names, labels)
    rest = _sums(x, place, len(x)).index_select(0, place).sub_(x)
    return (x * rest).sum(1).div_(others.clamp_min(1)), others, place, rest


def fake(z: Tensor, labels: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rest = in_float(z.new_empty(z.shape))
    return rest.new_empty(z.shape[0]), torch.empty_like(labels), torch.empty_like(labels), rest


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    z, _, ctx.normalize = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, *output[1:])


def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    z, others, place, rest = ctx.saved_tensors
    raw = in_float(z)
    w = (grad / others.clamp_min(1))[:, None]
    wx = w * normalized(raw, ctx.normalize)
    of_others = _sums(wx, place, len(wx)).index_select(0, place) - wx
    dx = torch.addcmul(of_others, w, rest)
    return through_normalization(dx, raw, ctx.normalize).to(z.dtype), None, None


label_similarity = define(
    "label_similarity(Tensor z, Tensor labels, bool normalize) -> (Tensor, Tensor, Tensor, Tensor)",
    run,
    fake,
)
differentiate(label_similarity, backward, setup_context)
