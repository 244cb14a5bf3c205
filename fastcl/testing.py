"""Helpers for testing against fastcl's operations: sample inputs, and the accuracy rule.

The rule: a kernel's error against float64 may not exceed the error of the plain PyTorch
expression in the same dtype, plus a stated slack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

LOSS_SLACK = 2e-6  # relative, float32
GRADIENT_SLACK = 1e-5  # of the largest entry, float32


def sample_inputs(
    word: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> list[tuple[Any, ...]]:
    """Argument lists for the first registered operation of `word` (a key of fastcl.ops.OPS).

    Small and odd sizes; every differentiable tensor requires a gradient; one list has transposed
    inputs.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, grad: bool = True) -> Tensor:
        x = torch.randn(shape, dtype=torch.float64, device=device, generator=generator)
        return x.to(dtype).requires_grad_(grad)

    def transposed(n: int, d: int) -> Tensor:
        return normal(d, n, grad=False).t().requires_grad_()

    def integers(high: int, n: int) -> Tensor:
        return torch.randint(high, (n,), device=device, generator=generator)

    scale = torch.tensor(
        3.0,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
        device=device,
        requires_grad=True,
    )
    pointer = torch.tensor([4], device=device)
    center = torch.zeros(7, dtype=scale.dtype, device=device)
    samples: dict[str, list[tuple[Any, ...]]] = {
        "similarity_lse": [
            (normal(5, 7), normal(9, 7), scale, None, None, True, True, True),
            (transposed(5, 7), transposed(3, 7), scale, None, None, False, True, False),
            (normal(6, 4), normal(8, 4), scale, integers(3, 6), integers(3, 8), True, False, True),
        ],
        "self_similarity_lse": [
            (normal(7, 5), scale, None, True),
            (transposed(9, 3), scale, integers(4, 9), False),
        ],
        "soft_cross_entropy": [
            (normal(5, 11), normal(5, 11, grad=False).softmax(1), scale, "none"),
            (transposed(3, 6), normal(3, 6, grad=False).softmax(1), scale, "mean"),
        ],
        "sinkhorn": [(normal(6, 9, grad=False), 0.05, 3), (transposed(7, 3).detach(), 0.5, 1)],
        "cosine": [(normal(5, 7), normal(5, 7), 1e-8), (transposed(4, 3), transposed(4, 3), 1e-8)],
        "ema": [
            (
                [normal(3, 2, grad=False), normal(5, grad=False)],
                [normal(3, 2, grad=False), normal(5, grad=False)],
                0.9,
            )
        ],
        "instance_spread": [(normal(8, 5), scale, 1.5, True, False)],
        "pair_sigmoid": [
            (normal(5, 7), normal(5, 7), scale, scale, True),
            (transposed(4, 3), transposed(4, 3), scale, scale, False),
        ],
        "self_distillation": [
            (normal(4, 3, 7), normal(2, 3, 7, grad=False), center, scale, scale.detach())
        ],
        "bank_scores": [
            (normal(4, 5), normal(9, 5, grad=False), integers(9, 12).reshape(4, 3), scale)
        ],
        "bank": [(normal(9, 5, grad=False), integers(9, 4), normal(4, 5, grad=False), 0.5)],
        "queue": [(normal(5, 3, grad=False), pointer, normal(4, 3, grad=False))],
        "own_negatives": [
            (normal(5, 7), normal(5, 3, 7), scale, True),
            (transposed(4, 6), normal(4, 5, 6), scale, False),
        ],
    }
    return samples[word]


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """The largest deviation as a fraction of the largest entry of the truth."""
    size = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((actual.double() - truth).abs().max() / size)


def assert_as_accurate_as(
    actual: Tensor, plain: Tensor, truth: Tensor, *, slack: float, name: str = "result"
) -> None:
    """Raise AssertionError if `actual` is further from the float64 truth than `plain` + slack.

    Errors are relative to the largest entry of the truth.
    """
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape}, not {truth.shape}"
    error, allowed = relative_error(actual, truth), relative_error(plain, truth) + slack
    assert error <= allowed, f"{name}: error {error:.2e} above {allowed:.2e}"


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor | None = None
) -> list[Tensor]:
    """[output, gradient of each input] of function(*inputs), from copies of the inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    weights = torch.ones_like(output) if cotangent is None else cotangent.to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, weights)]
