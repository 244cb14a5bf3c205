"""DINO's loss, fused and pair by pair: pytest bench/bench_self_distillation.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcl.functional as F


def fused(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    return F.self_distillation(student, teacher, center=center)


def plain(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    targets = ((teacher - center) / 0.04).softmax(2)
    log_p = (student / 0.1).log_softmax(2)
    terms = [
        -(targets[i] * log_p[v]).sum(1).mean()
        for i in range(len(targets))
        for v in range(len(log_p))
        if i != v
    ]
    return torch.stack(terms).mean()


@pytest.mark.parametrize(("views", "n", "k"), [(4, 16, 512), (10, 16, 65536)])
@pytest.mark.parametrize("provider", [fused, plain], ids=["fastcl", "torch"])
def test_self_distillation_forward_and_backward(
    benchmark, provider, views: int, n: int, k: int
) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(views, n, k, requires_grad=True), torch.randn(2, n, k)
    center = torch.randn(k)

    def run(provider) -> list[Tensor]:
        loss = provider(student, teacher, center)
        return [loss, *torch.autograd.grad(loss, student)]

    for actual, expected in zip(run(fused), run(plain)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    benchmark(run, provider)
