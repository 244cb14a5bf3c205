"""CLIP and a queue of negatives, fused and plain: pytest bench/bench_similarity_lse.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import fastcl.functional as F


def plain_clip(x: Tensor, y: Tensor) -> Tensor:
    logits = 14.0 * normalize(x) @ normalize(y).T
    diagonal = torch.arange(len(x))
    return (cross_entropy(logits, diagonal) + cross_entropy(logits.T, diagonal)) / 2


def fused_clip(x: Tensor, y: Tensor) -> Tensor:
    return F.clip(x, y, logit_scale=14.0)


def plain_queue(q: Tensor, queue: Tensor) -> Tensor:
    return (normalize(q) @ normalize(queue).T / 0.07).logsumexp(1).mean()


def fused_queue(q: Tensor, queue: Tensor) -> Tensor:
    return F.similarity_lse(q, queue, scale=1 / 0.07, normalize=True).mean()


@pytest.mark.parametrize("provider", ["fastcl", "torch"])
@pytest.mark.parametrize(("n", "d"), [(64, 128), (4096, 512)])
def test_clip(benchmark, n: int, d: int, provider: str) -> None:
    x, y = (torch.randn(n, d, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(fused_clip(x, y), plain_clip(x, y), rtol=1e-5, atol=1e-5)
    loss = fused_clip if provider == "fastcl" else plain_clip
    benchmark(lambda: torch.autograd.grad(loss(x, y), [x, y]))


@pytest.mark.parametrize("provider", ["fastcl", "torch"])
@pytest.mark.parametrize(("n", "m", "d"), [(256, 65536, 128)])
def test_queue(benchmark, n: int, m: int, d: int, provider: str) -> None:
    q, queue = torch.randn(n, d, requires_grad=True), torch.randn(m, d)
    torch.testing.assert_close(fused_queue(q, queue), plain_queue(q, queue), rtol=1e-5, atol=1e-5)
    loss = fused_queue if provider == "fastcl" else plain_queue
    benchmark(lambda: torch.autograd.grad(loss(q, queue), q))
