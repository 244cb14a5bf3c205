"""Scores against a memory bank, fused and gathered: pytest bench/bench_bank_scores.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcl.functional as F


def plain(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    rows = bank.index_select(0, index.view(-1)).view(*index.shape, -1)
    return torch.bmm(rows, query.unsqueeze(2)).squeeze(2)


@pytest.mark.parametrize(("n", "k", "m", "d"), [(64, 64, 1000, 128), (256, 4097, 200_000, 128)])
@pytest.mark.parametrize("provider", [F.bank_scores, plain], ids=["fastcl", "torch"])
def test_bank_scores_forward_and_backward(
    benchmark, provider, n: int, k: int, m: int, d: int
) -> None:
    torch.manual_seed(0)
    query, bank = torch.randn(n, d, requires_grad=True), torch.randn(m, d)
    index, cotangent = torch.randint(m, (n, k)), torch.randn(n, k)

    def run(provider) -> list[Tensor]:
        scores = provider(query, bank, index)
        return [scores, *torch.autograd.grad(scores, query, cotangent)]

    for actual, expected in zip(run(F.bank_scores), run(plain)):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-2)
    benchmark(run, provider)
