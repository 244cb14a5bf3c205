"""MoCo v2: MoCo v1 with what SimCLR had shown to help.

    head           linear                    → two layers
    augmentation   crop, gray, jitter, flip  → + blur, weaker hue, jitter not always
    learning rate  step                      → cosine
    τ              0.07                      → 0.2

Source: Chen et al. 2020, arXiv:2003.04297.
"""

from dataclasses import dataclass

from torch import nn

from fastcl.methods import moco_v1
from fastcl.nn import moco_v2_head


@dataclass(frozen=True)
class Config(moco_v1.Config):
    augmentation: str = "moco-v2"
    schedule: str = "cosine"
    milestones: tuple[int, ...] = ()
    temperature: float = 0.2


class MoCoV2(moco_v1.MoCoV1):
    recipes = {"paper": Config(), "quick": Config()}

    def make_head(self, features: int, dim: int) -> nn.Module:
        return moco_v2_head(features, dim)
