"""The losses as modules: hyper-parameters in the constructor, tensors in forward, no state.

Each is the function of fastcl.functional that its docstring names; see there for formula, shapes,
errors and source. A temperature that is an nn.Parameter is registered, and so trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastcl.functional as F
from fastcl.distributed import Group

__all__ = [
    "ClipLoss",
    "DCLLoss",
    "DINOLoss",
    "InfoNCELoss",
    "InstanceSpreadLoss",
    "NCELoss",
    "NTXentLoss",
    "NegativeCosineLoss",
    "SigLipLoss",
    "SupConLoss",
    "SwAVLoss",
]


class Loss(nn.Module):
    """Keeps the keyword arguments of a function of fastcl.functional as attributes."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        shown = {
            name: tuple(value.shape) if isinstance(value, Tensor) and value.ndim else value
            for name, value in self.options().items()
        }
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class InfoNCELoss(Loss):
    """`functional.info_nce`: find the positive among in-batch, shared or own negatives.

    >>> loss = InfoNCELoss(temperature=0.2)
    >>> loss(torch.randn(8, 4), torch.randn(8, 4), torch.randn(100, 4)).shape  # with a queue
    torch.Size([])
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.07,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature, normalize=normalize, reduction=reduction, group=group
        )

    def forward(self, query: Tensor, positive: Tensor, negatives: Tensor | None = None) -> Tensor:
        return F.info_nce(query, positive, negatives, **self.options())


class NTXentLoss(Loss):
    """`functional.nt_xent`: SimCLR's loss, the mean over the 2N views.

    >>> NTXentLoss(temperature=0.2)
    NTXentLoss(temperature=0.2, normalize=True, reduction='mean', group=None)
    >>> z0, z1 = torch.randn(2, 8, 4)
    >>> torch.equal(NTXentLoss(temperature=0.2)(z0, z1), F.nt_xent(z0, z1, temperature=0.2))
    True
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.5,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature, normalize=normalize, reduction=reduction, group=group
        )

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return F.nt_xent(z0, z1, **self.options())


class DCLLoss(Loss):
    """`functional.dcl`: NT-Xent without the positive in the denominator.

    >>> DCLLoss(reduction="none")(torch.randn(8, 4), torch.randn(8, 4)).shape  # both views
    torch.Size([16])
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature, normalize=normalize, reduction=reduction, group=group
        )

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return F.dcl(z0, z1, **self.options())


class ClipLoss(Loss):
    """`functional.clip`: both directions between images and texts, from one pass.

    >>> scale = torch.nn.Parameter(torch.tensor(14.3))  # registered, and so trained
    >>> loss = ClipLoss(logit_scale=scale)
    >>> loss(torch.randn(8, 4), torch.randn(8, 4)).backward()
    >>> [name for name, _ in loss.named_parameters()], scale.grad is None
    (['logit_scale'], False)
    """

    def __init__(
        self,
        *,
        logit_scale: float | Tensor,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group | None = None,
    ) -> None:
        super().__init__(
            logit_scale=logit_scale, normalize=normalize, reduction=reduction, group=group
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return F.clip(image, text, **self.options())


class SigLipLoss(Loss):
    """`functional.siglip`: every pair a binary question, summed and divided by N.

    >>> loss = SigLipLoss(logit_scale=10.0, logit_bias=-10.0)
    >>> loss(torch.randn(8, 4), torch.randn(8, 4)).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group | None = None,
    ) -> None:
        super().__init__(
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            normalize=normalize,
            reduction=reduction,
            group=group,
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return F.siglip(image, text, **self.options())


class SupConLoss(Loss):
    """`functional.sup_con`: rows of one label attract each other.

    >>> SupConLoss(temperature=0.1)(torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.07,
        base_temperature: float | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            base_temperature=base_temperature,
            normalize=normalize,
            reduction=reduction,
            group=group,
        )

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.sup_con(features, labels, **self.options())


class InstanceSpreadLoss(Loss):
    """`functional.instance_spread`: InvaSpread's loss over the 2N views.

    >>> InstanceSpreadLoss(reduction="none")(torch.randn(8, 4), torch.randn(8, 4)).shape
    torch.Size([16])
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        negative_weight: float = 1.0,
        detach_columns: bool = True,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature,
            negative_weight=negative_weight,
            detach_columns=detach_columns,
            normalize=normalize,
            reduction=reduction,
            group=group,
        )

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return F.instance_spread(z0, z1, **self.options())


class NCELoss(Loss):
    """`functional.nce`: noise-contrastive estimation on scores, the positive first.

    >>> loss = NCELoss(data_size=1000, partition=1000.0)
    >>> loss(torch.randn(8, 1 + 64)).shape
    torch.Size([])
    """

    def __init__(
        self,
        *,
        data_size: int,
        partition: float | Tensor,
        eps: float = 1e-7,
        reduction: str = "mean",
        group: Group | None = None,
    ) -> None:
        super().__init__(
            data_size=data_size, partition=partition, eps=eps, reduction=reduction, group=group
        )

    def forward(self, scores: Tensor) -> Tensor:
        return F.nce(scores, **self.options())


class DINOLoss(Loss):
    """`functional.self_distillation`: students predict the teacher's other views.

    `center` (K,) is held by reference: update it in place after each step.

        >>> loss = DINOLoss(center=torch.zeros(5))
        >>> loss(torch.randn(6, 8, 5), torch.randn(2, 8, 5)).shape  # the first two
        torch.Size([])
    """

    def __init__(
        self,
        *,
        center: Tensor,
        student_temperature: float | Tensor = 0.1,
        teacher_temperature: float | Tensor = 0.04,
        group: Group | None = None,
    ) -> None:
        super().__init__(
            center=center,
            student_temperature=student_temperature,
            teacher_temperature=teacher_temperature,
            group=group,
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.self_distillation(student, teacher, **self.options())


class NegativeCosineLoss(Loss):
    """`functional.negative_cosine`: BYOL's and SimSiam's similarity; the target is not detached.

    >>> p, z = torch.randn(8, 4), torch.randn(8, 4)
    >>> bool(NegativeCosineLoss()(p, z.detach()).abs() <= 1)
    True
    """

    def __init__(
        self, *, eps: float = 1e-8, reduction: str = "mean", group: Group | None = None
    ) -> None:
        super().__init__(eps=eps, reduction=reduction, group=group)

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.negative_cosine(prediction, target, **self.options())


class SwAVLoss(Loss):
    """Swapped prediction: the code of a large crop is predicted from every other crop.

        q_i = sinkhorn(cat(queue_i, s_i) / ε), the batch's rows
        loss = 1/A Σ_i 1/(V − 1) Σ_{v≠i} soft_cross_entropy(s_v, q_i, temperature)

    Source: Caron et al. 2020, arXiv:2006.09882, equation 2 and section 3.2.

        >>> scores = [torch.randn(8, 5, requires_grad=True) for _ in range(6)]  # six crops
        >>> SwAVLoss()(scores).backward()
        >>> scores[5].grad.shape
        torch.Size([8, 5])
    """

    temperature: float | Tensor
    epsilon: float
    iterations: int
    group: Group | None

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        group: Group | None = None,
    ) -> None:
        super().__init__(
            temperature=temperature, epsilon=epsilon, iterations=iterations, group=group
        )

    def forward(
        self,
        high_resolution: Sequence[Tensor],
        low_resolution: Sequence[Tensor] = (),
        queue: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """The loss () of prototype scores (N, K), one tensor a crop.

        `high_resolution` are the A crops that give codes; `queue` their stored scores (L, K), which
        take part in the codes and in nothing else; of a group, each rank has rows of its own.
        Raises ValueError for fewer than two crops, or a queue that is not one tensor a large crop.
        """
        scores = [*high_resolution, *low_resolution]
        if not high_resolution or len(scores) < 2:
            raise ValueError(
                "SwAVLoss: needs a large crop and at least two crops in all; "
                f"got {len(high_resolution)} and {len(scores)}."
            )
        if queue is not None and len(queue) != len(high_resolution):
            raise ValueError(
                "SwAVLoss: queue must hold one tensor for each large crop; "
                f"got {len(queue)} for {len(high_resolution)}."
            )
        losses = []
        for i, score in enumerate(high_resolution):
            stored = score.detach() if queue is None else torch.cat((queue[i], score)).detach()
            codes = F.sinkhorn(
                stored, epsilon=self.epsilon, iterations=self.iterations, group=self.group
            )
            code = codes[-score.shape[0] :]  # (N, K)
            losses += [
                F.soft_cross_entropy(other, code, temperature=self.temperature, group=self.group)
                for v, other in enumerate(scores)
                if v != i
            ]
        return torch.stack(losses).mean()
