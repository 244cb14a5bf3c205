"""MoCo v1: a query must find its key among a queue of keys from a slowly moving encoder.

    q = f_θ(x₁),  k = f_ξ(x₂)                  unit vectors
    ξ ← m ξ + (1 − m) θ                        parameters only, before the keys are computed
    L = −log exp(q·k/τ) / (exp(q·k/τ) + Σ_j exp(q·queue_j/τ))
    queue ← k                                  afterwards: keys of this batch are no negatives

Batch norm works on groups of the batch, and keys are shuffled first: between the processes, which
have groups of their own, and within one of them, whose groups are interleaved as in the CIFAR demo
of facebookresearch/moco.

Source: He et al. 2020, arXiv:1911.05722.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl.methods import multi_crop
from fastcl.methods.base import STORED, Progress, check_stored, option
from fastcl.methods.multi_crop import LARGE
from fastcl.nn import FeatureQueue, centred, moco_head, momentum_copy, split_batch_norm


@dataclass(frozen=True)
class Config(multi_crop.Config):
    augmentation: str = "moco-v1"
    schedule: str = "step"
    milestones: tuple[int, ...] = (120, 160)
    dim: int = option(128, "size of the embedding", at_least=1)
    queue_size: int = option(65536, "keys in the queue", at_least=1)
    queue_dtype: str = option("fp32", "what the queue is stored in: fp32, bf16 or fp16")
    momentum: float = option(0.999, "of the key encoder")
    temperature: float = option(0.07, "of the softmax over the keys", above=0)
    bn_splits: int = option(
        8, "groups of the batch with batch-norm statistics of their own", at_least=1
    )
    centred_head: bool = option(False, "batch norm after the head, for short runs")
    symmetric: bool = option(False, "each view also as the other's key; the losses are added")


class MoCoV1(multi_crop.MultiCrop):
    recipes = {
        "paper": Config(),
        "quick": Config(
            backbone="tiny-resnet",
            image_size=24,
            crop_scale=(0.3, 1.0),
            jitter=2.0,
            epochs=25,
            batch_size=64,
            optimizer="adamw",
            lr=0.001,
            schedule="warmup-cosine",
            milestones=(),
            warmup_epochs=0.5,
            queue_size=1024,
            momentum=0.9,  # 4,000 steps in all: the keys must follow
            temperature=0.2,
            bn_splits=1,
            centred_head=True,
        ),
    }
    config: Config

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(split_batch_norm(encoder, config.bn_splits), config)
        head = self.make_head(self.feature_dim, config.dim)
        self.head = centred(head, config.dim) if config.centred_head else head
        self.key_encoder = momentum_copy(self.query_encoder)
        check_stored("queue_dtype", config.queue_dtype)
        dtype = STORED[config.queue_dtype]
        self.queue = FeatureQueue(config.queue_size, config.dim, dtype=dtype)

    def make_head(self, features: int, dim: int) -> nn.Module:
        return moco_head(features, dim)

    @property
    def query_encoder(self) -> nn.Module:
        return nn.Sequential(self.encoder, self.head)

    def set_images(self, images: int) -> None:
        size = self.config.queue_size
        if 2 * size >= images:
            warnings.warn(
                f"queue_size {size} is at least half of the {images} training images: "
                "an image's own earlier keys are among its negatives",
                stacklevel=2,
            )

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        F.ema_update_(self.key_encoder, self.query_encoder, momentum=self.config.momentum)
        of = range(LARGE) if self.config.symmetric else (1,)  # the views that give keys
        keys = {i: self.encode_keys(views[i]) for i in of}  # (N, D) each
        self.keys = torch.cat(list(keys.values()))
        pairs = [(i, v) for i in keys for v in range(len(views)) if v != i]
        queries = {v: self.query(views[v]) for v in sorted({v for _, v in pairs})}
        self.embedding = queries[0].detach()
        losses = [self.contrast(queries[v], keys[i]) for i, v in pairs]
        return torch.stack(losses).sum() / (len(views) - 1)  # the mean over each key's queries

    def query(self, view: Tensor) -> Tensor:
        """Unit queries (N, D) of view (N, 3, size, size)."""
        return normalize(self.query_encoder(view), dim=1)

    def contrast(self, query: Tensor, keys: Tensor) -> Tensor:
        """The loss, 0-dim, of queries (N, D) against their keys (N, D) and the queue."""
        return F.info_nce(
            query,
            keys,
            self.queue.features,
            temperature=self.config.temperature,
            normalize=False,  # all rows are unit already
            group=self.group,
        )

    @torch.no_grad()
    def encode_keys(self, view: Tensor) -> Tensor:
        """Unit keys (N, D), shuffled on the way: their batch-norm groups are not the queries'."""
        images = self.whole(view)
        order = self.agreed(torch.randperm(len(images), device=view.device))
        keys = self.whole(self.key_encoder(self.own(images[order])))
        return normalize(self.own(keys[order.argsort()]), dim=1)

    def after_backward(self, at: Progress) -> None:
        for keys in self.keys.chunk(1 + self.config.symmetric):
            self.queue.push(keys)

    def momentum_at(self, at: Progress) -> float:
        return self.config.momentum
