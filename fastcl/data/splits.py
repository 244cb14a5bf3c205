"""What a data set is here: images with labels, either all in memory or read from files when asked.

Images are uint8 (3, H, W), labels int64, −1 where there is none. Both kinds of split answer the
same questions: how many, what labels, and `batches`, the images as a test sees them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TensorSplit:
    """Images held in memory: `images` uint8 (N, 3, H, W), `labels` int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        assert self.images.dtype == torch.uint8 and self.images.dim() == 4
        assert self.labels.dtype == torch.int64 and len(self.labels) == len(self.images)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images uint8 (B, 3, H, W), labels (B,)), in order."""
        yield from zip(torch.split(self.images, batch_size), torch.split(self.labels, batch_size))


@dataclass(frozen=True)
class FolderSplit:
    """Image files, decoded when they are asked for.

    `batches` gives the usual test view: the shorter side resized to `image_size`·256/224, then the
    central square of `image_size`. `unreadable` collects the files that could not be decoded.
    """

    paths: tuple[str, ...]
    labels: Tensor
    image_size: int
    unreadable: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> Tensor | None:
        """The image as uint8 (3, H, W), or None when the file is no readable image."""
        return decode(self.paths[index])

    def report(self, indices: Iterable[int]) -> None:
        """Remembers unreadable files, and warns of each once."""
        for path in (self.paths[index] for index in indices):
            if path not in self.unreadable:
                self.unreadable.add(path)
                warnings.warn(f"skipped an unreadable image: {path}", stacklevel=2)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (images uint8 (B, 3, S, S), labels (B,)), in order, without unreadable files."""
        with ThreadPoolExecutor() as pool:
            for indices in torch.split(torch.arange(len(self)), batch_size):
                crops = list(pool.map(self._centre, indices.tolist()))
                readable = torch.tensor([crop is not None for crop in crops])
                self.report(indices[~readable].tolist())
                if readable.any():
                    images = torch.stack([crop for crop in crops if crop is not None])
                    yield images, self.labels[indices[readable]]

    def _centre(self, index: int) -> Tensor | None:
        image = self.read(index)
        return None if image is None else centre_square(image, self.image_size)


Split = TensorSplit | FolderSplit


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


def decode(path: str) -> Tensor | None:
    """One image file as uint8 (3, H, W) in RGB, or None when it is no readable image."""
    from PIL import Image
    from torchvision.transforms.v2.functional import pil_to_tensor

    try:
        with Image.open(path) as image:
            return pil_to_tensor(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError):  # what Pillow raises on truncated and foreign files
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
