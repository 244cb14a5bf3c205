"""Every shipped launch of the self-distillation kernels, compiled for each GPU."""

import pytest
import torch
from streaming_budget import assert_lean, compiled_kernels, over_ragged, over_targets, tile_loads

from fastcl.kernels import self_distillation


def launch(students, teachers, n, k, dtype, teacher_dtype=None):
    student = torch.empty(students, n, k, dtype=dtype)
    teacher = torch.empty(teachers, n, k, dtype=teacher_dtype or dtype)
    center, t = torch.empty(k), torch.tensor(1.0)
    _, *lse = self_distillation.forward(student, teacher, center, t, t)
    self_distillation.backward(torch.empty(n), student, teacher, center, t, t, *lse)


@over_targets
@over_ragged
@pytest.mark.parametrize(
    "students, teachers, k",
    [(10, 2, 65536), (10, 2, 512), (8, 1, 65536), (4, 4, 4096), (4, 8, 4096), (3, 33, 4096)],
    ids=lambda size: str(size),
)
def test_no_spills_and_wide_loads(students, teachers, k, short, target, dtype):
    kernels = compiled_kernels(target, lambda: launch(students, teachers, 16, k - short, dtype))
    assert [kernel.name for kernel in kernels] == [
        "forward_kernel", "finish_kernel", "backward_kernel"
    ]  # fmt: skip
    forward, finish, backward = kernels
    block_t, block_k = self_distillation.block_of(teachers, k - short)
    loads = tile_loads(forward, block_t * block_k, dtype) + tile_loads(forward, block_k, dtype)
    blocks = 4 if block_t <= 8 else 3
    assert_lean(forward, loads=loads, blocks=blocks, ragged=short)
    assert_lean(backward, loads=loads, blocks=blocks, ragged=short)
    assert_lean(finish, loads=0)


def test_float32_teacher_of_a_bfloat16_student():
    forward, _, backward = compiled_kernels(
        90, lambda: launch(10, 2, 16, 65536, torch.bfloat16, torch.float32)
    )
    assert_lean(forward, loads=8 + 2, blocks=4)
    assert_lean(backward, loads=8 + 2, blocks=4)


def test_sizes_do_not_recompile():
    def launches():
        for students, n, k in ((10, 16, 65536), (8, 1, 4096), (2, 100, 2504)):
            launch(students, 2, n, k, torch.float32)

    assert len({id(kernel.kernel) for kernel in compiled_kernels(90, launches)}) == 3
