"""Updates of a memory bank, fused and by indexing: pytest bench/bench_bank.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import fastcl.functional as F


def plain(bank: Tensor, index: Tensor, features: Tensor, *, momentum: float = 0.5) -> None:
    bank[index] = normalize(momentum * bank[index] + (1 - momentum) * features)


@pytest.mark.parametrize(("m", "b", "d"), [(1000, 64, 128), (200_000, 4096, 128)])
@pytest.mark.parametrize("provider", [F.bank_update_, plain], ids=["fastcl", "torch"])
def test_bank_update(benchmark, provider, m: int, b: int, d: int) -> None:
    torch.manual_seed(0)
    bank, features = normalize(torch.randn(m, d)), torch.randn(b, d)
    index = torch.randperm(m)[:b]
    ours, theirs = bank.clone(), bank.clone()
    F.bank_update_(ours, index, features)
    plain(theirs, index, features)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    benchmark(provider, bank, index, features)
