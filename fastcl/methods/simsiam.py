"""SimSiam: predict the other view of an image; without negatives, momentum encoder or large batch.

    z_i = f(x_i),  p_i = h(z_i)                    one network f, each view through it on its own
    L = −½ cos(p₁, sg(z₂)) − ½ cos(p₂, sg(z₁))     sg: no gradient, without which all z collapse

The learning rate of the predictor h stays at its peak: it must keep up with z.

Source: Chen & He 2020, arXiv:2011.10566; facebookresearch/simsiam, with --fix-pred-lr.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl.methods import multi_crop
from fastcl.methods.base import Progress, option
from fastcl.methods.multi_crop import LARGE, mean_over_pairs
from fastcl.nn import simsiam_predictor, simsiam_projector


@dataclass(frozen=True)
class Config(multi_crop.Config):
    zero_init_residual: bool = True
    augmentation: str = "moco-v2"
    epochs: int = 100
    batch_size: int = 512
    lr: float = 0.1  # 0.05 · batch / 256
    dim: int = option(2048, "size of the embedding", at_least=1)
    projector_layers: int = option(3, "layers of the projector; 2 for CIFAR", at_least=1)
    hidden: int = option(512, "width of the predictor's bottleneck", at_least=1)
    fix_predictor_lr: bool = option(True, "no schedule for the predictor's learning rate")


class SimSiam(multi_crop.MultiCrop):
    recipes = {
        "paper": Config(),
        "quick": Config(
            backbone="tiny-resnet",
            zero_init_residual=False,  # blocks that start as the identity leave a short run behind
            image_size=24,
            crop_scale=(0.3, 1.0),
            blur=False,
            jitter=2.0,
            epochs=16,
            batch_size=128,
            optimizer="adamw",
            lr=0.002,
            dim=128,
            projector_layers=2,
            hidden=64,
        ),
    }
    config: Config

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        self.projector = simsiam_projector(self.feature_dim, config.dim, config.projector_layers)
        self.predictor = simsiam_predictor(config.dim, config.hidden)

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        z = [self.projector(self.encoder(view)) for view in views]  # (N, D) each
        p = [self.predictor(z_v) for z_v in z]
        target = [z_i.detach() for z_i in z[:LARGE]]
        self.embedding = normalize(target[0], dim=1)
        return mean_over_pairs(
            lambda i, v: F.negative_cosine(p[v], target[i], group=self.group), len(views)
        )

    def fixed_lr(self) -> Iterable[nn.Parameter]:
        return self.predictor.parameters() if self.config.fix_predictor_lr else ()

    def collapsed_loss(self) -> float:
        return -1.0
