"""Builds csrc/ once per instruction set, with ninja and pybind11 and without torch.

Every instruction set becomes a module of its own, fastcl._C.<isa>, so that no inline function
compiled for a wide machine can be linked into code that runs on a narrow one. fastcl._C chooses
at import. Without a compiler the install succeeds, and fastcl._C says what was missing.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
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

NINJA = """\
rule compile
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $cxx -shared -fopenmp $in -o $out
"""


def find_compiler() -> str:
    """The first C++ compiler that runs: $CXX, g++, clang++."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++")):
        if shutil.which(name.split()[0]):
            return name
    raise RuntimeError("no C++ compiler found (looked for $CXX, g++ and clang++)")


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
    """A path or a flag as ninja wants it."""
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildKernels(build_ext):
    """Writes one build.ninja for all instruction sets and runs it."""

    def run(self) -> None:
        try:
            compiler = find_compiler()
            self.compile_with(compiler)
            record = {"compiler": self.version_of(compiler), "isas": list(ISAS)}
        except (RuntimeError, ImportError, OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("FASTCL_REQUIRE_COMPILER") == "1":
                raise
            record = {"compiler": None, "isas": [], "error": str(error)}
            print(f"fastcl: the C++ kernels were not built: {error}", file=sys.stderr)
        (self.target("_build.json")).write_text(json.dumps(record) + "\n")

    def target(self, name: str) -> Path:
        """Where a file of fastcl/_C goes: the source tree when in place, else the build tree."""
        folder = ROOT / "fastcl" / "_C" if self.inplace else Path(self.build_lib, "fastcl", "_C")
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve() / name

    def version_of(self, compiler: str) -> str:
        out = subprocess.run([*compiler.split(), "--version"], capture_output=True, text=True)
        return out.stdout.splitlines()[0]

    def compile_with(self, compiler: str) -> None:
        import pybind11

        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        includes = [sysconfig.get_paths()["include"], pybind11.get_include()]
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        common = [*COMPILE, *(f"-isystem{path}" for path in includes)]
        lines = [NINJA]
        for isa, flags in ISAS.items():
            objects = []
            for source in sorted((ROOT / "csrc").glob("*.cpp")):
                out = f"{isa}/{source.stem}.o"
                # Registration runs before the processor is known: module.cpp is always baseline.
                own = [] if source.stem == "module" else flags
                own = [*own, f"-DFASTCL_ISA={isa}"]
                lines.append(f"build {out}: compile {escape(str(source))}")
                lines.append("  flags = " + " ".join(map(escape_flag, [*common, *own])))
                objects.append(out)
            module = escape(str(self.target(isa + suffix)))
            lines.append(f"build {module}: link {' '.join(objects)}")
        (build / "build.ninja").write_text(f"cxx = {compiler}\n" + "\n".join(lines) + "\n")
        subprocess.run([ninja_executable(), "-C", str(build)], check=True)

    def get_outputs(self) -> list[str]:
        return [str(self.target(isa + sysconfig.get_config_var("EXT_SUFFIX"))) for isa in ISAS]


def escape_flag(flag: str) -> str:
    return flag.replace("$", "$$")


setup(
    packages=[
        *("fastcl", "fastcl._C", "fastcl._functional", "fastcl.ops", "fastcl.reference"),
        *("fastcl.kernels", "fastcl.data", "fastcl.methods", "fastcl.models"),
    ],
    package_dir={"fastcl.kernels": "kernels"},
    package_data={"fastcl": ["py.typed", "data/*.npz", "data/*.xz", "data/*LICENSE*", "_C/*.json"]},
    ext_modules=[Extension("fastcl._C.kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels},
)
