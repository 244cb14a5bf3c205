"""Negatives of each query's own on a GPU, or as ttsem executes them: bfloat16, bounds, races."""

import own_negatives_cases as cases
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("n, k, d", [(5, 33, 100), (2, 5, 2500)])
def test_matches_float64_formula(n, k, d, normalize, dtype):
    cases.check(n, k, d, normalize=normalize, dtype=dtype, device="cuda")


def test_nothing_left_and_rows_of_zeros():
    cases.check_nothing_left("cuda")
    cases.check(4, 9, 40, 1e4, zeros=True, device="cuda")


def test_the_same_bits_every_time():
    first, second = (cases.check(2, 200, 64, device="cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
