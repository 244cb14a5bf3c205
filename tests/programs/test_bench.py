"""`python -m bench`: what it refuses to time, what it does not run, and what it counts."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_setting import ONE, TINY, one_thread, tiny  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import fastcl.functional as F
from bench import machine, measure, memory, report
from bench.calls import make_inputs, step_of
from bench.inputs import resnet_shapes
from bench.measure import Runner
from bench.workloads import WORKLOADS, bytes_of, providers_of
from fastcl.ops import OPS

# ---- correctness comes first ---------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_installed_provider_agrees_with_the_float64_formula(name: str) -> None:
    workload, sizes = WORKLOADS[name], tiny(name)
    inputs = make_inputs(workload, sizes, ONE)
    for provider in providers_of(workload):
        result = measure.begin(workload, sizes, provider, ONE)
        if provider == "compile" or result.get("status") == "not installed":
            continue
        (runner,) = measure.checked(workload, sizes, result, inputs, ONE) or [None]
        assert result["status"] == "ok", (provider, result)
        assert runner.result is result
        assert result["errors"].keys() >= {*workload.gradients, *workload.mutates}


def test_every_operation_has_regressions_that_pass() -> None:
    root = Path(__file__).parents[2]
    files = {path.stem.removeprefix("bench_") for path in (root / "bench").glob("bench_*.py")}
    assert files == OPS.keys()
    pytest.importorskip("pytest_benchmark")
    flags = ["-k", "small", "--benchmark-disable", "-p", "no:cacheprovider"]
    answer = subprocess.run(
        [sys.executable, "-m", "pytest", "bench", *flags], cwd=root, text=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    counted = [w for w in WORKLOADS.values() if w.op]
    tests = sum(2 + ("builtin" in workload.peers) for workload in counted)
    assert f"{tests} passed" in answer.stdout, answer.stdout[-2000:]


class Called(TorchDispatchMode):
    """Collects which of fastcl's operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **(kwargs or {}))


def test_every_operation_has_a_workload_that_runs_it() -> None:
    assert {w.op for w in WORKLOADS.values()} - {""} == OPS.keys()
    for workload in WORKLOADS.values():
        inputs = make_inputs(workload, workload.small, ONE)
        with Called() as called:
            step_of(workload, "fastcl", workload.small, inputs)()
        of_the_word = {op.overload.name() for op in OPS[workload.op]} if workload.op else set()
        ours = {name for name in called.names if name.startswith("fastcl::")}
        assert bool(ours & of_the_word) == bool(workload.op), (workload.name, ours)


@pytest.mark.parametrize(
    "fused",
    [
        lambda z0, z1: F.nt_xent(z0, z1, temperature=0.6),
        lambda z0, z1: F.nt_xent(z0, z1, temperature=0.5) + (z1 - z1.detach()).sum(),
        lambda z0, z1: F.nt_xent(z0, z1, temperature=0.5) * math.nan,
    ],
    ids=["value", "gradient", "nan"],
)
def test_a_wrong_provider_gets_no_number(fused, capsys) -> None:
    workload = dataclasses.replace(WORKLOADS["nt_xent"], fused=fused)
    wrong, right = measure.measure(workload, TINY, ["fastcl", "torch"], ONE)
    assert wrong["status"] == "wrong"
    assert "seconds" not in wrong
    assert right["status"] == "ok"
    assert right["seconds"]["median"] > 0
    report.print_table([wrong, right])
    line = next(line for line in capsys.readouterr().out.splitlines() if "fastcl" in line)
    assert "wrong" in line
    assert " ms" not in line and " µs" not in line


def test_an_exception_is_a_row_and_stops_nobody_else() -> None:
    def fails(z0, z1):
        raise RuntimeError("no such luck\nand more")

    workload = dataclasses.replace(WORKLOADS["nt_xent"], fused=fails)
    failed, right = measure.measure(workload, TINY, ["fastcl", "torch"], ONE)
    assert (failed["status"], failed["note"]) == ("failed", "RuntimeError: no such luck")
    assert "seconds" in right


def test_a_call_that_fails_later_is_a_row_too(monkeypatch, capsys) -> None:
    calls = []

    def fails_the_third_time(z0, z1):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of something")
        return F.nt_xent(z0, z1, temperature=0.5)

    workload = dataclasses.replace(WORKLOADS["nt_xent"], fused=fails_the_third_time)
    failed, right = measure.measure(workload, TINY, ["fastcl", "torch"], ONE)
    assert (failed["status"], failed["note"]) == ("failed", "RuntimeError: out of something")
    assert "seconds" not in failed
    assert len(right["seconds"]["samples"]) == 3
    report.print_table([failed, right])
    assert "failed: RuntimeError: out of something" in capsys.readouterr().out


def test_memory_that_cannot_be_measured_is_said(monkeypatch, capsys) -> None:
    def fails(**sizes):
        raise MemoryError("too much")

    peak = memory.peak_or_reason(fails)
    assert peak == (None, "memory: MemoryError: too much")
    monkeypatch.setattr(memory, "peak_bytes", lambda *_: peak)
    settings = dataclasses.replace(ONE, memory=True)
    results = measure.measure(WORKLOADS["nt_xent"], TINY, ["torch"], settings)
    report.print_table(results)
    assert "memory: MemoryError: too much" in capsys.readouterr().out


def die(*_) -> None:
    os._exit(9)


def test_a_killed_memory_process_stops_nobody(monkeypatch) -> None:
    monkeypatch.setattr(memory, "send_peak", die)
    workload, settings = WORKLOADS["nt_xent"], dataclasses.replace(ONE, memory=True)
    peak = memory.peak_bytes(workload, TINY, "fastcl", settings)
    assert peak == (None, "killed while its memory was measured")


def test_a_memory_process_that_raises_says_why() -> None:
    sizes = {"N": 2**40, "D": 2}  # 8 TiB
    settings = dataclasses.replace(ONE, memory=True)
    peak, reason = memory.peak_bytes(WORKLOADS["nt_xent"], sizes, "fastcl", settings)
    assert peak is None
    assert reason.startswith("memory: RuntimeError: ")


def test_a_change_in_place_is_compared_too() -> None:
    workload = dataclasses.replace(
        WORKLOADS["ema"],
        fused=lambda targets, sources: F.ema_update_(targets, sources, momentum=0.9),
    )
    (result,) = measure.measure(workload, {"width": 2}, ["fastcl"], ONE)
    assert result["status"] == "wrong"


# ---- what is not run is still listed -------------------------------------------------------------


def test_a_missing_peer_is_listed(monkeypatch, capsys) -> None:
    monkeypatch.setattr(machine, "version", lambda p: None if p == "lightly" else "1")
    results = measure.measure(WORKLOADS["nt_xent"], TINY, ["torch", "lightly"], ONE)
    assert results[1]["status"] == "not installed"
    report.print_table(results)
    assert "not installed" in capsys.readouterr().out


def test_what_cannot_fit_is_not_started(monkeypatch) -> None:
    monkeypatch.setattr(machine, "version", lambda p: "1")
    workload = WORKLOADS["nt_xent"]
    result = measure.begin(workload, workload.full, "pytorch-metric-learning", ONE)
    assert result["status"] == "does not fit"
    assert result["note"] == f"asks for about {13 * 8192**3 / 2**30:.0f} GiB"
    assert bytes_of(workload, "fastcl", workload.full, 4) == 0


# ---- what is counted -----------------------------------------------------------------------------


def test_resnet_50_has_its_published_number_of_parameters() -> None:
    shapes = resnet_shapes(64)
    assert len(shapes) == 161
    assert sum(math.prod(shape) for shape in shapes) == 25_557_032


def test_fraction_is_work_over_time_over_the_best_rate() -> None:
    result = {"work": {"amount": 3e9, "unit": "flop"}, "seconds": {"median": 0.5}}
    measure.set_fractions([result], {"mm": 8e9, "registers": 12e9})
    assert result["fraction_of_limit"] == 0.5
    assert result["limit"]["measured_by"] == "registers"


def test_providers_take_turns_and_slow_ones_sit_out(monkeypatch) -> None:
    calls: list[str] = []

    def step(name: str, seconds: float):
        def run():
            calls.append(name)
            time.sleep(seconds)
            return {}

        return Runner({"provider": name}, run, slow=False)

    settings = dataclasses.replace(ONE, repeats=5, seconds=0.08)
    samples = measure.take_turns([step("a", 0.006), step("b", 0.05)], settings)
    assert calls == ["a", "b", *"ab", *"ba", *"ab", *"aa"]
    assert [len(s) for s in samples] == [5, 3]
    assert min(samples[0]) >= 0.006


def test_a_call_that_takes_all_the_seconds_is_made_once() -> None:
    calls: list[str] = []

    def step(name: str, slow: bool) -> Runner:
        return Runner({"provider": name}, lambda: calls.append(name) or time.sleep(0.02), slow)

    settings = dataclasses.replace(ONE, repeats=5, seconds=0.01)
    samples = measure.take_turns([step("known", True), step("found", False)], settings)
    assert calls == ["found", "known", "found"]  # the second to find out
    assert [len(s) for s in samples] == [1, 1]


def test_memory_is_the_peak_of_one_call_in_a_process_of_its_own() -> None:
    settings = dataclasses.replace(ONE, memory=True)
    sizes = {"N": 1024, "D": 16}
    plain, reason = memory.peak_bytes(WORKLOADS["nt_xent"], sizes, "torch", settings)
    assert reason == ""
    if plain is None:
        pytest.skip("the kernel does not offer /proc/self/clear_refs")
    matrix = 4 * 2048**2
    assert 3 * matrix <= plain <= 8 * matrix


def test_registers_bound_the_multiply_adds() -> None:
    if machine.register_library() is None:
        pytest.skip("no C++ compiler")
    rates = machine.multiply_add_rates(torch.float32, "cpu")
    assert rates["registers"] > 1e9
    assert rates["registers"] > 0.5 * rates["mm"]  # other processes may slow either
