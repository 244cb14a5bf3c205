"""The embedded data: Fashion-MNIST in random colours, so that there is something to learn invariance to.

    image = α · foreground + (1 − α) · background,       α = the grey image / 255, padded from 28×28 to 32×32

Foreground and background are each a linear ramp between two colours, in a random direction. Every image draws its own
colours, so that colour says nothing about the class, as in photographs, while grey Fashion-MNIST would be solved by its raw
pixels (weighted kNN 81 %; here below 40 %).

Everything is integer arithmetic on the frozen stream of numpy.random.RandomState (NEP 19): the same bytes everywhere.
Source: Xiao et al. 2017, arXiv:1708.07747; MIT licence (fashion.LICENSE). The archive is made by make_fashion.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastcl.data.splits import DataSplits, TensorSplit

ARCHIVE = Path(__file__).with_name("fashion.npz")
CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot",
)  # fmt: skip
SIZE = 32
TRAIN_SEED, TEST_SEED = 0, 1
MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)
CHUNK = 500  # images coloured at a time: the intermediate arrays then stay in the cache


def load(data_dir: Path | None = None, download: bool = False) -> DataSplits:
    """The embedded data: 10,000 training and 2,000 test images, 32×32, 10 classes. Nothing is read from data_dir."""
    if data_dir is not None:
        raise ValueError("data 'fashion' is part of the package and takes no data_dir")
    with np.load(ARCHIVE, allow_pickle=False) as archive:
        train = _split(archive["train_images"], archive["train_labels"], TRAIN_SEED)
        test = _split(archive["test_images"], archive["test_labels"], TEST_SEED)
    return DataSplits("fashion", train, test, CLASSES, SIZE, MEAN, STD)


def _split(grey: NDArray[np.uint8], labels: NDArray[np.uint8], seed: int) -> TensorSplit:
    return TensorSplit(
        torch.from_numpy(colour(grey, seed)), torch.from_numpy(labels.astype(np.int64))
    )


def colour(grey: NDArray[np.uint8], seed: int) -> NDArray[np.uint8]:
    """Grey images (N, 28, 28) in random colours: (N, 3, 32, 32), a function of the seed alone."""
    random = np.random.RandomState(seed)
    count = len(grey)
    ends = random.randint(0, 256, (count, 2, 2, 3))  # [image, background|foreground, end, channel]
    direction = random.randint(-256, 257, (count, 2, 2))  # [image, background|foreground, y|x]
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        background, foreground = (
            _ramp(ends[part, layer], direction[part, layer]) for layer in (0, 1)
        )
        alpha = np.pad(grey[part], ((0, 0), (2, 2), (2, 2))).astype(np.uint16)
        alpha += alpha >> 7  # 0…255 -> 0…256, so that a shift divides
        alpha = alpha[:, None]
        images[part] = (foreground * alpha + background * (256 - alpha)) >> 8  # fits 16 bits
    return images


def _ramp(ends: NDArray[np.int64], direction: NDArray[np.int64]) -> NDArray[np.uint16]:
    """Linear ramps between two colours: ends (N, 2, 3), direction (N, 2) -> (N, 3, 32, 32)."""
    axis = 2 * np.arange(SIZE) - (SIZE - 1)  # −31, −29, …, 31
    along_y, along_x = direction[:, 0, None, None], direction[:, 1, None, None]
    reach = (abs(along_y) + abs(along_x)) * (SIZE - 1) + 1
    t = (along_y * axis[:, None] + along_x * axis + reach) * 256 // (2 * reach)  # 0…256
    t = t[:, None].astype(np.uint16)
    first, second = ends[:, 0, :, None, None], ends[:, 1, :, None, None]
    return (first.astype(np.uint16) * (256 - t) + second.astype(np.uint16) * t) >> 8
