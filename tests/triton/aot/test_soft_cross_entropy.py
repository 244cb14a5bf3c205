"""Every shipped launch of the soft cross entropy kernels, compiled for each GPU."""

import budget
import pytest
import torch
from streaming_budget import assert_lean, compiled_kernels, over_ragged, over_targets, tile_loads

from fastcl.kernels import soft_cross_entropy


def launch(n, k, dtype, scale=1.0, targets_dtype=None):
    x, y = torch.empty(n, k, dtype=dtype), torch.empty(n, k, dtype=targets_dtype or dtype)
    v, scale = torch.empty(n), torch.tensor(scale)
    soft_cross_entropy.forward(x, y, scale)
    soft_cross_entropy.backward(v, x, y, scale, v, v)


@over_targets
@over_ragged
@pytest.mark.parametrize(
    "n, k",
    [*((4096, k) for k in soft_cross_entropy.CONFIGS), (16, 65536)],
    ids=lambda size: str(size),
)
def test_no_spills_and_wide_loads(n, k, short, target, dtype):
    kernels = compiled_kernels(target, lambda: launch(n, k - short, dtype))
    split = soft_cross_entropy.grid_of(n, k).splits > 1
    names = ["forward_kernel", *["merge_kernel"] * split, "backward_kernel", "sum_kernel"]
    assert [kernel.name for kernel in kernels] == names
    rows = soft_cross_entropy.config_of(k)
    for kernel in kernels:
        streams = kernel.name in ("forward_kernel", "backward_kernel")
        loads = 2 * tile_loads(kernel, rows.block_n * rows.block_k, dtype) if streams else 0
        assert_lean(kernel, loads=loads, blocks=4, ragged=short)


def test_float32_targets_of_bfloat16_logits():
    kernels = compiled_kernels(90, lambda: launch(4096, 3000, torch.bfloat16, 1.0, torch.float32))
    assert_lean(kernels[0], loads=2 + 4, blocks=4)
    assert_lean(kernels[1], loads=2 + 4, blocks=4)


def test_sizes_and_scale_do_not_recompile():
    def launches():
        for n, k, scale in ((4096, 3000, 10.0), (1025, 2048, 1.0), (2000, 65536, 0.3)):
            x = torch.empty(n, k)
            soft_cross_entropy.forward(x, x, torch.tensor(scale))

    assert len(compiled_kernels(90, launches)) == 1


def test_main_loop_in_machine_code():
    """One exponential for each logit, and one that rescales the sums."""
    forward, backward, _ = compiled_kernels(90, lambda: launch(4096, 3000, torch.float32))
    for kernel, exponentials in ((forward, 17), (backward, 16)):
        report = budget.examine(kernel)
        budget.assert_within_budget(report, blocks=4)
        assert report.main_loop["LDG.E.128"] == 8
        assert report.main_loop["MUFU.EX2"] == exponentials
        assert sum(n for name, n in report.main_loop.items() if name.startswith("LDG")) == 8
