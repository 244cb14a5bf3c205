"""lightly's MemoryBankModule, of fastcl.compat.lightly.

Source: https://github.com/lightly-ai/lightly, lightly/models/modules/memory_bank.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcl.compat._common import world_size
from fastcl.compat._patch import installed_version


class MemoryBankModule(nn.Module):
    """A ring of past features, random unit rows at first: lightly's MemoryBankModule.

    size: (rows, dim), or 0 for none. Of a bare number above 0, lightly 1.6 makes an error; with
    lightly 1.5 installed the dimension is taken from the first batch, and 65536 is the default.
    Returns (output, the bank before this batch): a copy, (dim, rows) if `feature_dim_first`.

    Quirks kept: the buffers `bank` and `bank_ptr` are not saved in state dicts. A batch that
    reaches the end of the bank is cut there, the rest of it is dropped, and the next starts at row
    0. With `gather_distributed`, the batches of all processes are written, but gradients are not
    followed.
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(
        self,
        size: int | Sequence[int] | None = None,
        gather_distributed: bool = False,
        feature_dim_first: bool = True,
    ):
        super().__init__()
        version = installed_version("lightly")
        infers = version is not None and version < (1, 6)
        if size is None:
            if not infers:
                raise TypeError("MemoryBankModule: size is required: (rows, dim), or 0 for none.")
            size = 65536
        sizes = (size,) if isinstance(size, int) else tuple(size)
        # lightly's own words in every error: its tests, and perhaps its users, look for them.
        if any(x < 0 for x in sizes):
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative.")
        if isinstance(size, int) and size > 0:
            if not infers:
                raise ValueError(
                    f"Memory bank size 'size={size}' does not specify the feature dimension. Set "
                    f"it with 'size=({size}, dim)', or pass 'size=0' to disable the memory bank."
                )
            warnings.warn(
                f"Memory bank size 'size={size}' does not specify feature dimension. It is "
                "recommended to set the feature dimension with 'size=(n, dim)' when creating the "
                "memory bank. Distributed training might fail if the feature dimension is not set.",
                UserWarning,
                stacklevel=2,
            )
        elif sizes != (0,) and len(sizes) != 2 and not infers:
            raise ValueError(
                f"Illegal memory bank size {size}, expected a (num_features, dim) tuple, or "
                "'size=0' to disable the memory bank."
            )
        self.size = sizes
        self.gather_distributed = gather_distributed
        self.feature_dim_first = feature_dim_first
        self.register_buffer("bank", torch.empty(sizes), persistent=False)
        self.register_buffer("bank_ptr", torch.empty(1, dtype=torch.long), persistent=False)
        if len(sizes) > 1:
            self._init_memory_bank(sizes)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        if self.size[0] == 0:
            return output, None
        self._prepare(output)
        bank = self.bank.clone().detach()
        if self.feature_dim_first:
            bank = bank.transpose(0, -1)
        if update:
            self._dequeue_and_enqueue(output)
        return output, bank

    def _prepare(self, output: Tensor) -> None:
        """Make the rows, where 1.5 was not told their dimension."""
        if self.bank.ndim == 1:
            self._init_memory_bank((*self.size, *output.shape[1:]))

    @torch.no_grad()
    def _init_memory_bank(self, size: tuple[int, ...]) -> None:
        self.bank = nn.functional.normalize(torch.randn(size).type_as(self.bank), dim=-1)
        self.bank_ptr = torch.zeros(1).type_as(self.bank_ptr)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, batch: Tensor) -> None:
        if self.gather_distributed and world_size() > 1:
            parts = [torch.empty_like(batch) for _ in range(world_size())]
            torch.distributed.all_gather(parts, batch.contiguous())
            batch = torch.cat(parts)
        start = int(self.bank_ptr)
        end = start + batch.shape[0]
        self.bank[start:end] = batch[: self.size[0] - start].detach()
        self.bank_ptr[0] = 0 if end >= self.size[0] else end
