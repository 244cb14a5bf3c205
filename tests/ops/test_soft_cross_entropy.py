"""soft_cross_entropy against the float64 formula, and where log softmax is easily lost."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastcl.functional as F
from fastcl import ops
from fastcl.testing import GRADIENT_SLACK, LOSS_SLACK, relative_error, value_and_gradients

on_each_backend = pytest.mark.usefixtures("backend")
on_the_kernels = pytest.mark.usefixtures("kernels")

# One class, less than a vector, ragged ends, a tile of vectors and more, more than one piece.
SIZES = [(1, 1), (5, 2), (3, 15), (7, 129), (129, 63), (33, 300), (2, 8192), (3, 20001)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(n: int, k: int, size: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """logits, targets and random weights of the rows; one row's targets sum to 0, one's to 2."""
    generator = torch.Generator().manual_seed(n * k)
    logits = size * torch.randn(n, k, generator=generator)
    targets = (3 * torch.randn(n, k, generator=generator)).softmax(1)
    if n > 2:
        targets[0], targets[1] = 0, 2 * targets[1]
    return logits, targets, torch.randn(n, generator=generator)


def plain_loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    return -(y * (x * scale).log_softmax(1)).sum(1)


def assert_accurate(
    logits: Tensor, targets: Tensor, weights: Tensor, scale: float, *, slack: float = GRADIENT_SLACK
) -> None:
    def run(loss, dtype, *, cast: bool) -> list[Tensor]:
        x = logits.to(dtype) if cast else logits
        y = targets.to(dtype) if cast else targets
        t = torch.tensor(scale, dtype=dtype)
        return value_and_gradients(lambda x, t: loss(x, y, t), (x, t), weights)

    actual = run(lambda *a: ops.soft_cross_entropy(*a, "none")[0], torch.float32, cast=False)
    plain = run(plain_loss, torch.float32, cast=True)
    truth = run(plain_loss, torch.float64, cast=True)
    rounding = 0 if logits.dtype == torch.float32 else torch.finfo(logits.dtype).eps
    allowed = (plain[0].double() - truth[0]).abs().max() + LOSS_SLACK * truth[0].abs().clamp_min(1)
    assert ((actual[0].double() - truth[0]).abs() <= allowed).all(), "loss"
    # Of the largest entry, or of m p and y where nothing is left of their difference (K = 1).
    size = torch.maximum(truth[1].abs().max(), (scale * weights[:, None] * targets).abs().max())
    errors = [(x.double() - truth[1]).abs().max() / size for x in (actual[1], plain[1])]
    assert errors[0] <= errors[1] + slack + rounding, "grad_logits"
    # Σ w x (m p − y) cancels: its error is a fraction of the sum of the terms' sizes.
    terms = (truth[1] / scale * logits.double()).abs().sum() + weights.abs().sum()
    error = (actual[2].double() - truth[2]).abs()
    assert error <= (plain[2].double() - truth[2]).abs() + 2e-6 * terms, "grad_scale"


@on_each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SIZES, ids=str)
def test_matches_float64(n: int, k: int, dtype: torch.dtype) -> None:
    logits, targets, weights = inputs(n, k)
    assert_accurate(logits.to(dtype), targets.to(dtype), weights, 1 / 0.3)


@on_each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 129), (3, 20001), (5000, 3)], ids=str)
def test_reduced_losses_and_their_gradients_match_float64(n: int, k: int, reduction: str) -> None:
    logits, targets, weights = inputs(n, k)
    cotangent = weights[-1]

    def reduced(x: Tensor, t: Tensor) -> Tensor:
        rows = plain_loss(x, targets.double(), t)
        return rows.mean() if reduction == "mean" else rows.sum()

    actual = value_and_gradients(
        lambda x, t: ops.soft_cross_entropy(x, targets, t, reduction)[0],
        (logits, torch.tensor(3.0)),
        cotangent,
    )
    truth = value_and_gradients(
        reduced, (logits.double(), torch.tensor(3.0, dtype=torch.float64)), cotangent.double()
    )
    for got, expected in zip(actual, truth):
        assert got.shape == expected.shape
        if k == 1:  # nothing to learn: what is left of a difference
            assert (got - expected).abs().max() < 1e-6
        else:
            assert relative_error(got, expected) < 1e-5


@on_each_backend
@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(dtype: torch.dtype, target_dtype: torch.dtype) -> None:
    logits, targets, weights = inputs(7, 77)
    assert_accurate(logits.to(dtype), targets.to(target_dtype), weights, 2.0)


@on_the_kernels
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0, -1e5])
def test_neither_size_nor_offset_costs_digits(scale: float, offset: float) -> None:
    logits, targets, weights = inputs(9, 333)
    # Offsets are added in whole 1/64, so that the logits themselves are not rounded.
    logits = (logits * 64).round() / 64 + offset
    assert_accurate(logits, targets, weights, scale)


@on_the_kernels
def test_an_offset_changes_nothing() -> None:
    logits, targets, _ = inputs(9, 333)
    logits = (logits * 64).round() / 64
    options = dict(temperature=0.1, reduction="none")
    moved = F.soft_cross_entropy(logits + 1e5, targets, **options)
    still = F.soft_cross_entropy(logits.double(), targets.double(), **options)
    torch.testing.assert_close(moved.double(), still, rtol=2e-6, atol=0)


@on_each_backend
def test_uniform_logits_give_log_of_classes() -> None:
    for k in (1, 16, 3000):
        loss = F.soft_cross_entropy(torch.full((3, k), 7.0), torch.full((3, k), 1 / k))
        assert loss.item() == pytest.approx(math.log(k), rel=5e-6, abs=1e-7)


@on_each_backend
def test_scale_zero_is_uniform() -> None:
    logits, targets, _ = inputs(2, 50)
    loss, lse, mass = ops.soft_cross_entropy(logits, targets, torch.tensor(0.0), "none")
    torch.testing.assert_close(loss, mass * math.log(50))
    torch.testing.assert_close(lse, torch.full((2,), math.log(50)))


@on_each_backend
def test_one_hot_targets_are_torchs_cross_entropy() -> None:
    logits, _, _ = inputs(20, 37)
    labels = torch.randint(37, (20,), generator=torch.Generator().manual_seed(0))
    actual = value_and_gradients(
        lambda x: F.soft_cross_entropy(x, torch.eye(37)[labels], temperature=0.5), (logits,)
    )
    expected = value_and_gradients(
        lambda x: torch.nn.functional.cross_entropy(x / 0.5, labels), (logits,)
    )
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)


@on_each_backend
def test_gradient_of_a_row_without_targets_is_zero() -> None:
    logits, targets, _ = inputs(5, 40)
    x = logits.requires_grad_()
    F.soft_cross_entropy(x, targets, reduction="sum").backward()
    assert (x.grad[0] == 0).all() and (x.grad[2] != 0).any()


@on_each_backend
def test_a_nan_is_visible_in_its_row_only() -> None:
    logits, targets, _ = inputs(4, 300)
    for at in (3, 299):
        x = logits.clone()
        x[2, at] = torch.nan
        x.requires_grad_()
        loss = F.soft_cross_entropy(x, targets, reduction="none")
        loss.sum().backward()
        assert loss.isnan().tolist() == [False, False, True, False]
        assert x.grad[2].isnan().all() and not x.grad[[0, 1, 3]].isnan().any()


@on_each_backend
def test_targets_get_no_silent_gradient() -> None:
    logits, targets, _ = inputs(4, 5)
    with pytest.raises(ValueError, match="no gradient"):
        F.soft_cross_entropy(logits, targets.requires_grad_())


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_what_is_no_group_is_refused(reduction: str) -> None:
    logits, targets, _ = inputs(4, 5)
    with pytest.raises(TypeError, match="process group"):
        F.soft_cross_entropy(logits, targets, reduction=reduction, group="world")  # type: ignore[arg-type]


# The last is larger than what is written past the caches, and its rows are not aligned.
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(("n", "k"), [(300, 129), (5, 20001), (65, 65541)])
def test_same_bits_for_any_number_of_threads(
    assert_same_bits, n: int, k: int, reduction: str
) -> None:
    logits, targets, weights = inputs(n, k)
    for offset in (0.0, 100.0):  # a large lse is found again in the backward pass
        assert_same_bits(
            lambda offset=offset: value_and_gradients(
                lambda x, t: ops.soft_cross_entropy(x, targets, t, reduction)[0],
                (logits + offset, torch.tensor(2.0)),
                weights if reduction == "none" else weights[0],
            )
        )


@on_each_backend
def test_large_output_is_as_accurate() -> None:
    assert_accurate(*inputs(65, 65541), 1.0)
