"""Soft-target cross entropy, fused and plain: pytest bench/bench_soft_cross_entropy.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcl.functional as F


def plain(logits: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
    return -(targets * (logits / temperature).log_softmax(1)).sum(1).mean()


# A small batch, SwAV's prototypes, ten of DINO's views.
@pytest.mark.parametrize(("n", "k"), [(64, 300), (4096, 3000), (160, 65536)])
@pytest.mark.parametrize("provider", [F.soft_cross_entropy, plain], ids=["fastcl", "torch"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_soft_cross_entropy(benchmark, provider, n: int, k: int, backward: bool) -> None:
    torch.manual_seed(0)
    logits, targets = torch.randn(n, k, requires_grad=True), torch.randn(n, k).softmax(1)

    def run(provider) -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            loss = provider(logits, targets, temperature=0.1)
        return [loss, *(torch.autograd.grad(loss, logits) if backward else ())]

    for actual, expected in zip(run(F.soft_cross_entropy), run(plain)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-7)
    benchmark(run, provider)
