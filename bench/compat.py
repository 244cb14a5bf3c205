"""`python -m bench compat`: each class of fastcl.compat beside the library's own, in one run.

    python -m bench compat                              all of them, at full size
    python -m bench compat lightly info_nce             of two libraries
    python -m bench compat --size small --json out.json

A call is the loss and its gradients. Both are called in turns in one process, and the median of
each is shown; the first calls are left out. Memory is what one call adds to the resident memory at
its peak, measured for each in a process of its own. Deviation is the largest of ours from theirs,
of the loss and of the gradients, as a fraction of the largest entry: above 1e-3 the row is WRONG.
Exit status: 1 when a row is wrong or failed, 2 for wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import shlex
import statistics
import sys
import time
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine, memory, report
from bench.compat_cases import CASES, LIBRARIES, Case, Sizes, Step
from bench.usage import UsageError, unknown

LARGEST_DEVIATION = 1e-3  # both round in float32
HEADERS = ("class", "sizes", "theirs", "ours", "faster", "peak theirs", "peak ours", "deviation")

# ---- measuring -----------------------------------------------------------------------------------


def module_of(case: Case, ours: bool) -> Any:
    return importlib.import_module(
        f"fastcl.compat.{case.library}" if ours else LIBRARIES[case.library]
    )


def measure(case: Case, sizes: Sizes, options: argparse.Namespace) -> dict[str, Any]:
    """One row: times and deviation in this process, then each one's memory in its own."""
    row: dict[str, Any] = {"class": f"{case.library}: {case.name}", "sizes": sizes}
    if importlib.util.find_spec(case.library) is None:
        return {**row, "status": "not installed"}
    try:
        steps = [case.make(module_of(case, ours), **sizes) for ours in (False, True)]
        row["deviation"] = max(map(deviation, *(step() for step in steps)))
        samples = take_turns(steps, options.repeats, options.seconds)
    except Exception as error:  # a row of the table, whatever a library raises
        return {
            **row,
            "status": "failed",
            "note": f"{type(error).__name__}: {error}".split("\n")[0],
        }
    row["status"] = "ok" if row["deviation"] <= LARGEST_DEVIATION else "WRONG"
    for name, times in zip(("theirs", "ours"), samples):
        row[name] = {"median": statistics.median(times), "samples": times}
    del steps
    if not options.no_memory:
        for name in ("theirs", "ours"):
            row[name]["peak_bytes"] = peak_of(case, sizes, name == "ours", options.threads)
    return row


def deviation(theirs: Tensor, ours: Tensor) -> float:
    if theirs.shape != ours.shape:
        return float("inf")
    largest = theirs.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    found = float((ours.double() - theirs.double()).abs().max() / largest)
    return found if found == found else float("inf")


def take_turns(steps: list[Step], repeats: int, seconds: float) -> list[list[float]]:
    loops = [max(1, int(5e-3 / max(machine.seconds(step, 1, "cpu"), 1e-7))) for step in steps]
    samples: list[list[float]] = [[] for _ in steps]
    gc.collect()
    gc.disable()
    try:
        for repeat in range(repeats):
            for i, step in enumerate(steps):
                if repeat < 3 or sum(samples[i]) * loops[i] < seconds:
                    samples[i].append(machine.seconds(step, loops[i], "cpu"))
    finally:
        gc.enable()
    return samples


def peak_of(case: Case, sizes: Sizes, ours: bool, threads: int) -> int | None:
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, CASES.index(case), sizes, ours, threads)
    process = context.Process(target=send_peak, args=arguments)
    process.start()
    sender.close()
    try:
        found: int | None = receiver.recv()
        process.join(timeout=10)
        return found
    except EOFError:  # killed, as when memory runs out
        return None
    finally:
        process.kill()
        process.join()


def send_peak(sender: Any, index: int, sizes: Sizes, ours: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    case = CASES[index]
    case.make(module_of(case, ours), **case.small)()  # imports and threads are not the loss's
    step = case.make(module_of(case, ours), **sizes)
    gc.collect()
    if not memory.reset_peak():
        sender.send(None)
        return
    before = memory.status_bytes("VmRSS")
    kept = step()
    sender.send(max(0, memory.status_bytes("VmHWM") - before))
    del kept


# ---- the command line ----------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench compat",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("libraries", nargs="*", metavar="library", help=f"all: {', '.join(LIBRARIES)}")
    p.add_argument("--size", choices=("small", "full"), default="full")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    p.add_argument("--repeats", type=int, default=9, metavar="N", help="samples of each; 9")
    p.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of samples; 5")
    p.add_argument("--no-memory", action="store_true", help="skip the peak memory processes")
    p.add_argument("--json", type=Path, metavar="FILE")
    return p


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        for name in options.libraries:
            if name not in LIBRARIES:
                raise UsageError(unknown("library", name, LIBRARIES))
        if min(options.threads, options.repeats) < 1:
            raise UsageError("--threads and --repeats must be at least 1.")
    except UsageError as error:
        print(f"python -m bench compat: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    record = {
        "command": shlex.join(["python", "-m", "bench", "compat", *arguments]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine.describe("cpu", options.threads),
        "results": [],
    }
    report.print_machine(record["machine"])
    rows = record["results"]
    interrupted = False
    print_line(HEADERS)
    try:
        for case in CASES:
            if options.libraries and case.library not in options.libraries:
                continue
            rows.append(
                measure(case, case.small if options.size == "small" else case.full, options)
            )
            print_line(cells(rows[-1]))
            if options.json:
                report.save(record, options.json)
    except KeyboardInterrupt:
        interrupted = True
        print("\nstopped; above is what was measured", file=sys.stderr)
    bad = [row for row in rows if row["status"] in ("WRONG", "failed")]
    return 130 if interrupted else int(bool(bad))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    about = (row["class"], " ".join(f"{k}={v}" for k, v in row["sizes"].items()))
    if "theirs" not in row:
        return (*about, row["status"], row.get("note", ""))
    theirs, ours = row["theirs"], row["ours"]
    faster = theirs["median"] / ours["median"]
    wrong = "" if row["status"] == "ok" else f" {row['status']}"
    return (
        *about,
        report.duration(theirs["median"]),
        report.duration(ours["median"]),
        f"{faster:.2f}×",
        report.size(theirs.get("peak_bytes")),
        report.size(ours.get("peak_bytes")),
        f"{row['deviation']:.0e}{wrong}",
    )


def print_line(texts: tuple[str, ...]) -> None:
    widths = (68, 34, 10, 10, 8, 12, 10, 10)
    print(" ".join(text.ljust(width) for text, width in zip(texts, widths)).rstrip(), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
