"""BYOL: predict what a slowly moving copy of the network makes of the other view; no negatives.

    p_i = q_θ(g_θ(f_θ(x_i))),  z_i = g_ξ(f_ξ(x_i))     online and target, each view on its own
    L = mean ‖p̂₁ − ẑ₂‖² + mean ‖p̂₂ − ẑ₁‖²              = 4 − 2 cos(p₁, z₂) − 2 cos(p₂, z₁)
    ξ ← τ ξ + (1 − τ) θ,  τ from τ₀ to 1 by a cosine     after the optimizer's step

Differs from the code: the target starts as a copy of the online network rather than from a seed of
its own, which by its comment makes no difference; there is no linear classifier beside the method,
which gives the encoder no gradient; batch norm's running variance is torch's, unbiased.

Source: Grill et al. 2020, arXiv:2006.07733; google-deepmind/deepmind-research, byol.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl.methods import multi_crop
from fastcl.methods.base import Progress, option
from fastcl.methods.multi_crop import LARGE, mean_over_pairs
from fastcl.nn import byol_mlp, momentum_copy
from fastcl.optim import cosine

NORM_FLOOR = 1e-6  # of p and z: the code floors the squared norm at 1e-12


@dataclass(frozen=True)
class Config(multi_crop.Config):
    augmentation: str = "byol"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    epochs: int = 1000
    batch_size: int = 4096
    optimizer: str = "lars-byol"
    lr: float = 3.2  # 0.2 · batch / 256
    weight_decay: float = 1.5e-6
    schedule: str = "warmup-cosine-byol"
    warmup_epochs: float = 10.0
    hidden: int = option(4096, "hidden width of projector and predictor", at_least=1)
    dim: int = option(256, "size of the embedding", at_least=1)
    momentum: float = option(0.996, "τ₀, of the target, in the first step; 1 in the last")
    projector_norm: str = option("bn", "normalisation in the projector: bn, ln or none")
    predictor_norm: str = option("bn", "normalisation in the predictor: bn, ln or none")


class BYOL(multi_crop.MultiCrop):
    recipes = {
        "paper": Config(),
        "quick": Config(
            backbone="tiny-resnet",
            image_size=24,
            crop_scale=(0.3, 1.0),
            blur=False,
            augmentation="moco-v2",  # BYOL's adds to brightness, which whitens small pictures
            jitter=2.0,
            epochs=12,
            batch_size=128,
            optimizer="adamw",
            lr=0.002,
            weight_decay=1e-4,
            warmup_epochs=0.5,
            hidden=256,
            dim=64,
            momentum=0.9,  # 936 steps in all: the target must follow
        ),
    }
    config: Config

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        c = config
        self.projector = byol_mlp(self.feature_dim, c.hidden, c.dim, c.projector_norm)
        self.predictor = byol_mlp(c.dim, c.hidden, c.dim, c.predictor_norm)
        self.target = momentum_copy(self.online)

    @property
    def online(self) -> nn.Module:
        return nn.Sequential(self.encoder, self.projector)

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        z = [self.online(view) for view in views]  # (N, D) each
        self.embedding = normalize(z[0].detach(), dim=1)
        with torch.no_grad():
            target = [self.target(view) for view in views[:LARGE]]
        p = [self.predictor(z_v) for z_v in z]
        return 2 * mean_over_pairs(lambda i, v: self.regression(p[v], target[i]), len(views))

    def regression(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The mean squared distance of the unit vectors of two (N, D), from 0 to 4."""
        return 2 + 2 * F.negative_cosine(prediction, target, eps=NORM_FLOOR, group=self.group)

    def after_step(self, at: Progress) -> None:
        F.ema_update_(self.target, self.online, momentum=self.momentum_at(at))

    def momentum_at(self, at: Progress) -> float:
        steps = at.epochs * at.steps_per_epoch
        return cosine(at.step, total=steps, start=self.config.momentum, end=1.0)
