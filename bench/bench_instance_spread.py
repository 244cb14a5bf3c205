"""InvaSpread's loss, fused and as the plain matrix: pytest bench/bench_instance_spread.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastcl.functional as F


def plain(z0: Tensor, z1: Tensor, *, temperature: float = 0.1) -> Tensor:
    z = normalize(torch.cat((z0, z1)))
    s = (z @ z.detach().T / temperature).fill_diagonal_(-torch.inf)
    log_p = s.log_softmax(1)
    partner = torch.arange(len(z)).roll(len(z0))[:, None]
    others = torch.log1p(-log_p.exp()).scatter(1, partner, 0.0)
    return -(log_p.gather(1, partner)[:, 0] + others.sum(1)).mean()


@pytest.mark.parametrize(("n", "d"), [(64, 128), (2048, 128)])
@pytest.mark.parametrize("provider", [F.instance_spread, plain], ids=["fastcl", "torch"])
def test_instance_spread_forward_and_backward(benchmark, provider, n: int, d: int) -> None:
    torch.manual_seed(0)
    z0, z1 = (torch.randn(n, d, requires_grad=True) for _ in range(2))

    def run(provider) -> list[Tensor]:
        loss = provider(z0, z1)
        return [loss, *torch.autograd.grad(loss, (z0, z1))]

    for actual, expected in zip(run(F.instance_spread), run(plain)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    benchmark(run, provider)
