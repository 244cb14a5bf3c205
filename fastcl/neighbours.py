"""Weighted kNN of features, as the papers do it.

Among the k training images whose cosine similarity s to the test image is largest, class c gets the
score

    score_c = Σ_{j: y_j = c} exp(s_j / τ)

and the class of the largest score is the prediction.

Sources: Wu et al. 2018, arXiv:1805.01978, section 3.4; k and τ of `KNN`: each method's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as nf

SIMILARITIES = 1 << 24  # held at a time: 64 MB


@dataclass(frozen=True)
class Neighbours:
    """k and τ of a paper's weighted kNN."""

    k: int
    temperature: float


DEFAULT = Neighbours(20, 0.07)  # DINO's, for every method, so that numbers compare
KNN = {
    "instdisc": Neighbours(200, 0.07),  # 0.1 on CIFAR-10
    "invaspread": Neighbours(200, 0.1),  # on CIFAR-10
    "moco": Neighbours(200, 0.1),  # the CIFAR-10 demo's
    "dino": DEFAULT,
}


def own_knn(method: str) -> Neighbours:
    """k and τ of the method's paper or its family's; where it has none, the default."""
    return KNN.get(method, KNN.get(method.partition("-")[0], DEFAULT))


@torch.no_grad()
def knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = DEFAULT.k,
    temperature: float = DEFAULT.temperature,
) -> float:
    """The share of test rows, 0 to 1, that weighted kNN classifies right. It normalises the rows.

    train_features (N, D), train_labels (N,), test_features (M, D), test_labels (M,). Exact: all M·N
    similarities, in chunks. Of equally similar training rows the first are the neighbours, of
    classes of equal score the first wins.
    """
    if not 1 <= k <= len(train_features):
        raise ValueError(f"knn: k must be in 1 … {len(train_features)} training rows; got {k}")
    if not temperature > 0:
        raise ValueError(f"knn: temperature must be positive; got {temperature}")
    train, test = nf.normalize(train_features, dim=1), nf.normalize(test_features, dim=1)
    return knn_of_unit_rows(train, train_labels, test, test_labels, k=k, temperature=temperature)


def knn_of_unit_rows(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    k: int,
    temperature: float,
) -> float:
    """The same of train (N, D) and test (M, D) whose rows have length 1: no copy of them."""
    classes = int(torch.cat((train_labels, test_labels)).max()) + 1
    labels = train_labels.cpu()
    right = 0
    rows = max(1, SIMILARITIES // len(train))
    for part, truth in zip(torch.split(test, rows), torch.split(test_labels.cpu(), rows)):
        with torch.autocast(train.device.type, enabled=False):  # bfloat16 cannot tell them apart
            similarity, neighbour = nearest(part @ train.T, k)
        # On the CPU the order of the additions is fixed; exp((s − s_max)/τ) cannot overflow.
        similarity = (similarity - similarity.amax(1, keepdim=True)).double().cpu()
        score = torch.zeros(len(part), classes, dtype=torch.float64)
        score.scatter_add_(1, labels[neighbour.cpu()], torch.exp(similarity / temperature))
        right += int((score.argmax(1) == truth).sum())
    return right / len(test)


def nearest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, of equal ones the first: values, indices (M, k), in no order."""
    value, index = similarity.topk(k, 1)
    least = value[:, -1:]
    tied = (similarity >= least).sum(1) > k  # there topk may choose any of the least
    if tied.any():
        s, least = similarity[tied], least[tied]
        wanted = k - (s > least).sum(1, keepdim=True)
        equal = s == least
        chosen = (s > least) | (equal & (equal.cumsum(1) <= wanted))
        index[tied] = chosen.nonzero()[:, 1].view(-1, k)
        value[tied] = s.gather(1, index[tied])
    return value, index
