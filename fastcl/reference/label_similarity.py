"""The similarity of each row to the mean of its label's other rows, in plain torch.

    r_i    = Σ_{j≠i of i's label} ẑ_j,    n_i how many those are
    mean_i = ẑ_i·r_i / n_i
    dẑ_i   = w_i r_i + Σ_{j≠i of i's label} w_j ẑ_j,    w_i = g_i / n_i

In O(N·D), from the sums of the labels' rows: there is no mask matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.reference._common import in_float, normalized, through_normalization


def others_of(names: Tensor, labels: Tensor) -> Tensor:
    """How many more of each label there are among the sorted names."""
    first = torch.searchsorted(names, labels)
    return torch.searchsorted(names, labels, right=True).sub_(first).sub_(1)


def sums_at(x: Tensor, place: Tensor, count: int) -> Tensor:
    """(count, D): the sum of the rows of x (N, D) that have each place."""
    sums = x.new_zeros(count, x.shape[1])
    if x.device.type == "cpu":  # torch's deterministic scatter-add differs by device
        return sums.index_add(0, place, x)
    return sums.index_put((place,), x, accumulate=True)


def of_others(x: Tensor, labels: Tensor, names: Tensor) -> Tensor:
    """(N, D): for each row the sum of its label's other rows."""
    place = torch.searchsorted(names, labels)
    return sums_at(x, place, len(x)).index_select(0, place).sub_(x)


def forward(z: Tensor, labels: Tensor, *, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """mean (N,), n (N,) and r (N, D) of z (N, D) and labels (N,)."""
    x = normalized(in_float(z), normalize)
    names = labels.sort().values
    others, rest = others_of(names, labels), of_others(x, labels, names)
    return (x * rest).sum(1).div_(others.clamp_min(1)), others, rest


def backward(
    grad: Tensor, z: Tensor, labels: Tensor, others: Tensor, rest: Tensor, *, normalize: bool
) -> Tensor:
    """grad_z (N, D)."""
    raw = in_float(z)
    w = (grad / others.clamp_min(1))[:, None]
    dx = of_others(w * normalized(raw, normalize), labels, labels.sort().values)
    return through_normalization(dx.addcmul_(w, rest), raw, normalize).to(z.dtype)
