"""How good are the features of an encoder? Weighted kNN, and a linear classifier on top.

kNN (Wu et al. 2018, arXiv:1805.01978, section 3.4): among the k training images whose cosine
similarity s to the test image is largest, class c gets the score

    score_c = Σ_{j: y_j = c} exp(s_j / τ)

and the class of the largest score is the prediction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as nf

from fastcl.data.splits import DataSplits, Split

SIMILARITIES = 1 << 24  # held at a time: 64 MB

Normalize = Callable[
    [Tensor], Tensor
]  # images uint8 (B, 3, H, W) -> what the encoder was trained on


def unit_range(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]."""
    return images.float() / 255


@torch.no_grad()
def features_and_labels(
    model: nn.Module,
    split: Split,
    *,
    normalize: Normalize = unit_range,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """The model's features (N, D) in eval mode, float32 on the CPU, and the labels (N,).

    normalize   what was done to the images in training: the recipe's `Augmentation.normalize`
    N counts the readable images. Every module is left in the mode, training or not, that it had.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    rows, labels = [], []
    try:
        for images, label in split.batches(batch_size):
            rows.append(model(normalize(images.to(device))).float().cpu())
            labels.append(label)
    finally:
        for module, training in modes:
            module.training = training
    return torch.cat(rows), torch.cat(labels)


def features(
    model: nn.Module,
    split: Split,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
    *,
    normalize: Normalize = unit_range,
) -> Tensor:
    """The features of `features_and_labels`, each row divided by its length: (N, D)."""
    options = {"batch_size": batch_size, "device": device}
    rows, _ = features_and_labels(model, split, normalize=normalize, **options)  # type: ignore[arg-type]
    return nf.normalize(rows, dim=1)


@torch.no_grad()
def knn(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
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
    classes = int(torch.cat((train_labels, test_labels)).max()) + 1
    train, test = nf.normalize(train_features, dim=1), nf.normalize(test_features, dim=1)
    labels = train_labels.cpu()
    right = 0
    rows = max(1, SIMILARITIES // len(train))
    for part, truth in zip(torch.split(test, rows), torch.split(test_labels.cpu(), rows)):
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


def knn_accuracy(
    model: nn.Module,
    data: DataSplits,
    *,
    normalize: Normalize = unit_range,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
) -> float:
    """Weighted kNN of the encoder's features, training split against test split: 0 to 1."""
    train, test = (
        features_and_labels(model, split, normalize=normalize, batch_size=batch_size, device=device)
        for split in (data.train, data.test)
    )
    return knn(*train, *test, k=min(k, len(train[0])), temperature=temperature)


def pixel_knn_accuracy(data: DataSplits, *, k: int = 20, temperature: float = 0.07) -> float:
    """The same of the images' own pixels in [0, 1]: what an encoder must beat."""
    return knn_accuracy(nn.Flatten(), data, k=k, temperature=temperature)
