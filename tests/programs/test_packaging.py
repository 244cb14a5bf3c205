"""What an installation contains, and that it works with and without a C++ compiler.

Everything is built from a copy of the sources and runs in processes of its own, so that neither
the checkout nor the environment's own fastcl takes part.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import release

ROOT = Path(__file__).parents[2]
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = ["baseline", "avx2"] if X86 else ["baseline"]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q")
IN_PLACE = ("--no-deps", "--no-build-isolation", "--no-index")

needs_build_tools = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("pip", "wheel", "pybind11", "ninja")),
    reason="building needs pip, wheel, pybind11 and ninja: pip install 'fastcl[test]'",
)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler"
)

# A loss on 64 rows of 24 against the formula in float64, and where it ran.
RUN_A_LOSS = """
import json, sys, warnings
import torch
import fastcl, fastcl.functional as F

torch.manual_seed(0)
z0, z1 = torch.randn(2, 32, 24).requires_grad_().unbind()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    losses = [F.nt_xent(z0, z1, temperature=0.1) for _ in range(2)]

z = torch.nn.functional.normalize(torch.cat([z0, z1]).double())
s = (z @ z.T / 0.1).fill_diagonal_(-torch.inf)
truth = torch.nn.functional.cross_entropy(s, torch.arange(64).roll(32))
print(json.dumps({
    "file": fastcl.__file__,
    "backend": fastcl.backend_of(z0),
    "isa": fastcl._C.ISA,
    "errors": [abs(loss.item() - truth.item()) / truth.item() for loss in losses],
    "warnings": [[w.category.__name__, str(w.message)] for w in caught],
}))
"""


def python(
    *arguments: str, path: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, `path` before everything installed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FASTCL_")} | variables
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    elsewhere = path or ROOT / "tests"  # the current folder comes before PYTHONPATH
    return subprocess.run(
        [sys.executable, *arguments], cwd=elsewhere, capture_output=True, text=True, env=environment
    )


def pip(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PIP, *arguments], cwd=cwd, capture_output=True, text=True, env={**os.environ, **variables}
    )


def loss_from(path: Path, **variables: str) -> dict:
    ran = python("-c", RUN_A_LOSS, path=path, **variables)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert Path(result["file"]).is_relative_to(path)
    assert max(result["errors"]) < 2e-6
    return result


def copy_sources(to: Path) -> Path:
    """The files that git knows or would add."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    for name in filter(None, listing.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/golden/"):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # What an earlier build of other instruction sets left must not get into the wheel.
    stale = sources / "build" / "lib.stale" / "fastcl" / "_C" / "avx512.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    built = pip(
        *("wheel", *IN_PLACE, "-w", str(folder), "."),
        cwd=sources,
        FASTCL_BUILD_ISAS=",".join(ISAS),
        FASTCL_REQUIRE_COMPILER="1",
        CXXFLAGS="-O0",  # what counts here is what gets built, not how fast it runs
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("fastcl-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    done = pip(
        "install", "--no-deps", "--no-index", "--target", str(folder), str(wheel), cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder


# ---- with a compiler -----------------------------------------------------------------------------


@needs_build_tools
@needs_compiler
def test_wheel_holds_the_package_and_nothing_else(wheel: Path, sources: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read("fastcl/_C/_build.json"))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    python_files = {
        *(f"fastcl/{p.relative_to(sources / 'fastcl')}" for p in sources.glob("fastcl/**/*.py")),
        *(f"fastcl/kernels/{p.name}" for p in sources.glob("kernels/*.py")),
    }
    assert {name for name in names if name.endswith(".py")} == python_files
    assert {name for name in names if name.endswith(".so")} == {
        f"fastcl/_C/{isa}{suffix}" for isa in ISAS
    }
    assert record["isas"] == ISAS
    assert record["compiler"]
    assert names >= {"fastcl/py.typed", "fastcl/data/fashion.npz", "fastcl/data/fashion.LICENSE"}
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fastcl"}
    licences = {name.split("/licenses/")[1] for name in names if "/licenses/" in name}
    assert licences == {"LICENSE", "fastcl/data/fashion.LICENSE"}


@needs_build_tools
@needs_compiler
def test_wheel_needs_torch_triton_and_numpy_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.split(">")[0].split(";")[0].strip() for line in required} == {
        *("torch", "numpy", "triton")
    }
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"


@needs_build_tools
@needs_compiler
def test_loss_runs_from_the_installed_wheel(installed: Path) -> None:
    result = loss_from(installed)
    assert result["backend"][0] == "cpp"
    assert result["isa"] in ISAS
    assert result["warnings"] == []


@needs_build_tools
@needs_compiler
def test_instruction_set_can_be_forced(installed: Path) -> None:
    result = loss_from(installed, FASTCL_ISA="baseline")
    assert result["backend"] == ["cpp", "the tensor is on the CPU; instruction set baseline"]


@needs_build_tools
@needs_compiler
def test_unknown_instruction_set_is_refused_with_the_list(installed: Path) -> None:
    ran = python("-c", "import fastcl", path=installed, FASTCL_ISA="nonsense")
    assert ran.returncode != 0
    last = ran.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: FASTCL_ISA=nonsense: this machine runs baseline")


# ---- without a compiler --------------------------------------------------------------------------


@needs_build_tools
def test_install_without_a_compiler_works_and_says_what_is_missing(
    sources: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    copy = shutil.copytree(sources, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    done = pip(
        *("install", *IN_PLACE, "--target", str(tmp_path / "installed"), "."),
        cwd=copy,
        PATH=str(tmp_path / "bin"),
        CXX="",
    )
    assert done.returncode == 0, done.stderr
    result = loss_from(tmp_path / "installed")
    missing = "no C++ compiler found (looked for $CXX, g++ and clang++)"
    assert result["backend"][0] == "reference"
    assert missing in result["backend"][1]
    ((category, message),) = result["warnings"]  # two losses, one warning
    assert category == "RuntimeWarning"
    assert missing in message
    assert "Install a C++ compiler (g++ or clang++) and reinstall" in message


@needs_build_tools
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PATH": "", "CXX": ""}, "not built: no C++ compiler found"),
        ({"CXX": "false"}, "not built: false does not compile an empty file"),
        ({"FASTCL_BUILD_ISAS": "mmx"}, "FASTCL_BUILD_ISAS: unknown 'mmx'; one of baseline"),
    ],
    ids=["no compiler", "broken compiler", "unknown instruction set"],
)
def test_build_that_must_not_fail_says_why_it_does(
    sources: Path, tmp_path: Path, variables: dict[str, str], message: str
) -> None:
    ran = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path)],
        cwd=sources,
        env={**os.environ, "FASTCL_REQUIRE_COMPILER": "1", **variables},
        capture_output=True,
        text=True,
    )
    assert ran.returncode != 0
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr


@needs_build_tools
@needs_compiler
def test_compiler_error_is_the_reason_that_is_kept(sources: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(sources, tmp_path / "copy", ignore=shutil.ignore_patterns("build"))
    for source in (copy / "csrc").glob("*.cpp"):
        source.write_text("int broken( {\n")
    out = tmp_path / "out"
    ran = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "-b", str(out), "-t", str(tmp_path / "t")],
        cwd=copy,
        env={**os.environ, "FASTCL_BUILD_ISAS": "baseline"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    record = json.loads((out / "fastcl" / "_C" / "_build.json").read_text())
    assert record["isas"] == []
    assert "failed: " in record["error"]
    assert "csrc/" in record["error"]


# ---- sources, imports, environment ---------------------------------------------------------------


@needs_build_tools
def test_source_distribution_builds_elsewhere(sources: Path, tmp_path: Path) -> None:
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    ran = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=sources, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    (path,) = tmp_path.glob("fastcl-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for pattern in ("csrc/*.cpp", "csrc/*.h", "kernels/*.py", "fastcl/**/*.py", "fastcl/data/*.*"):
        found = {str(p.relative_to(sources)) for p in sources.glob(pattern)}
        assert found, pattern
        assert found <= names
    assert names >= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md"}
    assert names >= {"CITATION.cff", "CONTRIBUTING.md", "fastcl/py.typed"}
    assert not any(name.startswith(("tests", "bench", "build")) for name in names)


def test_version_is_the_same_wherever_it_is_said() -> None:
    """fastcl/_version.py holds it, the package's metadata reads it, a citation repeats it."""
    import yaml

    from fastcl import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()


def test_the_tests_of_a_release_are_complete_by_themselves(tmp_path: Path) -> None:
    release.copy_tests(tmp_path / "tests")
    command = (sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider")
    found = subprocess.run((*command, "tests"), cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout
    assert all((tmp_path / "tests" / name).exists() for name in release.TESTS)


def test_public_ci_does_what_ci_run_does() -> None:
    import yaml

    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    commands = [
        step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step
    ]
    assert commands == ["bash .ci/run", "make lint", "make docs", "make release-check"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(f"\n{c.split()[1]}:" in makefile for c in commands if c.startswith("make "))


def test_import_loads_no_optional_package() -> None:
    before_and_after = (
        "import sys, torch; before = set(sys.modules); import fastcl; "
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    ran = python("-c", before_and_after)
    assert ran.returncode == 0, ran.stderr
    loaded = set(ran.stdout.split())
    assert "fastcl" in loaded
    optional = ("triton", "torchvision", "timm", "rich", "matplotlib", "yaml", "tensorboard")
    assert loaded.isdisjoint(optional)


def test_unknown_backend_is_refused_with_the_list() -> None:
    call = "import torch, fastcl.functional as F; F.nt_xent(torch.ones(2, 3), torch.ones(2, 3))"
    ran = python("-c", call, FASTCL_BACKEND="nonsense")
    assert ran.returncode != 0
    assert ran.stderr.strip().splitlines()[-1] == (
        "ValueError: FASTCL_BACKEND must be one of auto, cpp, triton, reference; got 'nonsense'."
    )
