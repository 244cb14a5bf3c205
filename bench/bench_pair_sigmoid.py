"""SigLIP's loss, fused and as the plain matrix: pytest bench/bench_pair_sigmoid.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

import fastcl.functional as F

SCALE, BIAS = 10.0, -10.0


def fused(image: Tensor, text: Tensor) -> Tensor:
    return F.siglip(image, text, logit_scale=SCALE, logit_bias=BIAS)


def plain(image: Tensor, text: Tensor) -> Tensor:
    s = SCALE * normalize(image) @ normalize(text).T + BIAS
    z = 2 * torch.eye(len(s)) - 1
    return -logsigmoid(z * s).sum() / len(s)


@pytest.mark.parametrize(("n", "d"), [(64, 128), (4096, 512)])
@pytest.mark.parametrize("provider", [fused, plain], ids=["fastcl", "torch"])
def test_pair_sigmoid_forward_and_backward(benchmark, provider, n: int, d: int) -> None:
    torch.manual_seed(0)
    image, text = (torch.randn(n, d, requires_grad=True) for _ in range(2))

    def run(provider) -> list[Tensor]:
        loss = provider(image, text)
        return [loss, *torch.autograd.grad(loss, (image, text))]

    for actual, expected in zip(run(fused), run(plain)):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    benchmark(run, provider)
