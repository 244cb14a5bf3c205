"""info_nce's negatives of each query's own: the C++ operation against the float64 formula."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

import fastcl.functional as F
from fastcl.ops.own_negatives import own_negatives
from fastcl.reference.own_negatives import forward as formula
from fastcl.testing import relative_error, value_and_gradients

pytestmark = pytest.mark.usefixtures("kernels")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (5, 33, 100), (17, 129, 64), (3, 16, 129)])
def test_matches_the_float64_formula(
    n: int, k: int, d: int, dtype: torch.dtype, normalize: bool
) -> None:
    torch.manual_seed(0)
    query, negatives = torch.randn(n, d).to(dtype), torch.randn(n, k, d).to(dtype)
    t, cotangent = torch.tensor(5.0 if normalize else 0.5), torch.randn(n)
    ours = value_and_gradients(
        lambda *x: own_negatives(*x, normalize), (query, negatives, t), cotangent
    )

    def plain(*x: torch.Tensor) -> torch.Tensor:
        return formula(*x, normalize=normalize)

    wide = query.double(), negatives.double(), t.double()
    truth = value_and_gradients(plain, wide, cotangent)
    # The scale's gradient is a sum over queries, whose terms may cancel.
    terms = value_and_gradients(plain, wide, cotangent.abs())
    of_inputs = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for a, b, size, slack in zip(ours, truth, terms, (2e-6, of_inputs, of_inputs, 5e-6)):
        assert (a.double() - b.double()).abs().max() <= slack * size.double().abs().max() + 1e-6


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_of_the_plain_version(normalize: bool) -> None:
    inputs = torch.randn(3, 4), torch.randn(3, 5, 4), torch.tensor(2.0)
    doubles = [x.double().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: own_negatives(*x, normalize), doubles)


@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
def test_steep_scales_and_rows_of_zeros_stay_finite(scale: float) -> None:
    query, negatives, t = torch.randn(4, 8), torch.randn(4, 6, 8), torch.tensor(scale)
    query[0], negatives[1], negatives[2, 3] = 0, 0, 0
    ours = value_and_gradients(lambda *x: own_negatives(*x, True), (query, negatives, t))
    wide = query.double(), negatives.double(), t.double()
    truth = value_and_gradients(lambda *x: formula(*x, normalize=True), wide)
    assert all(x.isfinite().all() for x in ours)
    assert relative_error(ours[0], truth[0]) < 2e-6


def test_no_negatives_leave_nothing() -> None:
    query = torch.randn(3, 4, requires_grad=True)
    loss = F.info_nce(query, torch.randn(3, 4), torch.randn(3, 0, 4))
    loss.backward()
    assert loss.item() == 0 and not query.grad.any()


def test_same_bits_for_any_number_of_threads(assert_same_bits) -> None:
    query, negatives = torch.randn(37, 100), torch.randn(37, 65, 100)
    inputs = query, negatives, torch.tensor(3.0)
    assert_same_bits(
        lambda: value_and_gradients(lambda *x: own_negatives(*x, True), inputs, torch.ones(37))
    )


def test_registration() -> None:
    inputs = torch.randn(5, 7), torch.randn(5, 3, 7), torch.tensor(2.0)
    opcheck(own_negatives.overload, (*(x.requires_grad_() for x in inputs), True))
