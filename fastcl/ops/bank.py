"""The registered operation fastcl::bank_update_, in place on the bank.

Formula in fastcl/reference/bank.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl import _C
from fastcl.ops._backend import DTYPE_CODES, implementation, pointer
from fastcl.ops._library import contiguous, define

WORD = "bank"


class Cpp:
    """Calls csrc/bank.cpp."""

    @staticmethod
    def update_(bank: Tensor, index: Tensor, features: Tensor, *, momentum: float) -> None:
        _C.kernels.bank_update(
            *(pointer(bank), pointer(index), pointer(features)),
            *(*features.shape, momentum, DTYPE_CODES[bank.dtype], DTYPE_CODES[features.dtype]),
            torch.get_num_threads(),
        )


def run(bank: Tensor, index: Tensor, features: Tensor, momentum: float) -> None:
    implementation(WORD, bank, Cpp).update_(bank, *contiguous(index, features), momentum=momentum)
    torch.autograd.graph.increment_version(bank)


def fake(bank: Tensor, index: Tensor, features: Tensor, momentum: float) -> None:
    pass


bank_update_ = define(
    "bank_update_(Tensor(a!) bank, Tensor index, Tensor features, float momentum) -> ()", run, fake
)
