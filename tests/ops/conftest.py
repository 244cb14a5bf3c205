"""Shared by the tests of the operations: what must not change a single bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from fastcl import _C

Run = Callable[[], Sequence[Tensor]]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the test on the C++ kernels, which promise more than the plain versions."""
    if _C.kernels is None:
        pytest.skip(_C.MISSING)
    monkeypatch.setenv("FASTCL_BACKEND", "cpp")


@pytest.fixture
def assert_same_bits(kernels: None) -> Iterator[Callable[[Run], None]]:
    """assert_same_bits(run): run() gives the same bits with 1, 2 and 3 threads, and once more."""
    before = torch.get_num_threads()

    def check(run: Run) -> None:
        seen = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            seen.append([x.detach().flatten().view(torch.uint8).clone() for x in run()])
        for results in seen[1:]:
            assert len(results) == len(seen[0])
            assert all(map(torch.equal, results, seen[0]))

    yield check
    torch.set_num_threads(before)
