"""Checks of arguments, in the caller's names: what must hold, what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcl.ops._library import plain

REDUCTIONS = ("mean", "sum", "none")


def describe(x: object) -> str:
    """A tensor's shape, or the type of anything else."""
    return str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def matrices(function: str, **tensors: Tensor) -> None:
    """Each is a floating-point (N, D) tensor with D ≥ 1, all of one D and on one device."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}: {name} must be a tensor; got {type(x).__name__}.")
        if not x.is_floating_point():
            raise TypeError(f"{function}: {name} must be floating point; got {x.dtype}.")
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(f"{function}: {name} must be (N, D) with D ≥ 1; got {describe(x)}.")
    first, *rest = tensors.values()
    if any(x.shape[1] != first.shape[1] for x in rest):
        names, shapes = " and ".join(tensors), " and ".join(map(describe, tensors.values()))
        raise ValueError(f"{function}: {names} must have one feature size D; got {shapes}.")
    if any(x.device != first.device for x in rest):
        names, devices = (
            " and ".join(tensors),
            " and ".join(str(x.device) for x in tensors.values()),
        )
        raise ValueError(f"{function}: {names} must be on one device; got {devices}.")


def pairs(function: str, **tensors: Tensor) -> None:
    """`matrices` of one shape, with at least one row."""
    matrices(function, **tensors)
    first, *rest = tensors.values()
    if any(x.shape != first.shape for x in rest):
        names, shapes = " and ".join(tensors), " and ".join(map(describe, tensors.values()))
        raise ValueError(f"{function}: {names} must both be (N, D); got {shapes}.")
    not_empty(function, **tensors)


def not_empty(function: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if x.shape[0] == 0:
            raise ValueError(f"{function}: {name} is empty; got {describe(x)}.")


def integers(function: str, name: str, ids: Tensor, rows: int, device: torch.device) -> Tensor:
    """ids as int64 (rows,) on the device of the rows that they name."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{function}: {name} must be a tensor; got {type(ids).__name__}.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"{function}: {name} must be integers; got {ids.dtype}.")
    if ids.shape != (rows,):
        raise ValueError(f"{function}: {name} must be ({rows},); got {describe(ids)}.")
    if ids.device != device:
        raise ValueError(f"{function}: {name} must be on {device}; got {ids.device}.")
    return ids.long()


def scalar(function: str, name: str, value: float | Tensor, *, positive: bool) -> None:
    """A finite number or 0-dim tensor, above 0 when `positive`.

    The value of a tensor is looked at only where it is at hand: on the CPU, outside compilers and
    traces.
    """
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(
                f"{function}: {name} must be a float or a 0-dim tensor; got {describe(value)}."
            )
        if value.device.type != "cpu" or not plain(value):
            return
        value = float(value.detach())
    elif not isinstance(value, (int, float)):
        raise TypeError(
            f"{function}: {name} must be a float or a 0-dim tensor; got {type(value).__name__}."
        )
    # Comparisons, which torch.compile can trace, and which NaN fails.
    if not (-math.inf < value < math.inf) or (positive and not value > 0):
        bound = "above 0 and finite" if positive else "finite"
        raise ValueError(f"{function}: {name} must be {bound}; got {value}.")


def fraction(function: str, name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{function}: {name} must be between 0 and 1; got {value}.")


def one_of(function: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{function}: {name} must be one of {', '.join(choices)}; got {value!r}.")


def inside(function: str, index: Tensor, size: int) -> None:
    """Every index is in [0, size); looked at only on the CPU, outside compilers."""
    if index.device.type != "cpu" or not plain(index) or index.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(index))
    if low < 0 or high >= size:
        raise IndexError(f"{function}: index must be in [0, {size}); got {low} to {high}.")
