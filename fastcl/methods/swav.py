"""SwAV: predict the cluster assignment of one view from the other views.

    z = h(f(x)), unit;   s = z Cᵀ              rows of C: K prototypes, made unit before each step
    q_i = sinkhorn(s_i / ε)                    balanced codes of the large crops i = 0, 1
    L = ½ Σ_i 1/(V − 1) Σ_{v ≠ i} −q_i · log softmax(s_v/τ)

Small batches balance their codes together with a queue of earlier embeddings, one for each large
crop: scored once it is full, filled before that. Prototypes stay fixed for the first epoch.

Since the loss is linear in the codes, view v meets them all at once: its target is Σ_{i ≠ v} q_i.

Source: Caron et al. 2020, arXiv:2006.09882; facebookresearch/swav.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl.methods import multi_crop
from fastcl.methods.base import Progress, option
from fastcl.methods.multi_crop import LARGE
from fastcl.nn import FeatureQueue, Prototypes, centred, swav_head


@dataclass(frozen=True)
class Config(multi_crop.Config):
    augmentation: str = "swav"
    crop_scale: tuple[float, float] = (0.14, 1.0)
    epochs: int = 800
    batch_size: int = 4096
    optimizer: str = "larc"
    lr: float = 4.8  # for batch 4096; the recipe for 256 has 0.6, which is not in proportion
    weight_decay: float = 1e-6
    schedule: str = "linspace-cosine"
    warmup_epochs: float = 10.0
    start_lr: float = 0.3
    final_lr: float = 0.0048
    small_crops: int = 6
    hidden: int = option(2048, "hidden width of the head", at_least=1)
    dim: int = option(128, "size of the embedding", at_least=1)
    centred_head: bool = option(False, "batch norm after the head, for short runs")
    prototypes: int = option(3000, "K; several times the classes that one expects", at_least=2)
    temperature: float = option(0.1, "τ, of the softmax over prototypes", above=0)
    epsilon: float = option(0.05, "ε, smoothness of the codes", above=0)
    sinkhorn_iterations: int = option(3, "Sinkhorn iterations", at_least=1)
    queue_size: int = option(
        0, "embeddings in each queue, cut to a multiple of the batch; 0: none", at_least=0
    )
    queue_start_epoch: int = option(15, "epoch at which the queues begin to fill", at_least=0)
    freeze_epochs: float = option(
        1.0, "epochs in which the prototypes stay as they are", at_least=0
    )


class SwAV(multi_crop.MultiCrop):
    recipes = {
        "paper": Config(),
        "quick": Config(
            backbone="tiny-resnet",
            image_size=24,
            crop_scale=(0.3, 1.0),
            blur=False,
            epochs=18,
            batch_size=128,
            optimizer="adamw",
            lr=0.0015,
            weight_decay=1e-4,
            warmup_epochs=0.5,
            start_lr=0.0,
            final_lr=1e-5,
            small_crops=0,  # half of 24 pixels shows too little of these images
            hidden=256,
            dim=64,
            centred_head=True,
            prototypes=100,  # for ten classes; the batch balances them without a queue
            temperature=0.2,
            freeze_epochs=0.25,
        ),
    }
    config: Config

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        head = swav_head(self.feature_dim, config.hidden, config.dim)
        self.head = centred(head, config.dim) if config.centred_head else head
        self.prototypes = Prototypes(config.dim, config.prototypes)
        size = config.queue_size // config.batch_size * config.batch_size
        queues = [FeatureQueue(size, config.dim) for _ in range(LARGE if size else 0)]
        for queue in queues:
            queue.features.zero_()  # so that an unfilled queue shows
        self.queues = nn.ModuleList(queues)

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        self.prototypes.normalize_()
        z = normalize(self.head(self.encode(views)), dim=1)  # (V · N, D)
        scores = self.prototypes(z)  # (V · N, K)
        self.embedding = z.detach()[: len(views[0])]

        z_large = z.detach().chunk(len(views))[:LARGE]
        scores_large = scores.detach().chunk(len(views))[:LARGE]
        codes = [self.codes(i, z_large[i], scores_large[i], at) for i in range(LARGE)]  # (N, K)
        both = codes[0] + codes[1]
        targets = torch.cat([both - code for code in codes] + [both] * (len(views) - LARGE))
        # The mean over V · N rows, for a sum over LARGE · (V − 1) pairs of views and a mean over N.
        pairs = LARGE * (len(views) - 1)
        loss = F.soft_cross_entropy(
            scores, targets, temperature=self.config.temperature, group=self.group
        )
        return loss * (len(views) / pairs)

    @torch.no_grad()
    def codes(self, i: int, z: Tensor, scores: Tensor, at: Progress) -> Tensor:
        """Codes (N, K) of large crop i, from its scores (N, K) and those of its queue."""
        if self.queues and at.epoch >= self.config.queue_start_epoch:
            queue = cast(FeatureQueue, self.queues[i])
            if queue.features[-1].any():  # full
                scores = torch.cat([self.prototypes(self.own(queue.features)), scores])
            queue.push(z)
        codes = F.sinkhorn(
            scores,
            epsilon=self.config.epsilon,
            iterations=self.config.sinkhorn_iterations,
            group=self.group,
        )
        return codes[-len(z) :]

    def after_backward(self, at: Progress) -> None:
        if at.step < self.config.freeze_epochs * at.steps_per_epoch:
            # None rather than 0: neither momentum nor weight decay moves them.
            self.prototypes.weight.grad = None

    def collapsed_loss(self) -> float:
        return math.log(self.config.prototypes)
