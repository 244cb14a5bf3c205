"""The pairwise sigmoid kernels as compiled, in every type: values, bounds, races, repeatability."""

import pair_sigmoid_cases as cases
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_formula(dtype):
    cases.check(50, 40, 10.0, -10.0, normalize=True, dtype=dtype, device="cuda")
    cases.check(35, 40, 10.0, -10.0, normalize=False, dtype=dtype, device="cuda")


@pytest.mark.parametrize("blocks", ["tiled", "shipped"])
def test_other_blocks_match_formula(blocks):
    cases.check(
        67, 72, 10.0, -5.0, normalize=True, dtype=torch.bfloat16, device="cuda", blocks=blocks
    )


def test_what_the_negatives_add_is_exact():
    cases.check_small_probabilities("cuda")


def test_the_same_bits_every_time():
    first = cases.check(35, 40, 10.0, -10.0, normalize=True, device="cuda")
    second = cases.check(35, 40, 10.0, -10.0, normalize=True, device="cuda")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
