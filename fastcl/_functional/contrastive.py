"""Contrastive losses, and the log-sum-exp of similarities that they are made of."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl import _check as check
from fastcl import ops
from fastcl._functional._across import both_across, pairs_across, rows_across
from fastcl._functional._labels import similarity_to_own_label
from fastcl._functional._shared import (
    against,
    as_scale,
    inverse,
    minus_positive,
    promoted,
    reduce,
    row_lse,
    stays_narrow,
)
from fastcl.distributed import Group, Share, gather, needs_grad, share


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

        >>> q, k = torch.randn(5, 3), torch.randn(7, 3)
        >>> rows, columns = F.similarity_lse(q, k, scale=2.0, reduce="both")
        >>> torch.allclose(rows, (2 * q @ k.T).logsumexp(1)), columns.shape
        (True, torch.Size([7]))
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
    if reduce != "rows" or query_ids is not None or not stays_narrow(query, key):
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

        >>> z = torch.eye(4)  # each row has three others, of similarity 0
        >>> torch.allclose(F.self_similarity_lse(z), torch.full((4,), 3.0).log())
        True
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
    group: Group | None = None,
) -> Tensor:
    """InfoNCE: the positive must be found among its negatives.

        loss_i = log Σ_c exp(<q_i, c> / τ) − <q_i, p_i> / τ      c: the positive and the negatives

    query, positive (N, D). negatives: None, the other rows of `positive`; (K, D), shared by all
    queries, such as a queue; (N, K, D), each query's own. Returns nats.
    Source: van den Oord et al. 2018, arXiv:1807.03748, equation 4; He et al. 2020,
    arXiv:1911.05722, equation 1, for the queue.
    Raises ValueError or TypeError on shapes, dtypes, devices, temperature ≤ 0, reduction.

        >>> q, k, queue = torch.randn(8, 4), torch.randn(8, 4), torch.randn(100, 4)
        >>> F.info_nce(q, k).shape, F.info_nce(q, k, queue, reduction="none").shape
        (torch.Size([]), torch.Size([8]))
        >>> same = torch.ones(8, 4)  # cannot be told apart: the logarithm of the candidates
        >>> torch.allclose(F.info_nce(same, same).exp(), torch.tensor(8.0))
        True
    """
    check.pairs("info_nce", query=query, positive=positive)
    check.one_of("info_nce", "reduction", reduction, check.REDUCTIONS)
    if negatives is not None:
        _check_negatives(query, negatives)
        if not stays_narrow(query, negatives):
            query, positive, negatives = promoted(query, positive, negatives)
        else:
            query, positive = promoted(query, positive)
    else:
        query, positive = promoted(query, positive)
    t = inverse("info_nce", temperature, query)
    at = share(query.shape[0], group, query.device)
    if negatives is None:
        others = rows_across(query, positive, t, normalize, _numbers(at, query), at)  # (N,)
    elif negatives.ndim == 2:
        others = row_lse(query, negatives, t, normalize)
    else:
        others = ops.own_negatives(query, negatives, t, normalize)
    return reduce(against(others, query, positive, t, normalize), reduction, at)


def _numbers(at: Share, like: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers of this rank's rows among all, and those of all rows."""
    everyone = torch.arange(at.total, device=like.device)
    return everyone[at.own] if at.group is not None else everyone, everyone


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


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.5,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group | None = None,
) -> Tensor:
    """NT-Xent, SimCLR's loss: each of 2N views must find its partner among the 2N − 1 others.

        z = cat(z0, z1);  s = z @ z.T / τ, −inf on the diagonal
        cross_entropy(s, [N, …, 2N − 1, 0, …, N − 1])

    z0, z1 (N, D): row i of each is a view of image i. Returns nats, the mean over the 2N rows (the
    official code sums the two halves' means: twice this), or (2N,) for reduction="none".
    Source: Chen et al. 2020, arXiv:2002.05709, equation 1.
    Raises ValueError or TypeError on shapes, dtypes, devices, temperature ≤ 0, reduction.

        >>> z0 = torch.randn(8, 4, requires_grad=True)
        >>> z1 = z0 + 0.1 * torch.randn(8, 4)
        >>> loss = F.nt_xent(z0, z1, temperature=0.2)
        >>> loss.backward()
        >>> bool(loss < F.nt_xent(z0, torch.randn(8, 4), temperature=0.2)), z0.grad.shape
        (True, torch.Size([8, 4]))
    """
    check.pairs("nt_xent", z0=z0, z1=z1)
    check.one_of("nt_xent", "reduction", reduction, check.REDUCTIONS)
    z0, z1 = promoted(z0, z1)
    t = inverse("nt_xent", temperature, z0)
    at = share(z0.shape[0], group, z0.device)
    others = _other_images(z0, z1, t, normalize, at)
    return _over_views(against(others, z0, z1, t, normalize), reduction, at)


def _other_images(z0: Tensor, z1: Tensor, t: Tensor, normalize: bool, at: Share) -> Tensor:
    """For both views of each image, the lse over the views of the others (2, N)."""
    z = torch.cat((z0, z1))  # (2N, D)
    if at.group is None:
        image = torch.arange(at.total, device=z.device)
        image = torch.cat((image, image))
        lse: Tensor = ops.self_similarity_lse(z, t, image, normalize)
    else:
        images = [at.numbers(rank, z.device).repeat(2) for rank in range(at.world)]
        views = Share(tuple(2 * count for count in at.counts), at.rank, at.group)
        lse = rows_across(z, z, t, normalize, (images[at.rank], torch.cat(images)), views)
    return lse.view(2, -1)


def _over_views(loss: Tensor, reduction: str, at: Share) -> Tensor:
    """Of a loss (2, N): its mean or sum, or all 2N."""
    return loss.flatten() if reduction == "none" else reduce(loss, reduction, at)


def dcl(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group | None = None,
) -> Tensor:
    """Decoupled contrastive loss: NT-Xent with the positive left out of the denominator.

        loss_r = log Σ_{c: another image} exp(<z_r, z_c> / τ) − <z_r, z_partner> / τ

    z0, z1 (N, D), N ≥ 2. Returns nats, the mean over both directions' 2N rows, or (2N,).
    Source: Yeh et al. 2021, arXiv:2110.06848, equation 6.
    Raises ValueError or TypeError on shapes, dtypes, devices, N = 1, temperature ≤ 0, reduction.

        >>> z0, z1 = torch.randn(2, 8, 4)
        >>> bool(F.dcl(z0, z1) < F.nt_xent(z0, z1, temperature=0.1))  # one candidate fewer
        True
    """
    check.pairs("dcl", z0=z0, z1=z1)
    check.one_of("dcl", "reduction", reduction, check.REDUCTIONS)
    z0, z1 = promoted(z0, z1)
    t = inverse("dcl", temperature, z0)
    at = share(z0.shape[0], group, z0.device)
    if at.total < 2:
        raise ValueError("dcl: needs at least 2 images, or no negatives are left; got 1.")
    others = _other_images(z0, z1, t, normalize, at)
    return _over_views(minus_positive(others, z0, z1, t, normalize), reduction, at)


def clip(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group | None = None,
) -> Tensor:
    """CLIP's symmetric loss: each image must find its text, and each text its image.

        s = logit_scale * image @ text.T
        (cross_entropy(s, arange(N)) + cross_entropy(s.T, arange(N))) / 2

    image, text (N, D); logit_scale multiplies the cosine (1 / τ, already exponentiated). Both
    directions come from one pass. Returns nats; reduction="none" gives (N,), each the mean of its
    two terms. Source: Radford et al. 2021, arXiv:2103.00020, figure 3.
    Raises ValueError or TypeError on shapes, dtypes, devices, logit_scale ≤ 0, reduction.

        >>> image, text = torch.randn(8, 4), torch.randn(8, 4)
        >>> log_scale = torch.tensor(2.66, requires_grad=True)
        >>> F.clip(image, text, logit_scale=log_scale.exp()).backward()
        >>> log_scale.grad.shape
        torch.Size([])
    """
    check.pairs("clip", image=image, text=text)
    check.scalar("clip", "logit_scale", logit_scale, positive=True)
    check.one_of("clip", "reduction", reduction, check.REDUCTIONS)
    image, text = promoted(image, text)
    t = as_scale(logit_scale, image)
    at = share(image.shape[0], group, image.device)
    lse = torch.stack(both_across(image, text, t, normalize, _numbers(at, image), at))
    both = against(lse, image, text, t, normalize)  # (2, N)
    if reduction == "mean":
        return reduce(both, reduction, at)
    return reduce(both.mean(0), reduction, at)


def sup_con(
    features: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    base_temperature: float | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group | None = None,
) -> Tensor:
    """Supervised contrastive loss L_out: rows of one label are each other's positives.

        loss_i = log Σ_{j≠i} exp(<z_i, z_j> / τ) − <z_i, mean of the other rows of its label> / τ

    features (N, D), one row a view; labels (N,) integers. Rows without a positive give 0 and count
    in the mean. `base_temperature` multiplies the loss by τ / base_temperature, as the official
    code does. Class sums give the positives in O(N·D): there is no mask matrix. Returns nats.
    Source: Khosla et al. 2020, arXiv:2004.11362, equation 2.
    Raises ValueError or TypeError on shapes, dtypes, devices, temperatures ≤ 0, reduction.

        >>> z, labels = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 1, 2])
        >>> F.sup_con(z, labels, reduction="none")[5]  # alone with its label
        tensor(0.)
    """
    check.matrices("sup_con", features=features)
    check.not_empty("sup_con", features=features)
    check.one_of("sup_con", "reduction", reduction, check.REDUCTIONS)
    labels = check.integers("sup_con", "labels", labels, features.shape[0], features.device)
    t = inverse("sup_con", temperature, features)
    at = share(features.shape[0], group, features.device)
    if at.group is None:
        lse = ops.self_similarity_lse(features, t, None, normalize)  # (N,)
    else:
        lse = rows_across(features, features, t, normalize, _numbers(at, features), at)
    mean, others = similarity_to_own_label(features, labels, normalize, at)
    loss = torch.where(others > 0, torch.addcmul(lse, t, mean, value=-1), 0.0)
    if base_temperature is not None:
        check.scalar("sup_con", "base_temperature", base_temperature, positive=True)
        loss = loss / (t * base_temperature)
    return reduce(loss, reduction, at)


def siglip(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group | None = None,
) -> Tensor:
    """SigLIP's pairwise loss: every image and text is a binary question of its own.

        s = logit_scale * image @ text.T + logit_bias;  z = 2 * eye(N) - 1
        -logsigmoid(z * s).sum() / N

    image, text (N, D). Returns nats, the sum over pairs divided by N; reduction="none" gives (N,),
    each image's sum over the texts. Source: Zhai et al. 2023, arXiv:2303.15343, equation 1.
    Raises ValueError or TypeError on shapes, dtypes, devices, logit_scale ≤ 0, reduction.

        >>> image, text = torch.randn(8, 4), torch.randn(8, 4)
        >>> loss = F.siglip(image, text, logit_scale=10.0, logit_bias=-10.0)
        >>> torch.allclose(loss, F.siglip(text, image, logit_scale=10.0, logit_bias=-10.0))
        True
    """
    check.pairs("siglip", image=image, text=text)
    check.scalar("siglip", "logit_scale", logit_scale, positive=True)
    check.scalar("siglip", "logit_bias", logit_bias, positive=False)
    check.one_of("siglip", "reduction", reduction, check.REDUCTIONS)
    image, text = promoted(image, text)
    t, b = as_scale(logit_scale, image), as_scale(logit_bias, image)
    if group is not None:
        at = share(image.shape[0], group, image.device)
        return reduce(pairs_across(image, text, t, b, normalize, at), reduction, at)
    arguments = (image, text, t, b, normalize)
    if reduction == "none" or not any(map(needs_grad, arguments[:4])):
        return reduce(ops.pair_sigmoid(*arguments), reduction)
    total: Tensor = ops.pair_sigmoid_sum(*arguments)[0]
    return total / image.shape[0] if reduction == "mean" else total


def instance_spread(
    z0: Tensor,
    z1: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    negative_weight: float = 1.0,
    detach_columns: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group | None = None,
) -> Tensor:
    """InvaSpread's loss: a view is its own instance, and no other view is.

        z = cat(z0, z1);  p_rc = exp(<z_r, z_c> / τ) / Σ_{c≠r} w_rc exp(<z_r, z_c> / τ)
        loss_r = −log p_r,partner − m Σ_{c≠r,partner} log(1 − p_rc)      w = m for negatives, else 1

    z0, z1 (N, D): row i of each is a view of image i; m = negative_weight. `detach_columns` lets
    the gradient flow through the row operand only, as the official code does. Exact also where
    1 − p cancels in float32. Returns nats, the mean over the 2N rows, or (2N,).
    With a group every rank goes through the matrix of all rows, for the losses of its own.
    Source: Ye et al. 2019, arXiv:1904.03436.
    Raises ValueError or TypeError on shapes, dtypes, devices, temperature or weight ≤ 0, reduction.

        >>> z0 = torch.randn(8, 4)
        >>> bool(F.instance_spread(z0, z0) < F.instance_spread(z0, torch.randn(8, 4)))
        True
    """
    check.pairs("instance_spread", z0=z0, z1=z1)
    check.scalar("instance_spread", "negative_weight", negative_weight, positive=True)
    check.one_of("instance_spread", "reduction", reduction, check.REDUCTIONS)
    z0, z1 = promoted(z0, z1)
    t = inverse("instance_spread", temperature, z0)
    at = share(z0.shape[0], group, z0.device)
    z = torch.cat((gather(z0, at), gather(z1, at)))
    loss = ops.instance_spread(z, t, float(negative_weight), normalize, detach_columns)[0]
    return _over_views(loss.view(2, -1)[:, at.own], reduction, at)
