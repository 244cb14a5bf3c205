"""The embedded data: Fashion-MNIST with colour, light and place left to chance, as in photographs.

    image = light · (α · foreground + (1 − α) · background),      α = grey/255, flipped and moved

Each image draws its own hue, two tones of that hue (foreground and background, whose lumas differ
by a quarter of the range or more, either one the brighter), a light that falls off in some
direction, a flip, and a shift of up to 4 pixels. None of it says anything of the class,
and crops, flips and colour jitter undo it. Weighted kNN on raw pixels falls from 81 % to 37 %.

It is integer arithmetic on the frozen stream of numpy.random.RandomState (NEP 19), so the bytes are
the same everywhere. make_fashion.py makes the archive of grey images.
Source: Xiao et al. 2017, arXiv:1708.07747; MIT licence (fashion.LICENSE).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastcl.data.splits import DataSplits, TensorSplit

ARCHIVE = Path(__file__).with_name("fashion.npz")
CLASSES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle-boot"),
)
SIZE = 32
MEAN = (0.40, 0.40, 0.40)
STD = (0.285, 0.285, 0.285)
TRAIN_SEED, TEST_SEED = 0, 1
SHIFT = 4  # pixels, either way
CONTRAST = 64  # least difference of the two lumas, of 255
FALL = 112  # most that the light changes from the middle to a corner, of 128
CHUNK = 500  # images coloured at a time: their intermediate arrays stay in the cache


def load(data_dir: Path | None = None, download: bool = False) -> DataSplits:
    """10,000 training and 2,000 test images, 32×32, 10 classes, from the package itself."""
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
    """Grey images (N, 28, 28) -> (N, 3, 32, 32), each with its own colours, light and place."""
    random = np.random.RandomState(seed)
    count = len(grey)
    tones = _tones(random, count)  # (N, 2, 3)
    direction = random.randint(-256, 257, (count, 2))  # of the light: y, x
    fall = random.randint(0, FALL + 1, count)
    flip = random.randint(0, 2, count).astype(bool)
    shift = random.randint(-SHIFT, SHIFT + 1, (count, 2))  # y, x
    images = np.empty((count, 3, SIZE, SIZE), np.uint8)
    for start in range(0, count, CHUNK):
        part = slice(start, start + CHUNK)
        alpha = _place(grey[part], flip[part], shift[part]).astype(np.uint16)
        alpha += alpha >> np.uint16(7)  # 0 … 255 -> 0 … 256, so that a shift divides
        background, foreground = tones[part, 0, :, None, None], tones[part, 1, :, None, None]
        image = foreground * alpha[:, None]
        image += background * (256 - alpha[:, None])
        image >>= 8
        image *= _light(direction[part], fall[part])[:, None]  # at most 255 · 240: 16 bits hold it
        image >>= 7
        images[part] = np.minimum(image, 255)
    return images


def _tones(random: np.random.RandomState, count: int) -> NDArray[np.uint16]:
    """[image, background|foreground, channel]: a hue, and two saturations and values of it.

    Of 16 draws the first whose lumas differ enough. HSV to RGB as in pixels.hue, in 256ths.
    """
    hue = random.randint(0, 6 * 256, (count, 1, 1, 1))
    saturation = random.randint(0, 257, (count, 16, 2, 1))
    value = random.randint(0, 256, (count, 16, 2, 1))
    k = (hue + 256 * np.array([5, 3, 1])) % (6 * 256)
    away = np.clip(np.minimum(k, 4 * 256 - k), 0, 256)
    rgb = value - (value * saturation * away >> 16)  # (N, 16, 2, 3)
    luma = rgb @ np.array([77, 150, 29]) >> 8
    first = (abs(luma[:, :, 0] - luma[:, :, 1]) >= CONTRAST).argmax(1)
    tones: NDArray[np.uint16] = rgb[np.arange(count), first].astype(np.uint16)
    return tones


def _place(
    grey: NDArray[np.uint8], flip: NDArray[np.bool_], shift: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """(N, 28, 28) -> (N, 32, 32): mirrored where `flip`, moved by `shift` from the middle."""
    grey = np.where(flip[:, None, None], grey[:, :, ::-1], grey)
    border = (SIZE - grey.shape[1]) // 2 + SHIFT
    wide = np.pad(grey, ((0, 0), (border, border), (border, border)))
    pixel = np.arange(SIZE) + SHIFT
    rows, columns = pixel - shift[:, :1], pixel - shift[:, 1:]  # (N, 32)
    return wide[np.arange(len(grey))[:, None, None], rows[:, :, None], columns[:, None, :]]


def _light(direction: NDArray[np.int64], fall: NDArray[np.int64]) -> NDArray[np.uint16]:
    """128 in the middle, linear, and 128 ± fall in two corners: (N, 32, 32)."""
    axis = 2 * np.arange(SIZE) - (SIZE - 1)  # −31, −29, …, 31
    y, x = direction[:, 0, None, None], direction[:, 1, None, None]
    slope = y * axis[:, None] + x * axis
    reach = np.maximum((abs(y) + abs(x)) * (SIZE - 1), 1)
    light: NDArray[np.uint16] = (128 + fall[:, None, None] * slope // reach).astype(np.uint16)
    return light
