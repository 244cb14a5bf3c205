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
    recipes = {
        "paper": Config(),
        "quick": Config(
            backbone="tiny-resnet",
            image_size=24,
            crop_scale=(0.3, 1.0),
            jitter=2.0,
            blur=False,
            epochs=25,
            batch_size=64,
            optimizer="adamw",
            lr=0.001,
            schedule="warmup-cosine",
            warmup_epochs=0.5,
            queue_size=1024,
            momentum=0.9,  # 4,000 steps in all: the keys must follow
            temperature=0.2,
            bn_splits=1,
            centred_head=True,
        ),
    }

    def make_head(self, features: int, dim: int) -> nn.Module:
        return moco_v2_head(features, dim)
