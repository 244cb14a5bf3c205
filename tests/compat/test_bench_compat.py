"""`python -m bench compat`, at small sizes."""

from __future__ import annotations

import json

import pytest
import torch

from bench import compat
from bench.compat_cases import CASES


def test_rows_of_two_libraries(tmp_path, capsys):
    for library in ("info_nce", "lightly"):
        pytest.importorskip(library)
    threads = torch.get_num_threads()
    file = tmp_path / "compat.json"
    status = compat.main(
        ["info_nce", "lightly", "--size=small", "--repeats=1", "--no-memory", f"--json={file}"]
    )
    torch.set_num_threads(threads)
    rows = json.loads(file.read_text())["results"]
    expected = [c for c in CASES if c.library in ("info_nce", "lightly")]
    assert status == 0 and len(rows) == len(expected)
    for row in rows:
        assert row["status"] == "ok" and 0 <= row["deviation"] < 1e-5
        assert row["theirs"]["median"] > 0 < row["ours"]["median"]
    assert capsys.readouterr().out.count("×") == len(rows)


def test_memory_of_a_process():
    pytest.importorskip("info_nce")
    case = next(c for c in CASES if c.name == "InfoNCE")
    theirs, ours = (compat.peak_of(case, {"n": 1024, "d": 8}, x, 1) for x in (False, True))
    if theirs is None:
        pytest.skip("no /proc/self/clear_refs here")
    assert theirs > 1024 * 1024 * 4 > ours


def test_a_wrong_result_and_a_failure_are_rows(monkeypatch, capsys):
    def wrong(module, n):
        return lambda: [torch.tensor([1.0 + ("compat" in module.__name__)])]

    def failing(module, n):
        raise RuntimeError("no such thing")

    cases = [
        CASES[0]._replace(library="info_nce", make=f, small={"n": 1}) for f in (wrong, failing)
    ]
    monkeypatch.setattr(compat, "CASES", cases)
    pytest.importorskip("info_nce")
    assert compat.main(["info_nce", "--size=small", "--repeats=1", "--no-memory"]) == 1
    output = capsys.readouterr().out
    assert "1e+00 WRONG" in output and "RuntimeError: no such thing" in output


def test_wrong_usage(capsys):
    assert compat.main(["lightning"]) == 2
    assert "unknown library 'lightning'; did you mean lightly?" in capsys.readouterr().err
