"""MoCo v3: MoCo without a queue, symmetric, with a predictor; the negatives are the batch's keys.

    q_i = h(g_θ(f_θ(x_i))),  k_i = g_ξ(f_ξ(x_i))         unit vectors, each view on its own
    ξ ← m ξ + (1 − m) θ,  m from m₀ to 1 by a cosine       parameters only, before the keys
    L = 2τ CE(q₁ k₂ᵀ/τ) + 2τ CE(q₂ k₁ᵀ/τ)                 target i for row i, no gradient to k

               ResNet                                       ViT
    projector  2 layers                                     3 layers
    predictor  2 layers, no batch norm after the last       batch norm (without γ, β) after it
    optimizer  LARS, τ = 1                                  AdamW, τ = 0.2, patch projection frozen

2τ makes the size of the gradient independent of τ.

Source: Chen et al. 2021, arXiv:2104.02057; facebookresearch/moco-v3.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl.methods import multi_crop
from fastcl.methods.base import Progress, option
from fastcl.methods.multi_crop import LARGE, mean_over_pairs
from fastcl.nn import moco_v3_mlp, momentum_copy
from fastcl.optim import cosine


@dataclass(frozen=True)
class Config(multi_crop.Config):
    zero_init_residual: bool = True
    augmentation: str = "moco-v3"
    epochs: int = 1000
    batch_size: int = 4096
    optimizer: str = "lars-moco-v3"
    lr: float = 4.8  # 0.3 · batch / 256; 0.6 for 100 epochs
    weight_decay: float = 1.5e-6
    schedule: str = "warmup-cosine-moco-v3"
    warmup_epochs: float = 10.0
    projector_layers: int = option(2, "layers of the projector; 3 with a ViT", at_least=1)
    predictor_layers: int = option(2, "layers of the predictor", at_least=1)
    predictor_last_norm: bool = option(False, "batch norm at the end of the predictor: with a ViT")
    hidden: int = option(4096, "hidden width of projector and predictor", at_least=1)
    dim: int = option(256, "size of the embedding", at_least=1)
    momentum: float = option(0.996, "of the key encoder, in the first step")
    momentum_cosine: bool = option(True, "momentum to 1 by a cosine; else it stays")
    temperature: float = option(1.0, "τ, of the softmax over the keys", above=0)
    freeze_patch: bool = option(False, "a ViT's patch projection stays random, for stability")


class MoCoV3(multi_crop.MultiCrop):
    recipes = {
        "paper": Config(),
        "paper-vit": Config(
            backbone="vit-small-moco-v3",
            zero_init_residual=False,
            crop_scale=(0.08, 1.0),
            epochs=300,
            optimizer="adamw",
            lr=2.4e-3,  # 1.5e-4 · batch / 256
            weight_decay=0.1,
            warmup_epochs=40.0,
            projector_layers=3,
            predictor_last_norm=True,
            momentum=0.99,
            temperature=0.2,
            freeze_patch=True,
        ),
        "quick": Config(
            backbone="tiny-resnet",
            zero_init_residual=False,  # blocks that start as the identity leave a short run behind
            image_size=24,
            crop_scale=(0.3, 1.0),
            augmentation="moco-v2",
            blur=False,
            jitter=2.0,
            epochs=12,
            batch_size=128,
            optimizer="adamw",
            lr=0.002,
            weight_decay=1e-4,
            warmup_epochs=0.5,
            hidden=256,
            dim=64,
            momentum=0.9,  # 936 steps in all: the keys must follow
            temperature=0.2,
        ),
        "quick-vit": Config(
            zero_init_residual=False,
            backbone="tiny-vit",
            image_size=24,
            crop_scale=(0.3, 1.0),
            augmentation="moco-v2",
            blur=False,
            jitter=2.0,
            epochs=8,
            batch_size=128,
            optimizer="adamw",
            lr=0.001,
            weight_decay=1e-4,
            warmup_epochs=0.5,
            hidden=256,
            dim=64,
            momentum=0.9,
            temperature=0.2,
            freeze_patch=True,
        ),
    }
    config: Config

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        c = config
        if c.freeze_patch:
            patch_projection(encoder).requires_grad_(False)
        self.projector = moco_v3_mlp(
            c.projector_layers, self.feature_dim, c.hidden, c.dim, last_norm=True
        )
        self.predictor = moco_v3_mlp(
            c.predictor_layers, c.dim, c.hidden, c.dim, c.predictor_last_norm
        )
        self.key_encoder = momentum_copy(self.base_encoder)

    @property
    def base_encoder(self) -> nn.Module:
        return nn.Sequential(self.encoder, self.projector)

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        q = [self.predictor(self.base_encoder(view)) for view in views]  # (N, D) each
        F.ema_update_(self.key_encoder, self.base_encoder, momentum=self.momentum_at(at))
        with torch.no_grad():
            k = [self.key_encoder(view) for view in views[:LARGE]]
        self.embedding = normalize(q[0].detach(), dim=1)
        tau = self.config.temperature
        mean = mean_over_pairs(
            lambda i, v: F.info_nce(q[v], k[i], temperature=tau, group=self.group), len(views)
        )
        return 2 * tau * 2 * mean

    def momentum_at(self, at: Progress) -> float:
        if not self.config.momentum_cosine:
            return self.config.momentum
        t = at.step / at.steps_per_epoch
        return cosine(t, total=at.epochs, start=self.config.momentum, end=1.0)

    def collapsed_loss(self) -> float:
        return 4 * self.config.temperature * math.log(self.config.batch_size)


def patch_projection(vit: nn.Module) -> nn.Module:
    """The layer that makes tokens of patches, in timm's transformers and in tiny-vit."""
    for name in ("patch_embed.proj", "patch"):
        try:
            return vit.get_submodule(name)
        except AttributeError:
            pass
    raise ValueError("freeze_patch is for vision transformers; this backbone has no patches")
