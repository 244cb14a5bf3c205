"""The losses inside the official code of MoCo, SimCLR, SwAV, DINO, InstDisc and CMC.

That code is scripts, not packages, so these are functions to call where it computes its logits:

    moco            loss = moco_loss(q, k, self.queue.clone().detach(), self.T)
                    moco_dequeue_and_enqueue_(self.queue, self.queue_ptr, k)
                    moco_momentum_update_(self.encoder_q, self.encoder_k, self.m)
    moco-v3         loss = moco_v3_loss(q1, k2, T) + moco_v3_loss(q2, k1, T)
    simclr          loss = simclr_loss(hidden, hidden_norm, temperature)
    swav            loss = swav_loss(output, bs, crops_for_assign, nmb_crops, temperature)
    dino            DINOLoss
    instdisc        loss, Z = instdisc_loss(x, memory, idx, Z); instdisc_update_(memory, y, x)
    cmc             loss_l, loss_ab, Z_l, Z_ab = cmc_loss(l, ab, memory_l, memory_ab, idx, …)

Shapes, scales and orders are the official ones; each docstring says which. The clone of MoCo's
queue is no longer needed: nothing reads the queue after the loss is computed. Where the official
code goes across processes, `group` says which: torch.distributed.group.WORLD for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

import fastcl.functional as F
from fastcl.compat._common import against, as_scalar, as_their_dtype, in_float, paired_dot, row_lse
from fastcl.distributed import Group

__all__ = [
    "DINOLoss",
    "cmc_loss",
    "instdisc_loss",
    "instdisc_update_",
    "moco_dequeue_and_enqueue_",
    "moco_loss",
    "moco_momentum_update_",
    "moco_v3_loss",
    "nce_partition",
    "simclr_loss",
    "swav_distributed_sinkhorn",
    "swav_loss",
]

# ---- MoCo ----------------------------------------------------------------------------------------


def moco_loss(q: Tensor, k: Tensor, queue: Tensor, T: float | Tensor = 0.07) -> Tensor:
    """CrossEntropyLoss of what MoCo.forward returns, without its logits.

        logits = cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / T;  cross_entropy(logits, 0)

    q, k (N, D), normalised already, as MoCo.forward does; queue (D, K), the official buffer.
    Fastest when queue.T is contiguous: register_buffer("queue", rows.T), the same in a state dict.
    Source: He et al. 2020, arXiv:1911.05722; facebookresearch/moco, moco/builder.py.
    """
    t = 1.0 / as_scalar(T)
    others = row_lse(q, queue.detach().T, scale=t)
    return as_their_dtype(against(others, t * paired_dot(q, k)).mean(), q, k)


@torch.no_grad()
def moco_dequeue_and_enqueue_(queue: Tensor, queue_ptr: Tensor, keys: Tensor) -> None:
    """queue[:, ptr : ptr + N] = keys.T, and the pointer moves: MoCo._dequeue_and_enqueue.

    queue (D, K); queue_ptr int64 (1,); keys (N, D), of all processes, gathered already.
    Differs from it: K need not be a multiple of N, the ring wraps; and the pointer is not read by
    the host.
    """
    if queue.T.is_contiguous():
        F.queue_push_(queue.T, queue_ptr, keys)
        return
    size = queue.shape[1]
    column = (queue_ptr + torch.arange(len(keys), device=queue.device)) % size
    queue[:, column[-size:]] = keys[-size:].T.to(queue.dtype)
    queue_ptr.copy_((queue_ptr + len(keys)) % size)


def moco_momentum_update_(encoder_q: nn.Module, encoder_k: nn.Module, m: float = 0.999) -> None:
    """encoder_k ← m · encoder_k + (1 − m) · encoder_q, parameters only."""
    F.ema_update_(encoder_k, encoder_q, momentum=m)


def moco_v3_loss(q: Tensor, k: Tensor, T: float = 1.0, *, group: Group | None = None) -> Tensor:
    """MoCo v3's contrastive_loss: in-batch InfoNCE of normalised rows, times 2 T.

    q, k (N, D); no gradient to k, which comes from the momentum encoder. One direction; with a
    group, against the keys of all its processes.
    Source: Chen et al. 2021, arXiv:2104.02057; facebookresearch/moco-v3, moco/builder.py.
    """
    loss = F.info_nce(q, k.detach(), temperature=T, group=group)
    return as_their_dtype(loss * (2 * T), q, k)


# ---- SimCLR --------------------------------------------------------------------------------------


def simclr_loss(
    hidden: Tensor,
    hidden_norm: bool = True,
    temperature: float = 1.0,
    *,
    group: Group | None = None,
) -> Tensor:
    """SimCLR's add_contrastive_loss: NT-Xent, the sum of both views' means.

    hidden (2 N, D): first views, then second. Twice the paper's mean over 2 N rows.
    hidden_norm: rows · rsqrt(max(Σ h², 1e-12)). Returns the loss only. With a group, what
    `strategy` does there: the candidates are all its processes'.
    Source: Chen et al. 2020, arXiv:2002.05709; google-research/simclr, objective.py.
    """
    z = in_float(hidden)
    if hidden_norm:
        z = z * z.square().sum(1, keepdim=True).clamp_min(1e-12).rsqrt()
    z0, z1 = z.chunk(2)
    loss = F.nt_xent(z0, z1, temperature=temperature, normalize=False, group=group)
    return as_their_dtype(2 * loss, hidden)


# ---- SwAV ----------------------------------------------------------------------------------------


@torch.no_grad()
def swav_distributed_sinkhorn(
    out: Tensor,
    epsilon: float = 0.05,
    sinkhorn_iterations: int = 3,
    *,
    group: Group | None = None,
) -> Tensor:
    """SwAV's distributed_sinkhorn: scores (B, K) -> codes (B, K), rows sum to 1.

    With a group, balanced over the rows of all its processes; else over this one's.
    Safe for any scores, where the official exp(out / epsilon) overflows.
    """
    codes = F.sinkhorn(out, epsilon=epsilon, iterations=sinkhorn_iterations, group=group)
    return codes.to(out.dtype)


def swav_loss(
    output: Tensor,
    bs: int,
    crops_for_assign: Sequence[int] = (0, 1),
    nmb_crops: Sequence[int] = (2,),
    temperature: float = 0.1,
    epsilon: float = 0.05,
    sinkhorn_iterations: int = 3,
    queue_scores: Sequence[Tensor] | None = None,
    *,
    group: Group | None = None,
) -> Tensor:
    """The loss of SwAV's training loop.

    output (crops · bs, K): the scores of all crops, crop by crop; queue_scores: of the queue's
    features, (L, K) per crop of crops_for_assign, placed before the batch. Mean over the crops that
    assign and over the crops that predict them. No gradient to the codes. Returns (). With a group
    the codes are balanced over all its processes' rows.
    Source: Caron et al. 2020, arXiv:2006.09882; facebookresearch/swav, main_swav.py.
    """
    crops = output.split(bs)
    if len(crops) != sum(nmb_crops) or any(len(x) != bs for x in crops):
        raise ValueError(
            f"swav_loss: output must have {sum(nmb_crops)} crops of {bs} rows; "
            f"got {len(output)} rows."
        )
    loss = in_float(output).new_zeros(())
    targets: list[Tensor | None] = [None] * len(crops)
    for i, crop in enumerate(crops_for_assign):
        scores = crops[crop].detach()
        if queue_scores is not None:
            scores = torch.cat((queue_scores[i].detach().to(scores.dtype), scores))
        codes = F.sinkhorn(scores, epsilon=epsilon, iterations=sinkhorn_iterations, group=group)[
            -bs:
        ]
        for v in range(len(crops)):
            if v != crop:  # the loss is linear in the codes: one cross entropy per crop
                had = targets[v]
                targets[v] = codes if had is None else had + codes
    for scores, target in zip(crops, targets):
        if target is not None:
            loss = loss + F.soft_cross_entropy(scores, target, temperature=temperature)
    loss = loss / ((len(crops) - 1) * len(crops_for_assign))
    return as_their_dtype(loss, output)


# ---- DINO ----------------------------------------------------------------------------------------


class DINOLoss(nn.Module):
    """main_dino.py's DINOLoss: same constructor, forward and buffer `center` (1, out_dim).

    student_output (ncrops · B, K) and teacher_output (2 · B, K): crop by crop. The teacher is
    detached. The centre moves after the loss, by all processes' mean.
    Differs from it: runs without a process group too.
    Source: Caron et al. 2021, arXiv:2104.14294; facebookresearch/dino, main_dino.py.
    """

    center: Tensor

    def __init__(
        self,
        out_dim: int,
        ncrops: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        nepochs: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
    ):
        super().__init__()
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.ncrops = ncrops
        self.register_buffer("center", torch.zeros(1, out_dim))
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        constant = np.ones(nepochs - warmup_teacher_temp_epochs) * teacher_temp
        self.teacher_temp_schedule = np.concatenate((warmup, constant))

    def forward(self, student_output: Tensor, teacher_output: Tensor, epoch: int) -> Tensor:
        crops = (self.ncrops, -1, student_output.shape[1])
        loss = F.self_distillation(
            student_output.reshape(crops),
            teacher_output.detach().reshape(2, *crops[1:]),
            center=self.center[0],
            student_temperature=self.student_temp,
            teacher_temperature=float(self.teacher_temp_schedule[epoch]),
        )
        self.update_center(teacher_output)
        return as_their_dtype(loss, student_output)

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        total, rows = teacher_output.sum(0, keepdim=True), len(teacher_output)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
            rows *= torch.distributed.get_world_size()
        momentum = self.center_momentum
        self.center = self.center * momentum + total / rows * (1 - momentum)


# ---- InstDisc and CMC ----------------------------------------------------------------------------


def nce_partition(scores: Tensor, data_size: int) -> float:
    """Z of the first batch, which stays: the mean of exp(scores) times the number of images."""
    return float(in_float(scores.detach()).exp().mean() * data_size)


def instdisc_loss(
    x: Tensor, memory: Tensor, idx: Tensor, Z: float | None = None, T: float = 0.07
) -> tuple[Tensor, float]:
    """NCECriterion of NCEAverage's scores, and Z: lemniscate.pytorch's loss.

        P = exp(<x, memory[idx]> / T) / Z;  c = K / images
        −1/N Σ [log P_0 / (P_0 + c + ε) + Σ_k log c / (P_k + c + ε)]

    x (N, D) normalised; memory (images, D), without a gradient; idx (N, 1 + K), the image's own
    index first. Z None: estimated from this batch, to be passed from then on.
    The memory is not touched: after backward(), instdisc_update_ does what the official one does.
    Source: Wu et al. 2018, arXiv:1805.01978; zhirongw/lemniscate.pytorch, lib/NCEAverage.py.
    """
    scores = F.bank_scores(x, memory, idx, scale=1.0 / T)
    if Z is None or Z < 0:  # NCEAverage's way to say: not known yet
        Z = nce_partition(scores, len(memory))
    return F.nce(scores, data_size=len(memory), partition=Z), Z


def instdisc_update_(memory: Tensor, y: Tensor, x: Tensor, momentum: float = 0.5) -> None:
    """memory[y] = normalize(momentum · memory[y] + (1 − momentum) · x). y (N,), x (N, D)."""
    F.bank_update_(memory, y, x, momentum=momentum)


def cmc_loss(
    l: Tensor,
    ab: Tensor,
    memory_l: Tensor,
    memory_ab: Tensor,
    idx: Tensor,
    Z_l: float | None = None,
    Z_ab: float | None = None,
    T: float = 0.07,
) -> tuple[Tensor, Tensor, float, float]:
    """The two losses of CMC's NCEAverage and NCECriterion, and their Z.

    l, ab (N, D) normalised: each is scored against the other view's memory, (images, D), at the
    same idx (N, 1 + K).
    Differs from it: the official forward moves both memories, of which it has gathered a copy. Here
    nothing is copied: after backward(), call instdisc_update_(memory_l, y, l), and of ab.
    Source: Tian et al. 2019, arXiv:1906.05849; HobbitLong/CMC, NCE/NCEAverage.py.
    """
    loss_l, Z_l = instdisc_loss(l, memory_ab, idx, Z_l, T)
    loss_ab, Z_ab = instdisc_loss(ab, memory_l, idx, Z_ab, T)
    return loss_l, loss_ab, Z_l, Z_ab
