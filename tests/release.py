"""`make release-check`: what would be published, installed and tested with two releases of torch.

    python tests/release.py [--torch 2.13.0 2.14.1] [--wheel dist/fastcl-….whl]

Builds the source distribution, and from it the wheel, into dist/. Then, for each release of torch,
a virtual environment of its own in build/release, with that torch, the wheel and what it requires,
and a part of the tests that covers every operation, in a folder where the sources are not. The
compiled part is one and the same in all of them: it includes no torch header and links no library
of torch's. pip's own configuration decides where packages come from and which build of torch it is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
WORK = ROOT / "build" / "release"
PIP = ("-m", "pip", "--disable-pip-version-check", "-q")
TORCH = ("2.13.0", "2.14.1")
# What needs neither the sources nor another library.
TESTS = (
    *("ops", "test_functional.py", "test_losses.py", "test_nn.py", "test_doctests.py"),
    *("programs/test_distributed.py", "programs/test_typing.py"),
)
CHOSEN = "not has_a_file_in_every_layer"  # that looks at the sources
INSTALLED = """
import pathlib, sys, torch, fastcl
from fastcl import _C
assert pathlib.Path(fastcl.__file__).is_relative_to(sys.prefix), fastcl.__file__
assert torch.__version__.split("+")[0] == sys.argv[1], torch.__version__
assert fastcl.__version__ == sys.argv[2], fastcl.__version__
assert _C.kernels is not None, _C.MISSING
print(f"torch {torch.__version__}, fastcl {fastcl.__version__}, {_C.ISA}")
"""


def run(*command: str | Path, cwd: Path = ROOT, **variables: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    subprocess.run([str(c) for c in command], cwd=cwd, env=environment, check=True)


def build() -> Path:
    """dist/fastcl-*.tar.gz, and the wheel that is built from nothing but it."""
    for old in DIST.glob("fastcl-*"):
        old.unlink()
    make_sdist = (
        "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    )
    run(sys.executable, "-c", make_sdist, DIST)
    (sdist,) = DIST.glob("fastcl-*.tar.gz")
    options = ("--no-deps", "--no-build-isolation", "-w", DIST)
    run(sys.executable, *PIP, "wheel", *options, sdist, FASTCL_REQUIRE_COMPILER="1")
    (wheel,) = DIST.glob("fastcl-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        modules = [name for name in archive.namelist() if name.endswith(".so")]
        assert modules, "the wheel has no compiled kernels"
        for name in modules:
            content = archive.read(name)
            found = [x for x in (b"libtorch", b"libc10", b"_ZN2at", b"_ZN3c10") if x in content]
            assert not found, f"{name} depends on torch: {found}"
    return wheel


def copy_tests(to: Path) -> None:
    for name in ("conftest.py", "golden", *TESTS):
        source, copy = ROOT / "tests" / name, to / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)


def test_with(torch: str, wheel: Path) -> None:
    """The wheel in an environment with this release of torch."""
    folder = WORK / f"torch-{torch}"
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder / "venv", with_pip=True, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    run(python, *PIP, "install", f"torch=={torch}")
    run(python, *PIP, "install", wheel, "pytest", "hypothesis", "mypy")
    copy_tests(folder / "tests")
    run(python, "-c", INSTALLED, torch, wheel.name.split("-")[1], cwd=folder)
    run(python, "-m", "pytest", "-p", "no:cacheprovider", *("-k", CHOSEN), "tests", cwd=folder)
    shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch", nargs="+", default=TORCH, help="releases of torch")
    parser.add_argument("--wheel", type=Path, help="test this one; nothing is built")
    chosen = parser.parse_args()
    wheel = chosen.wheel.resolve() if chosen.wheel else build()
    for torch in chosen.torch:
        print(f"== {wheel.name} with torch {torch}", flush=True)
        test_with(torch, wheel)
    print(f"{wheel.name} works with torch {', '.join(chosen.torch)}")


if __name__ == "__main__":
    main()
