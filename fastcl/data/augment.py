"""Random views of images: every method's list of operations, in its own order.

recipe = augment.build("moco-v2", image_size=32, mean=data.mean, std=data.std)
first, second = recipe.views(images, generator)     uint8 (B, 3, H, W) -> float32 (B, 3, 32, 32)
first, second = recipe.views_of(image, generator)   one image of any size -> (3, 32, 32)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from fastcl.data.colours import convert
from fastcl.data.operations import (
    Blur,
    BlurPillow,
    Crop,
    CropBYOL,
    CropSquare,
    CropTensorFlow,
    Flip,
    Grayscale,
    Jitter,
    JitterTensorFlow,
    Operation,
    Solarize,
    Sometimes,
    as_float,
    select,
)
from fastcl.data.splits import IMAGENET_STD

CHUNK = 64  # images that go through the list together, so that they stay in the level-2 cache


@dataclass(frozen=True)
class Crops:
    """`count` views of size × size pixels that show the fraction `scale` of the image's area."""

    count: int
    size: int
    scale: tuple[float, float]


@dataclass(frozen=True)
class Augmentation:
    """The views that a method takes of an image: a list of operations each, then (x − mean)/std.

    colours   "rgb", or what the views are converted to last: "grey" (one channel), "lab", "ycbcr"
    """

    lists: tuple[tuple[Operation, ...], ...]
    mean: tuple[float, float, float] | None = None  # None: the views stay in [0, 1]
    std: tuple[float, float, float] | None = None
    colours: str = "rgb"

    def views(self, images: Tensor, generator: Generator) -> list[Tensor]:
        """One float32 batch (B, 3, size, size) for each view of images uint8 (B, 3, H, W).

        The generator is of the CPU; the images may be on any device, and the views are on it too.
        """
        return [self._view(operations, images, generator) for operations in self.lists]

    def views_of(self, image: Tensor, generator: Generator) -> list[Tensor]:
        """The same of one image uint8 (3, H, W) by torchvision: (3, size, size) each."""
        views = []
        for operations in self.lists:
            view = image
            for operation in operations:
                parameters = operation.draw(1, view.shape[-2], view.shape[-1], generator)
                view = operation.single(view, select(parameters, 0))
            views.append(self.normalize(view[None])[0])
        return views

    def normalize(self, images: Tensor) -> Tensor:
        """What a test sees of images (B, 3, H, W), uint8 or in [0, 1]: no list, the same scale."""
        return convert(as_float(images), self.colours, self.mean, self.std)

    def _view(
        self, operations: tuple[Operation, ...], images: Tensor, generator: Generator
    ) -> Tensor:
        count, _, height, width = images.shape
        drawn = []  # for the whole batch, so that CHUNK does not show in the views
        for operation in operations:
            drawn.append(_to(operation.draw(count, height, width, generator), images.device))
            if isinstance(operation, Crop):
                height = width = operation.size
        done = []
        for start in range(0, count, CHUNK):
            part = slice(start, start + CHUNK)
            view = as_float(images[part])
            for operation, parameters in zip(operations, drawn):
                view = operation.batch(view, select(parameters, part))
            done.append(self.normalize(view))
        return torch.cat(done)


def _to(parameters: Any, device: torch.device) -> Any:
    if isinstance(parameters, Tensor):
        return parameters.to(device)
    return tuple(_to(p, device) for p in parameters)


# The lists: of a view's size and scale, the strength of the colour jitter, and whether to blur.

Operations = list[Operation]
Scale = tuple[float, float]


def instdisc(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """InstDisc (Wu et al. 2018, arXiv:1805.01978) and MoCo v1: their code's list for ImageNet."""
    jitter = Jitter(0.4 * strength, 0.4 * strength, 0.4 * strength, 0.4 * strength)
    return [Crop(size, scale), Sometimes(0.2, Grayscale()), jitter, Sometimes(0.5, Flip())]


def simclr_v1(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """SimCLR (Chen et al. 2020, arXiv:2002.05709) as first released: brightness is added."""
    return _simclr(size, scale, strength, blur, additive=True)


def simclr_v2(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """SimCLR v2 (Chen et al. 2020, arXiv:2006.10029), v1's present code: brightness multiplies."""
    return _simclr(size, scale, strength, blur, additive=False)


def _simclr(size: int, scale: Scale, s: float, blur: bool, additive: bool) -> Operations:
    return [
        CropTensorFlow(size, scale),
        Sometimes(0.5, Flip()),
        Sometimes(0.8, JitterTensorFlow(0.8 * s, 0.8 * s, 0.8 * s, 0.2 * s, additive)),
        Sometimes(0.2, Grayscale()),
        *([Sometimes(0.5, Blur())] if blur else []),
    ]


def moco_v2(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """MoCo v2 (Chen et al. 2020, arXiv:2003.04297)."""
    jitter = Jitter(0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength)
    return [
        Crop(size, scale),
        Sometimes(0.8, jitter),
        Sometimes(0.2, Grayscale()),
        *([Sometimes(0.5, BlurPillow())] if blur else []),
        Sometimes(0.5, Flip()),
    ]


def swav(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """SwAV (Caron et al. 2020, arXiv:2006.09882): the same for large and small crops."""
    jitter = Jitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength)
    return [
        Crop(size, scale),
        Sometimes(0.5, Flip()),
        Sometimes(0.8, jitter),
        Sometimes(0.2, Grayscale()),
        *([Sometimes(0.5, BlurPillow())] if blur else []),
    ]


def byol(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """BYOL (Grill et al. 2020, arXiv:2006.07733), the first view: always blurred."""
    return _byol(size, scale, strength, blurred=1.0 * blur, solarized=0.0)


def byol_second(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """BYOL's second view: seldom blurred, sometimes solarized."""
    return _byol(size, scale, strength, blurred=0.1 * blur, solarized=0.2)


def _byol(size: int, scale: Scale, s: float, blurred: float, solarized: float) -> Operations:
    jitter = JitterTensorFlow(0.4 * s, 0.4 * s, 0.2 * s, 0.1 * s, additive=True)
    return [
        CropBYOL(size, scale),
        Sometimes(0.5, Flip()),
        Sometimes(0.8, jitter),
        Sometimes(0.2, Grayscale()),
        *([Sometimes(blurred, Blur())] if blurred else []),
        *([Sometimes(solarized, Solarize())] if solarized else []),
    ]


def moco_v3(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """MoCo v3 (Chen et al. 2021, arXiv:2104.02057), the first view: always blurred."""
    return _moco_v3(size, scale, strength, blurred=1.0 * blur, solarized=0.0)


def moco_v3_second(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """MoCo v3's second view: seldom blurred, sometimes solarized."""
    return _moco_v3(size, scale, strength, blurred=0.1 * blur, solarized=0.2)


def _moco_v3(size: int, scale: Scale, s: float, blurred: float, solarized: float) -> Operations:
    return [
        Crop(size, scale),
        Sometimes(0.8, Jitter(0.4 * s, 0.4 * s, 0.2 * s, 0.1 * s)),
        Sometimes(0.2, Grayscale()),
        *([Sometimes(blurred, BlurPillow())] if blurred else []),
        *([Sometimes(solarized, Solarize())] if solarized else []),
        Sometimes(0.5, Flip()),
    ]


def invaspread(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """InvaSpread (Ye et al. 2019, arXiv:1904.03436): its code's list for CIFAR-10."""
    jitter = Jitter(0.4 * strength, 0.4 * strength, 0.4 * strength, 0.4 * strength)
    return [Crop(size, scale), jitter, Sometimes(0.2, Grayscale()), Sometimes(0.5, Flip())]


def cmc(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """CMC (Tian et al. 2020, arXiv:1906.05849), where strength is 0: colours stay as they are."""
    jitter = Jitter(0.4 * strength, 0.4 * strength, 0.4 * strength, 0.1 * strength)
    return [
        Crop(size, scale),
        *([Sometimes(0.8, jitter)] if strength > 0 else []),
        Sometimes(0.5, Flip()),
    ]


def cpc(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """CPC (van den Oord et al. 2018, arXiv:1807.03748): a window of the squeezed image."""
    return [CropSquare(size, scale), Sometimes(0.5, Flip())]


def dino(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """DINO (Caron et al. 2021, arXiv:2104.14294), the first large crop: always blurred."""
    return _dino(size, scale, strength, blurred=1.0 * blur, solarized=0.0)


def dino_second(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """DINO's second large crop: seldom blurred, sometimes solarized."""
    return _dino(size, scale, strength, blurred=0.1 * blur, solarized=0.2)


def dino_small(size: int, scale: Scale, strength: float, blur: bool) -> Operations:
    """DINO's small crops: blurred half of the time."""
    return _dino(size, scale, strength, blurred=0.5 * blur, solarized=0.0)


def _dino(size: int, scale: Scale, s: float, blurred: float, solarized: float) -> Operations:
    return [
        Crop(size, scale, kernel="bicubic"),
        Sometimes(0.5, Flip()),
        Sometimes(0.8, Jitter(0.4 * s, 0.4 * s, 0.2 * s, 0.1 * s)),
        Sometimes(0.2, Grayscale()),
        *([Sometimes(blurred, BlurPillow())] if blurred else []),
        *([Sometimes(solarized, Solarize())] if solarized else []),
    ]


RECIPES: dict[str, Callable[[int, Scale, float, bool], Operations]] = {
    "instdisc": instdisc,
    "invaspread": invaspread,
    "moco-v1": instdisc,
    "simclr-v1": simclr_v1,
    "moco-v2": moco_v2,
    "simclr-v2": simclr_v2,
    "swav": swav,
    "byol": byol,
    "moco-v3": moco_v3,
    "cmc": cmc,
    "cpc": cpc,
    "dino": dino,
}
SECOND = {  # the second view, where it differs
    "byol": byol_second,
    "moco-v3": moco_v3_second,
    "dino": dino_second,
}
LATER = {"dino": dino_small}  # the views after the second, where they differ
SWAV_CROPS = (Crops(2, 224, (0.14, 1.0)), Crops(6, 96, (0.05, 0.14)))


def build(
    name: str,
    *,
    image_size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    crops: Sequence[Crops] | None = None,
    strength: float = 1.0,
    blur: bool = True,
    colours: str = "rgb",
) -> Augmentation:
    """The augmentation of a method, by the method's name.

    crops       the views. None: the paper's, two of image_size, and six of 3/7 of that for SwAV
    strength    multiplies the colour jitter
    blur        False leaves the blur out of a list that has one, as is usual for small images
    colours     "rgb", "grey", "lab" or "ycbcr": what the views are made of
    mean, std   of the data. SimCLR's views stay in [0, 1] and do not use them; SwAV's code has
                0.228 where ImageNet's std is 0.229, and so has this
    Raises ValueError for an unknown name, with the list.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown augmentation {name!r}. Augmentations: {', '.join(RECIPES)}")
    is_simclr = name.startswith("simclr")
    if crops is None and name == "swav":
        crops = [replace(c, size=round(c.size * image_size / 224)) for c in SWAV_CROPS]
    elif crops is None:
        wide = is_simclr or name == "byol"
        crops = [Crops(2, image_size, (0.08 if wide else 0.2, 1.0))]
    views = [c for c in crops for _ in range(c.count)]
    first = RECIPES[name]
    recipes = [first, SECOND.get(name, first), LATER.get(name, first)]
    lists = [
        tuple(recipes[min(i, 2)](c.size, c.scale, strength, blur)) for i, c in enumerate(views)
    ]
    if is_simclr:
        return Augmentation(tuple(lists), colours=colours)
    if name == "swav" and std == IMAGENET_STD:
        std = (0.228, *IMAGENET_STD[1:])
    return Augmentation(tuple(lists), mean, std, colours)
