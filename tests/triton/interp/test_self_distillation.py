"""The self-distillation kernels in Triton's interpreter, against the float64 formula."""

import pytest
import self_distillation_cases as cases
import torch
from streaming import GRAD_SLACK, LOSS_SLACK, assert_near, gradients

from fastcl.kernels import self_distillation
from fastcl.reference import self_distillation as reference

# NumPy warns of lanes beyond the end, whose results are masked.
pytestmark = pytest.mark.filterwarnings("ignore:(divide|invalid|overflow):RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    "students, teachers, n, k",
    [
        (2, 2, 1, 1),
        (5, 2, 7, 129),  # rows off a 128-bit boundary
        (3, 3, 2, 2100),  # teacher views padded to 4, several blocks of prototypes
        (2, 4, 3, 64),  # more teachers than students
        (2, 33, 1, 300),
    ],
    ids=lambda size: str(size),
)
def test_matches_float64_formula(students, teachers, n, k, dtype):
    cases.check(*cases.views(students, teachers, n, k, dtype))


def test_more_blocks_than_the_finish_adds_at_a_time(monkeypatch):
    monkeypatch.setattr(self_distillation, "PARTS", 4)
    monkeypatch.setattr(self_distillation, "LARGEST_BLOCK", 128)
    cases.check(*cases.views(3, 2, 2, 1150))


def test_teacher_in_another_type():
    cases.check(*cases.views(3, 2, 4, 130, torch.float16, torch.float32))


@pytest.mark.parametrize("scale", [-3.0, 0.0])
def test_any_student_scale(scale):
    student, teacher, center = cases.views(3, 2, 2, 2500)
    t, teacher_t = torch.tensor(scale), torch.tensor(2.0)
    loss, *lse = self_distillation.forward(student, teacher, center, t, teacher_t)
    dx, dscale = self_distillation.backward(
        torch.ones(2), student, teacher, center, t, teacher_t, *lse
    )

    def formula(x, t):
        return reference.self_distillation(x, teacher.double(), center.double(), t, teacher_t)

    x64, t64 = student.double(), t.double()
    assert_near(loss, formula(x64, t64), LOSS_SLACK)
    truth = gradients(formula, torch.ones(2).double(), x64, t64)
    assert_near(dx, truth[0], GRAD_SLACK)
    assert_near(dscale, truth[1], GRAD_SLACK)


def test_one_teacher_view():
    cases.check_lone_view_without_pairs("cpu")


def test_confident_views_have_no_loss():
    cases.check_confident_views("cpu")


def test_large_offset_costs_no_accuracy():
    cases.check_large_offset("cpu")


def test_no_samples():
    student, teacher, center = cases.views(3, 2, 0, 40)
    t = torch.tensor(1.0)
    loss, *lse = self_distillation.forward(student, teacher, center, t, t)
    assert loss.shape == (0,)
    grad = self_distillation.backward(loss, student, teacher, center, t, t, *lse)
    assert grad[0].shape == (3, 0, 40) and grad[1] == 0
