"""How good are the features of an encoder? Weighted kNN, a linear classifier, fine-tuning.

    python -m fastcl.evaluate --checkpoint runs/swav --knn paper --linear paper
    python -m fastcl.evaluate --checkpoint runs/swav --finetune quick --labels 0.01 --distill 1.0

What is computed is in neighbours.py, probe.py and finetune.py; here are the features, the encoder
of a checkpoint and the command line. Without --knn every method gets the same k and τ (20, 0.07),
as in training; `paper` is the protocol of the method's own paper.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
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
from fastcl.neighbours import DEFAULT, KNN, Neighbours, knn, knn_of_unit_rows, own_knn
from fastcl.probe import PROTOCOLS, Protocol, linear_probe, own_protocol, probed

__all__ = [
    "PROTOCOLS",
    "Protocol",
    "features",
    "features_and_labels",
    "knn",
    "knn_accuracy",
    "linear_probe",
    "load_encoder",
    "restore",
]

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
    rows, labels = torch.empty(0), []
    count = 0
    try:
        for images, label in split.batches(batch_size):
            part = model(normalize(images.to(device)))
            if count == 0:  # in place from the start: those of raw pixels are large
                rows = torch.empty(len(split), part.shape[1])
            rows[count : count + len(part)] = part
            labels.append(label)
            count += len(part)
    finally:
        for module, training in modes:
            module.training = training
    return rows[:count], torch.cat(labels)


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


def knn_accuracy(
    model: nn.Module,
    data: DataSplits,
    *,
    normalize: Normalize = unit_range,
    k: int = DEFAULT.k,
    temperature: float = DEFAULT.temperature,
    batch_size: int = 500,
    device: torch.device | str = "cpu",
) -> float:
    """Weighted kNN of the encoder's features, training split against test split: 0 to 1."""
    train, test = (
        features_and_labels(model, split, normalize=normalize, batch_size=batch_size, device=device)
        for split in (data.train, data.test)
    )
    for rows, _ in (train, test):
        nf.normalize(rows, dim=1, out=rows)
    return knn_of_unit_rows(*train, *test, k=min(k, len(train[0])), temperature=temperature)


def pixel_knn_accuracy(
    data: DataSplits, *, k: int = DEFAULT.k, temperature: float = DEFAULT.temperature
) -> float:
    """The same of the images' own pixels in [0, 1]: what an encoder must beat."""
    return knn_accuracy(nn.Flatten(), data, k=k, temperature=temperature)


def restore(state: dict[str, Any], image_size: int) -> nn.Module:
    """What the method of a checkpoint of fastcl.train keeps, for images of that side in pixels."""
    values = state["values"]
    method = METHODS[values["method"]]
    encoder = method.build_encoder(with_values(method.recipes["paper"], values), image_size)
    own = method.kept + "."
    weights = state["method"].items()
    encoder.load_state_dict({k.removeprefix(own): v for k, v in weights if k.startswith(own)})
    return encoder


def load_encoder(state: dict[str, Any], data: DataSplits) -> tuple[nn.Module, Normalize]:
    """The encoder of a checkpoint of fastcl.train, and what was done to its images in training.

    Images are normalised by the mean and std of `data`, as training did with those of its own.
    """
    values = state["values"]
    size = values["image_size"] or data.image_size
    config = with_values(METHODS[values["method"]].recipes["paper"], values)
    encoder = restore(state, size)
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
        "--knn",
        choices=("paper", *KNN),
        help=f"k and τ of the method's paper, or of another's; none: {DEFAULT.k} and "
        f"{DEFAULT.temperature}",
    )
    parser.add_argument("--k", type=int, help="neighbours; none: those of --knn")
    parser.add_argument("--temperature", type=float, help="τ of the votes; none: that of --knn")
    parser.add_argument(
        "--linear",
        choices=("paper", *PROTOCOLS),
        help="also a linear probe, by the protocol of the method's paper or of another's",
    )
    parser.add_argument(
        "--views",
        action="store_true",
        help="the probe's training images are cropped and flipped anew in each epoch, as in the "
        "papers; else their features are computed once",
    )
    parser.add_argument(
        "--finetune", choices=finetune.PROTOCOLS, help="also fine-tuning, by this protocol"
    )
    parser.add_argument(
        "--labels", type=float, default=0.01, help="share of the labels to fine-tune with"
    )
    parser.add_argument(
        "--epochs", type=int, help="of the probe and of fine-tuning; none: the protocol's"
    )
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
    if args.epochs is not None and args.epochs < 1:
        raise ValueError(f"--epochs must be at least 1; got {args.epochs}")
    encoder, normalize = load_encoder(state, data)
    encoder.to(args.device)
    options: dict[str, Any] = {"normalize": normalize, "device": args.device}
    options["batch_size"] = args.batch_size
    train, test = (
        features_and_labels(encoder, split, **options) for split in (data.train, data.test)
    )
    votes = own_knn(values["method"]) if args.knn == "paper" else KNN.get(args.knn, DEFAULT)
    votes = Neighbours(
        votes.k if args.k is None else args.k,
        votes.temperature if args.temperature is None else args.temperature,
    )
    yield (
        f"kNN (k = {votes.k})",
        knn(*train, *test, k=votes.k, temperature=votes.temperature),
    )
    if args.linear:
        own_name = own_protocol(values["method"], values["backbone"], values.get("width", 1))
        name = own_name if args.linear == "paper" else args.linear
        protocol = dataclasses.replace(
            PROTOCOLS[name], epochs=args.epochs or PROTOCOLS[name].epochs
        )
        model = probed(encoder, protocol)
        if model is not encoder:
            train, test = (
                features_and_labels(model, split, **options) for split in (data.train, data.test)
            )
        rows = views_of(model, data, normalize, args) if args.views else train[0]
        yield f"linear ({name})", linear_probe(rows, train[1], *test, protocol, seed=args.seed)
    if args.finetune:
        yield from fine_tuned(args, state, data)
    elif args.distill is not None:
        raise ValueError("--distill needs --finetune: the fine-tuned network is the teacher")


def views_of(
    model: nn.Module, data: DataSplits, normalize: Normalize, args: argparse.Namespace
) -> Callable[[int], Tensor]:
    """Epoch -> features (N, D) of the training images, cropped and flipped anew."""
    images, _ = finetune.gather(data.train)
    generator = torch.Generator().manual_seed(args.seed)
    least = smallest_crop(data)
    model.eval()

    @torch.no_grad()
    def features(epoch: int) -> Tensor:
        rows = [
            model(finetune.crop_and_flip(normalize(part.to(args.device)), generator, least)).cpu()
            for part in images.split(args.batch_size)
        ]
        return torch.cat(rows).float()

    return features


def smallest_crop(data: DataSplits) -> float:
    """The least share of an image in a training crop: ImageNet's, more of small images."""
    return 0.3 if data.image_size <= 64 else 0.08


def fine_tuned(
    args: argparse.Namespace, state: dict[str, Any], data: DataSplits
) -> Iterator[tuple[str, float]]:
    """Yields (what, accuracy) of fine-tuning, and of the student where there is one."""
    if args.distill is not None and not args.distill > 0:
        raise ValueError(f"--distill: the temperature must be positive; got {args.distill}")
    protocol = finetune.PROTOCOLS[args.finetune]
    few = args.labels < 0.1
    epochs = args.epochs or (protocol.few_epochs if few else protocol.epochs)
    torch.manual_seed(args.seed)
    body, features, normalize = load_body(state, data, args.labels)
    student = copy.deepcopy(body).to(args.device)
    images, labels = finetune.gather(data.train)
    chosen = finetune.share(labels, args.labels, args.seed)
    options: dict[str, Any] = {"protocol": protocol, "epochs": epochs, "seed": args.seed}
    options |= {"normalize": normalize, "crop": smallest_crop(data)}
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
