"""SwAV's codes, fused and as published: pytest bench/bench_sinkhorn.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastcl.functional as F


def published(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Rounds of sums and divisions of exp(scores / epsilon)."""
    Q = torch.exp(scores / epsilon).t()  # (K, N)
    Q /= Q.sum()
    K, N = Q.shape
    for _ in range(iterations):
        Q /= Q.sum(1, keepdim=True)
        Q /= K
        Q /= Q.sum(0, keepdim=True)
        Q /= N
    return (Q * N).t()


@pytest.mark.parametrize("provider", [F.sinkhorn, published], ids=["fastcl", "torch"])
@pytest.mark.parametrize(("n", "k"), [(64, 300), (4096, 3000)])
def test_sinkhorn(benchmark, provider, n: int, k: int) -> None:
    torch.manual_seed(0)
    scores = normalize(torch.randn(n, 128)) @ normalize(torch.randn(k, 128)).T
    torch.testing.assert_close(F.sinkhorn(scores), published(scores), rtol=1e-5, atol=1e-7)
    benchmark(provider, scores)
