"""What the plain versions share: the dtype they compute in, and normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

NORM_FLOOR = 1e-12  # of torch.nn.functional.normalize


def in_float(x: Tensor) -> Tensor:
    """x in the dtype that sums are kept in: float32, or float64 as it is."""
    return x if x.dtype == torch.float64 else x.float()


def normalized(x: Tensor, normalize: bool = True) -> Tensor:
    """x / max(‖x‖, 1e-12) by rows, or x itself."""
    return torch.nn.functional.normalize(x, dim=1, eps=NORM_FLOOR) if normalize else x


def through_normalization(grad: Tensor, x: Tensor, normalize: bool) -> Tensor:
    """The gradient of x from that of its normalised rows: (g − x̂ <x̂, g>) / ‖x‖."""
    if not normalize:
        return grad
    norm = x.norm(dim=1, keepdim=True)
    unit = x / norm.clamp_min(NORM_FLOOR)
    # Below the floor the norm is a constant: no projection.
    along = (unit * grad).sum(1, keepdim=True) * (norm >= NORM_FLOOR)
    return (grad - unit * along) / norm.clamp_min(NORM_FLOOR)
