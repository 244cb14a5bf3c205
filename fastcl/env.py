"""python -m fastcl.env [--json]: what is installed, what would run here, and why.

Paste its output into a bug report. With --json the same as one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastcl
from fastcl import _C
from fastcl.ops import OPS, backend_of

# The packages of the extras that a user notices when they are missing.
EXTRAS = {
    "train": ("torchvision", "timm", "rich", "matplotlib", "pyyaml", "tensorboard"),
    "hf": ("datasets",),
    "compat": ("lightly", "pytorch-metric-learning", "open_clip_torch", "sentence-transformers"),
    "export": ("safetensors", "onnx", "onnxruntime"),
    "test": ("pytest", "pytest-benchmark", "hypothesis", "ttsem"),
    "dev": ("ruff", "mypy", "clang-format", "pre-commit"),
}
VARIABLES = ("FASTCL_BACKEND", "FASTCL_ISA", "OMP_NUM_THREADS", "TRITON_INTERPRET")


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("model name", "cpu model"):
                return value.strip()
    return platform.processor() or platform.machine()


def available_isas() -> list[str]:
    """The built instruction sets that this processor runs, the fastest last."""
    if _C.kernels is None:
        return []
    built = _C.build_record()["isas"]
    return [isa for isa in _C.kernels.supported_isas() if isa in built]


def backend_on(device: str) -> dict[str, str | None]:
    """The backend of a float32 tensor on this device and the reason; name None when none runs."""
    if device == "cuda" and not torch.cuda.is_available():
        return {"name": None, "reason": "no CUDA device here"}
    try:
        name, reason = backend_of(torch.empty(0, device=device))
    except ValueError as error:
        return {"name": None, "reason": str(error)}
    return {"name": name, "reason": reason}


def collect() -> dict[str, Any]:
    """Everything that is printed, as plain lists, dicts and strings."""
    record = _C.build_record()
    # Every operation asks backend_of alone, so they differ by device and not from one another.
    backends = {device: backend_on(device) for device in ("cpu", "cuda")}
    return {
        "versions": {
            "fastcl": fastcl.__version__,
            "python": platform.python_version(),
            **{name: installed(name) for name in ("torch", "triton", "numpy")},
        },
        "system": {
            "platform": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
        "kernels": {
            "instruction_set": _C.ISA,
            "available": available_isas(),
            "built": record["isas"],
            "compiler": record["compiler"],
            "missing": _C.MISSING or None,
        },
        "cuda": [
            f"{torch.cuda.get_device_name(i)}, compute capability "
            f"{'.'.join(map(str, torch.cuda.get_device_capability(i)))}"
            for i in range(torch.cuda.device_count())
        ],
        "operations": {word: backends for word in OPS},
        "extras": {
            extra: {p: installed(p) for p in packages} for extra, packages in EXTRAS.items()
        },
        "environment": {name: os.environ.get(name) for name in VARIABLES},
    }


def _section(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(
        [title, *(f"  {key:<{width}}  {value}".rstrip() for key, value in rows.items())]
    )


def render(facts: dict[str, Any]) -> str:
    """The facts as aligned text."""

    def plain(rows: dict[str, Any], none: str = "not installed") -> dict[str, str]:
        return {key: none if value is None else str(value) for key, value in rows.items()}

    kernels = facts["kernels"]
    if kernels["missing"]:
        cpu = {"C++": kernels["missing"]}
    else:
        cpu = {
            "instruction set": kernels["instruction_set"],
            "available": ", ".join(kernels["available"]),
            "built": ", ".join(kernels["built"]),
            "compiler": kernels["compiler"],
        }
    operations = {
        word: "  ".join(
            f"{device}: {backend['name'] or 'none':<9}" for device, backend in by.items()
        )
        for word, by in facts["operations"].items()
    }
    reasons: dict[str, str] = {}
    for by in facts["operations"].values():
        for device, backend in by.items():
            reasons[f"{device}: {backend['name'] or 'none'}"] = backend["reason"]
    extras = {
        f"[{extra}]": ", ".join(f"{name} {version or '(missing)'}" for name, version in row.items())
        for extra, row in facts["extras"].items()
    }
    return "\n\n".join(
        [
            _section("versions", plain(facts["versions"])),
            _section("system", plain(facts["system"])),
            _section("kernels of the CPU", cpu),
            _section("CUDA devices", {str(i): name for i, name in enumerate(facts["cuda"])})
            if facts["cuda"]
            else "CUDA devices\n  none",
            _section("backend of each operation, float32", operations),
            _section("because", reasons),
            _section("optional packages", extras),
            _section("environment", plain(facts["environment"], none="not set")),
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastcl.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    facts = collect()
    if parser.parse_args(argv).json:
        print(json.dumps(facts, indent=2))
    else:
        print(render(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
