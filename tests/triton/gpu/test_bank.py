"""The memory bank's update on a GPU, or as ttsem executes it: bfloat16, bounds, races."""

import bank_cases
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size, batch, d", [(20, 33, 100), (9, 2, 4100)], ids=lambda n: str(n))
def test_matches_float64_formula(size, batch, d, dtype):
    bank_cases.check_update(size, d, batch, dtype, torch.float32, "cuda")
    bank_cases.check_update(size, d, batch, torch.float32, dtype, "cuda", momentum=0.9)


def test_last_duplicate_wins():
    bank_cases.check_last_duplicate_wins("cuda", 1100)


def test_row_of_zeros_stays_zero():
    bank_cases.check_row_of_zeros("cuda")
