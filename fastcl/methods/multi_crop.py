"""Multi-crop: small crops of an image beside its two large ones.

    L = mean of ℓ(i, v) over the large crops i = 0, 1 and all other crops v ≠ i

where ℓ(i, v) is a method's loss of predicting or finding large crop i from crop v. Small crops see
a part only and are cheap; nothing is asked of a small crop by another. Of two crops L is the mean
of both directions, so that a method's loss keeps its size whatever the number of crops.

SwAV and DINO were made for it, and have the pairs in their own losses. For the other methods it is
an option: what they learn from is no longer two views alike.

Source: Caron et al. 2020 (SwAV), arXiv:2006.09882.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.data.augment import Crops
from fastcl.methods.base import Config as BaseConfig
from fastcl.methods.base import Method, option

LARGE = 2  # crops


@dataclass(frozen=True)
class Config(BaseConfig):
    small_crops: int = option(0, "small crops beside the two large ones", at_least=0)
    small_size: int | None = option(
        None, "side of the small crops; none: 3/7 of the large ones", at_least=4
    )
    small_scale: tuple[float, float] = option((0.05, 0.14), "share of the image of a small crop")


class MultiCrop(Method):
    config: Config

    def crops(self, image_size: int) -> list[Crops]:
        c = self.config
        small = c.small_size or round(image_size * 3 / 7)  # 96 for 224
        large = Crops(LARGE, image_size, c.crop_scale)
        return [large, Crops(c.small_crops, small, c.small_scale)] if c.small_crops else [large]


def mean_over_pairs(loss: Callable[[int, int], Tensor], views: int) -> Tensor:
    """The mean of loss(i, v), 0-dim each, over the large crops i and all crops v ≠ i."""
    pairs = [(i, v) for i in range(LARGE) for v in range(views) if v != i]
    return torch.stack([loss(i, v) for i, v in pairs]).mean()
