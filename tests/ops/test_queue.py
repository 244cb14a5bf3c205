"""queue_push_ against a list, whatever is pushed; and MoCo's own queue."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastcl.functional as F

on_each_backend = pytest.mark.usefixtures("backend")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@on_each_backend
@given(
    size=st.integers(1, 40),
    d=st.integers(1, 35),
    batches=st.lists(st.integers(0, 90), min_size=1, max_size=6),
    start=st.integers(0, 39),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_equals_a_list_of_single_writes(size: int, d: int, batches: list[int], start: int) -> None:
    queue, pointer = torch.zeros(size, d), torch.tensor([start % size])
    rows, at, number = [[0.0] * d for _ in range(size)], start % size, 0
    for batch in batches:
        keys = torch.arange(number, number + batch * d, dtype=torch.float32).view(batch, d)
        number += batch * d
        F.queue_push_(queue, pointer, keys)
        for key in keys.tolist():
            rows[at], at = key, (at + 1) % size
        assert queue.tolist() == rows
        assert pointer.tolist() == [at]


@on_each_backend
@pytest.mark.parametrize(("into", "of"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_casts_to_the_queues_dtype(into: torch.dtype, of: torch.dtype) -> None:
    keys = torch.randn(9, 37, generator=torch.Generator().manual_seed(0)).to(of)
    keys[3, 5], keys[4, 36], keys[8, 0] = torch.inf, torch.nan, -0.0
    queue, pointer = torch.zeros(11, 37, dtype=into), torch.tensor([7])
    F.queue_push_(queue, pointer, keys)
    expected = torch.zeros(11, 37, dtype=into)
    expected[[*range(7, 11), *range(5)]] = keys.to(into)
    torch.testing.assert_close(queue, expected, rtol=0, atol=0, equal_nan=True)
    assert queue.dtype == into and pointer.item() == 5
    assert torch.equal(queue[4].signbit(), keys[8].signbit())


@on_each_backend
@pytest.mark.parametrize("name", ["b6_d96_k30_t02", "b8_d128_k64", "queuewrap_b7_d96_k30"])
def test_is_mocos_queue(golden, name: str) -> None:
    file = golden(f"moco_{name}")
    queue, pointer = file["queue_before"].clone(), torch.zeros(1, dtype=torch.int64)
    steps = sum(key.endswith("_ptr_after") for key in file)
    assert steps >= 3
    for step in range(1, steps + 1):
        key = file[f"s{step}_k" if "wrap" in name else f"s{step}_im_k"]
        F.queue_push_(queue, pointer, torch.nn.functional.normalize(key))
        assert pointer.item() == file[f"s{step}_ptr_after"]
    torch.testing.assert_close(queue, file["queue_after"], rtol=0, atol=1e-7)


@on_each_backend
def test_keys_may_be_strided() -> None:
    keys = torch.randn(6, 20)
    for view in (keys.t()[:6], keys[::2], keys[:, ::3]):
        queue, pointer = torch.zeros(9, view.shape[1]), torch.tensor([0])
        F.queue_push_(queue, pointer, view)
        assert torch.equal(queue[: len(view)], view)


# The first wraps around in a large copy, the second has more keys than the queue.
@pytest.mark.parametrize(("size", "d", "batch"), [(3001, 129, 2500), (1001, 300, 3333)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_pushes_with_any_number_of_threads(
    assert_same_bits, size: int, d: int, batch: int, dtype: torch.dtype
) -> None:
    keys = torch.randn(batch, d, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(size, d, dtype=dtype)
    for i in range(max(0, batch - size), batch):
        expected[(1000 + i) % size] = keys[i]

    def run() -> list[torch.Tensor]:
        queue, pointer = torch.zeros(size, d, dtype=dtype), torch.tensor([1000])
        F.queue_push_(queue, pointer, keys)
        assert torch.equal(queue, expected)
        return [queue, pointer]

    assert_same_bits(run)


@on_each_backend
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(keys=torch.randn(2, 5)), ValueError, "feature size"),
        (dict(keys=torch.ones(2, 4, dtype=torch.int64)), TypeError, "floating point"),
        (dict(pointer=torch.tensor([0], dtype=torch.int32)), TypeError, "int64"),
        (dict(pointer=torch.tensor(0)), ValueError, r"\(1,\)"),
        (dict(queue=torch.randn(0, 4)), ValueError, "empty"),
        (dict(queue=torch.randn(4, 6).t()), ValueError, "contiguous"),
    ],
)
def test_a_refused_push_changes_nothing(change, error, message) -> None:  # type: ignore[no-untyped-def]
    arguments = dict(queue=torch.randn(6, 4), pointer=torch.tensor([3]), keys=torch.randn(2, 4))
    arguments |= change
    before = {name: x.clone() for name, x in arguments.items()}
    with pytest.raises(error, match=message):
        F.queue_push_(**arguments)
    assert all(torch.equal(arguments[name], x) for name, x in before.items())


@on_each_backend
@pytest.mark.parametrize("pointer", [-1, 6, 10**12])
def test_a_wrong_pointer_writes_inside_the_queue(pointer: int) -> None:
    whole = torch.zeros(18, 4)
    position = torch.tensor([pointer])
    F.queue_push_(whole[6:12], position, torch.ones(2, 4))
    assert whole[6:12].sum() == 8 and whole.sum() == 8
    assert position.item() == (pointer + 2) % 6
