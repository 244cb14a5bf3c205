"""`python -m bench`: what it counts, what it refuses to time, and what it prints."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench is not part of the installed package

import fastcl.functional as F
from bench import machine, measure, report
from bench.__main__ import main
from bench.measure import Settings
from bench.workloads import PROVIDERS, WORKLOADS, New, bytes_of, providers_of, resnet_shapes

ONE = Settings(threads=1, repeats=3, seconds=0.05, memory=False)
TINY = {"N": 16, "D": 8}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(name: str) -> dict[str, int]:
    """The small sizes, rows cut further: pytorch-metric-learning is cubic in them."""
    return {
        key: min(value, 32) if key == "N" else value for key, value in WORKLOADS[name].small.items()
    }


# ---- correctness comes first ---------------------------------------------------------------------


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_installed_provider_agrees_with_the_float64_formula(name: str) -> None:
    workload, sizes = WORKLOADS[name], tiny(name)
    inputs = measure.make_inputs(workload, sizes, ONE)
    for provider in providers_of(workload):
        result = measure.begin(workload, sizes, provider, ONE)
        if provider == "compile" or result.get("status") == "not installed":
            continue
        step = measure.checked(workload, sizes, result, inputs, ONE)
        assert result["status"] == "ok", (provider, result)
        assert step is not None
        assert result["errors"].keys() >= {*workload.gradients, *workload.mutates}


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


def test_a_change_in_place_is_compared_too() -> None:
    workload = dataclasses.replace(
        WORKLOADS["ema"],
        fused=lambda targets, sources: F.ema_update_(targets, sources, momentum=0.9),
    )
    (result,) = measure.measure(workload, {"width": 2}, ["fastcl"], ONE)
    assert result["status"] == "wrong"


# ---- what is not run is still listed -------------------------------------------------------------


def test_a_missing_peer_is_listed(monkeypatch, capsys) -> None:
    monkeypatch.setattr(machine, "version", lambda p: None if p == "solo-learn" else "1")
    results = measure.measure(WORKLOADS["nt_xent"], TINY, ["torch", "solo-learn"], ONE)
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

        return ({"provider": name}, run)

    settings = dataclasses.replace(ONE, repeats=5, seconds=0.08)
    samples = measure.take_turns([step("a", 0.006), step("b", 0.05)], settings)
    assert calls == ["a", "b", *"ab", *"ba", *"ab", *"aa"]
    assert [len(s) for s in samples] == [5, 3]
    assert min(samples[0]) >= 0.006


def test_memory_is_the_peak_of_one_call_in_a_process_of_its_own() -> None:
    settings = dataclasses.replace(ONE, memory=True)
    sizes = {"N": 1024, "D": 16}
    plain = measure.peak_bytes(WORKLOADS["nt_xent"], sizes, "torch", settings)
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


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["nt_xnt"], ["clip", "--providers", "torch,lightli"]])
def test_a_typo_gives_one_line_with_the_list(arguments, capsys) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert ", ".join(WORKLOADS if "nt_xnt" in arguments else PROVIDERS) in line


def test_list_names_every_workload(capsys) -> None:
    assert main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in WORKLOADS)


def test_a_run_writes_what_is_needed_to_repeat_it(tmp_path, capsys) -> None:
    file = tmp_path / "new" / "run.json"
    flags = ["--providers", "fastcl,torch", "--threads", "1", "--repeats", "3", "--no-memory"]
    arguments = ["sinkhorn", "negative_cosine", "--size", "small", *flags, "--json", str(file)]
    assert main([*arguments, "--seconds", "0.05"]) == 0
    printed = capsys.readouterr().out
    run = json.loads(file.read_text())
    assert run["command"].startswith("python -m bench sinkhorn negative_cosine --size small")
    assert run["machine"]["threads"] == 1
    assert torch.__version__.startswith(run["machine"]["versions"]["torch"])
    names = [(r["workload"], r["provider"]) for r in run["results"]]
    assert names == [(w, p) for w in ("sinkhorn", "negative_cosine") for p in ("fastcl", "torch")]
    for r in run["results"]:
        work, seconds = r["work"]["amount"], r["seconds"]["median"]
        assert len(r["seconds"]["samples"]) == 3
        assert r["fraction_of_limit"] == pytest.approx(work / seconds / r["limit"]["per_second"])
        assert report.duration(seconds) in printed


def test_exit_status_tells_that_fastcl_is_wrong(monkeypatch, capsys) -> None:
    wrong = dataclasses.replace(
        WORKLOADS["dcl"], fused=lambda z0, z1: F.dcl(z0, z1, temperature=1.0)
    )
    monkeypatch.setitem(WORKLOADS, "dcl", wrong)
    flags = ["--size", "small", "--providers", "fastcl", "--threads", "1", "--no-memory"]
    assert main(["dcl", *flags]) == 1


def test_plain_table_holds_what_the_rich_one_does() -> None:
    results = measure.measure(WORKLOADS["clip"], TINY, ["fastcl", "torch"], ONE)
    measure.set_fractions(results, {"mm": 1e12})
    text = report.plain_table(report.title(results[0]), report.rows(results))
    heading, columns, *lines = text.splitlines()
    assert heading.startswith("clip  N=16 D=8  float32  cpu  ")
    assert [line.split()[0] for line in lines] == ["fastcl", "torch"]
    assert columns.index("error") > columns.index("memory") > columns.index("median")


def test_pictures_show_the_measured_numbers(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from bench import plots

    results = []
    for rows in (8, 16, 32):
        results += measure.measure(
            WORKLOADS["nt_xent"], {"N": rows, "D": 8}, ["fastcl", "torch"], ONE
        )
    measure.set_fractions(results, {"mm": 1e12})
    for r in results:
        r["peak_bytes"] = 2**20 * r["sizes"]["N"]
    assert [p.name for p in plots.draw(results, tmp_path)] == [
        "scaling_nt_xent.png",
        "fraction_of_limit.png",
    ]
    figure = plots.scaling(results, "N")
    seconds, memory = (axes.lines[0] for axes in figure.axes)
    own = [r for r in results if r["provider"] == "fastcl"]
    assert list(seconds.get_xdata()) == list(memory.get_xdata()) == [8, 16, 32]
    assert list(seconds.get_ydata()) == [1e3 * r["seconds"]["median"] for r in own]
    assert list(memory.get_ydata()) == [8, 16, 32]


def test_inputs_are_the_same_for_everybody() -> None:
    for workload in WORKLOADS.values():
        first, second = (workload.inputs(New(torch.float32, "cpu"), **workload.small) for _ in "ab")
        for x, y in zip(first.values(), second.values()):
            assert all(map(torch.equal, x, y)) if isinstance(x, list) else torch.equal(x, y)
