"""The registered operation fastcl::ema_, in place on its targets.

Formula in fastcl/reference/ema.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl import _C
from fastcl.ops._backend import DTYPE_CODES, implementation
from fastcl.ops._library import define
from fastcl.reference import ema as reference

WORD = "ema"


class Cpp:
    """Gathers the addresses and calls csrc/ema.cpp once for the list."""

    @staticmethod
    def update_(targets: list[Tensor], sources: list[Tensor], *, momentum: float) -> None:
        if not all(map(kernel_takes, targets, sources)):
            taken = []
            for target, source in zip(targets, sources):
                if kernel_takes(target, source):
                    taken.append((target, source))
                else:
                    reference.update_([target], [source], momentum=momentum)
            targets, sources = [x for x, _ in taken], [y for _, y in taken]
        _C.kernels.ema_update(
            [x.data_ptr() for x in targets],
            [y.data_ptr() for y in sources],
            [x.numel() for x in targets],
            [DTYPE_CODES[x.dtype] for x in targets],
            [DTYPE_CODES[y.dtype] for y in sources],
            *(momentum, torch.get_num_threads()),
        )


def kernel_takes(target: Tensor, source: Tensor) -> bool:
    """Both in a storage type of the kernels and laid out alike, without gaps."""
    if target.dtype not in DTYPE_CODES or source.dtype not in DTYPE_CODES:
        return False
    if target.is_contiguous() and source.is_contiguous():
        return True
    last = torch.channels_last
    return (
        target.dim() == 4
        and target.is_contiguous(memory_format=last)
        and source.is_contiguous(memory_format=last)
    )


def run(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    if not targets:
        return
    implementation(WORD, targets[0], Cpp).update_(targets, sources, momentum=momentum)
    torch.autograd.graph.increment_version(targets)


def fake(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    pass


ema_ = define("ema_(Tensor(a!)[] targets, Tensor[] sources, float momentum) -> ()", run, fake)
