"""Checks of self_distillation, for interp/ and gpu/."""

import torch
from streaming import GRAD_SLACK, LOSS_SLACK, assert_near, gradients, randn

from fastcl.kernels import self_distillation
from fastcl.reference import self_distillation as reference


def views(students, teachers, n, k, dtype=torch.float32, teacher_dtype=None, offset=0.0):
    """student (S, N, K), teacher (T, N, K), center (K,)."""
    student = (2 * randn(students, n, k) + offset).to(dtype)
    teacher = (randn(teachers, n, k, seed=1) + offset).to(teacher_dtype or dtype)
    return student, teacher, 0.5 * randn(k, seed=2)


def check(student, teacher, center, *, student_scale=10.0, teacher_scale=25.0, device="cpu"):
    """Losses, log-sum-exps and gradients for a random cotangent, against float64 and autograd."""
    scales = torch.tensor(student_scale), torch.tensor(teacher_scale)
    inputs = student, teacher, center, *scales
    on_device = [a.to(device) for a in inputs]
    g = randn(student.shape[1], seed=9)
    loss, student_lse, teacher_lse = self_distillation.forward(*on_device)
    dx, dscale = self_distillation.backward(g.to(device), *on_device, student_lse, teacher_lse)
    assert (loss.dtype, dx.dtype, dscale.shape) == (torch.float32, student.dtype, ())

    s64, t64, c64, *scales64 = (a.double() for a in inputs)
    s32, t32, c32, *_ = (a.float() for a in inputs)
    truth = reference.self_distillation(s64, t64, c64, *scales64)
    assert_near(loss, truth, LOSS_SLACK, reference.self_distillation(s32, t32, c32, *scales))
    assert_near(student_lse, (scales64[0] * s64).logsumexp(2), LOSS_SLACK)
    assert_near(
        teacher_lse,
        (scales64[1] * (t64 - c64)).logsumexp(2),
        LOSS_SLACK,
        (scales[1] * (t32 - c32)).logsumexp(2),
    )

    def formula(x, scale):
        teacher, center = (t64, c64) if x.dtype == torch.float64 else (t32, c32)
        return reference.self_distillation(x, teacher, center, scale, scales[1].to(x.dtype))

    truth = gradients(formula, g.double(), s64, scales64[0])
    plain = gradients(formula, g, s32, scales[0])
    assert_near(dx, truth[0], GRAD_SLACK, plain[0])
    # Terms of both signs: relative to the sizes of what is added up.
    size = (truth[0] * s64).abs().sum() / abs(student_scale)
    assert abs(dscale.item() - truth[1].item()) <= GRAD_SLACK * size
    return loss, dx, dscale


def check_lone_view_without_pairs(device):
    """One teacher view: the student's own view 0 has no partner, no loss and no gradient."""
    _, dx, _ = check(*views(3, 1, 4, 130), device=device)
    assert not dx[0].any() and dx[1:].any()


def check_confident_views(device):
    """A view that agrees with the other's sure target costs nothing."""
    x = torch.full((2, 3, 200), -50.0)
    x[:, :, 7] = 50.0
    x, center, t = x.to(device), torch.zeros(200, device=device), torch.tensor(10.0, device=device)
    loss, *lse = self_distillation.forward(x, x, center, t, t)
    assert torch.equal(loss.cpu(), torch.zeros(3))
    grad_student, _ = self_distillation.backward(torch.ones_like(loss), x, x, center, t, t, *lse)
    assert not grad_student.any()


def check_large_offset(device):
    """Logits near 1,000: what is added up are their differences, and the loss stays exact."""
    student, teacher, center = views(4, 2, 3, 3000, offset=1000.0)
    center += 1000  # a mean of teacher logits
    inputs = student, teacher, center, torch.tensor(10.0), torch.tensor(25.0)
    loss, *_ = self_distillation.forward(*(a.to(device) for a in inputs))
    assert_near(loss, reference.self_distillation(*(a.double() for a in inputs)), 1e-6)
