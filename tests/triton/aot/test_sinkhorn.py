"""Every shipped launch of the Sinkhorn kernels, compiled for each GPU."""

import budget
import pytest
import torch
from streaming_budget import assert_lean, compiled_kernels, over_ragged, over_targets, tile_loads

from fastcl.kernels import sinkhorn


def launch(n, k, dtype, epsilon=0.05):
    sinkhorn.forward(torch.empty(n, k, dtype=dtype), epsilon=epsilon, iterations=2)


@over_targets
@over_ragged
@pytest.mark.parametrize("k", sinkhorn.SWEEP)
def test_no_spills_and_wide_loads(k, short, target, dtype):
    kernels = compiled_kernels(target, lambda: launch(4096, k - short, dtype))
    columns, finish, sweep, _, codes = kernels
    narrow, whole = sinkhorn.config_of(sinkhorn.COLUMNS, k), sinkhorn.SWEEP[k]
    blocks = sinkhorn.WARPS_PER_MULTIPROCESSOR // whole.num_warps
    for kernel, elements, kind, fit in (
        (columns, narrow.block_n * narrow.block_k, dtype, 4),
        (finish, sinkhorn.FINISH_PARTS * sinkhorn.FINISH_BLOCK_K, torch.float32, 4),
        (sweep, whole.block_n * whole.block_k, dtype, blocks),
        (codes, whole.block_n * whole.block_k, dtype, blocks),
    ):
        loads = tile_loads(kernel, elements, kind)
        assert_lean(kernel, loads=loads, blocks=fit, ragged=short)


@over_targets
def test_rows_beyond_the_longest_block(target, dtype):
    kernels = compiled_kernels(target, lambda: launch(256, 65536, dtype))
    names = "columns finish rows columns finish codes"
    assert [kernel.name for kernel in kernels] == [f"{name}_kernel" for name in names.split()]
    for kernel in kernels:
        loads = 0 if kernel.name == "finish_kernel" else tile_loads(kernel, 4096, dtype)
        assert_lean(kernel, loads=loads, blocks=16 // 8)


def test_sizes_and_epsilon_do_not_recompile():
    def launches():
        for n, k, epsilon in ((4096, 3000, 0.05), (64, 3072, 1), (1, 4096, 0.5)):
            launch(n, k, torch.float32, epsilon)

    assert len({id(kernel.kernel) for kernel in compiled_kernels(90, launches)}) == 4


def test_main_loop_in_machine_code():
    """SwAV's 3,000 prototypes: 2 exponentials a score and one a column and tile."""
    *_, sweep, _, _ = compiled_kernels(90, lambda: launch(4096, 3000, torch.float32))
    report = budget.examine(sweep)
    budget.assert_within_budget(report, blocks=2)
    scores, columns = 2 * 4096 // 256, 4096 // 256  # of a thread
    assert report.main_loop["LDG.E.128"] == scores // 4
    assert sum(n for name, n in report.main_loop.items() if name.startswith("LDG")) == scores // 4
    assert report.main_loop["MUFU.EX2"] == 2 * scores + columns
