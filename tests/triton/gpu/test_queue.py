"""The queue kernels on a GPU, or as ttsem executes them: bfloat16, bounds, races."""

import pytest
import streaming
import torch


@pytest.mark.parametrize(
    "size, d, batches",
    [
        (1, 1, [1, 3]),
        (63, 129, [10, 50, 10]),
        (130, 64, [130, 1]),
        (10, 8, [25, 4, 100]),
        (7, 2050, [3]),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, list) else str(x),
)
def test_equals_pushes_of_single_keys(size, d, batches):
    streaming.check_queue(size, d, batches, device="cuda")


def test_float32_keys_in_a_bfloat16_queue():
    streaming.check_queue(20, 33, [13, 13], torch.bfloat16, torch.float32, "cuda")


@pytest.mark.parametrize("start", [-1, 23, 2**40])
def test_a_pointer_outside_the_queue_writes_inside(start):
    streaming.check_queue(10, 4, [4, 13], device="cuda", start=start)


def test_golden_moco():
    streaming.check_queue_golden("cuda")
