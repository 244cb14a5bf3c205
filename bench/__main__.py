"""`python -m bench`: fastcl, plain PyTorch, torch.compile and the installed peers.

    python -m bench                                 every workload at full size
    python -m bench nt_xent clip --size small       two of them, in seconds
    python -m bench nt_xent --scaling --plots out   time and memory against the number of rows
    python -m bench --json out/bench.json           everything needed to repeat it
    python -m bench --from out/*.json --plots out   pictures of earlier runs

Nothing is compared with a result that is wrong, and rows that lose are printed too. Exit status: 1
when fastcl itself is wrong or failed, 2 for a mistyped name.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine, report
from bench.measure import Settings, limit_rates, measure, set_fractions
from bench.workloads import PROVIDERS, WORKLOADS, Sizes, Workload, providers_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    p.add_argument("workloads", nargs="*", metavar="workload", help="default: all; see --list")
    p.add_argument("--list", action="store_true", help="the workloads and their providers")
    p.add_argument("--size", choices=("small", "full"), default="full")
    p.add_argument("--scaling", action="store_true", help="double the rows from --least to --most")
    p.add_argument("--least", type=int, default=1024)
    p.add_argument("--most", type=int, default=16384)
    p.add_argument("--providers", help="comma-separated; default: all of each workload")
    p.add_argument("--dtype", choices=DTYPES, default="float32")
    p.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 …")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument(
        "--seconds", type=float, default=6.0, help="of samples per provider, but at least three"
    )
    p.add_argument("--no-memory", action="store_true", help="skip the peak memory processes")
    p.add_argument("--json", type=Path, metavar="FILE")
    p.add_argument("--plots", type=Path, metavar="FOLDER")
    p.add_argument(
        "--from", dest="earlier", type=Path, nargs="+", default=[], metavar="FILE",
        help="show these earlier runs instead of measuring",
    )  # fmt: skip
    return p


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.list:
        print_list()
        return 0
    providers = options.providers.split(",") if options.providers else list(PROVIDERS)
    for name in options.workloads:
        if name not in WORKLOADS:
            return usage(f"unknown workload {name!r}. Workloads: {', '.join(WORKLOADS)}")
    for name in providers:
        if name not in PROVIDERS:
            return usage(f"unknown provider {name!r}. Providers: {', '.join(PROVIDERS)}")
    if min(options.threads, options.repeats, options.least) < 1:
        return usage("--threads, --repeats and --least must be at least 1.")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        return usage("--device cuda: torch sees no CUDA device here.")

    if options.earlier:
        runs = [report.load(path) for path in options.earlier]
        results = [result for run in runs for result in run["results"]]
        report.print_all(results)
    else:
        results = measure_all(options, providers, arguments)["results"]
    if options.plots:
        from bench import plots

        for path in plots.draw(results, options.plots):
            print(path)
    bad = [r for r in results if r["provider"] == "fastcl" and r["status"] in ("wrong", "failed")]
    return 1 if bad else 0


def usage(line: str) -> int:
    print(f"python -m bench: {line}", file=sys.stderr)
    return 2


def print_list() -> None:
    for workload in WORKLOADS.values():
        sizes = " ".join(f"{name}={value}" for name, value in workload.full.items())
        print(f"{workload.name:<20}{workload.what}")
        print(f"{'':<20}{sizes}; {', '.join(providers_of(workload))}")


def measure_all(
    options: argparse.Namespace, providers: list[str], arguments: list[str]
) -> dict[str, Any]:
    """Measures what was asked for; prints each table and rewrites the file as it is done."""
    torch.set_num_threads(options.threads)
    settings = Settings(
        dtype=DTYPES[options.dtype],
        device=options.device,
        threads=options.threads,
        repeats=options.repeats,
        seconds=options.seconds,
        memory=not options.no_memory,
    )
    run: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", *arguments]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine.describe(options.device, options.threads),
        "results": [],
    }
    report.print_machine(run["machine"])
    flops: dict[str, float] = {}
    for workload, sizes in cases(options):
        chosen = [p for p in providers_of(workload) if p in providers]
        if not chosen:
            continue
        before = limit_rates(workload, sizes, settings)
        results = measure(workload, sizes, chosen, settings)
        rates = largest(before, limit_rates(workload, sizes, settings))
        run["results"] += results
        if results[0]["work"]["unit"] == "flop":  # one limit for the whole run, the largest seen
            flops = largest(flops, rates)
            set_fractions([r for r in run["results"] if r["work"]["unit"] == "flop"], flops)
        else:
            set_fractions(results, rates)
        report.print_table(results)
        if options.json:
            report.save(run, options.json)
    print(report.LEGEND)
    return run


def largest(*rates: dict[str, float]) -> dict[str, float]:
    """The largest rate for each way in which it was measured."""
    ways = dict.fromkeys(way for r in rates for way in r)
    return {way: max(r[way] for r in rates if way in r) for way in ways}


def cases(options: argparse.Namespace) -> Iterator[tuple[Workload, Sizes]]:
    """The workloads asked for, each at the sizes asked for."""
    default = ["nt_xent"] if options.scaling else list(WORKLOADS)
    for name in options.workloads or default:
        workload = WORKLOADS[name]
        if not options.scaling or not workload.scaling:
            yield workload, workload.small if options.size == "small" else workload.full
            continue
        rows = options.least
        while rows <= options.most:
            yield workload, {**workload.full, workload.scaling: rows}
            rows *= 2


if __name__ == "__main__":
    sys.exit(main())
