"""A ResNet-50's momentum update, in one pass and torch's: pytest bench/bench_ema.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcl.functional as F

MOMENTUM = 0.99


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Its 161 parameters, 25.6 million numbers."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    wide = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for c in ((width, wide, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                shapes += [c, (c[0],), (c[0],)]
            if block == 0:
                shapes += [(4 * width, wide, 1, 1), (4 * width,), (4 * width,)]
            wide = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def fused(targets: list[Tensor], sources: list[Tensor]) -> None:
    F.ema_update_(targets, sources, momentum=MOMENTUM)


def foreach(targets: list[Tensor], sources: list[Tensor]) -> None:
    torch._foreach_lerp_(targets, sources, 1 - MOMENTUM)


def loop(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources):
        target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)


@pytest.mark.parametrize("size", ["mlp", "resnet50"])
@pytest.mark.parametrize("provider", [fused, foreach, loop])
def test_ema(benchmark, provider, size: str) -> None:
    torch.manual_seed(0)
    shapes = resnet50_shapes() if size == "resnet50" else [(64, 32), (64,), (16, 64), (16,)]
    assert size == "mlp" or (len(shapes), sum(map(lambda s: torch.Size(s).numel(), shapes))) == (
        161,
        25_557_032,
    )
    targets, sources = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    expected = [t.clone() for t in targets]
    foreach(expected, sources)
    fused(targets, sources)
    for actual, truth in zip(targets, expected):
        torch.testing.assert_close(actual, truth)
    benchmark(provider, targets, sources)
