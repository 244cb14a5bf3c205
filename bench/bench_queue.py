"""Pushing a batch into a queue of keys, against slice assignment: pytest bench/bench_queue.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastcl.functional as F


def published(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """MoCo's: the batch must divide the queue."""
    start = int(pointer)
    queue[start : start + len(keys)] = keys
    pointer[0] = (start + len(keys)) % len(queue)


@pytest.mark.parametrize(("m", "b", "d"), [(640, 64, 128), (65536, 256, 128), (65536, 4096, 256)])
@pytest.mark.parametrize("provider", [F.queue_push_, published], ids=["fastcl", "torch"])
def test_queue(benchmark, provider, m: int, b: int, d: int) -> None:
    keys = torch.randn(b, d)
    queues, pointers = [torch.zeros(m, d) for _ in range(2)], [torch.tensor([b]) for _ in range(2)]
    for push, queue, pointer in zip((F.queue_push_, published), queues, pointers):
        push(queue, pointer, keys)
    assert torch.equal(*queues) and torch.equal(*pointers)
    benchmark(provider, queues[0], pointers[0], keys)
