"""What this machine is, and what it can do, measured beside the workloads.

    multiply-adds   torch.mm of two large matrices, in the workload's dtype; on a CPU also float32
                    multiply-adds from registers only (peak.cpp), which nothing in float32 exceeds
    bytes           the best of copy (b = a), update (b += a) and read (Σ a), on as many bytes
                    as the workload touches, so that what fits in a cache is compared with that one;
                    on a GPU at least 256 MiB, as its timer empties the cache before each call

Each is measured before and after every workload. The largest is the limit.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastcl
from bench.workloads import PROVIDERS
from fastcl import _C

ROOT = Path(__file__).parent.parent


def describe(device: str, threads: int) -> dict[str, Any]:
    """Everything about the machine and its software that a repetition needs to know."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.release()}",
        "gpu": torch.cuda.get_device_name(device) if device.startswith("cuda") else None,
        "isa": _C.ISA,
        "compiler": _C.build_record().get("compiler"),
        "FASTCL_BACKEND": os.environ.get("FASTCL_BACKEND", "auto"),
        "python": platform.python_version(),
        "commit": commit(),
        "versions": {p: version(p) for p in PROVIDERS},
    }


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    values = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in values.items()}
    name = fields.get("model name", platform.machine())
    model = "".join(f" {key} {fields[key]}" for key in ("cpu family", "model") if key in fields)
    return f"{name} ({model.strip()})" if model else name


def version(provider: str) -> str | None:
    """The version of a provider's distribution, None when it is not installed."""
    if provider == "fastcl":
        return fastcl.__version__
    try:
        return importlib.metadata.version(PROVIDERS[provider])
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, with "+" when tracked files differ from it."""

    def git(*command: str) -> str:
        return subprocess.run(
            ("git", "-C", str(ROOT), *command), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- time ----------------------------------------------------------------------------------------


def seconds(step: Callable[[], Any], loops: int, device: str) -> float:
    """Time of one call: the mean of `loops` in a row; on a GPU what Triton's own timer says."""
    if device.startswith("cuda"):
        return gpu_seconds(step)
    begin = time.perf_counter()
    for _ in range(loops):
        step()
    return (time.perf_counter() - begin) / loops


def gpu_seconds(step: Callable[[], Any]) -> float:
    """The median of about 20 ms of calls between events, each after the L2 cache was emptied."""
    from triton.testing import do_bench

    return do_bench(step, warmup=5, rep=20, return_mode="median") / 1e3


def best_rate(step: Callable[[], Any], amount: float, device: str, budget: float = 0.15) -> float:
    """The largest of `amount` per second over about `budget` seconds, first call left out."""
    first = max(seconds(step, 1, device), 1e-6)
    repeats, loops = max(2, min(20, int(budget / first))), max(1, int(1e-3 / first))
    return amount / min(seconds(step, loops, device) for _ in range(repeats))


# ---- multiply-adds -------------------------------------------------------------------------------


def multiply_add_rates(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Floating-point operations per second, by the way that they were reached."""
    n = 8192 if device.startswith("cuda") else 2048
    if device == "cpu" and mm_rate(256, dtype, device) < 2 * n**3:  # float16 without hardware
        n = 256
    rates = {"mm": mm_rate(n, dtype, device)}
    library = register_library() if device == "cpu" else None
    if library is not None:
        iterations = 2_000_000  # about 5 ms
        rate = library.multiply_add_rate
        rates["registers"] = max(rate(torch.get_num_threads(), iterations) for _ in range(10))
    return rates


def mm_rate(n: int, dtype: torch.dtype, device: str) -> float:
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return best_rate(lambda: torch.mm(a, b, out=out), 2 * n**3, device)


@functools.cache
def register_library() -> Any:
    """peak.cpp compiled for this processor, None without a compiler."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peak.so"
        command = [os.environ.get("CXX", "c++"), "-O3", "-march=native", "-ffp-contract=fast"]
        command += ["-shared", "-fPIC", "-pthread", "-o", str(target)]
        try:
            subprocess.run(
                [*command, str(Path(__file__).with_name("peak.cpp"))],
                check=True,
                capture_output=True,
                text=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no register-only peak: {error}", file=sys.stderr)
            return None
        library = ctypes.CDLL(str(target))
    library.multiply_add_rate.argtypes = (ctypes.c_int, ctypes.c_long)
    library.multiply_add_rate.restype = ctypes.c_double
    return library


# ---- bytes ---------------------------------------------------------------------------------------


GPU_FOOTPRINT = 1 << 28  # less would time the launch; the timer empties the cache anyway


def byte_rates(footprint: int, device: str) -> dict[str, float]:
    """Bytes per second on two buffers of `footprint` bytes together, by what was done to them."""
    if device.startswith("cuda"):
        footprint = max(footprint, GPU_FOOTPRINT)
    n = max(1024, footprint // 8)
    a, b = torch.ones(n, device=device), torch.ones(n, device=device)
    return {
        "copy": best_rate(lambda: b.copy_(a), 8 * n, device),
        "update": best_rate(lambda: b.add_(a), 12 * n, device),
        "read": best_rate(lambda: a.sum(), 4 * n, device),
    }
