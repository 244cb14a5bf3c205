"""BYOL v2: BYOL works even without batch statistics, where something else keeps signals in scale.

    every batch norm   → group norm of 16 groups
    every weight       → standardised: ŵ = (w − mean w) / √(var w + 10⁻¹⁰), but in output layers

or with `careful_init` and norms "none": an affine map in place of each norm, set by the first batch
to give mean 0 and variance 1, then learned. Loss, target and schedules are BYOL's.

A reading of the paper, whose code was not published: learning rate, weight decay and momentum of
the `paper` recipe are BYOL's for 1,000 epochs.

Source: Richemond et al. 2020, arXiv:2010.10241.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastcl.methods import byol
from fastcl.methods.base import Config as BaseConfig
from fastcl.methods.base import Method, Progress, option
from fastcl.models.norms import careful_init_, mlp, replace_batch_norm
from fastcl.nn import momentum_copy


@dataclass(frozen=True)
class Config(byol.Config):
    encoder_norm: str = option("gn+ws", "in the encoder: bn, gn, gn+ws, ln or none")
    projector_norm: str = option("gn+ws", "in the projector: bn, gn, gn+ws, ln or none")
    predictor_norm: str = option("gn+ws", "in the predictor: bn, gn, gn+ws, ln or none")
    norm_groups: int = option(16, "groups of channels of a group norm", at_least=1)
    standardisation: str = option("bit", "of weights: bit or qiao")
    careful_init: bool = option(False, "affine maps set by the first batch where a norm is none")


# Where batch norm sits and what may stand in for it: (encoder, projector, predictor), and careful
# initialisation. BYOL's ablation; `python -m bench byol-bn` trains each.
PLACEMENTS = {
    "everywhere": ("bn", "bn", "bn", False),
    "encoder, projector": ("bn", "bn", "none", False),
    "encoder, predictor": ("bn", "none", "bn", False),
    "encoder": ("bn", "none", "none", False),
    "projector, predictor": ("none", "bn", "bn", False),
    "projector": ("none", "bn", "none", False),
    "predictor": ("none", "none", "bn", False),
    "nowhere": ("none", "none", "none", False),
    "encoder; LN in the heads": ("bn", "ln", "ln", False),
    "nowhere; GN + WS": ("gn+ws", "gn+ws", "gn+ws", False),
    "nowhere; careful initialisation": ("none", "none", "none", True),
}


class BYOLV2(byol.BYOL):
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
            projector_norm="bn",  # without batch statistics anywhere so short a run collapses
            predictor_norm="bn",
        ),
    }
    config: Config

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        Method.__init__(self, encoder, config)
        c = config
        self.projector = self.make_mlp(self.feature_dim, c.projector_norm)
        self.predictor = self.make_mlp(c.dim, c.predictor_norm)
        self.target = momentum_copy(self.online)

    def make_mlp(self, features: int, norm: str) -> nn.Module:
        c = self.config
        return mlp(
            features,
            c.hidden,
            c.dim,
            norm,
            groups=c.norm_groups,
            kind=c.standardisation,
            careful=c.careful_init,
        )

    @classmethod
    def build_encoder(cls, config: BaseConfig, image_size: int) -> nn.Module:
        assert isinstance(config, Config)
        return replace_batch_norm(
            super().build_encoder(config, image_size),
            config.encoder_norm,
            groups=config.norm_groups,
            kind=config.standardisation,
            careful=config.careful_init,
        )

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        if self.config.careful_init and at.step == 0:
            images = torch.cat([self.whole(view) for view in views])
            careful_init_(nn.Sequential(self.online, self.predictor), images)
            self.target.load_state_dict(self.online.state_dict())
        return super().loss(views, at)
