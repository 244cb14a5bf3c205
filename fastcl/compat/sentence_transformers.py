"""sentence-transformers' ranking losses (6.2 and newer) on fastcl's kernels.

    from fastcl.compat.sentence_transformers import MultipleNegativesRankingLoss
    fastcl.compat.patch("sentence_transformers")          or this

Both are subclasses of the library's (made when first asked for, so that importing this module does
not need it): constructor, embedding, gradient caching and configuration are the library's, and
only the loss of the embeddings is replaced. With queries q, their documents d¹ (the positive), d²,
… (hard negatives), and s = scale · similarity, the loss of row i is

    log Z_i − s(q_i, d¹_i)
    joint            Z_i = Σ exp s over the candidates of all directions together
    per_direction    log Z_i = mean over the directions of log Σ exp s over its candidates

    query_to_doc     s(q_i, dᶜ_j)    all documents
    query_to_query   s(q_i, q_j)     j ≠ i
    doc_to_query     s(d¹_i, q_j)    all queries, the own one (the positive) among them again
    doc_to_doc       s(d¹_i, dᶜ_j)   j ≠ i

The result is float32 (float64 for float64 embeddings), as the library's similarities are.
Each direction is one pass of a kernel over tiles; the positive is kept apart and joined exactly.
Hardness multiplies the similarity of the chosen negatives by (scale + strength), with the gradient
of `scale` alone, as the penalty is detached.

The cached loss takes all rows in one pass: `mini_batch_size` then bounds the encoder only, and no
bar is shown for the loss. gather_across_devices gathers by the library's own functions. The
library's own code runs for other similarities than cos_sim and dot_score, sparse embeddings, and
columns of different lengths.
Source: https://github.com/huggingface/sentence-transformers, sentence_transformer/losses.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastcl.functional as F
from fastcl.compat._common import (
    against,
    as_their_dtype,
    in_float,
    paired_dot,
    pairs,
    row_lse,
    say_once,
    unit,
)
from fastcl.compat._patch import original

__all__ = ["CachedMultipleNegativesRankingLoss", "MultipleNegativesRankingLoss"]

CachedMultipleNegativesRankingLoss: Any
MultipleNegativesRankingLoss: Any


class Rows(NamedTuple):
    """The embeddings that a loss is made of: this process's rows, and everybody's."""

    queries: Tensor  # (N, D)
    docs: list[Tensor]  # C of (N, D), the positives first
    every_query: Tensor  # (W N, D); `queries` itself when there is one process
    every_doc: Tensor  # (C W N, D)
    first: int  # where this process's rows begin in every_query


def rows_of(loss: Any, queries: Tensor, docs: list[Tensor], module: str) -> Rows:
    """`queries` and `docs`, gathered by the functions of the library's module if wanted."""
    if not loss.gather_across_devices:
        return Rows(queries, docs, queries, torch.cat(docs), 0)
    their = sys.modules[module]
    every, every_doc = their.all_gather_with_grad(queries), []
    n, first = len(queries), their.get_rank() * len(queries)
    for i, x in enumerate(docs):
        every_doc.append(their.all_gather_with_grad(x))
        docs[i] = every_doc[-1][first : first + n]
    mine = every if len(every) == n else every[first : first + n]
    return Rows(mine, docs, every, torch.cat(every_doc), first)


def ranking_loss(loss: Any, r: Rows) -> Tensor:
    """The mean over this process's rows."""
    scale, shape = float(loss.scale), unit if normalizes(loss) else in_float
    own = [paired_dot(shape(r.queries), shape(x)) for x in r.docs]  # C of (N,)
    positive = scale * own[0]
    others = other_candidates(loss, r)
    strength = extra(loss, "hard_negatives", "all_negatives")
    others["query_to_doc"] += [scale * s + strength * s.detach() for s in own[1:]]
    if loss.partition_mode == "joint":
        again = [positive] if "doc_to_query" in loss.directions else []
        every = [lse for direction in others.values() for lse in direction]
        rows = against(joined([*every, *again]), positive)
    else:
        directions = [against(joined(direction), positive) for direction in others.values()]
        rows = torch.stack(directions).mean(0)
    return as_their_dtype(rows.mean(), positive, on_cpu="autocast")


def other_candidates(loss: Any, r: Rows) -> dict[str, list[Tensor]]:
    """Per direction, the log-sum-exp (N,) over the candidates of other rows."""
    n, scale, single = len(r.queries), float(loss.scale), r.every_query is r.queries
    device = r.queries.device
    row = torch.arange(r.first, r.first + n, device=device)
    every_row = torch.arange(len(r.every_query), device=device)
    of = every_row.repeat(len(r.docs))
    options: dict[str, Any] = {"normalize": normalizes(loss), "query_ids": row}
    strength = extra(loss, "in_batch_negatives", "all_negatives")

    def to_doc(x: Tensor, scale: float) -> Tensor:
        return row_lse(x, r.every_doc, key_ids=of, scale=scale, **options)

    def to_query(x: Tensor, scale: float) -> Tensor:
        return row_lse(x, r.every_query, key_ids=every_row, scale=scale, **options)

    others: dict[str, list[Tensor]] = {}
    if "doc_to_query" in loss.directions and strength == 0 and single:  # both from one pass
        rows, columns = F.similarity_lse(
            r.queries, r.every_doc, scale=scale, key_ids=of, reduce="both", **options
        )
        others["query_to_doc"], others["doc_to_query"] = [rows], [columns[:n]]
    else:
        lse = to_doc(r.queries, scale + strength)
        others["query_to_doc"] = [with_gradient_of(scale, scale + strength, lse)]
        if "doc_to_query" in loss.directions:
            others["doc_to_query"] = [to_query(r.docs[0], scale)]
    if "query_to_query" in loss.directions:
        others["query_to_query"] = [
            F.self_similarity_lse(r.queries, scale=scale, normalize=options["normalize"])
            if single
            else to_query(r.queries, scale)
        ]
    if "doc_to_doc" in loss.directions:
        others["doc_to_doc"] = [
            F.self_similarity_lse(r.docs[0], scale=scale, normalize=options["normalize"])
            if single and len(r.docs) == 1
            else to_doc(r.docs[0], scale)
        ]
    return others


def extra(loss: Any, *modes: str) -> float:
    """The hardness strength, if the mode is one of these."""
    return float(loss.hardness_strength) if loss.hardness_mode in modes else 0.0


def normalizes(loss: Any) -> bool:
    return bool(loss.similarity_fct.__name__ == "cos_sim")


def joined(parts: list[Tensor]) -> Tensor:
    """The log-sum-exp of several (N,). A row without any candidate keeps a gradient of 0."""
    return torch.stack(parts).clamp_min(-1e30).logsumexp(0)


def with_gradient_of(scale: float, used: float, lse: Tensor) -> Tensor:
    """lse, computed with the scale `used`, with the gradient that `scale` gives."""
    if used == scale:
        return lse
    kept = scale / used
    return kept * lse + (1 - kept) * lse.detach()


# ---- the classes ---------------------------------------------------------------------------------


def cannot_fuse(loss: Any, columns: list[Tensor]) -> str | None:
    similarity = loss.similarity_fct
    package = "sentence_transformers.util"
    known = [original(f"{package}:{name}") for name in ("cos_sim", "dot_score")]
    if not any(similarity is f for f in known):
        return f"its similarity is {getattr(similarity, '__name__', similarity)}"
    return None if len(columns) > 1 and pairs(*columns) else "its columns are not of one shape"


@functools.cache
def _classes() -> dict[str, Any]:
    """The subclasses of the library's classes."""
    losses = "sentence_transformers.sentence_transformer.losses"
    their_loss: Any = original(f"{losses}.multiple_negatives_ranking:MultipleNegativesRankingLoss")
    their_cached: Any = original(
        f"{losses}.cached_multiple_negatives_ranking:CachedMultipleNegativesRankingLoss"
    )

    class MultipleNegativesRankingLoss(their_loss):  # type: ignore[misc]
        __doc__ = their_loss.__doc__

        def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
            why = cannot_fuse(self, embeddings)
            if why:
                say_once("fastcl.compat.sentence_transformers.MultipleNegativesRankingLoss", why)
                loss: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
                return loss
            docs = list(embeddings[1:])
            return ranking_loss(self, rows_of(self, embeddings[0], docs, their_loss.__module__))

    class CachedMultipleNegativesRankingLoss(their_cached):  # type: ignore[misc]
        __doc__ = their_cached.__doc__

        def calculate_loss(
            self, reps: list[list[Tensor]], labels: Any = None, *, with_backward: bool = False
        ) -> Tensor:
            columns = [torch.cat(r) for r in reps]
            why = cannot_fuse(self, columns)
            if why:
                name = "fastcl.compat.sentence_transformers.CachedMultipleNegativesRankingLoss"
                say_once(name, why)
                loss: Tensor = super().calculate_loss(reps, labels, with_backward=with_backward)
                return loss
            loss = ranking_loss(
                self, rows_of(self, columns[0], columns[1:], their_cached.__module__)
            )
            if with_backward:
                loss.backward()
                loss = loss.detach()
            return loss

    classes = {
        c.__name__: c for c in (MultipleNegativesRankingLoss, CachedMultipleNegativesRankingLoss)
    }
    for name, cls in classes.items():  # as if written at the top: they can be pickled
        cls.__module__, cls.__qualname__ = __name__, name
    return classes


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _classes()[name])
