"""bank_update_ against a loop over the batch."""

from __future__ import annotations

import pytest
import torch

import fastcl.functional as F

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(("m", "b", "d"), [(1, 3, 1), (20, 7, 100), (50, 129, 33)])
def test_equals_a_loop_in_which_the_last_duplicate_wins(
    m: int, b: int, d: int, momentum: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(m, d)).to(dtype)
    index, features = torch.randint(m, (b,)), torch.randn(b, d)
    expected = bank.double()
    for i, x in zip(index, features.double()):
        row = momentum * bank[i].double() + (1 - momentum) * x
        expected[i] = row / row.norm()
    F.bank_update_(bank, index, features, momentum=momentum)
    eps = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(bank.double(), expected, rtol=0, atol=2 * eps)


def test_momentum_one_only_normalises() -> None:
    bank = torch.randn(5, 4)
    before = bank.clone()
    F.bank_update_(bank, torch.tensor([1, 3]), torch.randn(2, 4), momentum=1.0)
    torch.testing.assert_close(bank[[1, 3]], torch.nn.functional.normalize(before[[1, 3]]))
    assert torch.equal(bank[[0, 2, 4]], before[[0, 2, 4]])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(index=torch.tensor([0, 5])), IndexError, r"in \[0, 5\)"),
        (dict(index=torch.tensor([-1, 0])), IndexError, r"in \[0, 5\)"),
        (dict(index=torch.tensor([0.0, 1.0])), TypeError, "integers"),
        (dict(index=torch.tensor([0])), ValueError, r"\(2,\)"),
        (dict(features=torch.randn(2, 3)), ValueError, "feature size"),
        (dict(momentum=2.0), ValueError, "between 0 and 1"),
    ],
)
def test_a_refused_update_changes_nothing(change, error, message) -> None:  # type: ignore[no-untyped-def]
    bank = torch.randn(5, 4)
    before = bank.clone()
    arguments = dict(index=torch.tensor([0, 1]), features=torch.randn(2, 4), momentum=0.5) | change
    momentum = arguments.pop("momentum")
    with pytest.raises(error, match=message):
        F.bank_update_(bank, **arguments, momentum=momentum)
    assert torch.equal(bank, before)
