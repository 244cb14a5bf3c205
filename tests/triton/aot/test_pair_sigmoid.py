"""Every row of the pairwise sigmoid kernels' table, compiled for its GPU and within its budget."""

import budget
import pytest
import torch

from fastcl.kernels import pair_sigmoid

PROVED = (80, 90, 100)


def launches(arch, d, dtype, n=8192):
    image, t = torch.zeros(n, d, dtype=dtype), torch.tensor(1.0)
    with budget.compiling_for(arch) as kernels:
        pair_sigmoid.forward(image, image, t, t, normalize=True)
        pair_sigmoid.backward(torch.zeros(n), image, image, t, t, normalize=True)
    return kernels


@pytest.mark.parametrize(
    "d, dtype",
    [
        (128, torch.bfloat16),
        (256, torch.bfloat16),
        (1024, torch.bfloat16),
        (768, torch.float32),
    ],
    ids=lambda x: str(x).removeprefix("torch."),
)
@pytest.mark.parametrize("arch", PROVED)
def test_rows_are_within_budget(arch, d, dtype):
    reports = [budget.examine(kernel) for kernel in launches(arch, d, dtype)]
    assert {report.name for report in reports} >= {"loss_kernel", "gradient_kernel"}
    for report in reports:
        main = report.name in ("loss_kernel", "gradient_kernel")
        budget.assert_within_budget(report, tensor_cores=main and dtype == torch.bfloat16)


def test_sizes_do_not_recompile():
    kernels = [
        kernel
        for n in (8192, 1, 16, 1001)
        for kernel in launches(90, 128, torch.bfloat16, n)
        if kernel.name == "loss_kernel"
    ]
    assert len({id(kernel.kernel) for kernel in kernels}) == 1
