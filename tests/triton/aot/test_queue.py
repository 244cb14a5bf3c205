"""Every shipped launch of the queue kernels, compiled for each GPU."""

import pytest
import torch
from streaming_budget import assert_lean, compiled_kernels, over_ragged, over_targets, tile_loads

from fastcl.kernels import queue


def launch(size, d, batch, dtype, keys_dtype=None):
    queue.push_(
        torch.empty(size, d, dtype=dtype),
        torch.zeros(1, dtype=torch.int64),
        torch.empty(batch, d, dtype=keys_dtype or dtype),
    )


@over_targets
@over_ragged
@pytest.mark.parametrize("d", queue.BLOCKS)
def test_no_spills_and_wide_loads(d, short, target, dtype):
    write, advance = compiled_kernels(target, lambda: launch(65536, d - short, 256, dtype))
    assert_lean(write, loads=tile_loads(write, 2048, dtype), blocks=8, ragged=short)
    assert_lean(advance, loads=0)


def test_float32_keys_of_a_bfloat16_queue():
    write, _ = compiled_kernels(90, lambda: launch(65536, 128, 256, torch.bfloat16, torch.float32))
    assert_lean(write, loads=tile_loads(write, 2048, torch.float32), blocks=8)


def test_sizes_do_not_recompile():
    def launches():
        for size, d, batch in ((65536, 128, 256), (1, 128, 1), (16, 120, 100), (100, 72, 7)):
            launch(size, d, batch, torch.float32)

    assert len({id(kernel.kernel) for kernel in compiled_kernels(90, launches)}) == 2
