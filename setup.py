"""Builds csrc/ once per instruction set, with ninja and pybind11 and without torch.

Every instruction set becomes a module of its own, fastcl._C.<isa>, so that no inline function
compiled for a wide machine can be linked into code that runs on a narrow one. fastcl._C chooses
at import. Without a compiler the install succeeds, and fastcl._C says what was missing.

CXX, CXXFLAGS, LDFLAGS      the compiler (else g++, else clang++) and flags that come last
FASTCL_BUILD_ISAS           comma-separated names from ISAS, to build fewer (baseline always)
FASTCL_REQUIRE_COMPILER=1   fail instead of installing without the kernels
"""

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()

# Flags beyond the platform's own baseline. Names are the modules' names.
X86_ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
X86_ISAS["avx512_bf16"] = [*X86_ISAS["avx512"], "-mavx512bf16"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = X86_ISAS if IS_X86 else {"baseline": []}

COMPILE = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wextra"),
    # errno and trapping exceptions are never read here; infinities and NaN keep their meaning.
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"),
]

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

NINJA = """\
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared -fopenmp $in -o $out $ldflags
"""


def find_compiler() -> str:
    """The first C++ compiler on PATH: $CXX, g++, clang++."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        if shutil.which(shlex.split(name)[0]):
            return name
    raise RuntimeError("no C++ compiler found (looked for $CXX, g++ and clang++)")


def python_headers() -> str:
    """The folder of Python.h, which some distributions package apart from Python."""
    folder = sysconfig.get_paths()["include"]
    if not Path(folder, "Python.h").exists():
        raise RuntimeError(f"Python.h is not in {folder} (on Debian: apt-get install python3-dev)")
    return folder


def wanted_isas() -> dict[str, list[str]]:
    """ISAS, or the ones that FASTCL_BUILD_ISAS names."""
    names = os.environ.get("FASTCL_BUILD_ISAS")
    if names is None:
        return ISAS
    wanted = {"baseline", *filter(None, names.split(","))}
    if unknown := sorted(wanted - ISAS.keys()):
        raise SystemExit(f"FASTCL_BUILD_ISAS: unknown {unknown[0]!r}; one of {', '.join(ISAS)}.")
    return {isa: flags for isa, flags in ISAS.items() if isa in wanted}


def accepts(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler knows these flags; older ones lack the newest instruction sets."""
    probe = [*shlex.split(compiler), *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(probe, capture_output=True).returncode == 0


def ninja_executable() -> str:
    """The ninja of the build environment, or the system's."""
    try:
        from ninja import BIN_DIR

        return str(Path(BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise RuntimeError("ninja not found; install it with pip install ninja") from None
        return found


def escape(text: str) -> str:
    """A path as ninja wants it."""
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildKernels(build_ext):
    """Writes one build.ninja for all instruction sets and runs it."""

    isas: dict[str, list[str]] = {}  # what was built

    def run(self) -> None:
        wanted = wanted_isas()
        try:
            compiler = find_compiler()
            self.isas = {isa: flags for isa, flags in wanted.items() if accepts(compiler, flags)}
            if "baseline" not in self.isas:
                raise RuntimeError(f"{compiler} does not compile an empty file")
            with locked(self.build_folder()):
                self.compile_with(compiler)
            record = {"compiler": version_of(compiler), "isas": list(self.isas)}
        except (RuntimeError, ImportError, OSError) as error:
            required = os.environ.get("FASTCL_REQUIRE_COMPILER") == "1"
            if required or self.built_before():  # whose record and modules stay as they were
                raise SystemExit(f"fastcl: the C++ kernels were not built: {error}") from None
            self.isas = {}
            record = {"compiler": None, "isas": [], "error": str(error)}
            print(f"fastcl: the C++ kernels were not built: {error}", file=sys.stderr)
        if not self.inplace:  # what an earlier build left there would go into the wheel
            for module in set(self.target("").glob(f"*{SUFFIX}")) - set(self.modules()):
                module.unlink()
        self.target("_build.json").write_text(json.dumps(record) + "\n")

    def built_before(self) -> bool:
        """Whether this checkout has kernels in place, of an earlier build."""
        record = self.target("_build.json")
        return bool(self.inplace and record.exists() and json.loads(record.read_text())["isas"])

    def target(self, name: str) -> Path:
        """Where a file of fastcl/_C goes: the source tree when in place, else the build tree."""
        folder = ROOT / "fastcl" / "_C" if self.inplace else Path(self.build_lib, "fastcl", "_C")
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve() / name

    def modules(self) -> list[Path]:
        return [self.target(isa + SUFFIX) for isa in self.isas]

    def build_folder(self) -> Path:
        # pip gives an editable install a new temporary folder each time; a lasting one lets ninja
        # compile only what changed.
        lasting = ROOT / "build" / f"editable-{sys.implementation.cache_tag}"
        folder = lasting if self.inplace else Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def compile_with(self, compiler: str) -> None:
        import pybind11

        build = self.build_folder()
        includes = [python_headers(), pybind11.get_include()]
        common = [*COMPILE, *(f"-isystem{path}" for path in includes)]
        own_last = shlex.split(os.environ.get("CXXFLAGS", ""))
        lines = [NINJA]
        linked = [build / module.name for module in self.modules()]
        for (isa, flags), module in zip(self.isas.items(), linked):
            objects = []
            for source in sorted((ROOT / "csrc").glob("*.cpp")):
                out = f"{isa}/{source.stem}.o"
                # Registration runs before the processor is known: module.cpp is always baseline.
                own = [] if source.stem == "module" else flags
                own = [*own, f"-DFASTCL_ISA={isa}"]
                lines.append(f"build {out}: compile {escape(str(source))}")
                lines.append("  flags = " + " ".join(map(escape_flag, [*common, *own, *own_last])))
                objects.append(out)
            lines.append(f"build {escape(str(module))}: link {' '.join(objects)}")
        names = f"cxx = {compiler}\nldflags = {os.environ.get('LDFLAGS', '').replace('$', '$$')}\n"
        (build / "build.ninja").write_text(names + "\n".join(lines) + "\n")
        ninja = subprocess.run(
            [ninja_executable(), "-C", str(build)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        print(ninja.stdout, end="", flush=True)
        if ninja.returncode != 0:
            errors = [line for line in ninja.stdout.splitlines() if "error: " in line]
            reason = errors[0] if errors else "its messages are shown by pip install -v"
            raise RuntimeError(f"{compiler} failed: {reason}")
        # All or none, and by renaming: a process that runs the old module keeps it.
        for module, target in zip(linked, self.modules()):
            fresh = target.with_suffix(".new")
            shutil.copy2(module, fresh)
            fresh.replace(target)

    def get_outputs(self) -> list[str]:
        return [str(module) for module in self.modules()]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a folder: `make` begins one that pip then comes to."""
    import fcntl

    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def version_of(compiler: str) -> str:
    asked = [*shlex.split(compiler), "--version"]
    return subprocess.run(asked, capture_output=True, text=True).stdout.splitlines()[0]


def escape_flag(flag: str) -> str:
    """A flag as the shell wants it, in ninja's file."""
    return shlex.quote(flag).replace("$", "$$")


setup(
    packages=[
        *("fastcl", "fastcl._C", "fastcl._functional", "fastcl.compat", "fastcl.ops"),
        "fastcl.reference",
        *("fastcl.kernels", "fastcl.data", "fastcl.methods", "fastcl.models", "fastcl.official"),
    ],
    package_dir={"fastcl.kernels": "kernels"},
    package_data={"fastcl": ["py.typed", "data/*.npz", "data/*.xz", "data/*LICENSE*", "_C/*.json"]},
    ext_modules=[Extension("fastcl._C.kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
