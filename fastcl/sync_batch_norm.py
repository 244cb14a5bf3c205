"""Batch norm with the statistics of the whole batch, whichever process its rows are on.

    x (N, C, …) on each rank;  n, μ, M the number, mean and sum of squared differences of a rank's
    n_all = Σ n,  μ_all = Σ n μ / n_all,  σ² = Σ (M + n (μ − μ_all)²) / n_all
    x̂  = (x − μ_all) / √(σ² + ε),   y = γ x̂ + β
    dx = γ / √(σ² + ε) · (dy − (Σ dy + x̂ Σ dy x̂) / n_all)          sums over all ranks
    dγ = Σ dy x̂,  dβ = Σ dy                     over this rank: gradients are averaged elsewhere

2 C + 1 numbers travel from each rank forward, 2 C backward. Ranks may have different numbers of
rows. torch has this for CUDA; what follows is for the devices that it refuses, as the CPU.

Source: Ioffe and Szegedy 2015, arXiv:1502.03167; the merging of variances: Chan et al. 1983.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from fastcl.distributed import Group, Share, gather, members_of
from fastcl.nn import SplitBatchNorm


class SyncBatchNorm(_BatchNorm):
    """torch.nn.SyncBatchNorm on any device."""

    group: Group

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"SyncBatchNorm: the input must be (N, C, …); got {input.ndim}-d.")

    def forward(self, input: Tensor) -> Tensor:
        """input (N, C, …) -> the same shape."""
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        y: Tensor
        y, mean, variance, count = _Normalize.apply(
            input, self.weight, self.bias, self.eps, self.group
        )
        if self.track_running_stats:
            self._follow(mean, variance * (count / (count - 1).clamp_min(1)))
        return y

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """The running statistics, as torch keeps them: an unbiased variance."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        pace = self.momentum
        if pace is None:  # the mean of all batches
            pace = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), pace)
        self.running_var.lerp_(variance.to(self.running_var.dtype), pace)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: Group
    ) -> tuple[Tensor, ...]:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        rest = [d for d in range(x.ndim) if d != 1]
        own_variance, own_mean = torch.var_mean(values, rest, correction=0)  # (C,) each
        own_count = own_mean.new_full((1,), x.numel() // max(x.shape[1], 1))

        own = torch.cat((own_count, own_mean, own_count * own_variance))
        ranks = gather(own[None], one_row_each(group))  # (W, 1 + 2 C)
        counts, means, squares = ranks.split((1, x.shape[1], x.shape[1]), 1)
        count = counts.sum(0)  # (1,)
        mean = (counts * means).sum(0) / count
        variance = (squares + counts * (means - mean).square()).sum(0) / count
        scale = torch.rsqrt(variance + eps)

        y = (values - along(mean, x)) * along(scale, x)
        if weight is not None and bias is not None:
            y = y * along(weight, x) + along(bias, x)
        ctx.group = group
        ctx.save_for_backward(x, weight, mean, scale, count)
        ctx.mark_non_differentiable(mean, variance, count)
        return y.to(x.dtype), mean, variance, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        rest = [d for d in range(x.ndim) if d != 1]
        dy = grad.to(mean.dtype)
        x_hat = (x.to(mean.dtype) - along(mean, x)) * along(scale, x)
        dbias, dweight = dy.sum(rest), (dy * x_hat).sum(rest)
        sums = torch.cat((dbias, dweight))
        dist.all_reduce(sums, group=members_of(ctx.group))
        of_mean, of_scale = (sums / count).chunk(2)
        gain = scale if weight is None else scale * weight
        dx = along(gain, x) * (dy - along(of_mean, x) - x_hat * along(of_scale, x))
        if weight is None:
            return dx.to(x.dtype), None, None, None, None
        return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype), None, None


def one_row_each(group: Group) -> Share:
    members = members_of(group)
    return Share((1,) * dist.get_world_size(members), dist.get_rank(members), group)


def along(value: Tensor, x: Tensor) -> Tensor:
    """value (C,) as it meets the channels of x (N, C, …)."""
    return value.view(1, -1, *(1 for _ in x.shape[2:]))


def share_batch_norm_(module: nn.Module, group: Group) -> None:
    """Make every batch norm of module see the whole batch, and every split one its own groups.

    Changed in place, once module is on its device: parameters and buffers stay the same objects,
    under the same names.
    """
    on_cuda = any(parameter.is_cuda for parameter in module.parameters())
    for part in module.modules():
        if isinstance(part, SplitBatchNorm):
            part.share_out(group)
        elif isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            if on_cuda:
                part.__class__ = nn.SyncBatchNorm  # type: ignore[assignment]
                part.__dict__["process_group"] = members_of(group)
            else:
                part.__class__ = SyncBatchNorm  # type: ignore[assignment]
                part.__dict__["group"] = group
