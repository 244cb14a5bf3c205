"""InvaSpread: a view is its own instance, and no other view is; without a memory.

    z = g(f(x)), unit;  p_rc = exp(z_r·sg(z_c)/τ) / Σ_{c ≠ r} exp(z_r·sg(z_c)/τ)          2N rows
    L = −1/2N Σ_r [ log p_r,pos(r) + Σ_{c ≠ r, pos(r)} log(1 − p_rc) ]

Differs from the paper as its code does: both views are augmented, all 2N of them are rows and
candidates, and the gradient flows through the row operand only (sg).

Source: Ye et al. 2019, arXiv:1904.03436; mangye16/Unsupervised_Embedding_Learning.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl.methods.base import Config as BaseConfig
from fastcl.methods.base import Method, Progress, option
from fastcl.nn import centred, moco_head


@dataclass(frozen=True)
class Config(BaseConfig):
    backbone: str = "resnet18"  # the paper's images are CIFAR-10's
    augmentation: str = "invaspread"
    epochs: int = 301
    batch_size: int = 128
    weight_decay: float = 5e-4
    schedule: str = "step"
    milestones: tuple[int, ...] = (120, 160, 200)
    factors: tuple[float, ...] = (0.1, 0.05, 0.01)
    dim: int = option(128, "size of the embedding", at_least=1)
    centred_head: bool = option(False, "batch norm after the head, for short runs")
    temperature: float = option(0.1, "of the softmax over the other views", above=0)
    negative_weight: float = option(1.0, "m, the weight of the negatives", above=0)
    detach_columns: bool = option(True, "gradient through the row operand only, as in the code")


class InvaSpread(Method):
    recipes = {
        "paper": Config(),
        "quick": Config(
            backbone="tiny-resnet",
            image_size=24,
            crop_scale=(0.3, 1.0),
            augmentation="moco-v2",
            blur=False,
            jitter=2.0,
            epochs=12,
            batch_size=128,
            centred_head=True,
            optimizer="adamw",
            lr=0.002,
            weight_decay=1e-4,
            schedule="cosine",
            milestones=(),
            factors=(),
            temperature=0.2,
        ),
    }
    config: Config

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        head = moco_head(self.feature_dim, config.dim)
        self.head = centred(head, config.dim) if config.centred_head else head

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        z1, z2 = self.head(self.encode(views)).chunk(2)  # (N, D); batch norm sees both views
        self.embedding = normalize(z1.detach(), dim=1)
        return F.instance_spread(
            z1,
            z2,
            temperature=self.config.temperature,
            negative_weight=self.config.negative_weight,
            detach_columns=self.config.detach_columns,
            group=self.group,
        )

    def collapsed_loss(self) -> float:
        m, others = self.config.negative_weight, 2 * self.config.batch_size - 2
        total = 1 + m * others  # Σ_{c ≠ r} of the weights: P is 1 / total everywhere
        return math.log(total) - m * others * math.log1p(-1 / total)
