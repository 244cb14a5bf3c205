"""Ring-buffer write of a batch of keys, in plain torch.

queue[(pointer + i) mod M] ← keys_i      in order: of more than M keys the last M remain
pointer ← (pointer + B) mod M
"""

from __future__ import annotations

import torch
from torch import Tensor


def push_(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    """queue (M, D) and pointer int64 (1,) in place; keys (B, D)."""
    size, batch = queue.shape[0], keys.shape[0]
    first = max(batch - size, 0)
    slots = (pointer + torch.arange(first, batch, device=queue.device)) % size
    queue.index_copy_(0, slots, keys[first:].to(queue.dtype))
    pointer.copy_((pointer + batch) % size)
