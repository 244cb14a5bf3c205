"""lightly's losses (1.5 and 1.6) on fastcl's kernels.

    from fastcl.compat.lightly import NTXentLoss        or fastcl.compat.patch("lightly")

Same constructors, buffers, state dicts, shapes and dtypes of results. lightly need not be
installed, except for what is left to its own code: `gather_distributed=True` with more than one
process (but for the memory bank, which gathers here too), inputs that no kernel takes, and
arguments that are errors there, so that they are the same errors.

Differs from lightly: nothing overflows (its sinkhorn's exp(scores / epsilon) does), half-precision
inputs are accumulated in float32, and a float32 memory bank takes inputs of any dtype.
Source: https://github.com/lightly-ai/lightly, lightly/loss and lightly/models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import fastcl.functional as F
from fastcl.compat._common import (
    against,
    as_scalar,
    as_their_dtype,
    fall_back,
    in_float,
    is_positive,
    is_scalar,
    matrices,
    paired_dot,
    pairs,
    row_lse,
    their,
    unit,
    world_size,
)
from fastcl.compat._lightly_bank import MemoryBankModule

__all__ = [
    "DCLLoss",
    "DCLWLoss",
    "DINOLoss",
    "MemoryBankModule",
    "NTXentLoss",
    "NegativeCosineSimilarity",
    "SwaVLoss",
    "negative_mises_fisher_weights",
    "sinkhorn",
    "update_momentum",
]

ODD = "these inputs are not ones that a kernel takes"
GATHER = "gather_distributed with more than one process"


def _check_distributed(name: str, wanted: bool) -> None:
    if wanted and not torch.distributed.is_available():
        raise ValueError(f"{name} is True but torch.distributed is not available.")


# ---- SimCLR and MoCo -----------------------------------------------------------------------------


class NTXentLoss(nn.Module):
    """SimCLR's loss, or MoCo's with a memory bank: lightly's NTXentLoss.

        without a bank   z = cat(out0, out1);  mean over the 2N rows of
                         log Σ_{c≠r} exp(<z_r, z_c> / τ) − <z_r, z_partner> / τ
        with one         mean over the N rows of out0 of −log softmax(<out0_i, c> / τ)_out1_i,
                         c: out1_i and the bank's rows

    out0, out1 (N, D), normalised here. Returns ().

    Quirks kept: the mean over rows is half of what SimCLR's official code returns. With a bank only
    out0 searches; out1 keeps its gradient; the negatives are the bank before this batch, which is
    written only if out0 requires a gradient, and not saved in the state dict. A negative
    temperature is allowed; |temperature| < 1e-8 raises ValueError.
    The bank is not copied, as the gradient is complete before the batch is written.
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        self.cross_entropy = nn.CrossEntropyLoss(reduction="mean")
        self.eps = 1e-8
        if abs(self.temperature) < self.eps:
            raise ValueError(f"Illegal temperature: abs({self.temperature}) < 1e-8")
        _check_distributed("gather_distributed", gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        why = self._cannot_fuse(out0, out1)
        if why:
            theirs = fall_back(self, "lightly.loss.ntx_ent_loss:NTXentLoss", why)
            loss: Tensor = theirs(out0, out1)
            return loss
        t = 1.0 / as_scalar(self.temperature)
        if self.memory_bank.size[0] > 0:
            query, key = unit(out0), unit(out1)
            negatives = self.memory_bank.bank.to(out0.device)  # (K, D)
            others = row_lse(query.to(out0.dtype), negatives, scale=t)  # (N,)
            loss = against(others, t * paired_dot(query, key)).mean()
            if out0.requires_grad:
                self.memory_bank._dequeue_and_enqueue(key.to(out1.dtype))
        else:
            image = torch.arange(len(out0), device=out0.device).repeat(2)
            z = torch.cat((out0, out1))
            others = F.self_similarity_lse(z, scale=t, normalize=True, ids=image)  # (2N,)
            positive = -t * F.negative_cosine(out0, out1, eps=1e-12, reduction="none")
            loss = against(others, positive.repeat(2)).mean()
        return as_their_dtype(loss, out0, out1)

    def _cannot_fuse(self, out0: Tensor, out1: Tensor) -> str | None:
        if not pairs(out0, out1) or not is_scalar(self.temperature):
            return ODD
        bank = self.memory_bank
        if bank.size[0] > 0:
            bank._prepare(out1)
            return None if bank.bank.ndim == 2 and bank.bank.shape[1] == out1.shape[1] else ODD
        return GATHER if self.gather_distributed and world_size() > 1 else None


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """DCLW's weights: 2 − N softmax(<out0_i, out1_i> / σ), over the batch. (N,), no gradient."""
    similarity = torch.einsum("nm,nm->n", out0.detach(), out1.detach()) / sigma
    return 2 - out0.shape[0] * similarity.softmax(0)


DCL = "lightly.loss.dcl_loss:DCLLoss"


class DCLLoss(nn.Module):
    """The decoupled contrastive loss: lightly's DCLLoss.

        z = cat(out0, out1);  mean over the 2N rows of
        log Σ_{c: another image} exp(<z_r, z_c> / τ) − w_r <z_r, z_partner> / τ

    out0, out1 (N, D), normalised here; w = weight_fn(out0, out1) (N,) for the rows of out0, and
    weight_fn(out1, out0) for those of out1, of the normalised features; without a function 1.
    Returns (); −inf for a single image, which has no negatives, as in lightly.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ):
        super().__init__()
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed
        _check_distributed("gather_distributed", gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        gathers = self.gather_distributed and world_size() > 1
        if gathers or not pairs(out0, out1) or not is_scalar(self.temperature):
            loss: Tensor = fall_back(self, DCL, GATHER if gathers else ODD)(out0, out1)
            return loss
        t = 1.0 / as_scalar(self.temperature)
        image = torch.arange(len(out0), device=out0.device).repeat(2)
        z = torch.cat((out0, out1))
        others = F.self_similarity_lse(z, scale=t, normalize=True, ids=image)  # (2N,)
        positive = -t * F.negative_cosine(out0, out1, eps=1e-12, reduction="none").repeat(2)
        if self.weight_fn:
            unit0, unit1 = unit(out0), unit(out1)
            weights = (self.weight_fn(unit0, unit1), self.weight_fn(unit1, unit0))
            positive = positive * torch.cat(weights)
        return as_their_dtype((others - positive).mean(), out0, out1, on_cpu="autocast")

    def _loss(self, *args: Tensor) -> Tensor:
        """What lightly's own forward calls."""
        loss: Tensor = fall_back(self, DCL, GATHER, "_loss")(*args)
        return loss


class DCLWLoss(DCLLoss):
    """DCLLoss weighted by negative_mises_fisher_weights(sigma): lightly's DCLWLoss."""

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ):
        weight_fn = partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weight_fn, gather_distributed)


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
    if gathers or not matrices(out) or not is_positive(epsilon):
        codes: Tensor = their(place, GATHER if gathers else ODD)(
            out, iterations, epsilon, gather_distributed
        )
        return codes
    if iterations < 1:
        total = (in_float(out) / float(epsilon)).flatten().softmax(0)
        return (total * len(out)).view_as(out).to(out.dtype)
    return F.sinkhorn(out, epsilon=float(epsilon), iterations=iterations).to(out.dtype)


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
        _check_distributed("sinkhorn_gather_distributed", sinkhorn_gather_distributed)
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


# ---- momentum encoders ---------------------------------------------------------------------------


@torch.no_grad()
def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """model_ema ← m · model_ema + (1 − m) · model, parameters only: lightly's update_momentum.

    Buffers, such as a batch norm's statistics, are not touched, as in lightly.
    """
    source: list[Tensor] = list(model.parameters())
    target: list[Tensor] = list(model_ema.parameters())
    same = len(source) == len(target) > 0 and all(
        x.shape == y.shape
        and x.device == y.device == target[0].device
        and x.is_floating_point()
        and y.is_floating_point()
        for x, y in zip(source, target)
    )
    if same and 0.0 <= m <= 1.0:
        F.ema_update_(target, source, momentum=m)
    else:
        torch._foreach_mul_(target, m)
        torch._foreach_add_(target, source, alpha=1.0 - m)
