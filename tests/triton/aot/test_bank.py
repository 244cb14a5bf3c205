"""Every shipped launch of the memory bank's update, compiled for each GPU."""

import pytest
import torch
from streaming_budget import assert_lean, compiled_kernels, over_ragged, over_targets

from fastcl.kernels import bank


def launch(size, d, batch, dtype, features_dtype=None):
    bank.update_(
        torch.empty(size, d, dtype=dtype),
        torch.zeros(batch, dtype=torch.int64),
        torch.empty(batch, d, dtype=features_dtype or dtype),
        momentum=0.5,
    )


@over_targets
@over_ragged
@pytest.mark.parametrize("d", [*bank.WARPS, 8192])
def test_no_spills_and_wide_loads(d, short, target, dtype):
    (kernel,) = compiled_kernels(target, lambda: launch(1000, d - short, 256, dtype))
    # Of bank and features; a row of 128 two-byte elements is too short for 128 bits a thread.
    loads = 2 if d * dtype.itemsize >= 512 else 0
    # The block's warps fill half a multiprocessor at least.
    assert_lean(kernel, loads=loads, blocks=32 // kernel.options["num_warps"], ragged=short)


def test_float32_features_of_a_bfloat16_bank():
    (kernel,) = compiled_kernels(90, lambda: launch(1000, 512, 256, torch.bfloat16, torch.float32))
    assert_lean(kernel, loads=4, blocks=32)


def test_sizes_and_momentum_do_not_recompile():
    def launches():
        for size, d, batch in ((65536, 128, 256), (1, 128, 1), (16, 120, 100), (100, 72, 7)):
            launch(size, d, batch, torch.float32)

    assert len({id(kernel.kernel) for kernel in compiled_kernels(90, launches)}) == 1
