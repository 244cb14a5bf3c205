"""Momentum update of rows of a memory bank, in plain torch.

    bank[index_b] ← normalise(m · bank[index_b] + (1 − m) · x_b)

Every row is made from the bank as it was; of equal indices the last one wins.
Source: Wu et al. 2018, arXiv:1805.01978, as its authors' code updates it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.reference._common import in_float, normalized


def update_(bank: Tensor, index: Tensor, features: Tensor, *, momentum: float) -> None:
    """bank (M, D) in place; index int64 (B,), features (B, D)."""
    batch = torch.arange(len(index), device=index.device)
    # The last place of every index, written by an order-free maximum.
    last = batch.new_full((len(bank),), -1).scatter_reduce(0, index, batch, "amax")[index]
    rows = in_float(bank[index]) * momentum + in_float(features)[last] * (1 - momentum)
    # Equal indices now write equal rows.
    bank.index_copy_(0, index, normalized(rows).to(bank.dtype))
