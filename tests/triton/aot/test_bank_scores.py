"""Every shipped launch of the bank's scores, compiled for each GPU."""

import pytest
import torch
from streaming_budget import assert_lean, compiled_kernels, over_ragged, over_targets, tile_loads

from fastcl.kernels import bank_scores


def launch(n, k, d, dtype, bank_dtype=None):
    query, bank = torch.empty(n, d, dtype=dtype), torch.empty(100, d, dtype=bank_dtype or dtype)
    index, scale = torch.empty(n, k, dtype=torch.int64), torch.tensor(1.0)
    bank_scores.forward(query, bank, index, scale)
    bank_scores.backward(torch.empty(n, k), query, bank, index, scale)


@over_targets
@over_ragged
@pytest.mark.parametrize("d", [*bank_scores.BLOCKS, 2048])
def test_no_spills_and_wide_loads(d, short, target, dtype):
    forward, backward, combine = compiled_kernels(
        target, lambda: launch(256, 4097, d - short, dtype)
    )
    for kernel in (forward, backward):
        # Eight blocks of 8 KB or 4 KB in flight on a multiprocessor.
        assert_lean(kernel, loads=tile_loads(kernel, 2048, dtype), blocks=8, ragged=short)
    assert_lean(combine, loads=0, blocks=4)


def test_float32_queries_of_a_bfloat16_bank():
    forward, backward, _ = compiled_kernels(
        90, lambda: launch(256, 4097, 128, torch.float32, torch.bfloat16)
    )
    assert_lean(forward, loads=tile_loads(forward, 2048, torch.bfloat16), blocks=8)
    assert_lean(backward, loads=tile_loads(backward, 2048, torch.bfloat16), blocks=8)


def test_sizes_do_not_recompile():
    def launches():
        for n, k, d in ((256, 4097, 128), (1, 1, 128), (16, 100, 120), (3, 16, 104)):
            bank_scores.forward(
                torch.empty(n, d), torch.empty(9, d), torch.empty(n, k).long(), torch.tensor(1.0)
            )

    assert len({id(kernel.kernel) for kernel in compiled_kernels(90, launches)}) == 1
