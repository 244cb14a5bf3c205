"""CMC: the lightness of an image and its colours must know each other among other images.

    v_1, v_2, …    channels of one view in Lab or YCbCr: L, and ab
    x_i = g_i(f_i(v_i)), unit;  M_i, a bank for each, one row for each of n images;  y, the image
    L = Σ_{i ≠ j} loss(x_i, M_j)         anchored in i, among the *stored* features of the others
    M_i ← normalise(½ M_i + ½ x_i)       afterwards; no gradient to M

The loss against a bank is InstDisc's, by NCE or by softmax, with the same candidates for all pairs
and a partition Z_ij for each. Every f_i is a network of its own (two of half the width make one);
what is kept is all of them, their features side by side.

Source: Tian et al. 2020, arXiv:1906.05849; HobbitLong/CMC.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl import models
from fastcl.data.augment import Crops
from fastcl.data.colours import CHANNELS, is_grey
from fastcl.methods.base import STORED, Method, Progress, check_stored, option
from fastcl.methods.base import Config as BaseConfig
from fastcl.nn import MemoryBank, Partition, centred, moco_head

LOSSES = ("nce", "softmax")
GRAPHS = ("full", "core")


@dataclass(frozen=True)
class Config(BaseConfig):
    augmentation: str = "cmc"
    colours: str = "lab"
    jitter: float = 0.0
    crop_scale: tuple[float, float] = (0.08, 1.0)  # 0.2 to 1 with AlexNet
    epochs: int = 240
    batch_size: int = 128
    schedule: str = "step"
    milestones: tuple[int, ...] = (120, 160, 200)
    width: float = option(0.5, "of each encoder: 0.5, 1 and 2 of the backbone's", above=0)
    channels: tuple[int, ...] = option((1, 2), "channels of each view")
    graph: str = option("full", "full: each view against each other; core: those with the first")
    dim: int = option(128, "size of the embedding", at_least=1)
    centred_head: bool = option(False, "batch norm after the head, for short runs")
    loss: str = option("nce", "nce or softmax")
    negatives: int = option(
        4096, "K, rows of the banks for each image; 0: all of them, for the softmax", at_least=0
    )
    temperature: float = option(0.07, "τ, of the scores", above=0)
    momentum: float = option(0.5, "of the banks", at_least=0)
    bank_dtype: str = option("fp32", "what the banks are stored in: fp32, bf16 or fp16")
    z_momentum: float = option(0.0, "of Z; 0: it stays what the first batch gave", at_least=0)


class Views(nn.Module):
    """An encoder for each group of channels: images (N, C, H, W) -> features side by side."""

    def __init__(self, encoders: Sequence[nn.Module], channels: Sequence[int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.channels = list(channels)
        self.dims = [cast(int, encoder.feature_dim) for encoder in encoders]
        self.feature_dim = sum(self.dims)

    def forward(self, images: Tensor) -> Tensor:
        views = images.split(self.channels, dim=1)
        return torch.cat([f(view) for f, view in zip(self.encoders, views, strict=True)], dim=1)


class CMC(Method):
    recipes = {
        "paper": Config(),
        "quick": Config(
            backbone="tiny-resnet",
            width=1.0,
            image_size=24,
            crop_scale=(0.3, 1.0),
            jitter=2.0,  # else the tones give away which image it is, and shapes are not needed
            epochs=20,
            optimizer="adamw",
            lr=0.002,
            schedule="cosine",
            milestones=(),
            dim=64,
            centred_head=True,
            loss="softmax",
            negatives=0,  # 10,000 images
            temperature=0.1,
        ),
    }
    config: Config
    encoder: Views

    @classmethod
    def build_encoder(cls, config: BaseConfig, image_size: int) -> nn.Module:
        assert isinstance(config, Config)
        if sum(config.channels) != CHANNELS[config.colours]:
            raise ValueError(
                f"channels must be {CHANNELS[config.colours]} in all for {config.colours}; "
                f"got {config.channels}"
            )
        encoders = [
            models.build(
                config.backbone,
                image_size=image_size,
                in_channels=channels,
                zero_init_residual=config.zero_init_residual,
                width=config.width,
            )
            for channels in config.channels
        ]
        return Views(encoders, config.channels)

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        for name, value, choices in (
            ("loss", config.loss, LOSSES),
            ("graph", config.graph, GRAPHS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be {' or '.join(choices)}; got {value!r}")
        check_stored("bank_dtype", config.bank_dtype)
        if len(config.channels) < 2:
            raise ValueError("cmc compares views: channels must have two groups or more")
        if config.loss == "nce" and config.negatives == 0:
            raise ValueError("the nce loss needs negatives; all rows are for the softmax")
        heads = [moco_head(dim, config.dim) for dim in self.encoder.dims]
        self.heads = nn.ModuleList(
            [centred(head, config.dim) if config.centred_head else head for head in heads]
        )
        pairs = permutations(range(len(heads)), 2)
        self.pairs = [(i, j) for i, j in pairs if config.graph == "full" or 0 in (i, j)]
        self.partitions = nn.ModuleList([Partition(config.z_momentum) for _ in self.pairs])

    def look(self, images: Tensor) -> None:
        if is_grey(images):
            raise ValueError(
                "cmc compares the lightness of an image with its colours, and these images are "
                "grey; it needs images in colour"
            )

    def set_images(self, images: int) -> None:
        c = self.config
        dtype = STORED[c.bank_dtype]
        banks = [MemoryBank(images, c.dim, c.momentum, dtype=dtype) for _ in self.heads]
        self.banks = nn.ModuleList(banks)

    def crops(self, image_size: int) -> list[Crops]:
        return [Crops(1, image_size, self.config.crop_scale)]

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        assert at.indices is not None
        if views[0].shape[1] != sum(self.config.channels):
            raise ValueError(
                f"cmc needs images of {sum(self.config.channels)} channels; "
                f"got {tuple(views[0].shape)}"
            )
        features = self.encoder(views[0]).split(self.encoder.dims, dim=1)
        x = [normalize(head(f), dim=1) for head, f in zip(self.heads, features)]  # (N, D) each
        self.embeddings = [view.detach() for view in x]
        self.embedding = self.embeddings[0]
        index = self.candidates(at.indices) if self.config.negatives else at.indices[:, None]
        losses = [
            self.against_bank(x[i], cast(MemoryBank, self.banks[j]).features, index, z)
            for (i, j), z in zip(self.pairs, self.partitions)
        ]
        return torch.stack(losses).sum()

    def against_bank(self, x: Tensor, bank: Tensor, index: Tensor, z: nn.Module) -> Tensor:
        """The loss of unit x (N, D) against rows index (N, 1 + K) of a bank, the image's own first.

        Against all rows where index (N, 1) has the own one only.
        """
        scale = 1 / self.config.temperature
        scores = F.bank_scores(x, bank, index, scale=scale)  # (N, 1 + K)
        if index.shape[1] == 1:
            return self.mean(cast(Tensor, F.similarity_lse(x, bank, scale=scale)) - scores[:, 0])
        if self.config.loss == "softmax":
            return self.mean(scores.logsumexp(1) - scores[:, 0])
        partition = z(scores.detach(), len(bank))
        return F.nce(scores, data_size=len(bank), partition=partition, group=self.group)

    def candidates(self, y: Tensor) -> Tensor:
        """Rows of the banks for each image (N, 1 + K): its own, then K noise rows."""
        images = len(cast(MemoryBank, self.banks[0]).features)
        shape = len(self.whole(y)), self.config.negatives
        noise = self.agreed(torch.randint(images, shape, device=y.device))
        return torch.cat([y[:, None], self.own(noise)], dim=1)

    def after_backward(self, at: Progress) -> None:
        assert at.indices is not None
        for bank, x in zip(self.banks, self.embeddings):
            cast(MemoryBank, bank).update(at.indices, x)

    def collapsed_loss(self) -> float | None:
        c = self.config
        if c.loss == "nce":
            return None
        images = len(cast(MemoryBank, self.banks[0]).features)
        return len(self.pairs) * math.log(1 + c.negatives if c.negatives else images)
