"""The negative cosine loss, fused and torch's: pytest bench/bench_cosine.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcl.functional as F


def plain(prediction: Tensor, target: Tensor) -> Tensor:
    return -torch.nn.functional.cosine_similarity(prediction, target).mean()


@pytest.mark.parametrize(("n", "d"), [(64, 256), (512, 2048), (8192, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("provider", [F.negative_cosine, plain], ids=["fastcl", "torch"])
def test_cosine_forward_and_backward(benchmark, provider, n: int, d: int, dtype) -> None:
    torch.manual_seed(0)
    prediction, target = (torch.randn(n, d, dtype=dtype) for _ in range(2))
    prediction.requires_grad_()

    def run(provider) -> list[Tensor]:
        loss = provider(prediction, target)
        return [loss, *torch.autograd.grad(loss, prediction)]

    tolerance = dict(rtol=1e-4, atol=1e-6) if dtype == torch.float32 else dict(rtol=5e-2, atol=1e-3)
    for actual, expected in zip(run(F.negative_cosine), run(plain)):
        torch.testing.assert_close(actual, expected, check_dtype=False, **tolerance)
    benchmark(run, provider)
