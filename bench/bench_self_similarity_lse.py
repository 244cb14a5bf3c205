"""NT-Xent of SimCLR, fused and plain: pytest bench/bench_self_similarity_lse.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import fastcl.functional as F


def plain(z0: Tensor, z1: Tensor) -> Tensor:
    z = normalize(torch.cat([z0, z1]))
    s = (z @ z.T / 0.5).fill_diagonal_(-torch.inf)
    return cross_entropy(s, torch.arange(len(z)).roll(len(z0)))


def fused(z0: Tensor, z1: Tensor) -> Tensor:
    return F.nt_xent(z0, z1, temperature=0.5)


@pytest.mark.parametrize("provider", ["fastcl", "torch"])
@pytest.mark.parametrize(("n", "d"), [(32, 128), (4096, 128)])
def test_nt_xent(benchmark, n: int, d: int, provider: str) -> None:
    z0, z1 = (torch.randn(n, d, requires_grad=True) for _ in range(2))
    torch.testing.assert_close(fused(z0, z1), plain(z0, z1), rtol=1e-5, atol=1e-5)
    loss = fused if provider == "fastcl" else plain
    benchmark(lambda: torch.autograd.grad(loss(z0, z1), [z0, z1]))
