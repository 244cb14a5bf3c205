"""`python -m bench` as a command: what it says, prints, writes and draws."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bench_setting import ONE, TINY, at, one_thread  # noqa: F401

import fastcl.functional as F
from bench import measure, report
from bench.__main__ import main
from bench.inputs import New
from bench.workloads import PROVIDERS, WORKLOADS


@pytest.mark.parametrize("arguments", [["nt_xnt"], ["clip", "--providers", "torch,lightli"]])
def test_a_typo_gives_one_line_with_the_list(arguments, capsys) -> None:
    assert main(arguments) == 2
    line = one_line(capsys)
    assert ", ".join(WORKLOADS if "nt_xnt" in arguments else PROVIDERS) in line
    assert f"did you mean {'nt_xent' if 'nt_xnt' in arguments else 'lightly'}?" in line


def one_line(capsys) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("python -m bench: ")
    return line


def test_what_cannot_be_done_is_one_line_and_status_2(tmp_path, capsys) -> None:
    broken, other = tmp_path / "broken.json", tmp_path / "other.json"
    broken.write_text('{"results": [')
    result = {"workload": "nt_xent", "provider": "a peer of the future"}
    other.write_text(json.dumps({"results": [result]}))
    cases = {
        ("--from", str(tmp_path / "none.json")): "No such file",
        ("--from", str(broken)): "is no file that --json has written",
        ("--from", str(other)): "another version",
        ("clip", "--providers", "lightly"): "nothing to measure",
        ("clip", "--providers", "memeff"): "nothing to measure",
        ("clip", "--device", "cuda:7"): "no CUDA device",
        ("clip", "--device", "tpu"): "cpu, cuda",
        ("clip", "--seconds", "0"): "above 0",
        ("clip", "--scaling", "--least", "64", "--most", "32"): "--most 32",
        ("clip", "--json", str(tmp_path)): "Is a directory",
        ("clip", "--json", str(broken / "x.json")): "cannot write to",
        ("clip", "--plots", str(broken)): "File exists",
    }
    if torch.cuda.is_available():
        del cases["clip", "--providers", "memeff"], cases["clip", "--device", "cuda:7"]
    for arguments, expected in cases.items():
        assert main(list(arguments)) == 2, arguments
        assert expected in one_line(capsys), arguments


def test_help_describes_every_subcommand(capsys) -> None:
    from bench.__main__ import SUBCOMMANDS

    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(f"{name:<12}{what}" in shown for name, (_, what) in SUBCOMMANDS.items())


def test_ctrl_c_keeps_what_was_measured(tmp_path) -> None:
    file = tmp_path / "run.json"
    command = [sys.executable, "-m", "bench", "queue_push", "nt_xent", "--providers", "fastcl"]
    command += ["--no-memory", "--threads", "1", "--json", str(file)]
    process = subprocess.Popen(
        [*command, "--seconds", "1"], cwd=Path(__file__).parents[2], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not (file.exists() and file.stat().st_size):  # queue_push is done
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err and "stopped" in err
    assert "queue_push" in out and "spread: " in out
    assert [r["workload"] for r in json.loads(file.read_text())["results"]] == ["queue_push"]


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


def test_pictures_end_lines_where_a_size_was_skipped() -> None:
    plots = pytest.importorskip("bench.plots")
    fast = [at(n, 1e-9 * n**2, 100.0 * n) for n in (2**14, 2**15, 2**16)]
    slow = [at(n, 1e-8 * n**2, n**2, "torch") for n in (2**14, 2**15)]
    for r in fast + slow:
        r["seconds"].update(lower_quartile=r["seconds"]["median"], upper_quartile=1.0)
    skipped = {**at(2**16, 0.0, provider="torch"), "status": "does not fit"}
    del skipped["seconds"]
    figure = plots.scaling([*fast, *slow, skipped], "N")
    for axes in figure.axes:
        assert [list(line.get_xdata()) for line in axes.lines] == [
            [2**14, 2**15, 2**16],
            [2**14, 2**15],
        ]
        assert min(min(line.get_ydata()) for line in axes.lines) > 0
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "fastcl: time $N^{2.00}$, memory $N^{1.00}$",
        "torch: time $N^{2.00}$, memory $N^{2.00}$; above 32,768 does not fit",
    ]


def test_inputs_are_the_same_for_everybody() -> None:
    for workload in WORKLOADS.values():
        first, second = (workload.inputs(New(torch.float32, "cpu"), **workload.small) for _ in "ab")
        for x, y in zip(first.values(), second.values()):
            assert all(map(torch.equal, x, y)) if isinstance(x, list) else torch.equal(x, y)
