"""The peak memory of one call, each in a process of its own; on a GPU torch's own counter.

What a call adds to the resident memory at its peak, results included, inputs not.
"""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.calls import Settings, make_inputs, one_line, quiet, step_of
from bench.workloads import WORKLOADS, Sizes, Workload


def peak_bytes(
    workload: Workload, sizes: Sizes, provider: str, settings: Settings
) -> tuple[int | None, str]:
    """What one call adds to memory at its peak; or None, and why where there is more to say."""
    if settings.device.startswith("cuda"):
        return peak_or_reason(peak_on_gpu, workload, sizes, provider, settings)
    context = get_context("forkserver")  # a fresh process that has torch imported, no threads yet
    context.set_forkserver_preload(["torch", "fastcl.functional"])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, workload.name, sizes, provider, settings)
    process = context.Process(target=send_peak, args=arguments)
    process.start()
    sender.close()
    try:
        found: tuple[int | None, str] = receiver.recv()
        process.join(timeout=10)
        return found
    except EOFError:
        return None, "killed while its memory was measured"  # as when memory runs out
    finally:
        process.kill()  # Ctrl-C does not wait for a long call
        process.join()


def send_peak(
    sender: Connection, name: str, sizes: Sizes, provider: str, settings: Settings
) -> None:
    """What the process does. Ctrl-C reaches it too, and is its parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()
    workload = WORKLOADS[name]
    sender.send(peak_or_reason(peak_in_this_process, workload, sizes, provider, settings))


def peak_or_reason(peak: Callable[..., int | None], *arguments: Any) -> tuple[int | None, str]:
    try:
        return peak(*arguments), ""
    except Exception as error:  # whatever another library raises
        return None, f"memory: {one_line(error)}"


def peak_in_this_process(
    workload: Workload, sizes: Sizes, provider: str, settings: Settings
) -> int | None:
    """Peak of the resident memory during one call, above what it was before."""
    torch.set_num_threads(settings.threads)
    # Threads, library handles and imports are paid on the small size. Compilation needs this one;
    # what a library keeps between calls counts for it.
    warm = sizes if provider == "compile" else workload.small
    step_of(workload, provider, warm, make_inputs(workload, warm, settings))()
    step = step_of(workload, provider, sizes, make_inputs(workload, sizes, settings))
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
    if not reset_peak():
        return None
    before = status_bytes("VmRSS")
    kept = step()
    peak = status_bytes("VmHWM")
    del kept
    return max(0, peak - before)


def reset_peak() -> bool:
    """Sets VmHWM back to the memory in use; False where the kernel does not offer it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_on_gpu(workload: Workload, sizes: Sizes, provider: str, settings: Settings) -> int:
    step = step_of(workload, provider, sizes, make_inputs(workload, sizes, settings))
    step()
    torch.cuda.empty_cache()
    device = torch.device(settings.device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = step()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before
