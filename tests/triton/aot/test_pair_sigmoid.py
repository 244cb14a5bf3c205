"""Every row of the pairwise sigmoid kernels' table, compiled for its GPU and within its budget."""

import budget
import pytest
import torch
from streaming_budget import ALL

from fastcl.kernels import pair_sigmoid


def launches(arch, d, dtype, n=8192):
    image, t = torch.zeros(n, d, dtype=dtype), torch.tensor(1.0)
    with budget.compiling_for(arch) as kernels:
        pair_sigmoid.forward(image, image, t, t, normalize=True)
        pair_sigmoid.backward(torch.zeros(n), image, image, t, t, normalize=True)
    return kernels


# One bucket of the table for each GPU, to save time; FASTCL_AOT_ALL=1 compiles every one.
ROWS = [(80, 256, torch.bfloat16), (90, 128, torch.bfloat16), (100, 768, torch.float32)]
if ALL:
    sizes = [(128, torch.bfloat16), (256, torch.bfloat16), (1024, torch.bfloat16)]
    ROWS = [(arch, *size) for arch in (80, 90, 100) for size in [*sizes, (768, torch.float32)]]


@pytest.mark.parametrize("arch, d, dtype", ROWS, ids=lambda x: str(x).removeprefix("torch."))
def test_rows_are_within_budget(arch, d, dtype):
    reports = [budget.examine(kernel) for kernel in launches(arch, d, dtype)]
    assert {report.name for report in reports} >= {"loss_kernel", "gradient_kernel"}
    for report in reports:
        main = report.name in ("loss_kernel", "gradient_kernel")
        budget.assert_within_budget(report, tensor_cores=main and dtype == torch.bfloat16)


def test_sizes_do_not_recompile():
    kernels = [
        kernel
        for n in (8192, 1, 1001)
        for kernel in launches(90, 128, torch.bfloat16, n)
        if kernel.name == "loss_kernel"
    ]
    assert len({id(kernel.kernel) for kernel in kernels}) == 1
