"""The Makefile's set-up errors, its help, and the script behind `make test`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
MAKE = shutil.which("make")

needs_make = pytest.mark.skipif(MAKE is None, reason="make is not installed")


def make(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "CXX")
    }
    return subprocess.run(
        [str(MAKE), *arguments],
        cwd=cwd,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder in which only the Makefile and what its rules depend on exist."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def complaint(ran: subprocess.CompletedProcess[str]) -> str:
    """The one line that fastcl's rules wrote."""
    assert ran.returncode != 0
    (line,) = (line for line in ran.stderr.splitlines() if not line.startswith("make"))
    return line


@needs_make
def test_make_alone_shows_the_commands(checkout: Path) -> None:
    ran = make(cwd=checkout)
    assert ran.returncode == 0
    for word in ["train", "test", "bench", "lint", "format", "build", "wheel", "clean"]:
        assert f"\nmake {word} " in "\n" + ran.stdout
    assert not (checkout / ".venv").exists()


@needs_make
@pytest.mark.parametrize("command", ["train", "test"])
def test_missing_python(checkout: Path, command: str) -> None:
    line = complaint(make(command, "PYTHON=/nowhere/python3", cwd=checkout))
    assert line.startswith("fastcl: no /nowhere/python3 found; install Python 3.10 or newer")


@needs_make
def test_python_too_old(checkout: Path) -> None:
    old = executable(
        checkout / "old", 'case "$*" in *version_info*) exit 1;; -V) echo Python 3.9.2;; esac'
    )
    line = complaint(make("train", f"PYTHON={old}", cwd=checkout))
    assert line.startswith(f"fastcl: needs Python 3.10 or newer; {old} is Python 3.9.2.")


@needs_make
def test_python_without_venv(checkout: Path) -> None:
    bare = executable(checkout / "bare", 'case "$*" in *ensurepip*) exit 1;; esac')
    line = complaint(make("test", f"PYTHON={bare}", cwd=checkout))
    assert line == f"fastcl: {bare} has no venv module; on Debian: apt-get install python3-venv"


@needs_make
@pytest.mark.parametrize("command", ["train", "test"])
def test_missing_compiler(checkout: Path, command: str) -> None:
    python = executable(checkout / ".venv/bin/python", f'exec "{sys.executable}" "$@"')
    assert python.exists()
    line = complaint(make(command, cwd=checkout, PATH=str(checkout)))
    assert line.startswith("fastcl: no C++ compiler found; install g++ or clang++")


@needs_make
def test_second_run_installs_nothing(checkout: Path) -> None:
    """The stamps, in the order in which a first run writes them, leave only the tests to run."""
    python = executable(checkout / ".venv/bin/python", 'echo "python $*"')
    for stamp in (".venv/.fastcl-installed", "fastcl/_C/_build.json", ".venv/.fastcl-ttsem"):
        (checkout / stamp).parent.mkdir(parents=True, exist_ok=True)
        (checkout / stamp).touch()
    ran = make("test", "ARGS=-x", cwd=checkout)
    assert ran.returncode == 0, ran.stderr
    assert python.exists()
    assert [line for line in ran.stdout.splitlines() if line.startswith("python ")] == [
        "python tests/run_all.py -x"
    ]
    os.utime(checkout / "pyproject.toml", (2e9, 2e9))
    again = make("test", cwd=checkout)
    assert "--no-build-isolation -e" in again.stdout


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text()


# ---- tests/run_all.py ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_all() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_all", ROOT / "tests" / "run_all.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OUTCOMES = """
import os, pytest
def test_passes(): pass
def test_passes_too(): pass
def test_fails(): assert False
@pytest.mark.skip
def test_is_skipped(): pass
@pytest.fixture
def broken(): raise RuntimeError
def test_has_a_broken_fixture(broken): pass
"""


def pytest_on(path: Path, text: str) -> tuple[list[str], dict[str, str]]:
    path.write_text(text)
    return [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={path.parent}",
        str(path),
    ], {}


def test_outcomes_are_counted(run_all: ModuleType, tmp_path: Path) -> None:
    arguments = pytest_on(tmp_path / "test_mixed.py", OUTCOMES)
    total, said = run_all.run("mixed", *arguments, [], capture=True)
    assert total == run_all.Total(passed=2, failed=2, skipped=1)
    assert "RuntimeError" in said and str(total) in said.splitlines()[-1]


@pytest.mark.parametrize(
    "text",
    ["import os\ndef test_dies(): os._exit(3)\n", "import nonexistent_package\n", "x = 1\n"],
    ids=["a process that died", "a file that does not import", "no test at all"],
)
def test_what_ran_no_test_counts_as_failed(run_all: ModuleType, tmp_path: Path, text: str) -> None:
    arguments = pytest_on(tmp_path / "test_broken.py", text)
    total, said = run_all.run("broken", *arguments, [], capture=True)
    assert "exit status" in said.splitlines()[-1]
    assert total == run_all.Total(failed=1)


def test_last_line_is_the_sum_and_status_says_failure(
    run_all: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    totals = {"a": run_all.Total(5, 0, 1), "b": run_all.Total(0, 2, 0), "c": run_all.Total(7, 0, 0)}
    monkeypatch.setattr(run_all, "processes", lambda: {name: ([], {}) for name in totals})
    monkeypatch.setattr(run_all, "run", lambda name, *_, **__: (totals[name], f"== {name}"))
    assert run_all.main([]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "12 passed, 2 failed, 1 skipped"
    assert {"== a", "== b", "== c"} <= set(lines)
    totals["b"] = run_all.Total(2, 0, 0)
    assert run_all.main([]) == 0


def test_every_test_file_belongs_to_a_process(run_all: ModuleType) -> None:
    covered = [
        argument
        for arguments, _ in run_all.processes().values()
        for argument in arguments
        if argument.startswith("tests/")
    ]
    apart = [*ROOT.glob("tests/triton/**/test_*.py"), *ROOT.glob("tests/programs/test_*.py")]
    assert {str(path.parent.relative_to(ROOT)) for path in apart} == set(covered)
