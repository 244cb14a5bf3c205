"""Which implementation of an operation runs on a tensor, and why.

    cuda                 triton     (fastcl.kernels)
    cpu                  cpp        (fastcl._C)
    anything else        reference  (fastcl.reference)

FASTCL_BACKEND=auto|cpp|triton|reference overrides the choice. float64 always runs the reference:
the kernels accumulate in float32.
"""

from __future__ import annotations

import functools
import importlib
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcl import _C

CHOICES = ("auto", "cpp", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Backend(NamedTuple):
    """The name of a backend ("cpp", "triton" or "reference") and why it was chosen."""

    name: str
    reason: str


def backend_of(tensor: Tensor) -> Backend:
    """Which backend an operation on this tensor would run on, and why.

    Raises ValueError when FASTCL_BACKEND names no backend, or one that cannot run here.
    """
    forced = os.environ.get("FASTCL_BACKEND", "auto")
    interpreted = forced == "triton" and interpreting()
    compiled = _C.kernels is not None
    return _backend(forced, tensor.device.type, tensor.dtype, compiled, interpreted)


@functools.cache
def _backend(
    forced: str, device: str, dtype: torch.dtype, compiled: bool, interpreted: bool
) -> Backend:
    if forced not in CHOICES:
        raise ValueError(f"FASTCL_BACKEND must be one of {', '.join(CHOICES)}; got {forced!r}.")
    if forced == "reference":
        return Backend("reference", "FASTCL_BACKEND=reference")
    if dtype not in KERNEL_DTYPES:
        return Backend("reference", f"the kernels accumulate in float32; got {dtype}")
    if forced == "triton":
        if device != "cuda" and not interpreted:
            raise ValueError(
                f"FASTCL_BACKEND=triton needs cuda tensors, or TRITON_INTERPRET=1; got {device}."
            )
        return Backend("triton", "FASTCL_BACKEND=triton")
    if forced == "cpp" and device != "cpu":
        raise ValueError(f"FASTCL_BACKEND=cpp needs cpu tensors; got {device}.")
    if device == "cuda":
        return Backend("triton", "the tensor is on a cuda device")
    if device != "cpu":
        return Backend("reference", f"no kernels for device {device}")
    if compiled:
        return Backend("cpp", f"the tensor is on the CPU; instruction set {_C.ISA}")
    if forced == "cpp":
        raise ValueError(f"FASTCL_BACKEND=cpp: {_C.MISSING}")
    return Backend("reference", _C.MISSING)


def interpreting() -> bool:
    """True when Triton's kernels are interpreted on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def warn_missing_kernels() -> None:
    """One warning per process: the slow path runs, and how to get the fast one."""
    warnings.warn(
        f"fastcl runs its slow reference path on the CPU. {_C.MISSING} Install a C++ compiler "
        "(g++ or clang++) and reinstall: pip install --force-reinstall --no-deps fastcl",
        RuntimeWarning,
        stacklevel=2,
    )


def implementation(word: str, tensor: Tensor, cpp: Any) -> Any:
    """The object that holds the operation's functions for this tensor.

    `cpp` is the operation's own adapter to fastcl._C; the others are modules named `word`.
    """
    forced = os.environ.get("FASTCL_BACKEND", "auto")
    runs = tensor.is_cpu and tensor.dtype in KERNEL_DTYPES and _C.kernels is not None
    if runs and forced in ("auto", "cpp"):  # most calls: half a microsecond faster than the rest
        return cpp
    name = backend_of(tensor).name
    if name == "cpp":
        return cpp
    if name == "triton":
        return importlib.import_module(f"fastcl.kernels.{word}")
    if _C.kernels is None and tensor.device.type == "cpu" and tensor.dtype in KERNEL_DTYPES:
        warn_missing_kernels()
    return importlib.import_module(f"fastcl.reference.{word}")


# ---- what the C++ adapters share -----------------------------------------------------------------

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # enum DType of csrc/ops.h


def pointer(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor's data, 0 for None."""
    if tensor is None:
        return 0
    assert tensor.is_contiguous()
    return tensor.data_ptr()
