"""pytorch-metric-learning's losses (2.9) on fastcl's kernels.

    from fastcl.compat.pytorch_metric_learning import NTXentLoss
    fastcl.compat.patch("pytorch_metric_learning")        or this

NTXentLoss, SupConLoss and CrossBatchMemory are subclasses of the library's (made when first asked
for, so that importing this module does not need it). Only the computation of the losses is
replaced: reducers, regularisers, SelfSupervisedLoss, DistributedLossWrapper and the memory itself
are the library's. Neither the matrix of similarities nor the lists of all pairs are made:

    NTXentLoss    loss_ap = log(1 + exp(lse_a − s_ap)),  lse_a over the negatives of anchor a;
                  one loss for each positive pair, O(pairs · D) beside one pass
    SupConLoss    loss_a = lse_a − mean_p s_ap,          lse_a over all others; class sums

with s = cos / τ, or the dot product's. The library's own code runs for a miner's or other given
pairs, other distances than CosineSimilarity and DotProductSimilarity (p = 2, power = 1, no stats),
labels that are not integers.

Quirks kept: at most one positive and one negative pair in all give 0. SupConLoss averages the rows
whose loss is above 0, and what vanishes in the inputs' precision counts as 0 (see _vanished).
CrossBatchMemory writes a batch before it is compared, leaves out a row's own slot, except that of
a batch of one row, which finds itself; its position is not in its state dict.
Differs from it: NTXentLoss is not cut at −log of the smallest number (87 in float32); inputs in
half precision are computed with in float32, and the losses rounded.
Source: https://github.com/KevinMusgrave/pytorch-metric-learning.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import fastcl.functional as F
from fastcl.compat._common import (
    against,
    as_scalar,
    as_their_dtype,
    in_float,
    is_positive,
    matrices,
    row_lse,
    say_once,
    unit,
)
from fastcl.compat._patch import original

__all__ = ["CrossBatchMemory", "NTXentLoss", "SupConLoss"]

CrossBatchMemory: Any
NTXentLoss: Any
SupConLoss: Any

CHUNK = 1 << 22  # numbers gathered at a time: 16 MiB


class AllPairs(NamedTuple):
    """Stands for the tuple of all pairs' indices, with each row's own column (N,) left out."""

    own: Tensor | None


class Positives(NamedTuple):
    """Which columns have a row's label: `number` of them, less its own, from `first` in `order`."""

    order: Tensor  # (M,) the columns, sorted by label
    first: Tensor  # (N,)
    number: Tensor  # (N,)
    pairs: int  # positive pairs
    negatives: int  # negative pairs


def positives_of(labels: Tensor, ref_labels: Tensor, own: Tensor | None) -> Positives:
    order = ref_labels.argsort(stable=True)
    ordered = ref_labels[order]
    first = torch.searchsorted(ordered, labels)
    count = torch.searchsorted(ordered, labels, right=True) - first
    negatives = len(labels) * len(ref_labels) - int(count.sum())
    if own is not None:
        count = count - 1
    return Positives(order, first, count, int(count.sum()), negatives)


def pair_indices(positives: Positives, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Anchor and positive of every positive pair (P,), in the order of torch.where."""
    every = positives.number + (own is not None)
    row = torch.arange(len(every), device=every.device).repeat_interleave(every)
    position = torch.arange(len(row), device=row.device) - (every.cumsum(0) - every)[row]
    column = positives.order[positives.first[row] + position]
    if own is None:
        return row, column
    kept = column != own[row]
    return row[kept], column[kept]


class PairDots(torch.autograd.Function):
    """<x[a_i], y[p_i]> (P,) of index vectors a and p, gathering a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, a: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, a, p)
        size = max(1, CHUNK // x.shape[1])
        return torch.cat([(x[i] * y[j]).sum(1) for i, j in zip(a.split(size), p.split(size))])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, y, a, p = ctx.saved_tensors
        size = max(1, CHUNK // x.shape[1])
        dx, dy = (torch.zeros_like(z) if n else None for z, n in zip((x, y), ctx.needs_input_grad))
        for g, i, j in zip(grad[:, None].split(size), a.split(size), p.split(size)):
            if dx is not None:
                dx.index_add_(0, i, g * y[j])
            if dy is not None:
                dy.index_add_(0, j, g * x[i])
        return dx, dy, None, None


# ---- the losses ----------------------------------------------------------------------------------


def ntxent(
    loss: Any, z: Tensor, labels: Tensor, ref: Tensor, ref_labels: Tensor, own: Tensor | None
) -> dict[str, Any]:
    """NTXentLoss's losses of all positive pairs. z (N, D), ref (M, D)."""
    positives = positives_of(labels, ref_labels, own)
    if nothing(positives):
        return dict(loss.zero_losses())
    t, normalize = 1.0 / as_scalar(loss.temperature), loss.distance.normalize_embeddings
    others = lse_of_negatives(z, labels, ref, ref_labels, t, normalize)  # (N,)
    a, p = pair_indices(positives, own)
    x, y = (unit(v) if normalize else in_float(v) for v in (z, ref))
    losses = against(others[a], t * PairDots.apply(x, y, a, p))
    return answer(as_their_dtype(losses, z, ref, on_cpu="autocast"), (a, p), "pos_pair")


def supcon(
    loss: Any, z: Tensor, labels: Tensor, ref: Tensor, ref_labels: Tensor, own: Tensor | None
) -> dict[str, Any]:
    """SupConLoss's losses of all rows. z (N, D), ref (M, D)."""
    positives = positives_of(labels, ref_labels, own)
    if nothing(positives):
        return dict(loss.zero_losses())
    t, normalize = 1.0 / as_scalar(loss.temperature), loss.distance.normalize_embeddings
    x, y = (unit(v) if normalize else in_float(v) for v in (z, ref))
    mean, itself = mean_similarity(x, y, positives, ref_labels, own)
    positive = t * mean
    single = positives.number == 1
    if not (positives.number > 1).any():
        rows = against(lse_of_negatives(z, labels, ref, ref_labels, t, normalize), positive)
    else:
        rows = lse_of_all(z, ref, own, t, normalize) - positive
        if single.any():  # exact, where the difference above is a rounding error
            i = single.nonzero()[:, 0]
            others = lse_of_negatives(z[i], labels[i], ref, ref_labels, t, normalize)
            rows = rows.index_put((i,), against(others, positive[i]))
    rows = torch.where(
        (positives.number == 0) | _vanished(rows, t * itself - positive, z), 0.0, rows
    )
    return answer(
        as_their_dtype(rows, z, ref, on_cpu="autocast"),
        torch.arange(len(z), device=z.device),
        "element",
    )


def _vanished(loss: Tensor, below: Tensor, like: Tensor) -> Tensor:
    """Where the library's own arithmetic gives 0, which its AvgNonZeroReducer leaves out.

    It computes (s_p − max) − log Σ exp(s − max) in the inputs' precision, max over the whole row
    with the row itself: a loss below the rounding of s_p − max, or of a sum near 1, is 0.
    """
    unit_roundoff = torch.finfo(like.dtype).eps / 2
    return loss.detach() < unit_roundoff * below.detach().clamp_min(1.0)


def nothing(positives: Positives) -> bool:
    few = positives.pairs <= 1 and positives.negatives <= 1
    return few or positives.pairs == 0 or positives.negatives == 0


def answer(losses: Tensor, indices: Any, kind: str) -> dict[str, Any]:
    """What the library's reducers take."""
    return {"loss": {"losses": losses, "indices": indices, "reduction_type": kind}}


def lse_of_negatives(
    z: Tensor, labels: Tensor, ref: Tensor, ref_labels: Tensor, t: float | Tensor, normalize: bool
) -> Tensor:
    """Log-sum-exp (N,) over the columns of other labels."""
    if ref is z and ref_labels is labels:
        return F.self_similarity_lse(z, scale=t, normalize=normalize, ids=labels)
    return row_lse(z, ref, scale=t, normalize=normalize, query_ids=labels, key_ids=ref_labels)


def lse_of_all(
    z: Tensor, ref: Tensor, own: Tensor | None, t: float | Tensor, normalize: bool
) -> Tensor:
    """Log-sum-exp (N,) over all columns but the row's own."""
    if ref is z and own is not None:
        return F.self_similarity_lse(z, scale=t, normalize=normalize)
    column = None if own is None else torch.arange(len(ref), device=ref.device)
    return row_lse(z, ref, scale=t, normalize=normalize, query_ids=own, key_ids=column)


def mean_similarity(
    x: Tensor, y: Tensor, positives: Positives, ref_labels: Tensor, own: Tensor | None
) -> tuple[Tensor, Tensor]:
    """<x_i, mean of its positives> (N,), and <x_i, its own column>, 0 without one."""
    ordered = ref_labels[positives.order]
    group = torch.searchsorted(ordered, ref_labels)  # names the label by a number below M
    sums = torch.zeros_like(y).index_add(0, group, y)  # (M, D)
    total = (x * sums[positives.first.clamp_max(len(y) - 1)]).sum(1)
    itself = torch.zeros_like(total) if own is None else (x * y[own]).sum(1)
    return (total - itself) / positives.number.clamp_min(1), itself


# ---- the classes ---------------------------------------------------------------------------------


def cannot_fuse(
    loss: Any, z: Tensor, labels: Tensor | None, ref: Tensor, ref_labels: Tensor | None
) -> str | None:
    distance = loss.distance
    if f"{type(distance).__module__}.{type(distance).__name__}" not in (
        "pytorch_metric_learning.distances.cosine_similarity.CosineSimilarity",
        "pytorch_metric_learning.distances.dot_product_similarity.DotProductSimilarity",
    ):
        return f"its distance is {type(distance).__name__}"
    if distance.p != 2 or distance.power != 1 or distance.collect_stats:
        return "its distance has p, power or stats of its own"
    if labels is None or ref_labels is None:
        return "there are no labels"
    if any(x.is_floating_point() or x.is_complex() or x.dtype == torch.bool
           for x in (labels, ref_labels)):  # fmt: skip
        return "its labels are not integers"
    fits = matrices(z, ref) and len(labels) == len(z) and len(ref_labels) == len(ref)
    if not fits or not is_positive(loss.temperature):
        return "these inputs are not ones that a kernel takes"
    return None


def _compute_loss(
    self: Any, theirs: Any, formula: Any, z: Tensor, labels: Any, pairs: Any, ref: Any, refs: Any
) -> Any:
    """compute_loss of both losses: `formula` for all pairs, or what is theirs."""
    given = pairs is not None and not isinstance(pairs, AllPairs)
    why = cannot_fuse(self, z, labels, ref, refs)
    if given or why:
        reason = why or "pairs are given, by a miner or a wrapper"
        say_once(f"fastcl.compat.pytorch_metric_learning.{type(self).__name__}", reason)
        if why:
            return theirs(z, labels, pairs, ref, refs)
        # In the same precision as all pairs, so that who gives them all has the same loss.
        x = in_float(z)
        result = theirs(x, labels, pairs, x if ref is z else in_float(ref), refs)
        losses = result["loss"]["losses"]
        if isinstance(losses, Tensor):  # not the 0 of no pairs
            result["loss"]["losses"] = as_their_dtype(losses, z, ref, on_cpu="autocast")
        return result
    same_labels = refs is labels
    own = torch.arange(len(z), device=z.device) if pairs is None and same_labels else None
    if pairs is not None:
        own = pairs.own
    labels = labels.long()
    return formula(self, z, labels, ref, labels if same_labels else refs.long(), own)


@functools.cache
def _classes() -> dict[str, Any]:
    """The subclasses of the library's classes."""
    losses = "pytorch_metric_learning.losses"
    their_ntxent: Any = original(f"{losses}.ntxent_loss:NTXentLoss")
    their_supcon: Any = original(f"{losses}.supcon_loss:SupConLoss")
    their_memory: Any = original(f"{losses}.cross_batch_memory:CrossBatchMemory")

    class NTXentLoss(their_ntxent):  # type: ignore[misc]
        __doc__ = their_ntxent.__doc__

        def compute_loss(self, *args: Any) -> Any:
            return _compute_loss(self, super().compute_loss, ntxent, *args)

    class SupConLoss(their_supcon):  # type: ignore[misc]
        __doc__ = their_supcon.__doc__

        def compute_loss(self, *args: Any) -> Any:
            return _compute_loss(self, super().compute_loss, supcon, *args)

    class CrossBatchMemory(their_memory):  # type: ignore[misc]
        __doc__ = their_memory.__doc__
        _in_forward = False

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            self._in_forward = True
            try:
                loss: Tensor = super().forward(*args, **kwargs)
                return loss
            finally:
                self._in_forward = False

        def create_indices_tuple(
            self,
            embeddings: Tensor,
            labels: Tensor,
            E_mem: Tensor,
            L_mem: Tensor,
            input_indices_tuple: Any,
            do_remove_self_comparisons: bool,
        ) -> Any:
            """The library's tuple, or within forward what stands for it."""
            all_pairs = self._in_forward and isinstance(self.loss, (NTXentLoss, SupConLoss))
            if self.miner or input_indices_tuple is not None or len(embeddings) == 0:
                all_pairs = False
            if not all_pairs or cannot_fuse(self.loss, embeddings, labels, E_mem, L_mem):
                return super().create_indices_tuple(
                    *(embeddings, labels, E_mem, L_mem),
                    *(input_indices_tuple, do_remove_self_comparisons),
                )
            # Of a single row the library does not find the own slot.
            found = do_remove_self_comparisons and len(embeddings) > 1
            return AllPairs(self.curr_batch_idx if found else None)

    classes = {c.__name__: c for c in (NTXentLoss, SupConLoss, CrossBatchMemory)}
    for name, cls in classes.items():  # as if written at the top: they can be pickled
        cls.__module__, cls.__qualname__ = __name__, name
    return classes


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _classes()[name])
