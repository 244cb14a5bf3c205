"""Every shipped launch of the cosine kernels, compiled for each GPU."""

import budget
import pytest
import torch
from streaming_budget import (
    assert_lean,
    compiled_kernels,
    over_ragged,
    over_targets,
    resources,
    tile_loads,
    wide_loads,
)

from fastcl.kernels import cosine


def launch(n, d, dtype):
    x = torch.empty(n, d, dtype=dtype)
    cosine.forward(x, x, eps=1e-8)
    cosine.backward(torch.empty(n), x, x, eps=1e-8, need_prediction=True, need_target=True)


@over_targets
@over_ragged
@pytest.mark.parametrize("d", [*cosine.BACKWARD, 2 * max(cosine.BACKWARD)])
def test_no_spills_and_wide_loads(d, short, target, dtype):
    forward, backward = compiled_kernels(target, lambda: launch(64, d - short, dtype))
    rows = cosine.config_of(cosine.FORWARD, d)
    loads = 2 * tile_loads(forward, rows.block_n * rows.block_d, dtype)
    assert_lean(forward, loads=loads, blocks=4, ragged=short)
    rows = cosine.config_of(cosine.BACKWARD, d)
    times = 2 if rows.block_d < d else 1
    loads = 2 * times * tile_loads(backward, rows.block_n * rows.block_d, dtype)
    blocks = 16 // rows.num_warps if times == 1 else 1
    assert_lean(backward, loads=loads, blocks=blocks, ragged=short)


def test_sizes_and_eps_do_not_recompile():
    def launches():
        for n, d in ((1, 2048), (16, 1536), (17, 1032), (4096, 2048)):
            for eps in (1e-8, 1, 0.5):
                x = torch.empty(n, d)
                cosine.forward(x, x, eps=eps)

    assert len(compiled_kernels(90, launches)) == 1


def test_main_loop_in_machine_code():
    forward, _ = compiled_kernels(90, lambda: launch(64, 4096, torch.bfloat16))
    report = budget.examine(forward)
    budget.assert_within_budget(report, blocks=5)
    assert report.main_loop["LDG.E.128"] == 4
    assert sum(n for name, n in report.main_loop.items() if name.startswith("LDG")) == 4


def test_the_gate_sees_narrow_loads_and_spills():
    forward, _ = compiled_kernels(90, lambda: launch(64, 2047, torch.float32))
    assert wide_loads(forward) == 0
    with pytest.raises(AssertionError, match="loads are wide"):
        assert_lean(forward, loads=8)

    def starved():
        x = torch.empty(64, 2048)
        cosine.forward_kernel[(64,)](
            x, x, x, 64, 2048, 1e-8, BLOCK_N=4, BLOCK_D=2048, ALIGN=8, num_warps=4, maxnreg=32
        )

    (kernel,) = compiled_kernels(90, starved)
    assert resources(kernel)["STACK"] > 0
    with pytest.raises(AssertionError, match="spills"):
        assert_lean(kernel, loads=0)
