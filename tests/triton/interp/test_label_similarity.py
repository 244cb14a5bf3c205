"""SupCon's positives in Triton's interpreter, against float64."""

import label_similarity_cases as cases
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize(
    "n, d, classes",
    [
        (1, 3, 1),  # no other row
        (64, 100, 100),  # rows off a 128-bit boundary, mostly without others
        (150, 32, 3),  # a label's last tile of rows short
        (200, 128, 1),  # four chunks, the last short
        (5, 2500, 2),  # a row a tile
    ],
)
def test_matches_float64_formula(n, d, classes, normalize, dtype):
    cases.check(n, d, classes, normalize=normalize, dtype=dtype)


def test_short_rows():
    cases.check(9, 40, 2, short=True)


def test_nothing_left():
    cases.check_nothing_left("cpu")
