"""DINO: a student learns what a moving average of itself makes of the other views; no negatives.

    s_v = h_θ(f_θ(x_v))  all crops v,  t_i = h_ξ(f_ξ(x_i))  the large crops i = 0, 1
    L = mean over i ≠ v of −softmax((t_i − c)/τ_t) · log softmax(s_v/τ_s)
    c ← 0.9 c + 0.1 mean t                                 the centre, after the loss
    ξ ← m ξ + (1 − m) θ,  m from m₀ to 1 by a cosine       after the optimizer's step

Centring keeps one output from winning everywhere, a small τ_t keeps them from becoming all alike.
With `sinkhorn_iterations` c is instead the one that makes SwAV's codes of the batch, as in the
paper's ablation: in runs of a thousand steps the moving centre leaves most outputs unused.
The last layer's rows are directions of unit length (or of a trained length), so that scores are
cosines. Each gradient is clipped to a norm of its own; the last layer stays fixed for the first
epoch; weight decay grows by a cosine and leaves biases and norms out. The teacher is what is kept.

Source: Caron et al. 2021, arXiv:2104.14294; facebookresearch/dino.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

import fastcl.functional as F
from fastcl import models
from fastcl.data.colours import CHANNELS
from fastcl.distributed import average, whole
from fastcl.methods import multi_crop
from fastcl.methods.base import Config as BaseConfig
from fastcl.methods.base import Progress, option
from fastcl.methods.multi_crop import LARGE
from fastcl.nn import DINOHead, momentum_copy
from fastcl.optim import clip_each_, cosine
from fastcl.reference._common import in_float

CLIPS = ("each", "global")


@dataclass(frozen=True)
class Config(multi_crop.Config):
    backbone: str = "vit-small-dino"
    augmentation: str = "dino"
    crop_scale: tuple[float, float] = (0.4, 1.0)  # 0.14 to 1 without small crops
    epochs: int = 100
    batch_size: int = 512
    optimizer: str = "adamw"
    lr: float = 1e-3  # 5e-4 · batch / 256
    weight_decay: float = 0.04
    schedule: str = "linspace-cosine"
    warmup_epochs: float = 10.0
    final_lr: float = 1e-6
    final_weight_decay: float = option(0.4, "weight decay at the end of its cosine", at_least=0)
    drop_path: float = option(0.1, "of the student; transformers only", at_least=0)
    small_crops: int = 8
    small_scale: tuple[float, float] = (0.05, 0.4)
    head_layers: int = option(3, "layers of the head before the last", at_least=1)
    head_norm: bool = option(False, "batch norm in the head")
    centred_head: bool = option(False, "batch norm before the unit vector, for short runs")
    hidden: int = option(2048, "hidden width of the head", at_least=1)
    dim: int = option(256, "size of the embedding", at_least=1)
    outputs: int = option(65536, "K, outputs of the head", at_least=2)
    norm_last_layer: bool = option(True, "the last layer's rows stay of unit length")
    freeze_last_layer: float = option(1.0, "epochs in which the last layer stays", at_least=0)
    student_temperature: float = option(0.1, "τ_s", above=0)
    teacher_temperature: float = option(0.04, "τ_t", above=0)
    start_teacher_temperature: float = option(0.04, "τ_t in the first epoch", above=0)
    teacher_warmup_epochs: int = option(0, "epochs from the one to the other", at_least=0)
    centring: bool = option(True, "the teacher's mean is taken off its outputs")
    sinkhorn_iterations: int = option(
        0, "of Sinkhorn, in the centre's place: all outputs used alike; 0: none", at_least=0
    )
    center_momentum: float = option(0.9, "of the centre", at_least=0)
    momentum: float = option(0.996, "of the teacher, in the first step; 1 in the last")
    clip: str = option("each", "norm of each tensor's gradient, or one global one")
    clip_grad: float = option(3.0, "the largest norm; 0: gradients are not clipped", at_least=0)


class DINO(multi_crop.MultiCrop):
    recipes = {
        "paper": Config(),
        "paper-resnet": Config(
            backbone="resnet50",
            crop_scale=(0.14, 1.0),
            small_scale=(0.05, 0.14),
            optimizer="sgd",
            lr=0.06,  # 0.03 · batch / 256
            weight_decay=1e-4,
            final_weight_decay=1e-4,
            drop_path=0.0,
        ),
        "quick-vit": Config(
            backbone="tiny-vit",
            image_size=24,
            crop_scale=(0.3, 1.0),
            augmentation="moco-v2",
            blur=False,
            jitter=2.0,
            epochs=7,
            batch_size=128,
            lr=0.001,
            weight_decay=0.04,
            final_weight_decay=0.04,
            drop_path=0.0,
            warmup_epochs=0.5,
            small_crops=0,  # half of 24 pixels shows too little of these images
            hidden=256,
            dim=64,
            centred_head=True,
            head_norm=True,
            head_layers=2,
            outputs=128,
            freeze_last_layer=0.25,
            student_temperature=0.2,
            teacher_temperature=0.05,
            start_teacher_temperature=0.05,
            sinkhorn_iterations=3,  # with the moving centre outputs for 7 directions remain in use
            momentum=0.9,
        ),
        "quick": Config(
            backbone="tiny-resnet",
            image_size=24,
            crop_scale=(0.3, 1.0),
            augmentation="moco-v2",
            blur=False,
            jitter=2.0,
            epochs=10,
            batch_size=128,
            lr=0.002,
            weight_decay=1e-4,
            final_weight_decay=1e-4,
            drop_path=0.0,
            warmup_epochs=0.5,
            small_crops=0,
            hidden=256,
            dim=64,
            centred_head=True,
            head_norm=True,
            head_layers=2,
            outputs=128,
            freeze_last_layer=0.25,
            student_temperature=0.2,
            teacher_temperature=0.05,
            start_teacher_temperature=0.05,
            sinkhorn_iterations=3,  # with the moving centre outputs for 7 directions remain in use
            momentum=0.9,
        ),
    }
    config: Config
    kept = "teacher.0"
    center: Tensor

    @classmethod
    def build_encoder(cls, config: BaseConfig, image_size: int) -> nn.Module:
        assert isinstance(config, Config)
        return models.build(
            config.backbone,
            image_size=image_size,
            in_channels=CHANNELS[config.colours],
            zero_init_residual=config.zero_init_residual,
            drop_path=config.drop_path,
        )

    def __init__(self, encoder: nn.Module, config: Config) -> None:
        super().__init__(encoder, config)
        c = config
        if c.clip not in CLIPS:
            raise ValueError(f"clip must be {' or '.join(CLIPS)}; got {c.clip!r}")
        self.head = DINOHead(
            self.feature_dim,
            c.hidden,
            c.dim,
            c.outputs,
            layers=c.head_layers,
            batch_norm=c.head_norm,
            unit=c.norm_last_layer,
            centre=c.centred_head,
        )
        self.teacher = momentum_copy(self.student)
        for module in self.teacher.modules():
            if hasattr(module, "drop_prob"):
                cast(Any, module).drop_prob = 0.0  # only the student drops paths
        self.register_buffer("center", torch.zeros(c.outputs))

    @property
    def student(self) -> nn.Sequential:
        return nn.Sequential(self.encoder, self.head)

    def loss(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        with torch.no_grad():
            teacher = self.teacher(torch.cat(list(views[:LARGE])))  # (2N, K)
        student = self.head(self.encode(views))  # (V · N, K)
        self.embedding = normalize(self.head.embedding[: len(views[0])], dim=1)
        count, outputs = len(views[0]), self.config.outputs
        temperature = self.teacher_temperature(at.epoch)
        loss = F.self_distillation(
            student.view(len(views), count, outputs),
            teacher.view(LARGE, count, outputs),
            center=self.centre_of(teacher, temperature),
            student_temperature=self.config.student_temperature,
            teacher_temperature=temperature,
            group=self.group,
        )
        if self.config.centring and not self.config.sinkhorn_iterations:
            self.move_center(teacher)
        return loss

    def centre_of(self, teacher: Tensor, temperature: float) -> Tensor:
        """c (K,) for the teacher's outputs (2N, K): the moving one, or Sinkhorn's of this batch."""
        if not self.config.sinkhorn_iterations:
            return self.center
        everyone = torch.cat([whole(view, self.group) for view in teacher.chunk(LARGE)])
        return balance(everyone, temperature, self.config.sinkhorn_iterations)

    @torch.no_grad()
    def move_center(self, teacher: Tensor) -> None:
        """c ← m c + (1 − m) mean of the teacher's outputs (2N, K), before τ_t."""
        mean = average(teacher.mean(0, dtype=self.center.dtype), len(teacher), self.group)
        # A new tensor: the loss has kept the old one for its backward pass.
        self.center = self.center.lerp(mean, 1 - self.config.center_momentum)

    def teacher_temperature(self, epoch: int) -> float:
        """τ_t: linear over the epochs of its warm-up, both ends included, then constant."""
        c = self.config
        if epoch >= c.teacher_warmup_epochs:
            return c.teacher_temperature
        share = epoch / max(c.teacher_warmup_epochs - 1, 1)
        start = c.start_teacher_temperature
        return start + (c.teacher_temperature - start) * share

    def after_backward(self, at: Progress) -> None:
        c = self.config
        parameters = [*self.encoder.parameters(), *self.head.parameters()]
        if c.clip_grad > 0 and c.clip == "each":
            clip_each_(parameters, c.clip_grad)
        elif c.clip_grad > 0:
            nn.utils.clip_grad_norm_(parameters, c.clip_grad)
        if at.step < c.freeze_last_layer * at.steps_per_epoch:
            # None rather than 0: neither momentum nor weight decay moves it.
            for parameter in self.head.last_layer.parameters():
                parameter.grad = None

    def after_step(self, at: Progress) -> None:
        F.ema_update_(self.teacher, self.student, momentum=self.momentum_at(at))

    def momentum_at(self, at: Progress) -> float:
        return self.cosine(at, self.config.momentum, 1.0)

    def weight_decay_at(self, at: Progress) -> float:
        return self.cosine(at, self.config.weight_decay, self.config.final_weight_decay)

    def cosine(self, at: Progress, start: float, end: float) -> float:
        return cosine(at.step, total=at.epochs * at.steps_per_epoch, start=start, end=end)

    def undecayed(self) -> Iterable[nn.Parameter]:
        parameters = [*self.encoder.named_parameters(), *self.head.named_parameters()]
        return [p for name, p in parameters if name.endswith(".bias") or p.ndim == 1]

    def collapsed_loss(self) -> float:
        return math.log(self.config.outputs)


@torch.no_grad()
def balance(outputs: Tensor, temperature: float, iterations: int) -> Tensor:
    """The centre c (K,) that makes softmax((t − c)/τ) Sinkhorn's codes of outputs t (N, K).

    SwAV's codes, with ε = τ: of a batch, all outputs together get the same mass, within what so
    many iterations give. Source: Caron et al. 2021, arXiv:2104.14294, ablation of the centre.
    """
    s = in_float(outputs) / temperature
    rows = s.new_zeros(len(s))
    for _ in range(iterations):
        columns = (s - rows[:, None]).logsumexp(0)  # (K,)
        rows = (s - columns).logsumexp(1)  # (N,)
    return temperature * columns
