"""self_distillation against DINO's official loss and the float64 formula."""

from __future__ import annotations

import math

import pytest
import torch

import fastcl.functional as F
from fastcl.reference.self_distillation import self_distillation
from fastcl.testing import assert_as_accurate_as, relative_error, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("name", ["b2_k3000_c4", "b5_k300_c6_3steps"])
def test_is_dino(golden, name: str) -> None:
    """Consecutive steps: the centre of a step is the one before its update."""
    file = golden(f"dino_loss_{name}")
    crops, k = int(file["ncrops"]), file["student"].shape[-1]
    center = file.get("center_init", torch.zeros(1, k)).reshape(k).clone()
    momentum = float(file["center_momentum"])
    for step, temperature in enumerate(file["temps"]):
        student = file["student"][step].reshape(crops, -1, k).requires_grad_()
        teacher = file["teacher"][step].reshape(2, -1, k)
        loss = F.self_distillation(
            student,
            teacher,
            center=center,
            student_temperature=float(file["student_temp"]),
            teacher_temperature=float(temperature),
        )
        assert loss.item() == pytest.approx(file["loss_f64"][step].item(), rel=3e-7)
        (grad,) = torch.autograd.grad(loss, student)
        center = momentum * center + (1 - momentum) * teacher.reshape(-1, k).mean(0)
    torch.testing.assert_close(center, file["center"][-1].reshape(k), rtol=0, atol=1e-6)
    official = file.get("grad_student_last", file.get("grad_student")).reshape(grad.shape)
    assert relative_error(grad, official.double()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("s", "t", "n", "k"), [(2, 2, 3, 7), (10, 2, 4, 129), (2, 3, 1, 1), (3, 1, 5, 1000)]
)
def test_as_accurate_as_plain_pytorch(s: int, t: int, n: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(s, n, k).to(dtype), torch.randn(t, n, k).to(dtype)
    center, temperature = torch.randn(k), torch.tensor(0.1)

    def plain(student, temperature):  # type: ignore[no-untyped-def]
        c, y = center.to(student.dtype), teacher.to(student.dtype)
        scales = 1 / temperature, torch.tensor(1 / 0.04, dtype=temperature.dtype)
        return self_distillation(student, y, c, *scales).mean()

    ours = value_and_gradients(
        lambda x, tau: F.self_distillation(x, teacher, center=center, student_temperature=tau),
        (student, temperature),
    )
    naive = value_and_gradients(plain, (student, temperature))
    truth = value_and_gradients(plain, (student.double(), temperature.double()))
    slacks = (2e-6, 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps, 1e-5)
    for name, a, b, c, slack in zip(("loss", "dx", "dtau"), ours, naive, truth, slacks):
        if c.abs().max() > 1e-12:
            assert_as_accurate_as(a, b, c, slack=slack, name=name)
        else:  # one prototype: nothing to learn
            assert a.abs().max() < 2e-4  # of terms of size 1 / temperature²


def test_uniform_outputs_cost_the_log_of_the_prototypes() -> None:
    student, teacher = torch.zeros(4, 3, 50), torch.zeros(2, 3, 50)
    loss = F.self_distillation(student, teacher, center=torch.zeros(50))
    assert loss.item() == pytest.approx(math.log(50), rel=1e-6)


def test_logits_of_any_size_are_safe() -> None:
    student, teacher = 1000 * torch.randn(3, 2, 9), 1000 * torch.randn(2, 2, 9)
    student.requires_grad_()
    loss = F.self_distillation(student, teacher, center=torch.zeros(9))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_bad_arguments_say_what_must_hold() -> None:
    student, teacher, center = torch.randn(3, 2, 5), torch.randn(2, 2, 5), torch.zeros(5)
    with pytest.raises(ValueError, match="must agree"):
        F.self_distillation(student, teacher[:, :1], center=center)
    with pytest.raises(ValueError, match="must agree"):
        F.self_distillation(student, teacher, center=center[:4])
    with pytest.raises(ValueError, match=r"\(views, N, K\)"):
        F.self_distillation(student[0], teacher, center=center)
    with pytest.raises(ValueError, match="two different views"):
        F.self_distillation(student[:1], teacher[:1], center=center)
    with pytest.raises(ValueError, match="teacher_temperature must be above 0"):
        F.self_distillation(student, teacher, center=center, teacher_temperature=-1.0)
