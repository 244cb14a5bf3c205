"""The self-distillation kernels on a GPU, or as ttsem executes them: bfloat16, bounds, races."""

import pytest
import self_distillation_cases as cases
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "students, teachers, n, k", [(5, 2, 3, 129), (2, 3, 2, 2100)], ids=lambda size: str(size)
)
def test_matches_float64_formula(students, teachers, n, k, dtype):
    cases.check(*cases.views(students, teachers, n, k, dtype), device="cuda")


def test_one_teacher_view():
    cases.check_lone_view_without_pairs("cuda")


def test_confident_views_have_no_loss():
    cases.check_confident_views("cuda")


def test_the_same_bits_every_time():
    first = cases.check(*cases.views(3, 2, 2, 2100), device="cuda")
    second = cases.check(*cases.views(3, 2, 2, 2100), device="cuda")
    assert all(torch.equal(a, b) for a, b in zip(first, second))
