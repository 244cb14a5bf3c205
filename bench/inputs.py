"""The inputs of the workloads: seeded, of one dtype, on one device.

An input called "cotangent" is not an argument: it is what the result's gradient is taken with, for
functions whose result is no scalar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

Inputs = dict[str, Any]  # name -> Tensor, or list of Tensors


class New:
    """Makes inputs: seeded, of one dtype, on one device."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def rows(self, *shape: int) -> Tensor:
        """Unit rows, as queues and banks hold them."""
        return normalize(self.normal(*shape), dim=-1)

    def view_of(self, x: Tensor) -> Tensor:
        """Rows at an angle of 45° to those of x: what a half-trained encoder makes of two views."""
        return x + self.normal(*x.shape)

    def scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.device)

    def index(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def distinct(self, high: int, count: int) -> Tensor:
        return torch.randperm(high, generator=self.generator)[:count].to(self.device)


def two_views(new: New, *, N: int, D: int) -> Inputs:
    z0 = new.normal(N, D)
    return {"z0": z0, "z1": new.view_of(z0)}


def image_and_text(new: New, *, N: int, D: int) -> Inputs:
    image = new.normal(N, D)
    return {"image": image, "text": new.view_of(image), "logit_scale": new.scalar(1 / 0.07)}


def image_text_and_bias(new: New, *, N: int, D: int) -> Inputs:
    image = new.normal(N, D)  # SigLIP starts at a scale of 10 and a bias of −10
    text = new.view_of(image)
    scalars = {"logit_scale": new.scalar(10.0), "logit_bias": new.scalar(-10.0)}
    return {"image": image, "text": text, **scalars}


def query_and_queue(new: New, *, N: int, M: int, D: int) -> Inputs:
    query = new.normal(N, D)
    return {"query": query, "positive": new.view_of(query), "negatives": new.rows(M, D)}


def query_and_its_negatives(new: New, *, N: int, K: int, D: int) -> Inputs:
    query = new.normal(N, D)
    return {"query": query, "positive": new.view_of(query), "negatives": new.normal(N, K, D)}


def labelled(new: New, *, N: int, D: int) -> Inputs:
    labels = torch.arange(N, device=new.device) % max(1, N // 8)  # 8 rows of each class
    return {"features": new.normal(N, D), "labels": labels}


def prototype_scores(new: New, *, N: int, K: int) -> Inputs:
    return {"scores": new.rows(N, 128) @ new.rows(K, 128).T}


def soft_targets(new: New, *, N: int, K: int) -> Inputs:
    return {"logits": new.normal(N, K), "targets": (new.normal(N, K) / 0.5).softmax(1)}


def student_and_teacher(new: New, *, S: int, T: int, N: int, K: int) -> Inputs:
    center = 0.1 * new.normal(K)
    return {"student": new.normal(S, N, K), "teacher": new.normal(T, N, K), "center": center}


def predictions(new: New, *, N: int, D: int) -> Inputs:
    prediction = new.normal(N, D)
    return {"prediction": prediction, "target": new.view_of(prediction)}


def query_and_bank(new: New, *, N: int, K: int, M: int, D: int) -> Inputs:
    """The query's own row first among its 1 + K, then noise."""
    return {"query": new.rows(N, D), "bank": new.rows(M, D), "index": new.index(M, N, 1 + K)}


def bank_and_cotangent(new: New, *, N: int, K: int, M: int, D: int) -> Inputs:
    return {**query_and_bank(new, N=N, K=K, M=M, D=D), "cotangent": new.normal(N, 1 + K).float()}


def bank_and_features(new: New, *, B: int, M: int, D: int) -> Inputs:
    index = new.distinct(M, B)
    return {"bank": new.rows(M, D), "index": index, "features": new.rows(B, D)}


def queue_and_keys(new: New, *, B: int, M: int, D: int) -> Inputs:
    pointer = torch.zeros(1, dtype=torch.long, device=new.device)
    return {"queue": new.normal(M, D), "pointer": pointer, "keys": new.normal(B, D)}


def encoder_and_its_average(new: New, *, width: int) -> Inputs:
    shapes = resnet_shapes(width)
    return {
        "targets": [new.normal(*shape) for shape in shapes],
        "sources": [new.normal(*shape) for shape in shapes],
    }


def resnet_shapes(width: int) -> list[tuple[int, ...]]:
    """The parameters of a bottleneck ResNet: ResNet-50's 161 tensors for width 64."""

    def convolution(k: int, inside: int, outside: int) -> list[tuple[int, ...]]:
        return [(outside, inside, k, k), (outside,), (outside,)]  # and batch normalisation

    shapes, inside = convolution(7, 3, width), width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        middle = width * 2**stage
        for block in range(blocks):
            shapes += convolution(1, inside, middle) + convolution(3, middle, middle)
            shapes += convolution(1, middle, 4 * middle)
            shapes += convolution(1, inside, 4 * middle) if block == 0 else []
            inside = 4 * middle
    return [*shapes, (1000, inside), (1000,)]
