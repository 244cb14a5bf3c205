"""fastcl::label_similarity, SupCon's positives: each row against the mean of its label's others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcl.ops.label_similarity import label_similarity
from fastcl.testing import relative_error, value_and_gradients


def with_a_mask(z: Tensor, labels: Tensor, normalize: bool) -> Tensor:
    z = torch.nn.functional.normalize(z, eps=1e-12) if normalize else z
    same = (labels[:, None] == labels) & ~torch.eye(len(z), dtype=torch.bool)
    return ((z @ z.T) * same).sum(1) / same.sum(1).clamp_min(1)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize(("n", "d", "classes"), [(1, 3, 1), (37, 20, 5), (64, 129, 100), (9, 4, 1)])
def test_is_what_a_mask_gives(n: int, d: int, classes: int, normalize: bool) -> None:
    torch.manual_seed(n)
    z, labels, cotangent = torch.randn(n, d), 3 * torch.randint(classes, (n,)) - 7, torch.randn(n)
    ours = value_and_gradients(lambda z: label_similarity(z, labels, normalize)[0], (z,), cotangent)
    truth = value_and_gradients(
        lambda z: with_a_mask(z, labels, normalize), (z.double(),), cotangent
    )
    for got, expected in zip(ours, truth):
        assert relative_error(got, expected) < 3e-6


def test_zero_rows_and_half_precision() -> None:
    z, labels = torch.randn(6, 5), torch.tensor([0, 0, 1, 1, 1, 2])
    z[1] = 0
    ours = value_and_gradients(lambda z: label_similarity(z, labels, True)[0], (z.bfloat16(),))
    truth = value_and_gradients(lambda z: with_a_mask(z, labels, True), (z.bfloat16().double(),))
    assert ours[0].dtype == torch.float32 and ours[1].dtype == torch.bfloat16
    assert ours[0][1] == 0 and ours[0][5] == 0
    kept = [0, 2, 3, 4, 5]  # the zero row's gradient is 1e12 times as large
    assert relative_error(ours[1][kept], truth[1][kept]) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_opcheck(dtype: torch.dtype) -> None:
    labels = torch.tensor([2, 0, 2, 1, 0])
    for z in (torch.randn(5, 3, dtype=dtype), torch.randn(3, 5, dtype=dtype).t()):
        torch.library.opcheck(label_similarity.overload, (z.requires_grad_(), labels, True))
