"""Tests for pytest-benchmark, made of the workloads: right first, then timed.

    pytest bench                                     every operation, small and full sizes
    pytest bench/bench_sinkhorn.py -k "small and fastcl"
    pytest bench --benchmark-autosave                to be compared with later by
    pytest bench --benchmark-compare --benchmark-compare-fail=min:10%

`python -m bench` compares providers fairly, in turns, and with the machine's limit. This compares
fastcl with itself over time: each file bench_<word>.py holds what exercises that operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import measure, report
from bench.calls import Settings, make_inputs
from bench.workloads import WORKLOADS, Workload

PROVIDERS = ("fastcl", "torch", "builtin")  # the alternatives that need no further package


def regressions(word: str) -> Callable[..., None]:
    """One test for each workload of this operation, size and provider."""
    cases = [
        pytest.param(workload, size, provider, id=f"{workload.name}-{size}-{provider}")
        for workload in WORKLOADS.values()
        for size in ("small", "full")
        for provider in PROVIDERS
        if workload.op == word and (provider in workload.peers or provider != "builtin")
    ]

    @pytest.mark.parametrize(("workload", "size", "provider"), cases)
    def test(benchmark: Any, workload: Workload, size: str, provider: str) -> None:
        sizes, settings = getattr(workload, size), Settings(threads=torch.get_num_threads())
        result = measure.begin(workload, sizes, provider, settings)
        if result.get("status") == "does not fit":
            pytest.skip(result["note"])
        inputs = make_inputs(workload, sizes, settings)
        runners = measure.checked(workload, sizes, result, inputs, settings)
        assert runners, (result["status"], result["note"], result.get("errors"))
        benchmark.group = f"{workload.name} {report.sizes_of(sizes)}"
        benchmark.extra_info.update(work=result["work"], errors=result["errors"])
        benchmark(runners[0].step)

    return test
