"""The scores of gathered bank rows on a GPU, or as ttsem executes them: bfloat16, bounds, races."""

import bank_cases
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "n, k, d, size", [(5, 33, 100, 50), (2, 5, 1100, 20)], ids=lambda size: str(size)
)
def test_matches_float64_formula(n, k, d, size, dtype):
    bank_cases.check_scores(n, k, d, size, dtype, torch.float32, "cuda")
    bank_cases.check_scores(n, k, d, size, torch.float32, dtype, "cuda")


def test_the_same_bits_every_time():
    first = bank_cases.check_scores(2, 200, 64, 9, device="cuda")
    second = bank_cases.check_scores(2, 200, 64, 9, device="cuda")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
