"""How good are the features of an encoder? Weighted kNN, and a linear classifier on top.

kNN (Wu et al. 2018, arXiv:1805.01978, section 3.4): among the k training images whose cosine
similarity s to the test image is largest, class c gets the score

    score_c = Σ_{j: y_j = c} exp(s_j / τ)

and the class of the largest score is the prediction.

    python -m fastcl.evaluate --checkpoint runs/swav/checkpoint.pt --linear swav
    python -m fastcl.evaluate --checkpoint runs/swav --finetune quick --labels 0.01 --distill 1.0
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as nf

from fastcl import checkpoint, finetune
from fastcl.config import with_values
from fastcl.data import DataSplits, Split, augment, load
from fastcl.methods import METHODS
from fastcl.methods.simclr_v2 import SimCLRV2

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


@dataclass(frozen=True)
class Protocol:
    """How a linear classifier is trained: SGD with momentum, on features that do not change."""

    lr: float
    epochs: int
    batch_size: int = 256
    weight_decay: float = 0.0
    momentum: float = 0.9
    nesterov: bool = False
    milestones: tuple[int, ...] | None = None  # epochs where lr falls to a tenth; None: cosine to 0


PROTOCOLS = {
    "moco": Protocol(lr=30.0, epochs=100, milestones=(60, 80)),  # arXiv:1911.05722, v1 and v2
    "simclr": Protocol(lr=1.6, epochs=90, batch_size=4096, nesterov=True),  # arXiv:2002.05709, B.6
    "swav": Protocol(lr=0.3, epochs=100, weight_decay=1e-6),  # arXiv:2006.09882
}


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    protocol: Protocol = PROTOCOLS["moco"],
    *,
    seed: int = 0,
) -> float:
    """The share of test rows, 0 to 1, that softmax regression on the training rows gets right.

    train_features (N, D), train_labels (N,), test_features (M, D), test_labels (M,), as
    `features_and_labels` gives them. W starts at N(0, 0.01), the bias at 0.
    Differs from the papers' protocols: the features are those of the test view, computed once,
    where the papers crop and flip the training images anew in every epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    count, dim = train_features.shape
    classes = int(torch.cat((train_labels, test_labels)).max()) + 1
    weight = (0.01 * torch.randn(classes, dim, generator=generator)).requires_grad_()
    bias = torch.zeros(classes, requires_grad=True)
    p = protocol
    optimizer = torch.optim.SGD(
        [weight, bias], p.lr, p.momentum, weight_decay=p.weight_decay, nesterov=p.nesterov
    )
    for epoch in range(p.epochs):
        if p.milestones is None:
            factor = 0.5 * (1 + math.cos(math.pi * epoch / p.epochs))
        else:
            factor = 0.1 ** sum(epoch >= milestone for milestone in p.milestones)
        optimizer.param_groups[0]["lr"] = p.lr * factor
        for rows in torch.split(torch.randperm(count, generator=generator), p.batch_size):
            logits = nf.linear(train_features[rows], weight, bias)
            optimizer.zero_grad()
            torch.autograd.backward(nf.cross_entropy(logits, train_labels[rows]))
            optimizer.step()
    with torch.no_grad():
        predicted = nf.linear(test_features, weight, bias).argmax(1)
    return float((predicted == test_labels).float().mean())


def load_encoder(state: dict[str, Any], data: DataSplits) -> tuple[nn.Module, Normalize]:
    """The encoder of a checkpoint of fastcl.train, and what was done to its images in training.

    Images are normalised by the mean and std of `data`, as training did with those of its own.
    """
    values = state["values"]
    size = values["image_size"] or data.image_size
    method = METHODS[values["method"]]
    config = with_values(method.recipes["paper"], values)
    encoder = method.build_encoder(config, size)
    own = method.kept + "."
    weights = state["method"].items()
    encoder.load_state_dict({k.removeprefix(own): v for k, v in weights if k.startswith(own)})
    recipe = augment.build(
        config.augmentation,
        image_size=size,
        mean=data.mean,
        std=data.std,
        colours=config.colours,
    )
    return encoder, recipe.normalize


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2, after one line, for wrong usage."""
    parser = argparse.ArgumentParser(
        prog="python -m fastcl.evaluate",
        description="Weighted kNN, and a linear probe, of the encoder of a checkpoint.",
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint.pt or its folder"
    )
    parser.add_argument("--data", help="data to evaluate on; none: the run's")
    parser.add_argument("--data-dir", help="where the data is; none: the run's")
    parser.add_argument(
        "--download", action="store_true", help="fetch the data, if torchvision can"
    )
    parser.add_argument(
        "--k", type=int, default=20, help="neighbours (the papers' 200 at ImageNet)"
    )
    parser.add_argument("--temperature", type=float, default=0.07, help="of kNN's votes")
    parser.add_argument("--linear", choices=PROTOCOLS, help="also a linear probe, by this protocol")
    parser.add_argument(
        "--finetune", choices=finetune.PROTOCOLS, help="also fine-tuning, by this protocol"
    )
    parser.add_argument(
        "--labels", type=float, default=0.01, help="share of the labels to fine-tune with"
    )
    parser.add_argument("--epochs", type=int, help="of fine-tuning; none: the protocol's")
    parser.add_argument(
        "--distill",
        type=float,
        metavar="TAU",
        help="then the fine-tuned network teaches the encoder, on images without labels",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the share and of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=500)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    try:
        for name, value in evaluate(args):
            print(f"{name}: {value:.2%}", flush=True)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"fastcl.evaluate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def evaluate(args: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Yields (what, accuracy from 0 to 1) for the command line's arguments."""
    path = args.checkpoint / checkpoint.NAME if args.checkpoint.is_dir() else args.checkpoint
    state = checkpoint.load(path)
    values = state["values"]
    own = args.data is None
    data_dir = args.data_dir or (values["data_dir"] if own else None)
    keys = ("image_column", "label_column") if own else ()
    columns = {key: values.get(key) for key in keys}
    name = values["data"] if own else args.data
    data = load(name, data_dir=data_dir, download=args.download, **columns)
    if not data.labelled:
        raise ValueError(f"data {name!r} has no labels to evaluate with")
    encoder, normalize = load_encoder(state, data)
    train, test = (
        features_and_labels(
            encoder.to(args.device),
            split,
            normalize=normalize,
            batch_size=args.batch_size,
            device=args.device,
        )
        for split in (data.train, data.test)
    )
    yield f"kNN (k = {args.k})", knn(*train, *test, k=args.k, temperature=args.temperature)
    if args.linear:
        yield f"linear ({args.linear})", linear_probe(*train, *test, PROTOCOLS[args.linear])
    if args.finetune:
        yield from fine_tuned(args, state, data)
    elif args.distill is not None:
        raise ValueError("--distill needs --finetune: the fine-tuned network is the teacher")


def fine_tuned(
    args: argparse.Namespace, state: dict[str, Any], data: DataSplits
) -> Iterator[tuple[str, float]]:
    """Yields (what, accuracy) of fine-tuning, and of the student where there is one."""
    if args.distill is not None and not args.distill > 0:
        raise ValueError(f"--distill: the temperature must be positive; got {args.distill}")
    if args.epochs is not None and args.epochs < 1:
        raise ValueError(f"--epochs must be at least 1; got {args.epochs}")
    protocol = finetune.PROTOCOLS[args.finetune]
    few = args.labels < 0.1
    epochs = args.epochs or (protocol.few_epochs if few else protocol.epochs)
    torch.manual_seed(args.seed)
    body, features, normalize = load_body(state, data, args.labels)
    student = copy.deepcopy(body).to(args.device)
    images, labels = finetune.gather(data.train)
    chosen = finetune.share(labels, args.labels, args.seed)
    options: dict[str, Any] = {"protocol": protocol, "epochs": epochs, "seed": args.seed}
    options |= {"normalize": normalize, "crop": 0.3 if data.image_size <= 64 else 0.08}
    images, labels = images.to(args.device), labels.to(args.device)
    count = len(data.classes)
    teacher = finetune.finetune(
        body.to(args.device), features, images[chosen], labels[chosen], count, **options
    )
    share = f"{args.labels:.0%} of the labels"
    yield (
        f"fine-tuned ({args.finetune}, {share})",
        finetune.accuracy(teacher, data.test, normalize, args.device),
    )
    if args.distill is not None:
        pupil = nn.Sequential(student, nn.Linear(features, count).to(args.device))
        options["epochs"] = args.epochs or protocol.epochs
        finetune.distil(pupil, teacher, images, temperature=args.distill, **options)
        yield (
            f"distilled (τ = {args.distill:g})",
            finetune.accuracy(pupil, data.test, normalize, args.device),
        )


def load_body(
    state: dict[str, Any], data: DataSplits, labels: float
) -> tuple[nn.Module, int, Normalize]:
    """What a share `labels` of the labels fine-tunes, its features, and what it is trained on.

    The encoder; for SimCLR v2 with less than all of the labels also the first layer of its head.
    """
    encoder, normalize = load_encoder(state, data)
    values = state["values"]
    method = METHODS[values["method"]]
    features: int = encoder.feature_dim  # type: ignore[assignment]
    if not issubclass(method, SimCLRV2) or labels >= 1:
        return encoder, features, normalize
    whole = method(encoder, cast(Any, with_values(method.recipes["paper"], values)))
    whole.load_state_dict(state["method"])
    return whole.fine_tuned_part(1), features, normalize


if __name__ == "__main__":
    sys.exit(main())
