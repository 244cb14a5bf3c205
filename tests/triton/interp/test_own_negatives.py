"""Negatives of each query's own in Triton's interpreter, against float64."""

import own_negatives_cases as cases
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize(
    "n, k, d",
    [
        (2, 1, 3),
        (5, 33, 100),  # rows off a 128-bit boundary, the last block of K short
        (2, 200, 128),  # split over K
        (3, 5, 2500),  # a row a tile, of more than one tile's elements
    ],
)
def test_matches_float64_formula(n, k, d, normalize, dtype):
    cases.check(n, k, d, normalize=normalize, dtype=dtype)


@pytest.mark.parametrize("t", [-3.0, 0.0, 1e-3, 1e4])
def test_any_scale_and_rows_of_zeros(t):
    cases.check(4, 9, 40, t, zeros=True)


def test_nothing_left():
    cases.check_nothing_left("cpu")
