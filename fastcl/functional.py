"""Contrastive losses, and the operations they are made of, as functions.

    import fastcl.functional as F
    loss = F.nt_xent(z0, z1, temperature=0.5)

No function stores a similarity matrix: memory grows with the rows, not with their square.
Everything after `*` is keyword-only. `temperature` and `scale` are floats, or 0-dim tensors that
may require a gradient. `normalize=True` L2-normalises rows (x / max(‖x‖, 1e-12)) inside the
kernel, gradient included. `reduction` is "mean", "sum" or "none". Losses are float32 (float64 for
float64 input, which runs the reference formulas). Inputs are never modified unless a name ends in
`_`. Bad arguments raise ValueError or TypeError before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastcl import _check as check
from fastcl import ops
from fastcl.ops._library import statistics_dtype
from fastcl.reference._common import NORM_FLOOR, in_float

__all__ = [
    "clip",
    "dcl",
    "ema_update_",
    "info_nce",
    "negative_cosine",
    "nt_xent",
    "queue_push_",
    "self_similarity_lse",
    "similarity_lse",
    "sinkhorn",
    "soft_cross_entropy",
    "sup_con",
]


# ---- helpers -------------------------------------------------------------------------------------


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
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return tuple(x.to(dtype) for x in tensors)


def paired_dot(x: Tensor, y: Tensor, normalize: bool) -> Tensor:
    """<x_i, y_i> (N,) of normalised rows, or of the rows as they are."""
    if normalize:
        return -ops.cosine(x, y, NORM_FLOOR)
    return (in_float(x) * in_float(y)).sum(1)


def against(others: Tensor, own: Tensor) -> Tensor:
    """log(1 + exp(others − own)): the cross entropy of the positive against the others' lse.

    The positive is left out of the others' sum, so that neither a small loss nor its gradient is
    the difference of two large numbers.
    """
    return nn.functional.softplus(others - own, threshold=40)  # torch's 20 shows in float64


def needs_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def row_lse(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    normalize: bool,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
) -> Tensor:
    """Row log-sum-exp (N,), in one pass with the query's gradient if the keys need none."""
    arguments = (query, key, scale, query_ids, key_ids, normalize)
    if not needs_grad(key) and (needs_grad(query) or needs_grad(scale)):
        lse: Tensor = ops.similarity_lse_mean(*arguments)[0]
        return lse
    lse = ops.similarity_lse(*arguments, True, False)[0]
    return lse


def reduce(loss: Tensor, reduction: str) -> Tensor:
    if reduction == "mean":
        return loss.mean()
    return loss.sum() if reduction == "sum" else loss


# ---- primitives ----------------------------------------------------------------------------------


def similarity_lse(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor = 1.0,
    normalize: bool = False,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    reduce: str = "rows",
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-sum-exp of similarities, by rows, by columns, or both from one pass.

        s = scale * query @ key.T;  rows: s.logsumexp(1);  columns: s.logsumexp(0)

    query (N, D); key (M, D), M may be 0; query_ids (N,), key_ids (M,): integers, pairs of equal ids
    are left out. Nothing left in a row gives −inf and a zero gradient.
    Returns nats: (N,) for reduce="rows", (M,) for "columns", the pair for "both".
    Without a gradient to `key`, rows cost two passes in all; otherwise four.
    Raises ValueError or TypeError on shapes, dtypes, devices, a scale that is not finite, one
    vector of ids without the other.
    """
    check.matrices("similarity_lse", query=query, key=key)
    check.scalar("similarity_lse", "scale", scale, positive=False)
    check.one_of("similarity_lse", "reduce", reduce, ("rows", "columns", "both"))
    if (query_ids is None) != (key_ids is None):
        raise ValueError("similarity_lse: query_ids and key_ids go together; got only one.")
    if query_ids is not None and key_ids is not None:
        query_ids = check.integers(
            "similarity_lse", "query_ids", query_ids, query.shape[0], query.device
        )
        key_ids = check.integers("similarity_lse", "key_ids", key_ids, key.shape[0], key.device)
    query, key = promoted(query, key)
    t = as_scale(scale, query)
    if reduce == "rows":
        return row_lse(query, key, t, normalize, query_ids, key_ids)
    if reduce == "columns":
        return row_lse(key, query, t, normalize, key_ids, query_ids)
    rows, columns = ops.similarity_lse(query, key, t, query_ids, key_ids, normalize, True, True)
    return rows, columns


def self_similarity_lse(
    z: Tensor,
    *,
    scale: float | Tensor = 1.0,
    normalize: bool = False,
    ids: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp of the similarities of each row to all other rows.

        s = scale * z @ z.T with −inf on the diagonal;  s.logsumexp(1)

    z (N, D); ids (N,): integers, pairs of equal ids are left out too. Each tile of the symmetric
    matrix is computed once. Returns (N,) in nats; nothing left in a row gives −inf.
    Raises ValueError or TypeError on shapes, dtypes, devices, a scale that is not finite.
    """
    check.matrices("self_similarity_lse", z=z)
    check.scalar("self_similarity_lse", "scale", scale, positive=False)
    if ids is not None:
        ids = check.integers("self_similarity_lse", "ids", ids, z.shape[0], z.device)
    lse: Tensor = ops.self_similarity_lse(z, as_scale(scale, z), ids, normalize)
    return lse


# ---- losses --------------------------------------------------------------------------------------


def info_nce(
    query: Tensor,
    positive: Tensor,
    negatives: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE: the positive must be found among its negatives.

        loss_i = log Σ_c exp(<q_i, c> / τ) − <q_i, p_i> / τ      c: the positive and the negatives

    query, positive (N, D). negatives: None, the other rows of `positive`; (K, D), shared by all
    queries, such as a queue; (N, K, D), each query's own. Returns nats.
    Source: van den Oord et al. 2018, arXiv:1807.03748, equation 4; He et al. 2020,
    arXiv:1911.05722, equation 1, for the queue.
    Raises ValueError or TypeError on shapes, dtypes, devices, temperature ≤ 0, reduction.
    """
    check.pairs("info_nce", query=query, positive=positive)
    check.one_of("info_nce", "reduction", reduction, check.REDUCTIONS)
    if negatives is not None:
        _check_negatives(query, negatives)
        query, positive, negatives = promoted(query, positive, negatives)
    else:
        query, positive = promoted(query, positive)
    t = inverse("info_nce", temperature, query)
    if negatives is None:
        row = torch.arange(query.shape[0], device=query.device)
        others = row_lse(query, positive, t, normalize, row, row)  # (N,)
    elif negatives.ndim == 2:
        others = row_lse(query, negatives, t, normalize)
    else:
        others = _own_negatives_lse(query, negatives, t, normalize)
    own = t * paired_dot(query, positive, normalize)  # (N,)
    return reduce(against(others, own), reduction)


def _check_negatives(query: Tensor, negatives: Tensor) -> None:
    n, d = query.shape
    if not isinstance(negatives, Tensor) or not negatives.is_floating_point():
        raise TypeError("info_nce: negatives must be a floating-point tensor.")
    shared = negatives.ndim == 2 and negatives.shape[1] == d
    own = negatives.ndim == 3 and negatives.shape[0] == n and negatives.shape[2] == d
    if not (shared or own):
        raise ValueError(
            f"info_nce: negatives must be (K, {d}) or ({n}, K, {d}); "
            f"got {check.describe(negatives)}."
        )
    if negatives.device != query.device:
        raise ValueError(
            f"info_nce: query and negatives must be on one device; "
            f"got {query.device} and {negatives.device}."
        )


def _own_negatives_lse(query: Tensor, negatives: Tensor, t: Tensor, normalize: bool) -> Tensor:
    """Log-sum-exp (N,) over each query's own negatives (N, K, D), which outweigh their scores."""
    q, k = in_float(query), in_float(negatives)
    if normalize:
        q = nn.functional.normalize(q, dim=-1, eps=NORM_FLOOR)
        k = nn.functional.normalize(k, dim=-1, eps=NORM_FLOOR)
    return (t * torch.einsum("nd,nkd->nk", q, k)).logsumexp(1)


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """NT-Xent, SimCLR's loss: each of 2N views must find its partner among the 2N − 1 others.

        z = cat(z0, z1);  s = z @ z.T / τ, −inf on the diagonal
        cross_entropy(s, [N, …, 2N − 1, 0, …, N − 1])

    z0, z1 (N, D): row i of each is a view of image i. Returns nats, the mean over the 2N rows (the
    official code sums the two halves' means: twice this), or (2N,) for reduction="none".
    Source: Chen et al. 2020, arXiv:2002.05709, equation 1.
    Raises ValueError or TypeError on shapes, dtypes, devices, temperature ≤ 0, reduction.
    """
    check.pairs("nt_xent", z0=z0, z1=z1)
    check.one_of("nt_xent", "reduction", reduction, check.REDUCTIONS)
    others, own = _views(*promoted(z0, z1), "nt_xent", temperature, normalize)
    return reduce(against(others, own), reduction)


def _views(
    z0: Tensor, z1: Tensor, function: str, temperature: float | Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """For each of the 2N views: the lse over the other images' views, the similarity to its own."""
    t = inverse(function, temperature, z0)
    image = torch.arange(z0.shape[0], device=z0.device).repeat(2)
    others = ops.self_similarity_lse(torch.cat((z0, z1)), t, image, normalize)  # (2N,)
    return others, (t * paired_dot(z0, z1, normalize)).repeat(2)


def dcl(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Decoupled contrastive loss: NT-Xent with the positive left out of the denominator.

        loss_r = log Σ_{c: another image} exp(<z_r, z_c> / τ) − <z_r, z_partner> / τ

    z0, z1 (N, D), N ≥ 2. Returns nats, the mean over both directions' 2N rows, or (2N,).
    Source: Yeh et al. 2021, arXiv:2110.06848, equation 6.
    Raises ValueError or TypeError on shapes, dtypes, devices, N = 1, temperature ≤ 0, reduction.
    """
    check.pairs("dcl", z0=z0, z1=z1)
    check.one_of("dcl", "reduction", reduction, check.REDUCTIONS)
    if z0.shape[0] < 2:
        raise ValueError("dcl: needs at least 2 images, or no negatives are left; got 1.")
    others, own = _views(*promoted(z0, z1), "dcl", temperature, normalize)
    return reduce(others - own, reduction)


def clip(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """CLIP's symmetric loss: each image must find its text, and each text its image.

        s = logit_scale * image @ text.T
        (cross_entropy(s, arange(N)) + cross_entropy(s.T, arange(N))) / 2

    image, text (N, D); logit_scale multiplies the cosine (1 / τ, already exponentiated). Both
    directions come from one pass. Returns nats; reduction="none" gives (N,), each the mean of its
    two terms. Source: Radford et al. 2021, arXiv:2103.00020, figure 3.
    Raises ValueError or TypeError on shapes, dtypes, devices, logit_scale ≤ 0, reduction.
    """
    check.pairs("clip", image=image, text=text)
    check.scalar("clip", "logit_scale", logit_scale, positive=True)
    check.one_of("clip", "reduction", reduction, check.REDUCTIONS)
    image, text = promoted(image, text)
    t = as_scale(logit_scale, image)
    pair = torch.arange(image.shape[0], device=image.device)
    rows, columns = ops.similarity_lse(image, text, t, pair, pair, normalize, True, True)
    own = t * paired_dot(image, text, normalize)  # (N,)
    return reduce((against(rows, own) + against(columns, own)) / 2, reduction)


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Supervised contrastive loss L_out: rows of one label are each other's positives.

        loss_i = log Σ_{j≠i} exp(<z_i, z_j> / τ) − <z_i, mean of the other rows of its label> / τ

    features (N, D), one row a view; labels (N,) integers. Rows without a positive give 0 and count
    in the mean. `base_temperature` multiplies the loss by τ / base_temperature, as the official
    code does. Class sums give the positives in O(N·D): there is no mask matrix. Returns nats.
    Source: Khosla et al. 2020, arXiv:2004.11362, equation 2.
    Raises ValueError or TypeError on shapes, dtypes, devices, temperatures ≤ 0, reduction.
    """
    check.matrices("sup_con", features=features)
    check.not_empty("sup_con", features=features)
    check.one_of("sup_con", "reduction", reduction, check.REDUCTIONS)
    labels = check.integers("sup_con", "labels", labels, features.shape[0], features.device)
    t = inverse("sup_con", temperature, features)
    lse = ops.self_similarity_lse(features, t, None, normalize)  # (N,)
    z = in_float(features)
    if normalize:
        z = nn.functional.normalize(z, dim=1, eps=NORM_FLOOR)
    class_sum, size = _sums_by_label(z, labels)  # (N, D), (N,)
    positives = (class_sum - z) / (size - 1).clamp_min(1)[:, None]  # mean of the others
    loss = torch.where(size > 1, lse - t * (z * positives).sum(1), 0.0)
    if base_temperature is not None:
        check.scalar("sup_con", "base_temperature", base_temperature, positive=True)
        loss = loss / (t * base_temperature)
    return reduce(loss, reduction)


def _sums_by_label(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """For every row, the sum (N, D) and the number (N,) of the rows with its label."""
    order = labels.argsort()
    changes = labels[order].diff() != 0
    rank = torch.zeros_like(labels).scatter(
        0, order, torch.cat((changes.new_zeros(1), changes)).long().cumsum(0)
    )  # (N,): the label's place among the distinct labels, without asking how many there are
    size = torch.zeros_like(rank).index_add(0, rank, torch.ones_like(rank))[rank]
    if z.device.type == "cpu":  # torch's deterministic scatter-add differs by device
        return torch.zeros_like(z).index_add(0, rank, z).index_select(0, rank), size
    return torch.zeros_like(z).index_put((rank,), z, accumulate=True)[rank], size


def soft_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy against soft targets.

        -(targets * (logits / τ).log_softmax(1)).sum(1)

    logits (N, K); targets (N, K): probabilities, without a gradient. Returns nats, (N,) for "none".
    Source: Hinton et al. 2015, arXiv:1503.02531; Caron et al. 2020, arXiv:2006.09882, equation 2.
    Raises ValueError or TypeError on shapes, dtypes, devices, temperature ≤ 0, targets that require
    a gradient, reduction.
    """
    check.matrices("soft_cross_entropy", logits=logits, targets=targets)
    check.not_empty("soft_cross_entropy", logits=logits)
    check.one_of("soft_cross_entropy", "reduction", reduction, check.REDUCTIONS)
    if logits.shape != targets.shape:
        raise ValueError(
            f"soft_cross_entropy: logits and targets must both be (N, K); "
            f"got {check.describe(logits)} and {check.describe(targets)}."
        )
    if needs_grad(targets):
        raise ValueError("soft_cross_entropy: targets get no gradient; pass targets.detach().")
    logits, targets = promoted(logits, targets)
    t = inverse("soft_cross_entropy", temperature, logits)
    loss: Tensor = ops.soft_cross_entropy(logits, targets, t)[0]
    return reduce(loss, reduction)


def sinkhorn(scores: Tensor, *, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Balanced soft codes: each sample sums to 1, each prototype gets about its equal share.

    scores (N, K): similarities of samples and prototypes. Returns codes (N, K), probabilities in
    float32, without a gradient. Works in the logarithm: scores of any size are safe.
    Source: Caron et al. 2020, arXiv:2006.09882, section 3.1 and appendix.
    Raises ValueError or TypeError on shapes, dtypes, epsilon ≤ 0, iterations < 1.
    """
    check.matrices("sinkhorn", scores=scores)
    check.not_empty("sinkhorn", scores=scores)
    check.scalar("sinkhorn", "epsilon", epsilon, positive=True)
    if not isinstance(iterations, int):
        raise TypeError(f"sinkhorn: iterations must be int; got {type(iterations).__name__}.")
    if iterations < 1:
        raise ValueError(f"sinkhorn: iterations must be at least 1; got {iterations}.")
    codes: Tensor = ops.sinkhorn(scores.detach(), float(epsilon), iterations)
    return codes


def negative_cosine(
    prediction: Tensor, target: Tensor, *, eps: float = 1e-8, reduction: str = "mean"
) -> Tensor:
    """Negative cosine similarity of paired rows, from −1 (aligned) to 1.

        -torch.nn.functional.cosine_similarity(prediction, target, dim=1, eps=eps)

    prediction, target (N, D). The target is not detached: SimSiam and BYOL pass target.detach().
    Source: Chen & He 2020, arXiv:2011.10566, equation 1; Grill et al. 2020, arXiv:2006.07733,
    equation 2, is 2 + 2 × this.
    Raises ValueError or TypeError on shapes, dtypes, devices, eps ≤ 0, reduction.
    """
    check.pairs("negative_cosine", prediction=prediction, target=target)
    check.scalar("negative_cosine", "eps", eps, positive=True)
    check.one_of("negative_cosine", "reduction", reduction, check.REDUCTIONS)
    prediction, target = promoted(prediction, target)
    return reduce(ops.cosine(prediction, target, float(eps)), reduction)


# ---- in place ------------------------------------------------------------------------------------


def ema_update_(
    targets: Sequence[Tensor] | nn.Module, sources: Sequence[Tensor] | nn.Module, *, momentum: float
) -> None:
    """Move the targets towards the sources: target ← momentum · target + (1 − momentum) · source.

    targets, sources: lists of tensors of equal shapes, or two modules, whose parameters are meant
    (buffers are not averaged). Keep targets in float32: near momentum 1 a half-precision average
    stops moving. Source: Tarvainen & Valpola 2017, arXiv:1703.01780.
    Raises ValueError or TypeError on momentum outside [0, 1], lists of different lengths, shapes,
    dtypes or devices; then nothing has changed.
    """
    check.fraction("ema_update_", "momentum", momentum)
    into, source = _tensors("targets", targets), _tensors("sources", sources)
    if len(into) != len(source):
        raise ValueError(
            f"ema_update_: targets and sources must be equally many; "
            f"got {len(into)} and {len(source)}."
        )
    for i, (x, y) in enumerate(zip(into, source)):
        if x.shape != y.shape:
            raise ValueError(
                f"ema_update_: targets[{i}] and sources[{i}] must have one shape; "
                f"got {check.describe(x)} and {check.describe(y)}."
            )
        if x.device != into[0].device or y.device != into[0].device:
            raise ValueError(f"ema_update_: all tensors must be on one device; see index {i}.")
        if not (x.is_floating_point() and y.is_floating_point()):
            raise TypeError(f"ema_update_: index {i} is not floating point.")
    if into:
        ops.ema_(into, source, float(momentum))


def _tensors(name: str, x: Iterable[Tensor] | nn.Module) -> list[Tensor]:
    tensors = [p.detach() for p in x.parameters()] if isinstance(x, nn.Module) else list(x)
    if not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"ema_update_: {name} must be a list of tensors or a module.")
    return [t.detach() for t in tensors]


def queue_push_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Write a batch of keys into a ring buffer, over the oldest.

        queue[(pointer + arange(B)) % M] = keys;  pointer = (pointer + B) % M

    queue (M, D), contiguous; pointer int64 (1,) on the queue's device; keys (B, D), any B: of more
    than M keys the last M stay. Source: He et al. 2020, arXiv:1911.05722, algorithm 1.
    Raises ValueError or TypeError on shapes, dtypes, devices, an empty queue; then nothing has
    changed.
    """
    check.matrices("queue_push_", queue=queue, keys=keys)
    check.not_empty("queue_push_", queue=queue)
    if not queue.is_contiguous():
        raise ValueError("queue_push_: queue must be contiguous, as (M, D).")
    if not isinstance(pointer, Tensor) or pointer.dtype != torch.int64:
        raise TypeError("queue_push_: pointer must be an int64 tensor.")
    if pointer.shape != (1,) or pointer.device != queue.device:
        raise ValueError(
            f"queue_push_: pointer must be (1,) on {queue.device}; "
            f"got {check.describe(pointer)} on {pointer.device}."
        )
    if keys.shape[0]:
        ops.queue_push_(queue.detach(), pointer, keys.detach())
