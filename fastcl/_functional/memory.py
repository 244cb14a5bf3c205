"""Memory: moving averages, queues, banks, and the scores against them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from fastcl import _check as check
from fastcl import ops
from fastcl._functional._shared import as_scale, reduce
from fastcl.distributed import Group, share


def ema_update_(
    targets: Sequence[Tensor] | nn.Module, sources: Sequence[Tensor] | nn.Module, *, momentum: float
) -> None:
    """Move the targets towards the sources: target ← momentum · target + (1 − momentum) · source.

    targets, sources: lists of tensors of equal shapes, or two modules, whose parameters are meant
    (buffers are not averaged). Keep targets in float32: near momentum 1 a half-precision average
    stops moving. Source: Tarvainen & Valpola 2017, arXiv:1703.01780.
    Raises ValueError or TypeError on momentum outside [0, 1], lists of different lengths, shapes,
    dtypes or devices; then nothing has changed.

        >>> teacher, student = [torch.zeros(2)], [torch.ones(2)]
        >>> F.ema_update_(teacher, student, momentum=0.75)
        >>> teacher
        [tensor([0.2500, 0.2500])]
    """
    check.fraction("ema_update_", "momentum", momentum)
    into, source = _tensors("targets", targets), _tensors("sources", sources)
    if len(into) != len(source):
        raise ValueError(
            f"ema_update_: targets and sources must be equally many; "
            f"got {len(into)} and {len(source)}."
        )
    if not into:
        return
    device = into[0].device
    for i, (x, y) in enumerate(zip(into, source)):  # 160 of them take as long as 3 % of the update
        if x.shape != y.shape:
            raise ValueError(
                f"ema_update_: targets[{i}] and sources[{i}] must have one shape; "
                f"got {check.describe(x)} and {check.describe(y)}."
            )
        if x.device != device or y.device != device:
            raise ValueError(f"ema_update_: all tensors must be on one device; see index {i}.")
        if not (x.dtype.is_floating_point and y.dtype.is_floating_point):
            raise TypeError(f"ema_update_: index {i} is not floating point.")
    ops.ema_(into, source, float(momentum))


def _tensors(name: str, x: Iterable[Tensor] | nn.Module) -> list[Tensor]:
    tensors = list(x.parameters() if isinstance(x, nn.Module) else x)
    for t in tensors:
        if not isinstance(t, Tensor):
            raise TypeError(f"ema_update_: {name} must be a list of tensors or a module.")
    return [t.detach() if t.requires_grad else t for t in tensors]


def queue_push_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """Write a batch of keys into a ring buffer, over the oldest.

        queue[(pointer + arange(B)) % M] = keys;  pointer = (pointer + B) % M

    queue (M, D), contiguous; pointer int64 (1,) on the queue's device; keys (B, D), any B: of more
    than M keys the last M stay. Source: He et al. 2020, arXiv:1911.05722, algorithm 1.
    Raises ValueError or TypeError on shapes, dtypes, devices, an empty queue; then nothing has
    changed.

        >>> queue, pointer = torch.zeros(4, 1), torch.tensor([3])
        >>> F.queue_push_(queue, pointer, torch.tensor([[1.0], [2.0]]))
        >>> queue[:, 0], pointer
        (tensor([2., 0., 0., 1.]), tensor([1]))
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


def bank_update_(bank: Tensor, index: Tensor, features: Tensor, *, momentum: float = 0.5) -> None:
    """Move rows of a memory bank towards new features, and back onto the unit sphere.

        bank[index] = normalize(momentum * bank[index] + (1 - momentum) * features)

    bank (M, D), contiguous; index integer (B,); features (B, D). Every row is made from the bank as
    it was; of equal indices the last one wins. Source: Wu et al. 2018, arXiv:1805.01978.
    Raises ValueError, TypeError or (an index outside the bank, on the CPU) IndexError; then nothing
    has changed.

        >>> bank = torch.eye(3)
        >>> F.bank_update_(bank, torch.tensor([1]), torch.tensor([[0.0, 0.0, 1.0]]), momentum=0.5)
        >>> bank[1]
        tensor([0.0000, 0.7071, 0.7071])
    """
    check.matrices("bank_update_", bank=bank, features=features)
    check.not_empty("bank_update_", bank=bank)
    check.fraction("bank_update_", "momentum", momentum)
    if not bank.is_contiguous():
        raise ValueError("bank_update_: bank must be contiguous, as (M, D).")
    index = check.integers("bank_update_", "index", index, features.shape[0], bank.device)
    check.inside("bank_update_", index, bank.shape[0])
    if features.dtype == torch.float64:
        features = features.to(bank.dtype)
    if features.shape[0]:
        ops.bank_update_(bank.detach(), index, features.detach(), float(momentum))


def bank_scores(
    query: Tensor, bank: Tensor, index: Tensor, *, scale: float | Tensor = 1.0
) -> Tensor:
    """Similarities of queries to rows of a memory bank, without gathering the rows.

        scale * torch.einsum("nd,nkd->nk", query, bank[index])

    query (N, D); bank (M, D), without a gradient; index integer (N, K). Returns (N, K), float32.
    Source: Wu et al. 2018, arXiv:1805.01978, section 3.2.
    Raises ValueError, TypeError or (an index outside the bank, on the CPU) IndexError.

        >>> q, bank, index = torch.randn(2, 4), torch.randn(9, 4), torch.tensor([[0, 3], [8, 1]])
        >>> scores = F.bank_scores(q, bank, index, scale=2.0)
        >>> torch.allclose(scores, 2 * torch.einsum("nd,nkd->nk", q, bank[index]))
        True
    """
    check.matrices("bank_scores", query=query, bank=bank)
    check.scalar("bank_scores", "scale", scale, positive=False)
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError("bank_scores: index must be a tensor of integers.")
    if index.ndim != 2 or index.shape[0] != query.shape[0] or index.device != query.device:
        raise ValueError(
            f"bank_scores: index must be ({query.shape[0]}, K) on {query.device}; "
            f"got {check.describe(index)} on {index.device}."
        )
    index = index.long()
    check.inside("bank_scores", index, bank.shape[0])
    if bank.dtype == torch.float64:
        query = query.double()
    scores: Tensor = ops.bank_scores(query, bank.detach(), index, as_scale(scale, query))
    return scores


def nce(
    scores: Tensor,
    *,
    data_size: int,
    partition: float | Tensor,
    eps: float = 1e-7,
    reduction: str = "mean",
    group: Group | None = None,
) -> Tensor:
    """Noise-contrastive estimation: is each candidate the data, or noise?

        P = exp(scores) / partition;  c = K / data_size
        loss_b = −log P_b0 / (P_b0 + c + ε) − Σ_k log c / (P_bk + c + ε)

    scores (N, 1 + K): similarities / τ, the positive first; the noise is uniform over `data_size`
    items; `partition` is Z, a float or 0-dim tensor. Returns nats: the mean over rows of the sum
    over candidates, or (N,). Source: Wu et al. 2018, arXiv:1805.01978, equations 5 to 9.
    Raises ValueError or TypeError on shapes, dtypes, data_size < 1, partition ≤ 0, reduction.

        >>> scores = torch.zeros(4, 1 + 16)  # one positive and sixteen noise samples each
        >>> F.nce(scores, data_size=1000, partition=1000.0).isfinite()
        tensor(True)
    """
    check.matrices("nce", scores=scores)
    check.not_empty("nce", scores=scores)
    check.one_of("nce", "reduction", reduction, check.REDUCTIONS)
    check.scalar("nce", "partition", partition, positive=True)
    check.scalar("nce", "eps", eps, positive=False)
    if scores.shape[1] < 2:
        raise ValueError("nce: scores must be (N, 1 + K) with K ≥ 1; got one column.")
    if data_size < 1:
        raise ValueError(f"nce: data_size must be at least 1; got {data_size}.")
    log_z = as_scale(partition, scores).log()
    c = (scores.shape[1] - 1) / data_size
    u = scores.to(log_z.dtype) - log_z - math.log(c + eps)  # (N, 1 + K), log P / (c + ε)
    positive = logsigmoid(u[:, 0])
    negatives = logsigmoid(-u[:, 1:]) + math.log(c / (c + eps))
    at = share(len(scores), group, scores.device)
    return reduce(-positive - negatives.sum(1), reduction, at)
