"""The tools' own verdicts: `make lint` as tests, and `make format` mends most of what they find."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").glob("*.[ch]*"))


def tool(name: str) -> str:
    """The tool beside this Python, or on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install 'fastcl[dev]'")
    return found


def assert_content(*command: str) -> None:
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-4000:]


def test_ruff_check() -> None:
    assert_content(tool("ruff"), "check", ".")


def test_ruff_format() -> None:
    assert_content(tool("ruff"), "format", "--check", ".")


def test_mypy_strict() -> None:
    assert_content(tool("mypy"))


def test_clang_format() -> None:
    assert len(CSRC) > 5
    assert_content(tool("clang-format"), "--dry-run", "-Werror", *CSRC)


def test_csrc_lines_fit_100_columns() -> None:
    """clang-format leaves comments alone, as their line breaks are the formula's."""
    lines = ((path, i, line) for path in CSRC for i, line in enumerate(source_lines(path), 1))
    assert [f"{path}:{i}" for path, i, line in lines if len(line) > 100] == []


def source_lines(path: str) -> list[str]:
    return (ROOT / path).read_text(encoding="utf-8").splitlines()
