"""The memory bank's update in Triton's interpreter, against float64."""

import bank_cases
import pytest
import torch

from fastcl.kernels import bank


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99, 1.0])
@pytest.mark.parametrize(
    "size, batch, d",
    [
        (1, 1, 1),
        (20, 33, 100),  # many duplicates, rows off a 128-bit boundary
        (300, 17, 128),
        (5, 3, 4100),  # rows longer than a block
    ],
    ids=lambda n: str(n),
)
def test_matches_float64_formula(size, batch, d, momentum):
    bank_cases.check_update(size, d, batch, momentum=momentum)


def test_bank_and_features_of_other_types():
    bank_cases.check_update(20, 129, 33, torch.float16, torch.float32)
    bank_cases.check_update(20, 129, 33, torch.float32, torch.float16)


def test_last_duplicate_wins(monkeypatch):
    monkeypatch.setattr(bank, "SCAN", 32)
    bank_cases.check_last_duplicate_wins("cpu", 75)


def test_row_of_zeros_stays_zero():
    bank_cases.check_row_of_zeros("cpu")


def test_empty_batch_changes_nothing():
    bank_cases.check_update(5, 16, 0)
