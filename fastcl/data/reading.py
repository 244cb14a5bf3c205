"""What data sets of image files have in common, wherever the files are: folder, table or shard.

Small images are decoded once and kept in memory; labels of any kind become 0 … K − 1; where there
is nothing to test with, every tenth image is kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fastcl.data.splits import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataSplits,
    ReadSplit,
    Split,
    TensorSplit,
    fit_square,
    none_readable,
)

IN_MEMORY = 100_000  # images of at most SMALL pixels: 100,000 · 3 · 64² bytes = 1.2 GB at the most
SMALL = 64
LARGE = 224  # the size that larger images are used at
HELD_OUT = 10  # every tenth image


def of_any_size(
    name: str, train: ReadSplit, test: ReadSplit, classes: tuple[str, ...]
) -> DataSplits:
    """Images of at most 64 pixels in memory, at their size; larger ones read and used at 224.

    Where only some have labels, all are for pre-training, and those for evaluation.
    """
    size = _largest_side(train)
    whole: Split = train
    tested: Split = test
    if size > SMALL or max(len(train), len(test)) > IN_MEMORY:
        size = LARGE
    else:
        whole, tested = in_memory(train, size), in_memory(test, size)
    known, tested = _with_labels(whole), _with_labels(tested)
    unlabeled = whole if len(known) < len(whole) else None
    options = (classes, size, IMAGENET_MEAN, IMAGENET_STD, unlabeled)
    return DataSplits(name, known, tested, *options)


def _with_labels(split: Split) -> Split:
    """Those images of a split that have labels; all where none has."""
    known = (split.labels >= 0).nonzero()[:, 0]
    return split if len(known) in (0, len(split)) else split.subset(known)


def _largest_side(split: ReadSplit, sample: int = 64) -> int:
    """The largest side among some evenly spaced images, from the files' headers."""
    from PIL import Image

    largest = 0
    for index in range(0, len(split), max(1, len(split) // sample)):
        try:
            with Image.open(split.source(index)) as image:
                largest = max(largest, *image.size)
        except Exception:  # unreadable: reported when it is decoded
            continue
    return largest or LARGE


def in_memory(split: ReadSplit, size: int) -> TensorSplit:
    """All images of a split, decoded: uint8 (N, 3, size, size). Unreadable ones are left out."""
    images = torch.empty(len(split), 3, size, size, dtype=torch.uint8)

    def decode_into(index: int) -> bool:
        image = split.read(index)
        if image is None:
            return False
        images[index] = fit_square(image, size)
        return True

    with ThreadPoolExecutor() as pool:
        readable = torch.tensor(list(pool.map(decode_into, range(len(split)))))
    split.report((~readable).nonzero()[:, 0].tolist())
    if not readable.any():
        raise ValueError(none_readable(split))
    if not readable.all():
        images, labels = images[readable], split.labels[readable]
    else:
        labels = split.labels
    return TensorSplit(images, labels, split.unreadable)


def held_out(split: ReadSplit) -> tuple[ReadSplit, ReadSplit]:
    """(nine tenths to train on, every tenth image to test with), of a data set of one split."""
    if len(split) < HELD_OUT:
        raise ValueError(
            f"{len(split)} images without a test split: at least {HELD_OUT} are needed"
        )
    number = torch.arange(len(split))
    last = number % HELD_OUT == HELD_OUT - 1
    return split.subset(number[~last]), split.subset(number[last])


def encode(what: str, *columns: Sequence[Any]) -> tuple[list[Tensor], tuple[str, ...]]:
    """Label values of several splits -> their class numbers, int64 (N,) each, and class names.

    Values are whole numbers or text; None, negative and empty: no label, −1. Classes are sorted:
    numbers by size, texts by letters. Raises ValueError, which begins with `what`, for others.
    """
    for value in (value for column in columns for value in column):
        if not (value is None or isinstance(value, int | str)):
            raise ValueError(f"{what}: labels must be whole numbers or text; got {value!r}")
    kinds = {value for column in columns for value in column if not _missing(value)}
    number = all(isinstance(value, int) for value in kinds)
    names = sorted(kinds) if number else sorted(kinds, key=str)
    place = {value: i for i, value in enumerate(names)}
    encoded = [torch.tensor([place.get(v, -1) for v in c], dtype=torch.int64) for c in columns]
    return encoded, tuple(map(str, names))


def _missing(value: int | str | None) -> bool:
    return value is None or value == "" or (isinstance(value, int) and value < 0)
