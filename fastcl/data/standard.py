"""CIFAR and STL-10, read by torchvision and held in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcl.data.splits import DataSplits, TensorSplit


def load_cifar10(data_dir: Path | None, download: bool = False) -> DataSplits:
    """`--data cifar10`: 50,000 + 10,000 images, 32×32. Source: Krizhevsky 2009."""
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    train, test = (_cifar("CIFAR10", data_dir, download, train) for train in (True, False))
    splits = _cifar_split(train), _cifar_split(test)
    return DataSplits("cifar10", *splits, tuple(train.classes), 32, mean, std)


def load_cifar100(data_dir: Path | None, download: bool = False) -> DataSplits:
    """`--data cifar100`: 50,000 + 10,000 images, 32×32. Source: Krizhevsky 2009."""
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
    train, test = (_cifar("CIFAR100", data_dir, download, train) for train in (True, False))
    splits = _cifar_split(train), _cifar_split(test)
    return DataSplits("cifar100", *splits, tuple(train.classes), 32, mean, std)


def load_stl10(data_dir: Path | None, download: bool = False) -> DataSplits:
    """`--data stl10`: 5,000 + 8,000 labelled images, 96×96. Source: Coates et al. 2011.

    And 105,000 to pre-train on, the unlabelled ones and those of train: 2.9 GB of memory.
    """
    mean, std = (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713)
    train, test, unlabeled = (
        _dataset("stl10", "STL10", "stl10_binary", data_dir, download, split=split)
        for split in ("train", "test", "train+unlabeled")
    )
    splits = [
        TensorSplit(
            torch.from_numpy(np.ascontiguousarray(s.data)),
            torch.from_numpy(s.labels.astype(np.int64)),
        )
        for s in (train, test, unlabeled)
    ]
    return DataSplits("stl10", splits[0], splits[1], tuple(train.classes), 96, mean, std, splits[2])


def _cifar(kind: str, data_dir: Path | None, download: bool, train: bool) -> Any:
    folder = {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}[kind]
    return _dataset(kind.lower(), kind, folder, data_dir, download, train=train)


def _cifar_split(dataset: Any) -> TensorSplit:
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return TensorSplit(images, torch.tensor(dataset.targets))


def _dataset(
    name: str, kind: str, folder: str, data_dir: Path | None, download: bool, **options: Any
) -> Any:
    """torchvision's data set `kind`, or a ValueError that says where it was expected."""
    import torchvision

    if data_dir is None:
        raise ValueError(
            f"data {name!r} needs data_dir, the folder with {folder}/ (or to download it to)"
        )
    if not download and not (data_dir / folder).is_dir():
        raise ValueError(
            f"data {name!r} expects {data_dir / folder}/, which is not there; --download gets it"
        )
    try:
        return getattr(torchvision.datasets, kind)(data_dir, download=download, **options)
    except (
        RuntimeError,
        OSError,
    ) as error:  # what torchvision raises on missing, corrupt, unreachable files
        raise ValueError(f"data {name!r} in {data_dir}: {' '.join(str(error).split())}") from error
