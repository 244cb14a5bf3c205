"""SupCon's positives on a GPU, or as ttsem executes them: bfloat16, bounds, races."""

import label_similarity_cases as cases
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("n, d, classes", [(150, 100, 2), (1, 3, 1), (5, 2500, 2)])
def test_matches_float64_formula(n, d, classes, normalize, dtype):
    cases.check(n, d, classes, normalize=normalize, dtype=dtype, device="cuda")


def test_nothing_left_and_short_rows():
    cases.check_nothing_left("cuda")
    cases.check(9, 40, 2, short=True, device="cuda")


def test_the_same_bits_every_time():
    first, second = (cases.check(150, 64, 2, device="cuda") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
