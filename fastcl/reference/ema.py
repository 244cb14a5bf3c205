"""Exponential moving average of a list of tensors, in plain torch.

target ← m · target + (1 − m) · source
"""

from __future__ import annotations

from torch import Tensor

from fastcl.reference._common import in_float


def update_(targets: list[Tensor], sources: list[Tensor], *, momentum: float) -> None:
    """In place on each target; computed in float32, or float64 for float64 targets."""
    for target, source in zip(targets, sources):
        average = in_float(target) * momentum + source.to(in_float(target).dtype) * (1 - momentum)
        target.copy_(average)
