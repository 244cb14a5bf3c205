"""The queue kernels in Triton's interpreter, against pushing one key after the other."""

import pytest
import streaming
import torch


@pytest.mark.parametrize(
    "size, d, batches",
    [
        (1, 1, [1, 3]),
        (63, 129, [10, 50, 10]),  # the second batch wraps around
        (129, 64, [129, 1]),  # exactly full
        (10, 7, [25, 4, 100]),  # more keys than places
        (100, 2050, [3]),  # rows longer than a block
        (300, 8, [299, 299, 0, 2]),
    ],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, list) else str(x),
)
def test_equals_pushes_of_single_keys(size, d, batches):
    streaming.check_queue(size, d, batches)


@pytest.mark.parametrize(
    "dtype, keys_dtype", [(torch.float32, torch.float16), (torch.float16, torch.float32)]
)
def test_keys_are_cast_to_the_queue(dtype, keys_dtype):
    streaming.check_queue(20, 33, [13, 13], dtype, keys_dtype)


@pytest.mark.parametrize("start", [-1, 23, 2**40])
def test_a_pointer_outside_the_queue_writes_inside(start):
    streaming.check_queue(10, 4, [4, 13], start=start)


def test_golden_moco():
    streaming.check_queue_golden("cpu")
