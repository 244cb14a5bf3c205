"""lightly's losses (1.5 and 1.6) on fastcl's kernels.

    from fastcl.compat.lightly import NTXentLoss        or fastcl.compat.patch("lightly")

Same constructors, buffers, state dicts, shapes and dtypes of results. lightly need not be
installed, except for what is left to its own code: inputs that no kernel takes, and arguments that
are errors there, so that they are the same errors.

With `gather_distributed=True` and several processes, the rows of all are candidates, gradients
come back to the process that a row is from, and the loss is the mean over this process's rows, as
in lightly. No process has more than its own rows' share of the passes.

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
    ODD,
    against,
    as_scalar,
    as_their_dtype,
    check_distributed,
    everyone,
    fall_back,
    is_positive,
    is_scalar,
    paired_dot,
    pairs,
    row_lse,
    unit,
    world_size,
)
from fastcl.compat._lightly_bank import MemoryBankModule
from fastcl.compat._lightly_clustering import (
    DINOLoss,
    NegativeCosineSimilarity,
    SwaVLoss,
    sinkhorn,
)

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

NEGATIVE = "gather_distributed with a temperature that is not above 0"


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
        check_distributed("gather_distributed", gather_distributed)

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
        elif self._gathers():
            loss = F.nt_xent(
                out0,
                out1,
                temperature=as_scalar(self.temperature),
                reduction="none",
                group=everyone(),
            ).mean()
        else:
            image = torch.arange(len(out0), device=out0.device).repeat(2)
            z = torch.cat((out0, out1))
            others = F.self_similarity_lse(z, scale=t, normalize=True, ids=image)  # (2N,)
            positive = -t * F.negative_cosine(out0, out1, eps=1e-12, reduction="none")
            loss = against(others, positive.repeat(2)).mean()
        return as_their_dtype(loss, out0, out1)

    def _gathers(self) -> bool:
        return self.gather_distributed and world_size() > 1

    def _cannot_fuse(self, out0: Tensor, out1: Tensor) -> str | None:
        if not pairs(out0, out1) or not is_scalar(self.temperature):
            return ODD
        bank = self.memory_bank
        if bank.size[0] > 0:
            bank._prepare(out1)
            return None if bank.bank.ndim == 2 and bank.bank.shape[1] == out1.shape[1] else ODD
        return NEGATIVE if self._gathers() and not is_positive(self.temperature) else None


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
        check_distributed("gather_distributed", gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        gathers = self.gather_distributed and world_size() > 1
        fits = pairs(out0, out1) and is_scalar(self.temperature)
        if not fits or (gathers and not is_positive(self.temperature)):
            loss: Tensor = fall_back(self, DCL, NEGATIVE if fits else ODD)(out0, out1)
            return loss
        t = 1.0 / as_scalar(self.temperature)
        positive = -t * F.negative_cosine(out0, out1, eps=1e-12, reduction="none").repeat(2)
        if gathers:
            losses = F.dcl(
                out0,
                out1,
                temperature=as_scalar(self.temperature),
                reduction="none",
                group=everyone(),
            )  # (2N,)
        else:
            image = torch.arange(len(out0), device=out0.device).repeat(2)
            z = torch.cat((out0, out1))
            losses = F.self_similarity_lse(z, scale=t, normalize=True, ids=image) - positive
        if self.weight_fn:
            unit0, unit1 = unit(out0), unit(out1)
            weights = (self.weight_fn(unit0, unit1), self.weight_fn(unit1, unit0))
            losses = losses + (1 - torch.cat(weights)) * positive
        return as_their_dtype(losses.mean(), out0, out1, on_cpu="autocast")

    def _loss(self, *args: Tensor) -> Tensor:
        """What lightly's own forward calls."""
        loss: Tensor = fall_back(self, DCL, ODD, "_loss")(*args)
        return loss


class DCLWLoss(DCLLoss):
    """DCLLoss weighted by negative_mises_fisher_weights(sigma): lightly's DCLWLoss."""

    def __init__(
        self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False
    ):
        weight_fn = partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weight_fn, gather_distributed)


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
