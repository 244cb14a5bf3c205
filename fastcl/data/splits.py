"""What a data set is here: images with labels, all in memory or read when they are asked for.

Images are uint8 (3, H, W), labels int64, −1 where there is none. Both kinds of split answer the
same questions: how many, what labels, and `batches`, the images as a test sees them.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import IO

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TensorSplit:
    """Images held in memory: `images` uint8 (N, 3, H, W), `labels` int64 (N,).

    `unreadable` has the names of those that were left out when they were read.
    """

    images: Tensor
    labels: Tensor
    unreadable: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8 and self.images.dim() == 4
        assert self.labels.dtype == torch.int64 and len(self.labels) == len(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, indices: Tensor) -> TensorSplit:
        """The split of these images alone, indices (M,) int64."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images uint8 (B, 3, H, W), labels (B,)), in order."""
        yield from zip(torch.split(self.images, batch_size), torch.split(self.labels, batch_size))


class ReadSplit(ABC):
    """Images that are read and decoded when they are asked for: what each source of them shares.

    `batches` gives the usual test view: the shorter side resized to `image_size`·256/224, then the
    central square of `image_size`. `unreadable` has the names of those that could not be decoded,
    the first first.
    """

    labels: Tensor
    image_size: int
    unreadable: dict[str, None]

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name_of(self, index: int) -> str:
        """What to call an image in a message: its file, and its place in there."""

    @abstractmethod
    def source(self, index: int) -> str | IO[bytes]:
        """What Pillow can open: a path, or the file's bytes. May raise OSError."""

    @abstractmethod
    def subset(self, indices: Tensor) -> ReadSplit:
        """The split of these images alone, indices (M,) int64."""

    def read(self, index: int) -> Tensor | None:
        """The image as uint8 (3, H, W), or None when it cannot be read."""
        try:
            return decode(self.source(index))
        except OSError:
            return None

    def report(self, indices: Iterable[int]) -> None:
        """Remembers unreadable images; warns of the first, then of the 10th, 100th, …"""
        for name in map(self.name_of, indices):
            if name in self.unreadable:
                continue
            self.unreadable[name] = None
            count = len(self.unreadable)
            if count == 1:
                warnings.warn(f"skipped an unreadable image: {name}", stacklevel=2)
            elif str(count).strip("0") == "1":
                warnings.warn(f"skipped {summary(self.unreadable)}", stacklevel=2)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images uint8 (B, 3, S, S), labels (B,)), in order, without unreadable images.

        Raises ValueError when none can be read.
        """
        found = False
        with ThreadPoolExecutor() as pool:
            for indices in torch.split(torch.arange(len(self)), batch_size):
                crops = list(pool.map(self._centre, indices.tolist()))
                readable = torch.tensor([crop is not None for crop in crops])
                self.report(indices[~readable].tolist())
                if readable.any():
                    found = True
                    images = torch.stack([crop for crop in crops if crop is not None])
                    yield images, self.labels[indices[readable]]
        if not found:
            raise ValueError(none_readable(self))

    def _centre(self, index: int) -> Tensor | None:
        image = self.read(index)
        return None if image is None else centre_square(image, self.image_size)


def summary(unreadable: Mapping[str, None]) -> str:
    """`12 unreadable images, the first photos/cat/7.jpg`"""
    return f"{len(unreadable):,} unreadable images, the first {next(iter(unreadable))}"


def none_readable(split: ReadSplit) -> str:
    return f"none of the {len(split):,} images can be read, the first {split.name_of(0)}"


@dataclass(frozen=True)
class FolderSplit(ReadSplit):
    """Image files, decoded when they are asked for."""

    paths: tuple[str, ...]
    labels: Tensor
    image_size: int
    unreadable: dict[str, None] = field(default_factory=dict)

    def name_of(self, index: int) -> str:
        return self.paths[index]

    def source(self, index: int) -> str:
        return self.paths[index]

    def subset(self, indices: Tensor) -> FolderSplit:
        paths = tuple(self.paths[i] for i in indices.tolist())
        return replace(self, paths=paths, labels=self.labels[indices])


Split = TensorSplit | ReadSplit


@dataclass(frozen=True)
class DataSplits:
    """A data set: its splits, and what a model must know of it.

    `train` and `test` are the labelled splits that evaluation uses. `unlabeled` is the larger split
    that a data set offers for pre-training, where it does (stl10). `mean` and `std` are per
    channel, for images in [0, 1].
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    unlabeled: Split | None = None

    @property
    def pretrain(self) -> Split:
        """The split to pre-train on: `unlabeled` where there is one, else `train`."""
        return self.train if self.unlabeled is None else self.unlabeled

    @property
    def labelled(self) -> bool:
        """Whether kNN has labels to vote with and to be right about."""
        return all(bool((split.labels >= 0).any()) for split in (self.train, self.test))

    @property
    def unreadable(self) -> dict[str, None]:
        """The names of the images that could not be read so far."""
        return self.train.unreadable | self.test.unreadable


def decode(source: str | IO[bytes]) -> Tensor | None:
    """An image file as uint8 (3, H, W) in RGB, or None when it is no readable image."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        with Image.open(source) as image:
            return pil_to_tensor(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception:  # Pillow's plugins raise more than OSError: ValueError, zlib.error, a bomb, …
        return None


def centre_square(image: Tensor, size: int) -> Tensor:
    """(3, H, W) -> (3, size, size): the shorter side to size·256/224, then the centre.

    An image that is size × size already stays as it is.
    """
    from torchvision.transforms.v2 import functional as tv

    if image.shape[-2:] == (size, size):
        return image
    return tv.center_crop(tv.resize(image, [size * 256 // 224], antialias=True), [size, size])


def fit_square(image: Tensor, size: int) -> Tensor:
    """(3, H, W) -> (3, size, size): the shorter side to size, then the centre."""
    from torchvision.transforms.v2 import functional as tv

    if image.shape[-2:] == (size, size):
        return image
    return tv.center_crop(tv.resize(image, [size], antialias=True), [size, size])
