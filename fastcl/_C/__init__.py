"""The compiled CPU kernels: one module per instruction set, the fastest that runs here chosen.

    kernels  the chosen module, or None
    ISA      its name ("baseline", "avx2", "avx512", "avx512_bf16"), or None
    MISSING  why there is none, as one sentence, or ""

FASTCL_ISA=<name> forces one.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch  # noqa: F401  first, so that its OpenMP runtime is the one that the kernels use


def build_record() -> dict[str, Any]:
    """What the build wrote down: the compiler and the instruction sets, or the error."""
    path = Path(__file__).with_name("_build.json")
    if not path.exists():
        return {"compiler": None, "isas": [], "error": "fastcl was not installed with pip"}
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def select() -> tuple[Any, str | None, str]:
    record = build_record()
    if not record["isas"]:
        return None, None, f"The C++ kernels were not built: {record['error']}."
    baseline = importlib.import_module("fastcl._C.baseline")
    runs_here = [isa for isa in baseline.supported_isas() if isa in record["isas"]]
    wanted = os.environ.get("FASTCL_ISA") or runs_here[-1]
    if wanted not in runs_here:
        raise ImportError(f"FASTCL_ISA={wanted}: this machine runs {', '.join(runs_here)}.")
    return importlib.import_module(f"fastcl._C.{wanted}"), wanted, ""


kernels, ISA, MISSING = select()
