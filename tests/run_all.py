"""Runs every test, in a few pytest processes, then a line that adds them up.

    python tests/run_all.py [pytest's flags]

Triton's interpreter and ttsem act when triton is imported, so tests/triton needs processes of its
own (see tests/triton/conftest.py). tests/programs starts programs and waits for them, so something
else can run meanwhile: as many processes as there are cores run side by side. The first shows its
tests as they come, the others when they end. All of them run even when one fails; the exit status
is 1 when a test failed, a process died or a process found no test.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PYTEST = ("-m", "pytest", "--color=auto")
NO_TESTS = 5  # pytest's exit status


class Total(NamedTuple):
    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def __add__(self, other: tuple[int, ...]) -> Total:  # type: ignore[override]
        return Total(*(a + b for a, b in zip(self, other)))

    def __str__(self) -> str:
        return f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped"


def processes() -> dict[str, tuple[list[str], dict[str, str]]]:
    """Name -> (arguments of python, environment)."""
    sanitize = ["-m", "ttsem.sanitize", "pytest"] if importlib.util.find_spec("ttsem") else PYTEST
    return {
        "tests/programs": ([*PYTEST, "tests/programs"], {}),  # the longest begin first
        "tests": ([*PYTEST, "tests", "--ignore=tests/triton", "--ignore=tests/programs"], {}),
        "tests/triton/aot": ([*PYTEST, "tests/triton/aot"], {}),
        "tests/triton/gpu": ([*sanitize, "tests/triton/gpu"], {}),
        "tests/triton/interp": ([*PYTEST, "tests/triton/interp"], {"TRITON_INTERPRET": "1"}),
    }


def counts(report: Path) -> Total:
    """What a process's JUnit report says."""
    suites = ET.parse(report).getroot().iter("testsuite")
    total = Total()
    for suite in suites:
        tests, failures, errors, skipped = (
            int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")
        )
        failed = failures + errors
        total += Total(tests - failed - skipped, failed, skipped)
    return total


def run(
    name: str, arguments: list[str], environment: dict[str, str], flags: list[str], capture: bool
) -> tuple[Total, str]:
    """One process: what its tests say, and its output if captured, else shown as it comes.

    A process that died counts as one failure.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        started = time.monotonic()
        # Cores are shared. Hundreds of processes import torch: the first keep its bytecode.
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **environment}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        process = subprocess.run(
            [sys.executable, *arguments, f"--junitxml={report}", *flags],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.STDOUT if capture else None,
            text=True,
        )
        total = counts(report) if report.exists() else Total()
    status = process.returncode
    if status == NO_TESTS and flags:  # such as -k: the others may have some
        status = 0
    if status != 0 and total.failed == 0:
        total += Total(failed=1)
    outcome = "" if status == 0 else f" (exit status {status})"
    line = f"== {name}: {total} in {time.monotonic() - started:.0f} s{outcome}"
    return total, f"{process.stdout or ''}{line}"


def main(flags: list[str]) -> int:
    first, *_ = every = processes()
    print(f"\n== {first}", flush=True)
    total = Total()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {
            pool.submit(run, name, *process, flags, capture=name != first): name
            for name, process in every.items()
        }
        for done in as_completed(running):
            more, said = done.result()
            total += more
            title = "" if running[done] == first else f"\n== {running[done]}\n"
            print(f"{title}{said}", flush=True)
    print(f"\n{total}")
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
