"""Fine-tune an encoder on some of the labels, and distil the result into a student without any.

    fine-tuning     a classifier from zero on the encoder (SimCLR v2: on the first layer of its head
                    where labels are few); every weight learns. Crop and flip only, no weight decay,
                    a cosine without warm-up.
    distillation    L = mean CE(softmax(teacher/τ), student/τ) on images whose labels are not used

Labels are drawn class by class, so that a share of 1 % has every class in it.

Sources: Chen et al. 2020, arXiv:2002.05709, appendix B.5; Chen et al. 2020, arXiv:2006.10029.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nf

from fastcl.data import Split
from fastcl.methods.simclr_v2 import distillation_loss
from fastcl.optim import LARS

Normalize = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Protocol:
    """How weights are fine-tuned. lr is for a batch of 256 (linear) or of 1 (square root)."""

    lr: float
    batch_size: int
    square_root: bool = False
    lars: bool = False
    few_epochs: int = 60  # with less than a tenth of the labels
    epochs: int = 30

    def peak(self, batch_size: int) -> float:
        """The learning rate of that batch."""
        return self.lr * (batch_size**0.5 if self.square_root else batch_size / 256)


PROTOCOLS = {
    "simclr": Protocol(lr=0.05, batch_size=4096),
    "simclr-v2": Protocol(lr=0.005, batch_size=1024, square_root=True, lars=True),
    "quick": Protocol(lr=0.05, batch_size=128),  # small data: more steps
}


def share(labels: Tensor, fraction: float, seed: int = 0) -> Tensor:
    """Indices of a share of each class, at least one image each: int64, ascending."""
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction of the labels must be above 0, at most 1; got {fraction}")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        count = max(1, round(fraction * len(own)))
        chosen.append(own[torch.randperm(len(own), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def crop_and_flip(images: Tensor, generator: torch.Generator, least: float = 0.08) -> Tensor:
    """Float images (N, C, H, W): a random part of each, of area least … 1, at the same size."""
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    side = uniform(least, 1).sqrt()
    stretch = (uniform(-1, 1) * math.log(4 / 3) / 2).exp()
    width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = width * (torch.rand(count, generator=generator) < 0.5).float().mul(2).sub(1)
    theta[:, 1, 1] = height
    theta[:, 0, 2] = (1 - width) * uniform(-1, 1)
    theta[:, 1, 2] = (1 - height) * uniform(-1, 1)
    grid = nf.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return nf.grid_sample(images, grid, padding_mode="border", align_corners=False)


def gather(split: Split, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Images uint8 (N, 3, H, W) and labels (N,) of the rows chosen, or of all."""
    images, labels = (torch.cat(part) for part in zip(*split.batches(500), strict=True))
    return (images, labels) if chosen is None else (images[chosen], labels[chosen])


def finetune(
    body: nn.Module,
    features: int,
    images: Tensor,
    labels: Tensor,
    classes: int,
    *,
    protocol: Protocol,
    epochs: int,
    normalize: Normalize,
    crop: float = 0.08,
    seed: int = 0,
) -> nn.Module:
    """body with a classifier on it, both trained on images uint8 (N, 3, H, W), labels (N,)."""
    classifier = nn.Linear(features, classes).to(images.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    model = nn.Sequential(body, classifier)

    def loss(view: Tensor, rows: Tensor) -> Tensor:
        return nf.cross_entropy(model(view), labels[rows])

    _train(model, images, loss, protocol, epochs, normalize, crop, seed)
    return model


def distil(
    student: nn.Module,
    teacher: nn.Module,
    images: Tensor,
    *,
    temperature: float,
    protocol: Protocol,
    epochs: int,
    normalize: Normalize,
    crop: float = 0.08,
    seed: int = 0,
) -> nn.Module:
    """student, trained to give the fine-tuned teacher's answers on images uint8 (N, 3, H, W)."""
    teacher.eval()

    def loss(view: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            answers = teacher(view)
        return distillation_loss(student(view), answers, temperature=temperature)

    _train(student, images, loss, protocol, epochs, normalize, crop, seed)
    return student


def _train(
    model: nn.Module,
    images: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    protocol: Protocol,
    epochs: int,
    normalize: Normalize,
    crop: float,
    seed: int,
) -> None:
    batch = min(protocol.batch_size, len(images))
    if batch < 2:
        raise ValueError(f"fine-tuning needs at least two images; got {len(images)}")
    peak = protocol.peak(batch)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer: torch.optim.Optimizer = (
        LARS.simclr(named, peak, momentum=0.9, weight_decay=0.0)
        if protocol.lars
        else torch.optim.SGD([p for _, p in named], peak, momentum=0.9, nesterov=True)
    )
    generator = torch.Generator().manual_seed(seed)
    steps, step = epochs * (len(images) // batch), 0
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for rows in order[: len(order) // batch * batch].split(batch):
            for group in optimizer.param_groups:
                group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * step / steps))
            view = crop_and_flip(normalize(images[rows]), generator, crop)
            optimizer.zero_grad()
            torch.autograd.backward(loss(view, rows))
            optimizer.step()
            step += 1


@torch.no_grad()
def accuracy(model: nn.Module, split: Split, normalize: Normalize, device: str = "cpu") -> float:
    """The share of a split's images, 0 to 1, that a classifier gets right, in eval mode."""
    model.eval()
    right = total = 0
    for images, labels in split.batches(500):
        predicted = model(normalize(images.to(device))).argmax(1).cpu()
        right += int((predicted == labels).sum())
        total += len(labels)
    return right / total
