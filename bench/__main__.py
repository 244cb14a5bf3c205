"""`python -m bench`: fastcl, plain PyTorch, torch.compile and the installed peers.

    python -m bench                                 every workload at full size
    python -m bench nt_xent clip --size small       two of them, in seconds
    python -m bench nt_xent --scaling --plots out   time and memory against the number of rows
    python -m bench --json out/bench.json           everything needed to repeat it
    python -m bench --from out/*.json --plots out   pictures of earlier runs

Peers that are not installed are listed as such; pip install 'fastcl[peers]' brings those for a CPU.
Nothing is compared with a result that is wrong, and rows that lose are printed too. Exit status: 1
when fastcl itself is wrong or failed, 2 for wrong usage, 130 after Ctrl-C, which keeps what was
measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine, report, scaling
from bench.calls import Settings, quiet
from bench.measure import limit_rates, measure, set_fractions
from bench.usage import UsageError, unknown
from bench.workloads import PROVIDERS, WORKLOADS, Sizes, Workload, providers_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Name -> module with main(arguments), and what --help says. Each has a --help of its own.
SUBCOMMANDS = {
    "methods": ("bench.methods", "train every method in turn: accuracy, time, memory"),
    "byol-bn": ("bench.byol_bn", "BYOL's ablation of batch norm: which placements collapse"),
    "step": ("bench.step", "where the time of a training step goes"),
    "compat": ("bench.compat", "fastcl.compat beside the libraries' own classes"),
    "scale": ("bench.scale", "losses over many ranks, gather beside ring: a model, and measured"),
    "gpu-static": ("bench.gpu_static", "what bounds each Triton kernel's loop, without a GPU"),
}


def parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"    {name:<12}{what}" for name, (_, what) in SUBCOMMANDS.items())
    p = argparse.ArgumentParser(
        prog="python -m bench",
        description=f"{__doc__}\nOther benches, `python -m bench NAME --help`:\n\n{listed}",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    p.add_argument("workloads", nargs="*", metavar="workload", help="default: all; see --list")
    p.add_argument("--list", action="store_true", help="the workloads and their providers")
    p.add_argument("--providers", help="comma-separated; default: all of each workload")

    what = p.add_argument_group("what is measured")
    what.add_argument("--size", choices=("small", "full"), default="full")
    what.add_argument("--scaling", action="store_true", help="double the rows, --least to --most")
    what.add_argument("--least", type=int, default=1024, metavar="N")
    what.add_argument("--most", type=int, default=16384, metavar="N")
    what.add_argument("--dtype", choices=DTYPES, default="float32")
    what.add_argument("--device", default="cpu", help="cpu, cuda or cuda:0 …")
    what.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")

    how = p.add_argument_group("how long it may take")
    how.add_argument("--repeats", type=int, default=9, metavar="N", help="samples of each; 9")
    how.add_argument(
        "--seconds", type=float, default=6.0, metavar="S",
        help="of samples per provider, but at least three of them, or one\n"
        "where a single call takes that long; 6",
    )  # fmt: skip
    how.add_argument(
        "--longest", type=float, default=300.0, metavar="S",
        help="with --scaling: what is expected to take longer a call is\nnot run, and listed; 300",
    )  # fmt: skip
    how.add_argument("--no-memory", action="store_true", help="skip the peak memory processes")

    out = p.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE")
    out.add_argument("--plots", type=Path, metavar="FOLDER")
    out.add_argument(
        "--from", dest="earlier", type=Path, nargs="+", default=[], metavar="FILE",
        help="show these earlier runs instead of measuring",
    )  # fmt: skip
    return p


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in SUBCOMMANDS:
        module, _ = SUBCOMMANDS[arguments[0]]
        return importlib.import_module(module).main(arguments[1:])
    options = parser().parse_args(arguments)
    try:
        return run(options, arguments)
    except UsageError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace, arguments: list[str]) -> int:
    """Measures, or shows what was measured. Raises UsageError."""
    if options.list:
        print_list()
        return 0
    providers = check(options)
    interrupted = False
    if options.earlier:
        results = [result for path in options.earlier for result in load(path)]
        report.print_all(results)
    else:
        record = new_record(options, arguments)
        results = record["results"]
        try:
            measure_all(options, providers, record)
        except KeyboardInterrupt:
            interrupted = True
            print("\nstopped; above is what was measured", file=sys.stderr)
    report.print_fits(scaling.fits(results))
    if results:
        print(report.LEGEND)
    if options.plots and any("seconds" in r for r in results):
        from bench import plots

        for path in plots.draw(results, options.plots):
            print(path)
    bad = [r for r in results if r["provider"] == "fastcl" and r["status"] in ("wrong", "failed")]
    return 130 if interrupted else int(bool(bad))


# ---- the command line ----------------------------------------------------------------------------


def check(options: argparse.Namespace) -> list[str]:
    """The providers asked for. Raises UsageError for what cannot be measured."""
    for name in options.workloads:
        if name not in WORKLOADS:
            raise UsageError(unknown("workload", name, [*WORKLOADS, *SUBCOMMANDS]))
    providers = options.providers.split(",") if options.providers else list(PROVIDERS)
    for name in providers:
        if name not in PROVIDERS:
            raise UsageError(unknown("provider", name, PROVIDERS))
    if min(options.threads, options.repeats, options.least) < 1:
        raise UsageError("--threads, --repeats and --least must be at least 1.")
    if options.scaling and options.most < options.least:
        raise UsageError(f"--most {options.most} is below --least {options.least}.")
    if not min(options.seconds, options.longest) > 0:
        raise UsageError("--seconds and --longest must be above 0.")
    check_device(options.device)
    names = options.workloads or list(WORKLOADS)
    if not any(
        p in providers for name in names for p in providers_of(WORKLOADS[name], options.device)
    ):
        raise UsageError(
            f"nothing to measure: {', '.join(providers)} has none of these workloads "
            f"on {options.device}; see --list."
        )
    check_output(options)
    return providers


def check_output(options: argparse.Namespace) -> None:
    """Before minutes of measuring rather than after. Raises UsageError."""
    try:
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.open("a").close()
        if options.plots:
            options.plots.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to {error.filename}: {error.strerror}.") from None
    if options.plots and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plots needs matplotlib: pip install 'fastcl[bench]'.")


def check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch sees no CUDA device here.")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise UsageError(f"--device must be cpu, cuda or cuda:N; got {device!r}.")


def load(path: Path) -> list[dict[str, Any]]:
    """The results in an earlier run's file. Raises UsageError."""
    try:
        results: list[dict[str, Any]] = report.load(path)["results"]
        known = all(r["workload"] in WORKLOADS and r["provider"] in PROVIDERS for r in results)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise UsageError(f"{path} is no file that --json has written.") from None
    if not known:
        raise UsageError(
            f"{path} is of another version: it has workloads or providers unknown here."
        )
    return results


def print_list() -> None:
    for workload in WORKLOADS.values():
        sizes = " ".join(f"{name}={value}" for name, value in workload.full.items())
        print(f"{workload.name:<20}{workload.what}")
        print(f"{'':<20}{sizes}; {', '.join(providers_of(workload))}")
        gpu = [p for p in providers_of(workload, "cuda") if p not in providers_of(workload)]
        if gpu:
            print(f"{'':<20}on CUDA also {', '.join(gpu)}")


# ---- the run -------------------------------------------------------------------------------------


def new_record(options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """What the JSON file will hold: how to repeat the run, and its results."""
    return {
        "command": shlex.join(["python", "-m", "bench", *arguments]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine.describe(options.device, options.threads),
        "results": [],
        "fits": [],
    }


def measure_all(options: argparse.Namespace, providers: list[str], record: dict[str, Any]) -> None:
    """Measures what was asked for; prints each table and rewrites the file as it is done."""
    torch.set_num_threads(options.threads)
    quiet()
    settings = Settings(
        dtype=DTYPES[options.dtype],
        device=options.device,
        threads=options.threads,
        repeats=options.repeats,
        seconds=options.seconds,
        longest=options.longest,
        memory=not options.no_memory,
    )
    report.print_machine(record["machine"])
    flops: dict[str, float] = {}
    for workload, sizes in cases(options):
        chosen = [p for p in providers_of(workload, options.device) if p in providers]
        if not chosen:
            continue
        before = limit_rates(workload, sizes, settings)
        results = measure(workload, sizes, chosen, settings, record["results"])
        rates = largest(before, limit_rates(workload, sizes, settings))
        record["results"] += results
        if results[0]["work"]["unit"] == "flop":  # one limit for the whole run, the largest seen
            flops = largest(flops, rates)
            counted = [r for r in record["results"] if r["work"]["unit"] == "flop"]
            set_fractions(counted, flops)
        else:
            set_fractions(results, rates)
        record["fits"] = scaling.fits(record["results"])
        report.print_table(results)
        if options.json:
            report.save(record, options.json)


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
