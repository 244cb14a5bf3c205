"""The instance loss's kernels as compiled, in every type: values, bounds, races, repeatability."""

import instance_spread_cases as cases
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matches_formula(dtype):
    cases.check(19, 40, 5.0, 1.0, normalize=True, dtype=dtype, device="cuda")


def test_d_in_several_blocks():
    cases.check(
        10, 72, 5.0, 1.0, normalize=True, dtype=torch.bfloat16, device="cuda", blocks="tiled"
    )


def test_is_invaspread_when_saturated():
    cases.check_golden("saturated_n6_d32_t005", "cuda")


def test_the_same_bits_every_time():
    first = cases.check(10, 16, 5.0, 1.0, normalize=True, device="cuda")
    second = cases.check(10, 16, 5.0, 1.0, normalize=True, device="cuda")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
