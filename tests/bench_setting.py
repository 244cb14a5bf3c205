"""What the tests of `python -m bench` share: small settings, and one thread."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench is not part of the installed package

from bench.calls import Settings
from bench.workloads import WORKLOADS

ONE = Settings(threads=1, repeats=3, seconds=0.05, memory=False)
TINY = {"N": 16, "D": 8}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(name: str) -> dict[str, int]:
    """The small sizes, rows cut further: pytorch-metric-learning is cubic in them."""
    return {
        key: min(value, 32) if key == "N" else value for key, value in WORKLOADS[name].small.items()
    }


def at(rows: int, seconds: float, peak: float | None = None, provider: str = "fastcl") -> dict:
    """A result of nt_xent."""
    return {
        "workload": "nt_xent", "provider": provider, "sizes": {"N": rows, "D": 128},
        "dtype": "float32", "device": "cpu", "status": "ok",
        "seconds": {"median": seconds, "samples": [seconds]},
        **({} if peak is None else {"peak_bytes": peak}),
    }  # fmt: skip
