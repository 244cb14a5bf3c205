"""SimCLR v2: SimCLR v1 with a deeper head, larger networks and, if asked for, a memory.

    head           two layers              → three; fine-tuning starts in its middle
    backbone       ResNet                  → ResNet-D with selective kernels, width 1, 2 or 3
    negatives      of the batch            → optionally a moving average's, of past batches too

With `memory` the 2N embeddings z meet those of the moving average k: columns are the batch's keys,
but for the same view of the same image, and a queue of earlier ones,

    ℓ_r = −log exp(z_r·k_pos(r)/τ) / (Σ_{c ≠ r} exp(z_r·k_c/τ) + Σ_j exp(z_r·queue_j/τ))
    L = (1/N) Σ_r ℓ_r,   ξ ← m ξ + (1 − m) θ before the keys, queue ← k afterwards

Distillation: `distillation_loss`, with fine-tuned teachers. `fine_tuned_part` is what a classifier
of few labels is put upon.

Differs from the paper where its code does: see SimCLR v1. The memory is a reading: its code was not
published.

Source: Chen et al. 2020, arXiv:2006.10029; google-research/simclr.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl._functional._shared import reduce
from fastcl.data.colours import CHANNELS
from fastcl.distributed import Group, own, share, whole
from fastcl.methods import simclr_v1
from fastcl.methods.base import STORED, Progress, check_stored, option
from fastcl.methods.base import Config as BaseConfig
from fastcl.methods.multi_crop import MultiCrop
from fastcl.models import selective
from fastcl.nn import FeatureQueue, momentum_copy, simclr_head


@dataclass(frozen=True)
class Config(simclr_v1.Config):
    zero_init_residual: bool = True
    augmentation: str = "simclr-v2"
    epochs: int = 800
    lr: float = 6.4  # 0.1 · √batch
    weight_decay: float = 1e-4
    warmup_epochs: float = 40.0
    width: int = option(1, "multiplies the channels; the papers' 1, 2 or 3", at_least=1)
    sk_ratio: float = option(0.0, "selective kernels and ResNet-D: 0.0625; 0: neither", at_least=0)
    head_layers: int = option(3, "layers of the head", at_least=1)
    memory: bool = option(False, "keys of a moving average, and a queue of them")
    queue_size: int = option(65536, "keys in the memory's queue", at_least=1)
    queue_dtype: str = option("fp32", "what the queue is stored in: fp32, bf16 or fp16")
    momentum: float = option(0.999, "of the memory's moving average")


class SimCLRV2(MultiCrop):
    recipes = {
        "paper": Config(),
        "quick": Config(
            backbone="tiny-resnet",
            zero_init_residual=False,
            truncated_init=False,
            image_size=24,
            crop_scale=(0.3, 1.0),
            blur=False,
            epochs=20,
            batch_size=128,
            optimizer="adamw",
            lr=0.0015,
            weight_decay=1e-4,
            warmup_epochs=0.5,
            temperature=0.2,
            queue_size=1024,
            momentum=0.9,
        ),
    }
    config: Config

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        self.head = simclr_head(self.feature_dim, config.dim, config.head_layers)
        check_stored("queue_dtype", config.queue_dtype)
        if config.memory and config.small_crops:
            raise ValueError("the memory is of two crops: it takes no small_crops")
        if config.memory:
            self.key_encoder = momentum_copy(self.query_encoder)
            dtype = STORED[config.queue_dtype]
            self.queue = FeatureQueue(config.queue_size, config.dim, dtype=dtype)

    @classmethod
    def build_encoder(cls, config: BaseConfig, image_size: int) -> nn.Module:
        assert isinstance(config, Config)
        if config.width == 1 and config.sk_ratio == 0 and config.backbone not in selective.LAYERS:
            encoder = super().build_encoder(config, image_size)
            if config.truncated_init:
                selective.truncated_init_(encoder)
            return encoder
        return selective.build(
            config.backbone,
            image_size=image_size,
            in_channels=CHANNELS[config.colours],
            width=config.width,
            sk_ratio=config.sk_ratio,
            zero_init_residual=config.zero_init_residual,
        )

    @property
    def query_encoder(self) -> nn.Module:
        return nn.Sequential(self.encoder, self.head)

    def fine_tuned_part(self, layer: int = 1) -> nn.Module:
        """The encoder and the first `layer` layers of the head, each with its ReLU.

        1 with 1 % or 10 % of the labels, 0 with all of them. The last layer has no ReLU.
        """
        if not 0 <= layer <= self.config.head_layers:
            raise ValueError(f"layer must be in 0 … {self.config.head_layers}; got {layer}")
        assert isinstance(self.head, nn.Sequential)
        return nn.Sequential(self.encoder, self.head[: 3 * layer])

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        z = self.head(self.encode(views))  # (V · N, D); batch norm sees all views
        self.embedding = normalize(z[: len(views[0])].detach(), dim=1)
        if not self.config.memory:
            return simclr_v1.nt_xent(z.chunk(len(views)), self.config.temperature, self.group)
        F.ema_update_(self.key_encoder, self.query_encoder, momentum=self.config.momentum)
        with torch.no_grad():
            self.keys = normalize(self.key_encoder(torch.cat(list(views))), dim=1)
        return memory_loss(z, self.keys, self.queue.features, self.config.temperature, self.group)

    def after_backward(self, at: Progress) -> None:
        if self.config.memory:
            for keys in self.keys.chunk(2):
                self.queue.push(keys)

    def momentum_at(self, at: Progress) -> float | None:
        return self.config.momentum if self.config.memory else None

    def collapsed_loss(self) -> float:
        c = self.config
        negatives = 2 * c.batch_size - 1 + (c.queue_size if c.memory else 0)
        return 2 * math.log(negatives)


def memory_loss(
    z: Tensor, keys: Tensor, queue: Tensor, temperature: float, group: Group | None = None
) -> Tensor:
    """L of the memory, 0-dim: z (2N, D) online, unit keys (2N, D) and queue (M, D), both fixed."""
    candidates = torch.cat([whole(view, group) for view in keys.chunk(2)])  # of the whole batch
    numbers = torch.arange(len(candidates), device=z.device)
    z = normalize(z, dim=1)
    batch = F.similarity_lse(
        z,
        candidates.to(z.dtype),
        scale=1 / temperature,
        # equal ids: the same view of the same image
        query_ids=torch.cat([own(view, group) for view in numbers.chunk(2)]),
        key_ids=numbers,
    )
    earlier = F.similarity_lse(z, queue, scale=1 / temperature)
    assert isinstance(batch, Tensor) and isinstance(earlier, Tensor)
    lse = torch.logaddexp(batch, earlier)  # of two sums: side by side the queue would be copied
    partner = keys.to(z.dtype).roll(len(z) // 2, 0)
    losses = lse - (z * partner).sum(1) / temperature
    return 2 * reduce(losses, "mean", share(len(losses), group, z.device))


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    scale_by_tau2: bool = False,
) -> Tensor:
    """A student's logits (N, C) learn a teacher's (N, C), which get no gradient.

        α · mean CE(softmax(teacher/τ), student/τ) + (1 − α) · mean CE(labels, student)

    temperature is 1 for a smaller student, 0.1 for one as large as its teacher. labels (N,) int64
    are needed for α < 1. scale_by_tau2 multiplies the first term by τ², as the code does and the
    paper does not.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in 0 … 1; got {alpha}")
    targets = torch.softmax(teacher.detach() / temperature, 1)
    loss = F.soft_cross_entropy(student, targets, temperature=temperature)
    if scale_by_tau2:
        loss = loss * temperature**2
    if alpha == 1:
        return loss
    if labels is None:
        raise ValueError("alpha < 1 needs labels")
    return alpha * loss + (1 - alpha) * nn.functional.cross_entropy(student, labels)
