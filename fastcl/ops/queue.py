"""The registered operation fastcl::queue_push_, in place on the queue and its pointer.

Formula in fastcl/reference/queue.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.ops._backend import implementation
from fastcl.ops._library import define
from fastcl.reference import queue as Cpp

WORD = "queue"


def run(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    implementation(WORD, queue, Cpp).push_(queue, pointer, keys.contiguous())
    torch.autograd.graph.increment_version((queue, pointer))


def fake(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    pass


queue_push_ = define(
    "queue_push_(Tensor(a!) queue, Tensor(b!) pointer, Tensor keys) -> ()", run, fake
)
