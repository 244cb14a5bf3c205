"""Every shipped launch of the negatives of each query's own, compiled for each GPU."""

import pytest
import torch
from streaming_budget import assert_lean, compiled_kernels, over_ragged, over_targets, tile_loads

from fastcl.kernels import own_negatives
from fastcl.ops.own_negatives import LONGEST


def launch(n, k, d, dtype):
    query, negatives = torch.empty(n, d, dtype=dtype), torch.empty(n, k, d, dtype=dtype)
    scale, v = torch.tensor(1.0), torch.empty(n)
    own_negatives.forward(query, negatives, scale, normalize=True)
    needed = dict(normalize=True, need_query=True, need_negatives=True)
    own_negatives.backward(v, query, negatives, scale, v, **needed)


@over_targets
@over_ragged
@pytest.mark.parametrize("d", [32, 128, 1024, 2048, own_negatives.LONGEST])
def test_no_spills_and_wide_loads(d, short, target, dtype):
    forward, backward, combine = compiled_kernels(target, lambda: launch(256, 64, d - short, dtype))
    tile = max(d, own_negatives.TILE)
    for kernel in (forward, backward):
        blocks = 16 // kernel.options["num_warps"]  # a quarter of the warps that there can be
        assert_lean(kernel, loads=tile_loads(kernel, tile, dtype), blocks=blocks, ragged=short)
    assert_lean(combine, loads=0, blocks=4)


def test_longer_rows_go_to_the_plain_version():
    assert LONGEST == own_negatives.LONGEST


def test_sizes_do_not_recompile():
    def launches():
        for n, k, d in ((256, 1024, 128), (1, 1, 128), (16, 100, 120), (3, 16, 104)):
            query, negatives = torch.empty(n, d), torch.empty(n, k, d)
            own_negatives.forward(query, negatives, torch.tensor(1.0), normalize=True)

    assert len({id(kernel.kernel) for kernel in compiled_kernels(90, launches)}) == 1
