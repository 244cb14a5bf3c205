"""`python -m bench byol-bn`: BYOL with batch norm here and there; which placements collapse.

    python -m bench byol-bn                                    all, 4 epochs of the embedded images
    python -m bench byol-bn nowhere "encoder, predictor"       two of them
    python -m bench byol-bn --epochs 20 -- --optimizer sgd --lr 0.1      the rest: fastcl.train's

BYOL has no negatives, and nothing in its loss keeps all embeddings from becoming the same. Batch
norm does, where it is, in so short a run; PLACEMENTS in fastcl/methods/byol_v2.py are the sets of
options. Everything else is BYOL v2's quick recipe. FOLDER then holds a run folder for each, and the
table as byol-bn.json and byol-bn.md, written anew after each.
Exit status: 1 when a training failed, 2 for wrong usage, 130 after Ctrl-C; a collapse is a result.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from bench import machine, report
from bench.methods import stop_signals, threads, train
from bench.usage import UsageError, unknown
from fastcl.methods.byol_v2 import PLACEMENTS

Row = dict[str, Any]

COLUMNS = (
    "batch norm in", "encoder", "projector", "predictor", "kNN", "untrained", "std", "rank", "loss",
    "",
)  # fmt: skip
LEGEND = (
    "kNN of the encoder, trained and untrained.  Last values of the training's monitors: standard "
    "deviation of\nthe unit projections (0: collapsed), their effective rank, the loss (0 to 4 for "
    "each view; 0 too: collapsed)."
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench byol-bn",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [options] [placement ...] [-- flags of fastcl.train]",
    )
    listed = "; ".join(f'"{name}"' for name in PLACEMENTS)
    p.add_argument("placements", nargs="*", metavar="placement", help=f"all: {listed}")
    p.add_argument("--epochs", type=int, default=4, metavar="N", help="of each training; 4")
    p.add_argument("--output", type=Path, default=Path("runs/byol-bn"), metavar="FOLDER")
    return p


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, flags = parser().parse_args(arguments[:split]), arguments[split + 1 :]
    try:
        names = check(options)
    except UsageError as error:
        print(f"python -m bench byol-bn: {error}", file=sys.stderr)
        return 2
    record: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "bench", "byol-bn", *arguments]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine.describe("cpu", threads()),
        "rows": [],
    }
    report.print_machine(record["machine"])
    interrupted = False
    with stop_signals():
        try:
            for name in names:
                record["rows"].append(run(options, name, flags))
                report.save(record, options.output / "byol-bn.json")
                (options.output / "byol-bn.md").write_text(markdown(record))
        except KeyboardInterrupt:
            interrupted = True
            print("\nstopped; below is what is done", file=sys.stderr)
    if record["rows"]:
        report.show("\nBYOL", COLUMNS, [cells(row) for row in record["rows"]])
        for row in record["rows"]:
            if row["note"]:
                print(f"{row['placement']}: {row['note']}")
        print(LEGEND)
    if interrupted:
        return 130
    return int(any(row["status"] == "failed" for row in record["rows"]))


def check(options: argparse.Namespace) -> list[str]:
    """The placements to train. Raises UsageError."""
    for name in options.placements:
        if name not in PLACEMENTS:
            raise UsageError(unknown("placement", name, PLACEMENTS))
    if options.epochs < 1:
        raise UsageError(f"--epochs must be at least 1; got {options.epochs}.")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to --output {options.output}: {error.strerror}.") from None
    return options.placements or list(PLACEMENTS)


def run(options: argparse.Namespace, name: str, flags: list[str]) -> Row:
    """The row of a placement, trained in a process of its own."""
    encoder, projector, predictor, careful = PLACEMENTS[name]
    arguments = ["--method", "byol-v2", "--recipe", "quick", "--epochs", str(options.epochs)]
    arguments += ["--encoder-norm", encoder, "--projector-norm", projector]
    arguments += ["--predictor-norm", predictor, "--no-report", "--no-tensorboard"]
    arguments += ["--careful-init"] if careful else []
    folder = options.output / re.sub(r"\W+", "-", name)
    row = {
        "placement": name,
        "norms": [encoder, projector, predictor],
        "careful_init": careful,
        **train(folder, name, [*arguments, *flags], None),
    }
    row["collapsed"] = "have collapsed" in row["note"]
    return row


# ---- the table -----------------------------------------------------------------------------------


def cells(row: Row) -> tuple[str, ...]:
    def number(name: str, form: str) -> str:
        return "" if row.get(name) is None else form.format(row[name])

    return (
        row["placement"],
        *("–" if norm == "none" else norm.upper() for norm in row["norms"]),
        *(number(name, "{:.1%}") for name in ("trained", "untrained")),
        number("feature_std", "{:.4f}"),
        number("effective_rank", "{:.1f}"),
        number("loss", "{:.3f}"),
        verdict(row),
    )


def verdict(row: Row) -> str:
    """In a word; "" for a placement that learns."""
    if row["status"] != "ok":
        return str(row["status"])
    if row["collapsed"]:
        return "collapsed"
    return "learned nothing" if row["trained"] <= row["untrained"] else ""


def markdown(record: dict[str, Any]) -> str:
    """The table, and the command that made it."""
    about = record["machine"]
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in record["rows"]]
    where = f"{about['processor']}, {about['threads']} threads"
    parts = [f"```\n{record['command']}\n```", where, "\n".join(lines), LEGEND]
    return "\n\n".join(parts) + "\n"
