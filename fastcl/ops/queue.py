"""The registered operation fastcl::queue_push_, in place on the queue and its pointer.

Formula in fastcl/reference/queue.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl import _C
from fastcl.ops._backend import DTYPE_CODES, implementation
from fastcl.ops._library import define
from fastcl.reference import queue as reference

WORD = "queue"


class Cpp:
    """Calls csrc/queue.cpp; what its kernel does not take goes to the plain version."""

    @staticmethod
    def push_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
        if not queue.is_contiguous() or keys.dtype not in DTYPE_CODES:
            return reference.push_(queue, pointer, keys)
        _C.kernels.queue_push(
            *(queue.data_ptr(), pointer.data_ptr(), keys.data_ptr()),
            *(queue.shape[0], keys.shape[0], queue.shape[1]),
            *(DTYPE_CODES[queue.dtype], DTYPE_CODES[keys.dtype], torch.get_num_threads()),
        )


def run(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    implementation(WORD, queue, Cpp).push_(queue, pointer, keys.contiguous())
    torch.autograd.graph.increment_version((queue, pointer))


def fake(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    pass


queue_push_ = define(
    "queue_push_(Tensor(a!) queue, Tensor(b!) pointer, Tensor keys) -> ()", run, fake
)
