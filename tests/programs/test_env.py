"""python -m fastcl.env tells what is installed and what would run."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest
import torch

import fastcl
from fastcl import _C, env
from fastcl.ops import OPS


def facts(capsys: pytest.CaptureFixture[str]) -> dict:
    assert env.main(["--json"]) == 0
    return json.loads(capsys.readouterr().out)


def lines_of(text: str, title: str) -> dict[str, str]:
    """The rows below a title: first column -> the rest."""
    block = next(b for b in text.split("\n\n") if b.startswith(title + "\n"))
    rows = (line.strip().split(maxsplit=1) for line in block.splitlines()[1:])
    return {row[0]: row[1] for row in rows}


def test_module_runs_as_a_command() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "fastcl.env"], capture_output=True, text=True, check=True
    )
    versions = lines_of(ran.stdout, "versions")
    assert versions["fastcl"] == fastcl.__version__
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"]
    assert versions["python"] == platform.python_version()
    assert set(lines_of(ran.stdout, "backend of each operation, float32")) == set(OPS)


def test_json_and_text_say_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    told = facts(capsys)
    env.main([])
    text = capsys.readouterr().out
    assert lines_of(text, "versions") == {
        key: value or "not installed" for key, value in told["versions"].items()
    }
    for word, by in told["operations"].items():
        row = lines_of(text, "backend of each operation, float32")[word]
        assert row.split() == [
            part for device in by for part in (f"{device}:", by[device]["name"] or "none")
        ]
    for reason in {
        backend["reason"] for by in told["operations"].values() for backend in by.values()
    }:
        assert reason in text


def test_columns_are_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    env.main([])
    for block in capsys.readouterr().out.strip().split("\n\n"):
        title, *rows = block.splitlines()
        assert not title.startswith(" ")
        assert all(row.startswith("  ") and row == row.rstrip() for row in rows)
    width = 2 + max(map(len, OPS)) + 2
    block = env.render(env.collect()).split("backend of each operation, float32\n")[1]
    for row in block.split("\n\n")[0].splitlines():
        assert row.index("cpu:") == width


def test_kernels_are_the_ones_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    if _C.kernels is None:
        pytest.skip(_C.MISSING)
    told = facts(capsys)
    kernels = told["kernels"]
    assert kernels["instruction_set"] == _C.ISA
    assert kernels["compiler"] == _C.build_record()["compiler"]
    assert kernels["available"] == [
        isa for isa in _C.kernels.supported_isas() if isa in kernels["built"]
    ]
    assert _C.ISA in kernels["available"]
    assert kernels["missing"] is None


def test_threads_follow_torch(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert facts(capsys)["system"]["threads"] == 3
    finally:
        torch.set_num_threads(threads)


def test_forced_backend_is_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCL_BACKEND", "reference")
    told = facts(capsys)
    assert told["environment"]["FASTCL_BACKEND"] == "reference"
    for by in told["operations"].values():
        assert by["cpu"] == {"name": "reference", "reason": "FASTCL_BACKEND=reference"}


def test_backend_that_cannot_run_is_reported_not_raised(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCL_BACKEND", "nonsense")
    for by in facts(capsys)["operations"].values():
        assert by["cpu"]["name"] is None
        assert "must be one of auto, cpp, triton, reference" in by["cpu"]["reason"]


def test_missing_kernels_are_told_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_C, "kernels", None)
    monkeypatch.setattr(_C, "ISA", None)
    monkeypatch.setattr(_C, "MISSING", "The C++ kernels were not built: no compiler.")
    told = facts(capsys)
    assert told["kernels"]["available"] == []
    for by in told["operations"].values():
        assert by["cpu"] == {"name": "reference", "reason": _C.MISSING}
    env.main([])
    assert lines_of(capsys.readouterr().out, "kernels of the CPU") == {"C++": _C.MISSING}


def test_missing_package_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = env.installed
    monkeypatch.setattr(env, "installed", lambda name: None if name == "timm" else real(name))
    assert facts(capsys)["extras"]["train"]["timm"] is None
    env.main([])
    assert "timm (missing)" in capsys.readouterr().out
