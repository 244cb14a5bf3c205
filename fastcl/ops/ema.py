"""The registered operation fastcl::ema_, in place on its targets.

Formula in fastcl/reference/ema.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.ops._backend import implementation
from fastcl.ops._library import define
from fastcl.reference import ema as Cpp

WORD = "ema"


def run(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    if not targets:
        return
    implementation(WORD, targets[0], Cpp).update_(targets, sources, momentum=momentum)
    torch.autograd.graph.increment_version(targets)


def fake(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    pass


ema_ = define("ema_(Tensor(a!)[] targets, Tensor[] sources, float momentum) -> ()", run, fake)
