"""Large batches through an encoder in small passes: the gradient of the whole batch, exactly.

A contrastive loss needs every row of the batch at once, so ordinary gradient accumulation, which
adds up the losses of small batches, is another loss with fewer negatives. Here only the encoder
works on a few rows at a time:

    z = [f(x_1), f(x_2), …]           chunk by chunk; of each only x_c and the random state are kept
    L(z),  ∂L/∂z                      on the whole batch
    ∂L/∂θ = Σ_c (∂L/∂z_c) ∂f(x_c)/∂θ  chunk by chunk: f(x_c) once more, then its backward pass

so that the activations of one chunk are held rather than those of the batch, for one more forward
pass. What f draws at random (dropout, drop path) it draws again, and buffers such as the running
statistics of batch norm move in the first pass only. Batch norm's own statistics are a chunk's:
with it in f the result is that of chunks, not of the whole batch.

Source: Gao et al. 2021 (GradCache), arXiv:2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def cached(module: nn.Module, x: Tensor, rows: int) -> Tensor:
    """module(x), at most `rows` rows at a time, with the memory of so many and the same gradient.

        torch.cat([module(chunk) for chunk in x.tensor_split(ceil(N / rows))])

    x (N, …) -> (N, …), rows of the same kind: row i of the output follows from row i of x (but for
    batch norm, see above). The chunks are of equal size, to a row. Without gradients too it is
    chunk by chunk. Raises ValueError for rows < 1.
    Source: Gao et al. 2021 (GradCache), arXiv:2101.06983.
    """
    if rows < 1:
        raise ValueError(f"cached: rows must be at least 1; got {rows}.")
    return _in_chunks(module, module, x, rows=rows)


def in_chunks_(module: nn.Module, rows: int) -> None:
    """From now on module(x) is `cached(module, x, rows)`. Its state dict stays what it is."""
    if rows < 1:
        raise ValueError(f"in_chunks_: rows must be at least 1; got {rows}.")
    module.forward = partial(_in_chunks, module.forward, module, rows=rows)


def _in_chunks(
    forward: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, *, rows: int
) -> Tensor:
    """forward(x), which is the module's, in chunks."""
    if len(x) <= rows:
        return forward(x)
    chunks = x.tensor_split(-(-len(x) // rows))
    if not torch.is_grad_enabled():
        return torch.cat([forward(chunk) for chunk in chunks])

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _buffers_kept(module)

    kept = partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)
    return torch.cat([kept(chunk) for chunk in chunks])


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """What runs here leaves the module's buffers as they were."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
