"""Losses without negatives: codes, soft targets, self-distillation, the negative cosine."""

from __future__ import annotations

from torch import Tensor

from fastcl import _check as check
from fastcl import ops
from fastcl._functional._shared import inverse, promoted, reduce
from fastcl.distributed import Group, gather, needs_grad, share
from fastcl.reference._common import in_float


def soft_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    group: Group | None = None,
) -> Tensor:
    """Cross entropy against soft targets.

        -(targets * (logits / τ).log_softmax(1)).sum(1)

    logits (N, K); targets (N, K): probabilities, without a gradient. Returns nats, (N,) for "none".
    Source: Hinton et al. 2015, arXiv:1503.02531; Caron et al. 2020, arXiv:2006.09882, equation 2.
    Raises ValueError or TypeError on shapes, dtypes, devices, temperature ≤ 0, targets that require
    a gradient, reduction.

        >>> logits, targets = torch.randn(8, 5), torch.randn(8, 5).softmax(1)
        >>> expected = torch.nn.functional.cross_entropy(logits / 0.1, targets)
        >>> torch.allclose(F.soft_cross_entropy(logits, targets, temperature=0.1), expected)
        True
    """
    check.matrices("soft_cross_entropy", logits=logits, targets=targets)
    check.not_empty("soft_cross_entropy", logits=logits)
    check.one_of("soft_cross_entropy", "reduction", reduction, check.REDUCTIONS)
    if logits.shape != targets.shape:
        raise ValueError(
            f"soft_cross_entropy: logits and targets must both be (N, K); "
            f"got {check.describe(logits)} and {check.describe(targets)}."
        )
    if needs_grad(targets):
        raise ValueError("soft_cross_entropy: targets get no gradient; pass targets.detach().")
    logits, targets = promoted(logits, targets)
    t = inverse("soft_cross_entropy", temperature, logits)
    alone = group is None
    loss: Tensor = ops.soft_cross_entropy(logits, targets, t, reduction if alone else "none")[0]
    return loss if alone else reduce(loss, reduction, share(len(loss), group, loss.device))


def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    group: Group | None = None,
) -> Tensor:
    """Balanced soft codes: each sample sums to 1, each prototype gets about its equal share.

    scores (N, K): similarities of samples and prototypes. Returns codes (N, K), probabilities in
    float32, without a gradient. Works in the logarithm: scores of any size are safe. With a
    group the shares are those of all ranks' samples.
    Source: Caron et al. 2020, arXiv:2006.09882, section 3.1 and appendix.
    Raises ValueError or TypeError on shapes, dtypes, epsilon ≤ 0, iterations < 1.

        >>> codes = F.sinkhorn(torch.randn(12, 3), iterations=50, epsilon=0.5)
        >>> torch.allclose(codes.sum(1), torch.ones(12))
        True
        >>> torch.allclose(codes.sum(0), torch.full((3,), 12 / 3), atol=1e-3)  # equal shares
        True
    """
    check.matrices("sinkhorn", scores=scores)
    check.not_empty("sinkhorn", scores=scores)
    check.scalar("sinkhorn", "epsilon", epsilon, positive=True)
    if not isinstance(iterations, int):
        raise TypeError(f"sinkhorn: iterations must be int; got {type(iterations).__name__}.")
    if iterations < 1:
        raise ValueError(f"sinkhorn: iterations must be at least 1; got {iterations}.")
    if group is not None:
        return _sinkhorn_across(scores.detach(), epsilon, iterations, group)
    codes: Tensor = ops.sinkhorn(scores.detach(), float(epsilon), iterations)
    return codes


def _sinkhorn_across(scores: Tensor, epsilon: float, iterations: int, group: Group) -> Tensor:
    """The same over all ranks' rows: each iteration, one number per prototype and rank travels."""
    L = in_float(scores) / epsilon  # (N, K)
    at = share(1, group, scores.device)
    log_v = L.new_zeros(len(L))
    for _ in range(iterations):
        log_u = -gather((L + log_v[:, None]).logsumexp(0, keepdim=True), at).logsumexp(0)  # (K,)
        log_v = -(L + log_u).logsumexp(1)
    return (L + log_u).softmax(1)


def negative_cosine(
    prediction: Tensor,
    target: Tensor,
    *,
    eps: float = 1e-8,
    reduction: str = "mean",
    group: Group | None = None,
) -> Tensor:
    """Negative cosine similarity of paired rows, from −1 (aligned) to 1.

        -torch.nn.functional.cosine_similarity(prediction, target, dim=1, eps=eps)

    prediction, target (N, D). The target is not detached: SimSiam and BYOL pass target.detach().
    Source: Chen & He 2020, arXiv:2011.10566, equation 1; Grill et al. 2020, arXiv:2006.07733,
    equation 2, is 2 + 2 × this.
    Raises ValueError or TypeError on shapes, dtypes, devices, eps ≤ 0, reduction.

        >>> x = torch.randn(8, 4)
        >>> torch.allclose(F.negative_cosine(x, 3 * x), torch.tensor(-1.0))
        True
    """
    check.pairs("negative_cosine", prediction=prediction, target=target)
    check.scalar("negative_cosine", "eps", eps, positive=True)
    check.one_of("negative_cosine", "reduction", reduction, check.REDUCTIONS)
    prediction, target = promoted(prediction, target)
    loss: Tensor = ops.cosine(prediction, target, float(eps))
    return reduce(loss, reduction, share(len(loss), group, loss.device))


def self_distillation(
    student: Tensor,
    teacher: Tensor,
    *,
    center: Tensor,
    student_temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    group: Group | None = None,
) -> Tensor:
    """DINO's loss: every student view predicts the teacher's other views.

        y = ((teacher - center) / τ_T).softmax(-1)
        mean over i ≠ v of -(y[i] * (student[v] / τ_S).log_softmax(-1)).sum(-1).mean()

    student (S, N, K) and teacher (T, N, K): raw logits, view by view, the teacher's T views first
    among the student's S; center (K,). No gradient to teacher and center; the centre is not updated
    here. No tensor of pairs, and no targets, are stored. Returns nats, ().
    Source: Caron et al. 2021, arXiv:2104.14294, equation 3.
    Raises ValueError or TypeError on shapes, dtypes, devices, temperatures ≤ 0, a single view.

        >>> student, teacher = torch.randn(6, 8, 5, requires_grad=True), torch.randn(2, 8, 5)
        >>> F.self_distillation(student, teacher, center=teacher.mean((0, 1))).backward()
        >>> student.grad.shape  # of all six views
        torch.Size([6, 8, 5])
    """
    name = "self_distillation"
    for argument, x in (("student", student), ("teacher", teacher)):
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim != 3 or 0 in x.shape:
            raise ValueError(
                f"{name}: {argument} must be floating point (views, N, K), not empty; "
                f"got {check.describe(x)}."
            )
    if student.shape[1:] != teacher.shape[1:] or center.shape != student.shape[2:]:
        raise ValueError(
            f"{name}: student (S, N, K), teacher (T, N, K) and center (K,) must agree; got "
            f"{check.describe(student)}, {check.describe(teacher)} and {check.describe(center)}."
        )
    if not student.device == teacher.device == center.device:
        raise ValueError(f"{name}: student, teacher and center must be on one device.")
    if student.shape[0] == teacher.shape[0] == 1:
        raise ValueError(f"{name}: needs two different views; got one.")
    check.scalar(name, "student_temperature", student_temperature, positive=True)
    check.scalar(name, "teacher_temperature", teacher_temperature, positive=True)
    student, teacher = promoted(student, teacher.detach())
    t_student = inverse(name, student_temperature, student)
    t_teacher = inverse(name, teacher_temperature, student).detach()
    centre = center.detach().to(t_student.dtype)
    loss: Tensor = ops.self_distillation(student, teacher, centre, t_student, t_teacher)[0]
    return reduce(loss, "mean", share(len(loss), group, loss.device))
