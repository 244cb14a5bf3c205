"""Every shipped launch of SupCon's positives, compiled for each GPU."""

import pytest
import torch
from streaming_budget import assert_lean, compiled_kernels, over_ragged, over_targets, tile_loads

from fastcl.kernels import label_similarity
from fastcl.ops.label_similarity import LONGEST


def launch(n, d, dtype):
    z, labels, v = torch.empty(n, d, dtype=dtype), torch.zeros(n, dtype=torch.int64), torch.empty(n)
    others, rest = torch.empty_like(labels), torch.empty(n, d)
    label_similarity.forward(z, labels, normalize=True)
    label_similarity.backward(v, z, labels, others, rest, normalize=True)


@over_targets
@over_ragged
@pytest.mark.parametrize("d", [32, 128, 1024, 2048, label_similarity.LONGEST])
def test_no_spills_and_wide_loads(d, short, target, dtype):
    for kernel in compiled_kernels(target, lambda: launch(256, d - short, dtype)):
        tile = max(d, label_similarity.TILE)
        blocks = 16 // kernel.options["num_warps"]  # a quarter of the warps that there can be
        assert_lean(kernel, loads=tile_loads(kernel, tile, dtype), blocks=blocks, ragged=short)


def test_longer_rows_go_to_the_plain_version():
    assert LONGEST == label_similarity.LONGEST


def test_sizes_do_not_recompile():
    def launches():
        for n, d in ((256, 128), (1, 128), (16, 120), (3, 104)):
            label_similarity.forward(
                torch.empty(n, d), torch.zeros(n, dtype=torch.int64), normalize=True
            )

    assert len({id(kernel.kernel) for kernel in compiled_kernels(90, launches)}) == 2
