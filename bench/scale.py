"""`python -m bench scale`: losses over many ranks, on paper and measured; gather beside ring.

    python -m bench scale                                W = 1, 2, 3 here; then hundreds of ranks
    python -m bench scale --losses clip --images 4096    one loss, other sizes
    python -m bench scale --no-measure --backend nccl --itemsize 2 --passes 5 \\
        --flops 3e14 --bandwidth 25e9 --latency 2e-5         another machine's numbers: no measuring
    python -m bench scale --plots out --json out/scale.json

Every rank keeps its number of images as ranks are added, so its operations grow with W. First the
model (bench/scale_model.py says what it counts) beside what W processes on this machine do, joined
by gloo, with one thread each: bytes received, the peak of what torch allocates (and of what becomes
resident), seconds. Rate, latency and bandwidth of the model are this machine's: the rate of the run
with one rank (which is therefore no check), the link from exchanges of 8 bytes and of megabytes.
Where there are more ranks than cores they share them. Then the model alone, with --flops,
--bandwidth and --latency in place of what was measured.
Exit status: 1 when the bytes that ranks receive are not those of the model, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from bench import machine, report
from bench.scale_model import (
    BACKENDS,
    KINDS,
    LOSSES,
    Case,
    Machine,
    flops,
    peak_bytes,
    received,
    seconds,
)
from bench.usage import UsageError, unknown

FAR = (1, 8, 64, 256, 1024)  # ranks of the model alone


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench scale",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--losses", nargs="+", default=list(LOSSES), metavar="LOSS")
    here = p.add_argument_group("measured here")
    here.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3], metavar="W")
    here.add_argument("--images", type=int, default=1024, metavar="N", help="of a rank; 1024")
    here.add_argument("--features", type=int, default=256, metavar="D", help="256")
    here.add_argument("--repeats", type=int, default=5, metavar="N", help="steps; the best counts")
    here.add_argument("--no-measure", action="store_true", help="the model alone")

    far = p.add_argument_group("the model alone, in float32 unless --itemsize says otherwise")
    far.add_argument("--far-ranks", type=int, nargs="+", default=list(FAR), metavar="W")
    far.add_argument("--far-images", type=int, default=4096, metavar="N", help="of a rank; 4096")
    far.add_argument("--far-features", type=int, default=512, metavar="D", help="512")
    far.add_argument("--backend", choices=BACKENDS, default="gloo", help="gloo")
    far.add_argument("--itemsize", type=int, choices=(2, 4), default=4, help="bytes; 4")
    far.add_argument("--passes", type=float, default=4.0, help="4; the Triton kernels' are 5")
    far.add_argument("--flops", type=float, metavar="R", help="a rank's operations a second")
    far.add_argument("--bandwidth", type=float, metavar="B", help="bytes a second into a rank")
    far.add_argument("--latency", type=float, metavar="S", help="seconds a message")

    out = p.add_argument_group("output")
    out.add_argument("--json", type=Path, metavar="FILE")
    out.add_argument("--plots", type=Path, metavar="FOLDER")
    return p


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    try:
        check(options)
    except UsageError as error:
        print(f"python -m bench scale: {error}", file=sys.stderr)
        return 2
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", "scale", *arguments]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine.describe("cpu", 1),
        "measured": [],
        "far": [],
    }
    report.print_machine(record["machine"])
    if not options.no_measure:
        record |= measured(options)
        show_measured(record)
    here = record.get("here", {})
    own = {name: getattr(options, name) or here[name] for name in ("flops", "bandwidth", "latency")}
    far = Machine(**own)
    record["model"] = own
    record["far"] = extrapolated(options, far)
    show_far(options, far, record["far"])
    if options.json:
        report.save(record, options.json)
    if options.plots:
        from bench.scale_plots import draw

        print(draw(record, options.plots))
    return int(any(row["received"] != row["model"]["received"] for row in record["measured"]))


def check(options: argparse.Namespace) -> None:
    for name in options.losses:
        if name not in LOSSES:
            raise UsageError(unknown("loss", name, LOSSES))
    least = {"images": 2, "features": 1, "repeats": 1, "far_images": 2, "far_features": 1}
    for name, value in least.items():
        if getattr(options, name) < value:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag} must be at least {value}; got {getattr(options, name)}.")
    if min(options.ranks + options.far_ranks) < 1:
        raise UsageError("a number of ranks must be at least 1.")
    given = [getattr(options, name) for name in ("flops", "bandwidth", "latency")]
    if any(value is not None and not value > 0 for value in given):
        raise UsageError("--flops, --bandwidth and --latency must be above 0.")
    if options.no_measure and None in given:
        raise UsageError("--no-measure needs --flops, --bandwidth and --latency.")
    if not options.no_measure and (1 not in options.ranks or max(options.ranks) < 2):
        raise UsageError("--ranks must have 1, whose rate the model takes, and one above.")


# ---- beside the model ----------------------------------------------------------------------------


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """`here`: this machine's rate and link; `measured`: a row for each run, with the model's."""
    from bench.scale_ranks import measure

    sizes = (options.images, options.features)
    found = {
        world: measure(world, options.losses, *sizes, options.repeats)
        for world in sorted(set(options.ranks))
    }

    def case(loss: str, kind: str, world: int) -> Case:
        return Case(loss, kind, world, *sizes)

    rate = {
        (loss, kind): flops(case(loss, kind, 1)) / found[1][loss, kind]["seconds"]
        for loss in options.losses
        for kind in KINDS
    }
    rows = []
    for world, results in found.items():
        crowded = max(1.0, world / len(os.sched_getaffinity(0)))
        for (loss, kind), result in ((key, r) for key, r in results.items() if key != "link"):
            one = case(loss, kind, world)
            link = results["link"] or {"latency": 0.0, "bandwidth": float("inf")}
            expected = seconds(one, Machine(rate[loss, kind] / crowded, **link))
            model = {"received": received(one), "peak": peak_bytes(one), **expected}
            rows.append({"loss": loss, "kind": kind, "world": world, **result, "model": model})
    link = found[min(world for world in found if world > 1)]["link"]
    here = {"flops": max(rate.values()), **link}
    return {
        "sizes": {"images": options.images, "features": options.features},
        "here": here,
        "measured": rows,
    }


def show_measured(record: dict[str, Any]) -> None:
    sizes, here = record["sizes"], record["here"]
    print(
        f"\n{sizes['images']} images of {sizes['features']} features a rank, float32, gloo: "
        f"{report.si(here['flops'])}FLOP/s, {report.si(here['bandwidth'])}B/s, "
        f"{here['latency'] * 1e6:.0f} µs"
    )
    print(
        f"{'':25}{'received':>18}{'':4}{'peak of tensors':>18}{'':4}{'step':>18}"
        f"{'communication':>16}{'resident':>10}"
    )
    print(
        f"{'loss':9}{'':9}{'W':>3}{'':4}" + f"{'model':>9}{'here':>9}{'':4}" * 3 + f"{'model':>9}"
        f"{'here':>12}"
    )
    for row in record["measured"]:
        model, fitted = row["model"], " *" if row["world"] == 1 else "  "
        cells = [
            *(size(model["received"]), size(int(row["received"]))),
            *(size(model["peak"]), size(int(row["allocated"]))),
            *(report.duration(model["step"]), report.duration(row["seconds"])),
        ]
        pairs = "".join(f"{a:>9}{b:>9}{'':4}" for a, b in zip(cells[::2], cells[1::2]))
        share = report.duration(model["communication"])
        print(
            f"{row['loss']:9}{row['kind']:9}{row['world']:3}{'':4}{pairs}{fitted}{share:>9}"
            f"{size(int(row['peak'])):>12}"
        )
    print("* the model's rate is that of this run")


# ---- the model alone -----------------------------------------------------------------------------


def extrapolated(options: argparse.Namespace, far: Machine) -> list[dict[str, Any]]:
    rows = []
    for loss in options.losses:
        for world in options.far_ranks:
            for kind in KINDS:
                case = Case(
                    *(loss, kind, world, options.far_images, options.far_features),
                    *(options.itemsize, options.backend, options.passes),
                )
                row = {"loss": loss, "kind": kind, "world": world, "rows": world * case.rows}
                row |= {"received": received(case), "peak": peak_bytes(case)}
                rows.append(row | seconds(case, far))
    return rows


def show_far(options: argparse.Namespace, far: Machine, rows: list[dict[str, Any]]) -> None:
    print(
        f"\nThe model alone: {options.far_images} images of {options.far_features} features a "
        f"rank, {options.itemsize} bytes an element, {options.backend}, {options.passes:g} passes; "
        f"{report.si(far.flops)}FLOP/s, {report.si(far.bandwidth)}B/s, {far.latency * 1e6:g} µs"
    )
    print(
        f"{'loss':9}{'W':>5}{'rows':>12}"
        + "".join(f"{name:>12}{'memory':>12}{'received':>12}{'commun.':>12}" for name in KINDS)
        + f"{'compute':>12}  less time"
    )
    for gather, ring in zip(rows[::2], rows[1::2]):
        cells = "".join(
            f"{report.duration(row['step']):>12}{size(row['peak']):>12}"
            f"{size(row['received']):>12}{report.duration(row['communication']):>12}"
            for row in (gather, ring)
        )
        compute = report.duration(gather["compute"])
        print(
            f"{gather['loss']:9}{gather['world']:5}{gather['rows']:12,}{cells}{compute:>12}  "
            f"{verdict(gather['step'], ring['step'])}"
        )


def size(count: float) -> str:
    return f"{report.si(count)}B" if count else "0"


def verdict(gather: float, ring: float) -> str:
    """Which takes less time, and by how much; within one percent it is neither."""
    if abs(gather - ring) <= 0.01 * min(gather, ring):
        return "as long"
    name = "gather" if gather < ring else "ring"
    return f"{name}, {max(gather, ring) / min(gather, ring):.2f}×"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
