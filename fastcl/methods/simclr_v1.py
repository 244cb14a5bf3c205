"""SimCLR v1: each of the two views of N images must find its partner among the other 2N − 2.

    z = g(f(x)),  unit                                              2N rows
    ℓ_r = −log exp(z_r·z_pos(r)/τ) / Σ_{c ≠ r} exp(z_r·z_c/τ)
    L = (1/N) Σ_r ℓ_r

Differs from the paper as its code does: L is twice the paper's mean over 2N rows, which doubles the
step of the tensors that LARS does not adapt, and the head has batch norm.

Source: Chen et al. 2020, arXiv:2002.05709; google-research/simclr, first commit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl.distributed import Group
from fastcl.methods import multi_crop
from fastcl.methods.base import Config as BaseConfig
from fastcl.methods.base import Progress, option
from fastcl.methods.multi_crop import mean_over_pairs
from fastcl.models.selective import truncated_init_
from fastcl.nn import simclr_head


@dataclass(frozen=True)
class Config(multi_crop.Config):
    zero_init_residual: bool = True
    augmentation: str = "simclr-v1"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    epochs: int = 1000
    batch_size: int = 4096
    optimizer: str = "lars-simclr"
    lr: float = 4.8  # 0.3 · batch / 256
    weight_decay: float = 1e-6
    schedule: str = "warmup-cosine"
    warmup_epochs: float = 10.0
    dim: int = option(128, "size of the embedding", at_least=1)
    temperature: float = option(0.1, "of the softmax over the 2N − 1 other views", above=0)
    truncated_init: bool = option(
        True, "convolutions start as a cut normal of variance 1 / fan-in, as in the code"
    )


class SimCLRV1(multi_crop.MultiCrop):
    recipes = {
        "paper": Config(),
        "quick": Config(
            backbone="tiny-resnet",
            zero_init_residual=False,
            truncated_init=False,
            image_size=24,
            crop_scale=(0.3, 1.0),
            blur=False,
            augmentation="simclr-v2",  # brightness times, not plus: plus whitens small pictures
            epochs=20,
            batch_size=128,
            optimizer="adamw",
            lr=0.0015,
            weight_decay=1e-4,
            warmup_epochs=0.5,
            temperature=0.2,
        ),
    }
    config: Config

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        self.head = simclr_head(self.feature_dim, config.dim)

    @classmethod
    def build_encoder(cls, config: BaseConfig, image_size: int) -> nn.Module:
        assert isinstance(config, Config)
        encoder = super().build_encoder(config, image_size)
        if config.truncated_init:
            truncated_init_(encoder)
        return encoder

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        z = self.head(self.encode(views)).chunk(len(views))  # batch norm sees all views
        self.embedding = normalize(z[0].detach(), dim=1)
        return nt_xent(z, self.config.temperature, self.group)

    def collapsed_loss(self) -> float:
        return 2 * math.log(2 * self.config.batch_size - 1)


def nt_xent(z: Sequence[Tensor], temperature: float, group: Group | None) -> Tensor:
    """L, 0-dim, of the embeddings (N, D) of each view; of more than two: multi_crop's mean."""

    def loss(i: int, v: int) -> Tensor:
        return F.nt_xent(z[i], z[v], temperature=temperature, group=group)

    return 2 * (loss(0, 1) if len(z) == 2 else mean_over_pairs(loss, len(z)))
