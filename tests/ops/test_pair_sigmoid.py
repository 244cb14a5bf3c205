"""siglip against the plain expression in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as N

import fastcl.functional as F
from fastcl.testing import assert_as_accurate_as, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")


def plain(x, y, t, b, normalize=True):  # type: ignore[no-untyped-def]
    if normalize:
        x, y = N.normalize(x), N.normalize(y)
    z = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -N.logsigmoid(z * (t * x @ y.T + b)).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("t", "b"), [(10.0, -10.0), (100.0, 3.0)])
@pytest.mark.parametrize(("n", "d"), [(2, 3), (63, 100), (129, 64)])
def test_as_accurate_as_plain_pytorch(
    n: int, d: int, t: float, b: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x = torch.randn(n, d)
    inputs = x.to(dtype), (x + torch.randn(n, d)).to(dtype), torch.tensor(t), torch.tensor(b)
    cotangent = torch.rand(n) + 0.5
    ours = value_and_gradients(
        lambda x, y, t, b: F.siglip(x, y, logit_scale=t, logit_bias=b, reduction="none"),
        inputs,
        cotangent,
    )
    naive = value_and_gradients(lambda *a: plain(*a).float(), inputs, cotangent)
    truth = value_and_gradients(plain, [a.double() for a in inputs], cotangent)
    for name, a, e, c in zip(("loss", "dx", "dy", "dt", "db"), ours, naive, truth):
        assert_as_accurate_as(a, e, c, slack=2e-6 if name == "loss" else 1e-5, name=name)


def test_mean_is_the_sum_over_pairs_divided_by_n() -> None:
    x, y = torch.randn(9, 16), torch.randn(9, 16)
    loss = F.siglip(x, y, logit_scale=10.0, logit_bias=-10.0)
    torch.testing.assert_close(loss, plain(x, y, 10.0, -10.0).sum() / 9)


def test_orthogonal_rows_without_bias_cost_log_2_a_pair() -> None:
    x, y = torch.eye(8)[:3], torch.eye(8)[3:6]
    rows = F.siglip(x, y, logit_scale=7.0, logit_bias=0.0, reduction="none")
    torch.testing.assert_close(rows, torch.full((3,), 3 * math.log(2)))


def test_unnormalised_rows_do_not_overflow() -> None:
    x, y = 100 * torch.randn(5, 4), 100 * torch.randn(5, 4)
    inputs = x, y, torch.tensor(1.0), torch.tensor(0.0)
    ours = value_and_gradients(
        lambda x, y, t, b: F.siglip(x, y, logit_scale=t, logit_bias=b, normalize=False).mul(5),
        inputs,
    )
    truth = value_and_gradients(
        lambda *a: plain(*a, normalize=False).sum(), [a.double() for a in inputs]
    )
    for a, b in zip(ours, truth):
        assert_as_accurate_as(a, b, b, slack=1e-5)
