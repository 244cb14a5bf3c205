"""setup.py in a checkout: a build that fails leaves the kernels of the one before."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pybind11", "ninja"))
    or not any(map(shutil.which, ("g++", "clang++"))),
    reason="building needs a C++ compiler, pybind11 and ninja",
)


def begin_build(checkout: Path, source: str, **variables: str) -> subprocess.Popen[str]:
    (checkout / "csrc").mkdir(exist_ok=True)
    (checkout / "csrc" / "one.cpp").write_text(source)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTCL_")}
    return subprocess.Popen(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=checkout,
        env=environment | {"FASTCL_BUILD_ISAS": "baseline"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def build_in_place(
    checkout: Path, source: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    process = begin_build(checkout, source, **variables)
    output = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, *output)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with setup.py and nothing that it would install."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "fastcl").mkdir()
    shutil.copy(ROOT / "fastcl" / "__init__.py", tmp_path / "fastcl")
    return tmp_path


def kernels(checkout: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (checkout / "fastcl" / "_C").glob("*")}


@pytest.mark.parametrize("required", ["0", "1"])
def test_failed_build_leaves_the_kernels_of_the_one_before(checkout: Path, required: str) -> None:
    first = build_in_place(checkout, "int one() { return 1; }\n")
    assert first.returncode == 0, first.stdout + first.stderr
    before = kernels(checkout)
    assert json.loads(before["_build.json"])["isas"] == ["baseline"]
    assert len(before) == 2

    failed = build_in_place(checkout, "int one( {\n", FASTCL_REQUIRE_COMPILER=required)
    assert failed.returncode != 0
    assert "fastcl: the C++ kernels were not built: " in failed.stderr
    assert kernels(checkout) == before

    mended = build_in_place(checkout, "int one() { return 2; }\n")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    after = kernels(checkout)
    assert after.keys() == before.keys()
    assert after != before


def test_first_build_that_fails_is_no_error_unless_it_must_not(checkout: Path) -> None:
    """An editable install without a compiler succeeds, and says what was missing."""
    must = build_in_place(checkout, "int one( {\n", FASTCL_REQUIRE_COMPILER="1")
    assert must.returncode != 0
    assert kernels(checkout) == {}
    may = build_in_place(checkout, "int one( {\n")
    assert may.returncode == 0, may.stderr
    record = json.loads(kernels(checkout)["_build.json"])
    assert record["isas"] == [] and "one.cpp" in record["error"]


def test_one_build_waits_for_another(checkout: Path) -> None:
    folder = checkout / "build" / f"editable-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build = begin_build(checkout, "int one() { return 1; }\n")
        with pytest.raises(subprocess.TimeoutExpired):
            build.wait(5)
        assert kernels(checkout) == {}
    assert build.communicate() is not None and build.returncode == 0
    assert len(kernels(checkout)) == 2
