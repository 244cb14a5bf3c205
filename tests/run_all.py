"""Runs every test: one pytest process after the other, then a line that adds them up.

    python tests/run_all.py [pytest's flags]

Triton's interpreter and ttsem act when triton is imported, so tests/triton needs processes of its
own (see tests/triton/conftest.py). All of them run even when one fails; the exit status is 1 when
a test failed, a process died or a process found no test.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
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
        "tests": ([*PYTEST, "tests", "--ignore=tests/triton"], {}),
        "tests/triton/interp": ([*PYTEST, "tests/triton/interp"], {"TRITON_INTERPRET": "1"}),
        "tests/triton/aot": ([*PYTEST, "tests/triton/aot"], {}),
        "tests/triton/gpu": ([*sanitize, "tests/triton/gpu"], {}),
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


def run(name: str, arguments: list[str], environment: dict[str, str], flags: list[str]) -> Total:
    """One process, its output shown; a process that died counts as one failure."""
    print(f"\n== {name}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        started = time.monotonic()
        status = subprocess.run(
            [sys.executable, *arguments, f"--junitxml={report}", *flags],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
        ).returncode
        total = counts(report) if report.exists() else Total()
    if status == NO_TESTS and flags:  # such as -k: the others may have some
        status = 0
    if status != 0 and total.failed == 0:
        total += Total(failed=1)
    outcome = "" if status == 0 else f" (exit status {status})"
    print(f"== {name}: {total} in {time.monotonic() - started:.0f} s{outcome}", flush=True)
    return total


def main(flags: list[str]) -> int:
    total = Total()
    for name, (arguments, environment) in processes().items():
        total += run(name, arguments, environment, flags)
    print(f"\n{total}")
    return 1 if total.failed or not total.passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
