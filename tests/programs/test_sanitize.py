"""`make sanitize` exists, and what it builds reports one float read past the end of a Scratch."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sanitize

ROOT = Path(__file__).parents[2]

# The kernels' own memory and loads: `count` floats, the last `read` of them read as a vector's end.
SNIPPET = """
#include "scratch.h"
extern "C" float last(int64_t count, int64_t read) {
  const fastcl::Scratch memory(size_t(count) * 4);
  float* x = memory.as<float>();
  for (int64_t i = 0; i < count; ++i) x[i] = float(i);
  return fastcl::load(x, read)[read - 1];
}
"""
CALL = """
import ctypes, sys
last = ctypes.CDLL(sys.argv[1]).last
last.restype, last.argtypes = ctypes.c_float, [ctypes.c_int64, ctypes.c_int64]
print(last(3, int(sys.argv[2])))
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_sanitize_runs_the_script() -> None:
    said = subprocess.run(
        ["make", "-n", "sanitize"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "python tests/sanitize.py" in said.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers' runtimes are g++'s")
def test_one_read_past_the_end_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "g++")
    source, library = tmp_path / "snippet.cpp", tmp_path / "snippet.so"
    source.write_text(SNIPPET)
    flags = [*sanitize.FLAGS.split(), "-std=c++17", "-fPIC", "-shared", "-Wno-psabi"]
    compile_it = ["g++", *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)]
    subprocess.run(compile_it, check=True)

    def call(read: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", CALL, str(library), str(read)]
        return subprocess.run(command, env=sanitize.environment(), capture_output=True, text=True)

    good = call(3)
    assert (good.returncode, good.stdout) == (0, "2.0\n"), good.stderr
    bad = call(4)
    assert bad.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in bad.stderr
    assert "simd.h" in bad.stderr
