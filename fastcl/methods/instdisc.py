"""InstDisc: every image is a class of its own, told apart against the remembered features of all.

    x = g(f(view)), unit;  M, the bank: one row for each of the n images;  y, which image it is
    NCE      P_k = exp(x·M_k/τ)/Z;  L = −log P_y/(P_y + K/n) − Σ_k log (K/n)/(P_k + K/n)
             K noise rows k, uniform, with replacement;  Z = n · mean of exp over the first batch
    softmax  L = −log exp(x·M_y/τ) / Σ_k exp(x·M_k/τ)         over y and K rows, or over all n
    M_y ← normalise(½ M_y + ½ x)                               afterwards; no gradient to M

Differs from the paper as its code does: the bank averages where the paper overwrites, which takes
the place of the proximal term (an option), and starts uniform rather than of unit length.

Source: Wu et al. 2018, arXiv:1805.01978; zhirongw/lemniscate.pytorch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl.data.augment import Crops
from fastcl.methods.base import STORED, Method, Progress, check_stored, option
from fastcl.methods.base import Config as BaseConfig
from fastcl.nn import MemoryBank, Partition, centred, moco_head

LOSSES = ("nce", "softmax")


@dataclass(frozen=True)
class Config(BaseConfig):
    augmentation: str = "instdisc"
    schedule: str = "step"
    milestones: tuple[int, ...] = (120, 160)
    dim: int = option(128, "size of the embedding", at_least=1)
    centred_head: bool = option(False, "batch norm after the head, for short runs")
    loss: str = option("nce", "nce or softmax")
    negatives: int = option(
        4096, "K, rows of the bank for each image; 0: all of them, for the softmax", at_least=0
    )
    temperature: float = option(0.07, "τ, of the scores", above=0)
    momentum: float = option(0.5, "of the bank", at_least=0)
    bank_dtype: str = option("fp32", "what the bank is stored in: fp32, bf16 or fp16")
    z_momentum: float = option(0.0, "of Z; 0: it stays what the first batch gave", at_least=0)
    proximal: float = option(0.0, "λ of the paper's λ ‖x − M_y‖²", at_least=0)


class InstDisc(Method):
    recipes = {
        "paper": Config(),
        "quick": Config(
            backbone="tiny-resnet",
            image_size=24,
            crop_scale=(0.3, 1.0),
            augmentation="moco-v2",
            blur=False,
            jitter=2.0,
            epochs=24,
            batch_size=128,
            dim=64,
            centred_head=True,
            optimizer="adamw",
            lr=0.002,
            schedule="cosine",
            milestones=(),
            loss="softmax",
            negatives=0,  # 10,000 images
            temperature=0.1,
        ),
    }
    config: Config
    bank: MemoryBank

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        check_stored("bank_dtype", config.bank_dtype)
        if config.loss not in LOSSES:
            raise ValueError(f"unknown loss {config.loss!r}. Losses: {', '.join(LOSSES)}")
        if config.loss == "nce" and config.negatives == 0:
            raise ValueError("the nce loss needs negatives; all rows are for the softmax")
        head = moco_head(self.feature_dim, config.dim)
        self.head = centred(head, config.dim) if config.centred_head else head
        self.partition = Partition(config.z_momentum)

    def set_images(self, images: int) -> None:
        c = self.config
        self.bank = MemoryBank(images, c.dim, c.momentum, dtype=STORED[c.bank_dtype])

    def crops(self, image_size: int) -> list[Crops]:
        return [Crops(1, image_size, self.config.crop_scale)]

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        assert at.indices is not None
        x = normalize(self.head(self.encoder(views[0])), dim=1)  # (N, D)
        self.embedding = x.detach()
        loss = self.against_bank(x, at.indices)
        if self.config.proximal > 0:
            away = x - self.bank.features[at.indices]
            loss = loss + self.config.proximal * self.mean(away.square().sum(1))
        return loss

    def against_bank(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of unit x (N, D), views of the images y (N,)."""
        bank, scale = self.bank.features, 1 / self.config.temperature
        if self.config.negatives == 0:
            own = F.bank_scores(x, bank, y[:, None], scale=scale)[:, 0]
            return self.mean(cast(Tensor, F.similarity_lse(x, bank, scale=scale)) - own)
        scores = F.bank_scores(x, bank, self.candidates(y), scale=scale)  # (N, 1 + K)
        if self.config.loss == "softmax":
            return self.mean(scores.logsumexp(1) - scores[:, 0])
        z = self.partition(scores.detach(), len(bank))
        return F.nce(scores, data_size=len(bank), partition=z, group=self.group)

    def candidates(self, y: Tensor) -> Tensor:
        """Rows of the bank for each image (N, 1 + K): its own, then K noise rows."""
        shape = len(self.whole(y)), self.config.negatives
        noise = self.agreed(torch.randint(len(self.bank.features), shape, device=y.device))
        return torch.cat([y[:, None], self.own(noise)], dim=1)

    def after_backward(self, at: Progress) -> None:
        assert at.indices is not None
        self.bank.update(at.indices, self.embedding)

    def collapsed_loss(self) -> float | None:
        if self.config.loss == "nce":
            return None
        return math.log(
            1 + self.config.negatives if self.config.negatives else len(self.bank.features)
        )
