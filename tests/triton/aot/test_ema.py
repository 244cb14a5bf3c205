"""Every shipped launch of the EMA kernel, compiled for each GPU."""

import budget
import pytest
import torch
from streaming_budget import assert_lean, compiled_kernels, tile_loads

from fastcl.kernels import ema


@pytest.mark.parametrize("target", [80, 90, 100])
@pytest.mark.parametrize(
    "source_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_no_spills_and_wide_loads(dtype, source_dtype, target):
    target_list, source_list = (
        [torch.empty(5000, dtype=dtype)],
        [torch.empty(5000, dtype=source_dtype)],
    )
    (kernel,) = compiled_kernels(
        target, lambda: ema.update_(target_list, source_list, momentum=0.9)
    )
    loads = sum(tile_loads(kernel, ema.BLOCK, kind) for kind in (dtype, source_dtype))
    assert_lean(kernel, loads=loads, blocks=4)


def test_one_launch_for_a_list_and_none_compiled_again():
    def launches():
        for sizes, momentum in (((3, 5000, 70), 0.9), ((4096,), 1), ((1,) * 200, 0.0)):
            tensors = [torch.empty(size) for size in sizes]
            ema.update_(tensors, [t.clone() for t in tensors], momentum=momentum)

    with budget.compiling_for(90) as launched:
        launches()
    assert len(launched) == 3
    assert len({id(launch.kernel) for launch in launched}) == 1


def test_tensors_off_a_128_bit_boundary():
    buffer = torch.empty(6000)
    (kernel,) = compiled_kernels(
        90, lambda: ema.update_([buffer[1:5000]], [torch.empty(4999)], momentum=0.9)
    )
    assert kernel.options["TARGET_UNIT"] == 1
    assert_lean(kernel, loads=0, blocks=3)
