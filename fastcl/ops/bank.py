"""The registered operation fastcl::bank_update_, in place on the bank.

Formula in fastcl/reference/bank.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.ops._backend import implementation
from fastcl.ops._library import contiguous, define
from fastcl.reference import bank as Cpp

WORD = "bank"


def run(bank: Tensor, index: Tensor, features: Tensor, momentum: float) -> None:
    implementation(WORD, bank, Cpp).update_(bank, *contiguous(index, features), momentum=momentum)
    torch.autograd.graph.increment_version(bank)


def fake(bank: Tensor, index: Tensor, features: Tensor, momentum: float) -> None:
    pass


bank_update_ = define(
    "bank_update_(Tensor(a!) bank, Tensor index, Tensor features, float momentum) -> ()", run, fake
)
