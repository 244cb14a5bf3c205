"""lightly's losses without negatives, of fastcl.compat.lightly: SwAV, SimSiam and BYOL, DINO.

Source: https://github.com/lightly-ai/lightly, lightly/loss.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastcl.functional as F
from fastcl.compat._common import (
    ODD,
    as_scalar,
    as_their_dtype,
    check_distributed,
    everyone,
    fall_back,
    in_float,
    is_positive,
    matrices,
    pairs,
    their,
    world_size,
)

# ---- SwAV ----------------------------------------------------------------------------------------


@torch.no_grad()
def sinkhorn(
    out: Tensor, iterations: int = 3, epsilon: float = 0.05, gather_distributed: bool = False
) -> Tensor:
    """SwAV's balanced codes: lightly's sinkhorn. out (B, K) -> (B, K), in out's dtype.

    Without iterations: exp(out / ε), scaled to a mean row sum of 1.
    """
    place = "lightly.loss.swav_loss:sinkhorn"
    gathers = gather_distributed and world_size() > 1
    if (gathers and iterations < 1) or not matrices(out) or not is_positive(epsilon):
        codes: Tensor = their(place, ODD)(out, iterations, epsilon, gather_distributed)
        return codes
    if iterations < 1:
        total = (in_float(out) / float(epsilon)).flatten().softmax(0)
        return (total * len(out)).view_as(out).to(out.dtype)
    group = everyone() if gathers else None
    return F.sinkhorn(out, epsilon=float(epsilon), iterations=iterations, group=group).to(out.dtype)


SWAV = "lightly.loss.swav_loss:SwaVLoss"


class SwaVLoss(nn.Module):
    """SwAV's swapped prediction: lightly's SwaVLoss.

        q_i  = sinkhorn(cat(high_i, queue_i))[:N]                         i: high-resolution crops
        loss = mean over i and over v ≠ i of −mean_n Σ_k q_i log softmax(crop_v / τ)

    high_resolution_outputs, low_resolution_outputs: lists of scores against the prototypes (N, K);
    queue_outputs: None, or such a list (L, K) per high-resolution crop. No gradient to the codes.
    Returns (1,), not (), in the dtype of the first crop; NaN when there is a single crop.
    As the loss is linear in the codes, each crop's are summed first: one cross entropy per crop.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        sinkhorn_iterations: int = 3,
        sinkhorn_epsilon: float = 0.05,
        sinkhorn_gather_distributed: bool = False,
    ):
        super().__init__()
        check_distributed("sinkhorn_gather_distributed", sinkhorn_gather_distributed)
        self.temperature = temperature
        self.sinkhorn_iterations = sinkhorn_iterations
        self.sinkhorn_epsilon = sinkhorn_epsilon
        self.sinkhorn_gather_distributed = sinkhorn_gather_distributed

    def subloss(self, z: Tensor, q: Tensor) -> Tensor:
        """−mean_n Σ_k q log softmax(z / τ); z, q (N, K)."""
        fits = pairs(z, q) and is_positive(self.temperature)
        if not fits or (torch.is_grad_enabled() and q.requires_grad):
            loss: Tensor = fall_back(self, SWAV, ODD, "subloss")(z, q)
            return loss
        loss = F.soft_cross_entropy(z, q, temperature=as_scalar(self.temperature))
        return as_their_dtype(loss, z, q)

    def forward(
        self,
        high_resolution_outputs: list[Tensor],
        low_resolution_outputs: list[Tensor],
        queue_outputs: list[Tensor] | None = None,
    ) -> Tensor:
        high, low, queue = high_resolution_outputs, low_resolution_outputs, queue_outputs
        if not self._fusable(high, low, queue):
            loss: Tensor = fall_back(self, SWAV, ODD)(high, low, queue)
            return loss
        codes = [
            sinkhorn(
                scores if queue is None else torch.cat((scores, queue[i].to(scores.dtype))),
                iterations=self.sinkhorn_iterations,
                epsilon=self.sinkhorn_epsilon,
                gather_distributed=self.sinkhorn_gather_distributed,
            )[: len(scores)]
            for i, scores in enumerate(high)
        ]
        crops = [*high, *low]
        loss = high[0].new_zeros(1, dtype=in_float(high[0]).dtype)
        everyone = torch.stack([in_float(q) for q in codes]).sum(0)  # (N, K)
        for v, crop in enumerate(crops):
            if v < len(codes):
                if len(codes) == 1:
                    continue  # nobody predicts the only codes' own crop
                target = everyone - in_float(codes[v]) if len(codes) > 2 else codes[1 - v]
            else:
                target = everyone
            loss = loss + F.soft_cross_entropy(
                crop, target, temperature=as_scalar(self.temperature)
            )
        return (loss / (len(crops) - 1) / len(high)).to(high[0].dtype)

    def _fusable(self, high: list[Tensor], low: list[Tensor], queue: list[Tensor] | None) -> bool:
        if len(high) == 0 or not pairs(*high, *low):
            return False
        if queue is not None and (len(queue) < len(high) or not matrices(high[0], *queue)):
            return False
        return is_positive(self.temperature)


# ---- SimSiam, BYOL, DINO -------------------------------------------------------------------------


class NegativeCosineSimilarity(nn.Module):
    """−cosine_similarity(x0, x1, dim, eps).mean(): lightly's NegativeCosineSimilarity.

    x0, x1: any shape. Nothing is detached here; SimSiam and BYOL detach the target themselves.
    """

    def __init__(self, dim: int = 1, eps: float = 1e-8) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps

    def forward(self, x0: Tensor, x1: Tensor) -> Tensor:
        same = x0.shape == x1.shape and x0.ndim > self.dim >= -x0.ndim
        if not (same and self.eps > 0):
            return -nn.functional.cosine_similarity(x0, x1, self.dim, self.eps).mean()
        rows = [x.movedim(self.dim, -1).reshape(-1, x.shape[self.dim]) for x in (x0, x1)]
        if not pairs(*rows):
            return -nn.functional.cosine_similarity(x0, x1, self.dim, self.eps).mean()
        loss = F.negative_cosine(rows[0], rows[1], eps=self.eps)
        return as_their_dtype(loss, x0, x1, on_cpu="inputs")


class DINOLoss(nn.Module):
    """DINO's cross entropy between teacher and student views: lightly's DINOLoss.

        y_i  = softmax((teacher_i − center) / τ_T)
        loss = mean over i ≠ v of −mean_b Σ_k y_i log softmax(student_v / τ_S)

    teacher_out, student_out: lists of (B, K), the views that both saw first. τ_T is
    `teacher_temp` if given, else at `epoch` of the linear warm-up, else the constructor's.
    Returns (). Afterwards the buffer `center` (1, 1, K), saved, moves towards the teacher's mean
    over views, batch and processes.

    Quirk kept: the teacher is not detached. If it needs a gradient, lightly's own code runs.
    A single view in all raises ValueError.
    """

    center: Tensor

    def __init__(
        self,
        output_dim: int = 65536,
        warmup_teacher_temp: float = 0.04,
        teacher_temp: float = 0.04,
        warmup_teacher_temp_epochs: int = 30,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        center_mode: str = "mean",
    ) -> None:
        super().__init__()
        if center_mode != "mean":
            raise ValueError(f"Unknown mode '{center_mode}'. Valid modes are ['mean'].")
        self.teacher_temp = teacher_temp
        self.student_temp = student_temp
        self.register_buffer("center", torch.zeros(1, 1, output_dim))
        self.center_momentum = center_momentum
        self.warmup_teacher_temp_epochs = warmup_teacher_temp_epochs
        self.teacher_temp_schedule = torch.linspace(
            warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs
        )

    def forward(
        self,
        teacher_out: list[Tensor],
        student_out: list[Tensor],
        teacher_temp: float | None = None,
        epoch: int | None = None,
    ) -> Tensor:
        chosen = self.teacher_temp if teacher_temp is None else teacher_temp
        if teacher_temp is None and epoch is not None and epoch < self.warmup_teacher_temp_epochs:
            temperature = float(self.teacher_temp_schedule[epoch])
        else:
            temperature = float(torch.tensor(chosen))  # a float's float32, as in lightly
        why = self._cannot_fuse(teacher_out, student_out, temperature)
        if why:
            place = "lightly.loss.dino_loss:DINOLoss"
            loss: Tensor = fall_back(self, place, why)(
                teacher_out, student_out, teacher_temp=teacher_temp, epoch=epoch
            )
            return loss
        if len(teacher_out) == len(student_out) == 1:
            raise ValueError("DINOLoss requires at least two views in total, but got one.")
        teacher, student = torch.stack(tuple(teacher_out)), torch.stack(tuple(student_out))
        loss = F.self_distillation(
            student,
            teacher,
            center=self.center.flatten(),
            student_temperature=as_scalar(self.student_temp),
            teacher_temperature=temperature,
        )
        self.update_center(teacher)
        return as_their_dtype(loss, student, on_cpu="autocast")

    def _cannot_fuse(
        self, teacher_out: list[Tensor], student_out: list[Tensor], temperature: float
    ) -> str | None:
        views = [*teacher_out, *student_out]
        if not (teacher_out and student_out and pairs(*views)):
            return ODD
        if self.center.numel() != views[0].shape[1] or self.center.device != views[0].device:
            return ODD
        if views[0].shape[1] == 1:  # a loss of exactly 0 there, of some 1e-8 from a kernel
            return ODD
        if not (is_positive(self.student_temp) and temperature > 0):
            return ODD
        if torch.is_grad_enabled() and any(x.requires_grad for x in teacher_out):
            return "the teacher needs a gradient"
        return None

    @torch.no_grad()
    def update_center(self, teacher_out: Tensor) -> None:
        """Move the centre towards the mean of teacher_out (views, B, K)."""
        mean = self._center_fn(x=teacher_out, dim=(0, 1))
        momentum = self.center_momentum
        self.center.data = self.center * momentum + mean * (1 - momentum)

    @staticmethod
    @torch.no_grad()
    def _center_fn(x: Tensor, dim: tuple[int, ...]) -> Tensor:
        mean = x.mean(dim=dim, keepdim=True)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(mean)
            mean = mean / torch.distributed.get_world_size()
        return mean
