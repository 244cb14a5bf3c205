"""negative_cosine against the float64 formula, and BYOL's and SimSiam's code."""

from __future__ import annotations

import pytest
import torch

import fastcl.functional as F
from fastcl import ops
from fastcl.reference import cosine as reference
from fastcl.testing import GRADIENT_SLACK, LOSS_SLACK, value_and_gradients

on_each_backend = pytest.mark.usefixtures("backend")

EPS = 1e-8
# One number, less than a vector, ragged ends, many rows; the last is more than a thread's share.
SIZES = [(1, 1), (3, 2), (2, 15), (63, 60), (129, 100), (7, 2048), (300, 129)]


def inputs(n: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows of very different norms; the first prediction is zero, the last target tiny."""
    generator = torch.Generator().manual_seed(n * d)
    p, t = (torch.randn(n, d, generator=generator) for _ in range(2))
    p *= torch.logspace(-3, 2, n)[:, None]
    if n > 1:
        p[0] = 0
        t[-1] *= 1e-10  # below EPS in float32; zero in float16
    return p.to(dtype), t.to(dtype)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "d"), SIZES, ids=lambda x: str(x))
def test_matches_float64(n: int, d: int, dtype: torch.dtype) -> None:
    p, t = inputs(n, d, dtype)
    weights = torch.randn(n, generator=torch.Generator().manual_seed(1))
    actual = value_and_gradients(lambda p, t: ops.cosine(p, t, EPS), (p, t), weights)

    # Not torch's cosine_similarity, which differentiates the norm as if it were not clamped.
    def formula(p: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return reference.cosine(p, t, eps=EPS)

    plain = value_and_gradients(formula, (p.float(), t.float()), weights)
    truth = value_and_gradients(formula, (p.double(), t.double()), weights)
    assert_no_worse(actual[0], plain[0], truth[0], slack=LOSS_SLACK)
    # Row by row, in units of the cotangent over the norm: norms differ by 1e5 and more here.
    for i, x in ((1, p), (2, t)):
        unit = (weights.double() / x.double().norm(dim=1).clamp_min(EPS))[:, None]
        shown = (truth[i].abs() < torch.finfo(dtype).max).all(1)  # in float16, clamped rows are not
        assert shown.sum() >= n - 2
        rows = [(grad.double() / unit)[shown] for grad in (actual[i], plain[i], truth[i])]
        rounding = rounding_to(dtype, truth[i]) / unit.abs()
        assert_no_worse(*rows, slack=GRADIENT_SLACK + rounding[shown])


def rounding_to(dtype: torch.dtype, x: torch.Tensor) -> torch.Tensor:
    """What storing x in a dtype shorter than float32 may change."""
    info = torch.finfo(dtype)
    return (x.abs() + info.tiny) * info.eps if dtype != torch.float32 else torch.zeros_like(x)


def assert_no_worse(
    actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, *, slack: float | torch.Tensor
) -> None:
    error, allowed = ((x.double() - truth).abs() for x in (actual, plain))
    worst = float((error - slack).max())
    assert worst <= allowed.max()


@on_each_backend
def test_backward_gives_only_what_is_needed() -> None:
    p, t = inputs(5, 33, torch.float32)
    both = value_and_gradients(lambda p, t: F.negative_cosine(p, t), (p, t))
    q = p.clone().requires_grad_()
    F.negative_cosine(q, t).backward()
    assert torch.equal(q.grad, both[1])
    s = t.clone().requires_grad_()
    F.negative_cosine(p, s).backward()
    assert torch.equal(s.grad, both[2])


@on_each_backend
def test_rows_below_the_clamp_have_no_projection() -> None:
    eps = 0.5
    p = torch.tensor([[0.3, 0.0], [3.0, 0.0]], requires_grad=True)
    t = torch.tensor([[0.6, 0.8], [0.6, 0.8]])
    F.negative_cosine(p, t, eps=eps, reduction="sum").backward()
    # below: −t / (ε T); above: the part of t along p is gone
    torch.testing.assert_close(p.grad, torch.tensor([[-1.2, -1.6], [0.0, -0.8 / 3]]))


@on_each_backend
@pytest.mark.parametrize("name", ["b19_d256", "degenerate_b10_d96"])
def test_is_byols_loss(golden, name: str) -> None:
    file = golden(f"byol_loss_{name}")
    p1, p2 = file["p1"].requires_grad_(), file["p2"].requires_grad_()
    # BYOL floors the squared norm at 1e-12 and sums the two directions.
    loss = 4 + 2 * F.negative_cosine(p1, file["z2"], eps=1e-6)
    loss = loss + 2 * F.negative_cosine(p2, file["z1"], eps=1e-6)
    loss.backward()
    # |p̂ − ẑ|² is 2 − 2 cos only where both have norm 1: not in the rows below the floor.
    rows = [p.detach().norm(dim=1) > 1e-6 for p in (p1, p2)]
    truth = file["loss_f64"] if "degenerate" not in name else loss.detach()
    gradients = (p1.grad[rows[0]], file["grad_p1_f64"][rows[0]])
    assert_near(loss, truth, *gradients, p2.grad[rows[1]], file["grad_p2_f64"][rows[1]])


@on_each_backend
@pytest.mark.parametrize("name", ["b3_d2048", "degenerate_b12_d96"])
def test_is_simsiams_loss(golden, name: str) -> None:
    file = golden(f"simsiam_loss_{name}")
    p1, p2 = file["p1"].requires_grad_(), file["p2"].requires_grad_()
    loss = (F.negative_cosine(p1, file["z2"]) + F.negative_cosine(p2, file["z1"])) / 2
    loss.backward()
    assert_near(loss, file["loss_f64"], p1.grad, file["grad_p1_f64"], p2.grad, file["grad_p2_f64"])


def assert_near(loss: torch.Tensor, loss_truth: torch.Tensor, *gradients: torch.Tensor) -> None:
    torch.testing.assert_close(loss.double(), loss_truth.double(), rtol=1e-6, atol=1e-6)
    for actual, truth in zip(gradients[::2], gradients[1::2]):
        size = truth.abs().max().item()
        torch.testing.assert_close(actual.double(), truth, rtol=0, atol=2e-6 * size)


@on_each_backend
def test_a_nan_is_visible_in_its_row_only() -> None:
    p, t = (torch.randn(4, 37) for _ in range(2))
    p[2, 20] = float("nan")
    p.requires_grad_(), t.requires_grad_()
    loss = F.negative_cosine(p, t, reduction="none")
    loss.sum().backward()
    for x in (loss, p.grad.sum(1), t.grad.sum(1)):
        assert x.isnan().tolist() == [False, False, True, False]


@on_each_backend
def test_transposed_and_strided_inputs() -> None:
    p, t = torch.randn(37, 9), torch.randn(9, 74)
    expected = reference.forward(p.t().contiguous(), t[:, ::2].contiguous(), eps=EPS)
    torch.testing.assert_close(ops.cosine(p.t(), t[:, ::2], EPS), expected)


# The second is larger than what goes to huge pages.
@pytest.mark.parametrize(("n", "d"), [(200, 129), (4099, 257)])
def test_same_bits_for_any_number_of_threads(assert_same_bits, n: int, d: int) -> None:
    p, t = inputs(n, d, torch.float32)
    weights = torch.randn(n)
    assert_same_bits(
        lambda: value_and_gradients(lambda p, t: ops.cosine(p, t, EPS), (p, t), weights)
    )
