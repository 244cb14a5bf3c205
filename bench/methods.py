"""`python -m bench methods`: every method in turn, by its quick recipe; what it learns and costs.

    python -m bench methods                               all of them, on the embedded images
    python -m bench methods swav byol --minutes 5         two of them, at most 5 minutes each
    python -m bench methods --data folder --data-dir photos --output runs/photos
    python -m bench methods swav -- --epochs 5 --seed 1   the rest goes to fastcl.train

Each training is a process of its own, and so is its linear probe. FOLDER then holds a run folder
and log for each method, and the table as methods.json, methods.md and methods.png; all are written
anew after every method. A method that is done there is not run again without --again; one that
fails is a row that says so. Ctrl-C stops the training and keeps the rows so far.
Exit status: 1 when a method failed, 2 for wrong usage, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench import machine, report
from bench.usage import UsageError, unknown
from fastcl.checkpoint import NAME
from fastcl.data import DATASETS
from fastcl.methods import METHODS

Row = dict[str, Any]
LOG, ROW = "bench.log", "bench.json"  # in each run folder
PATIENCE = 20.0  # seconds that a training has to save itself when it is stopped


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench methods",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [options] [method ...] [-- flags of fastcl.train]",
    )
    p.add_argument("methods", nargs="*", metavar="method", help=f"all: {', '.join(METHODS)}")
    p.add_argument("--data", default="fashion", help=", ".join(DATASETS))
    p.add_argument("--data-dir", type=Path, metavar="FOLDER", help="where the data is")
    p.add_argument("--minutes", type=float, metavar="M", help="stop each training after them")
    p.add_argument("--recipe", metavar="NAME", help="quick or quick-vit; all that a method has")
    p.add_argument("--output", type=Path, default=Path("runs/bench"), metavar="FOLDER")
    p.add_argument("--again", action="store_true", help="run also what is done in FOLDER")
    p.add_argument("--no-linear", action="store_true", help="skip the linear probes")
    return p


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, flags = parser().parse_args(arguments[:split]), arguments[split + 1 :]
    try:
        names = check(options, flags)
    except UsageError as error:
        print(f"python -m bench methods: {error}", file=sys.stderr)
        return 2
    record = {
        "command": shlex.join(["python", "-m", "bench", "methods", *arguments]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine.describe("cpu", threads()),
        "data": options.data,
        "rows": [],
    }
    report.print_machine(record["machine"])
    interrupted = False
    with stop_signals():
        try:
            for method, recipe in names:
                row = run(options, method, recipe, flags)
                record["rows"].append(row)
                say(row)
                save(record, options.output)
        except KeyboardInterrupt:
            interrupted = True
            print("\nstopped; below is what is done", file=sys.stderr)
    if record["rows"]:
        show(record)
        for name in ("methods.json", "methods.md", "methods.png"):
            if (options.output / name).exists():
                print(options.output / name)
    if interrupted:
        return 130
    return int(any(row["status"] == "failed" or row.get("probe_note") for row in record["rows"]))


def check(options: argparse.Namespace, flags: list[str]) -> list[tuple[str, str]]:
    """The (method, recipe) pairs to run. Raises UsageError."""
    for name in options.methods:
        if name not in METHODS:
            raise UsageError(unknown("method", name, METHODS))
    if options.data not in DATASETS:
        raise UsageError(unknown("data", options.data, DATASETS))
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise UsageError(f"--data-dir {options.data_dir} is no folder.")
    if options.minutes is not None and not options.minutes > 0:
        raise UsageError(f"--minutes must be above 0; got {options.minutes:g}.")
    for flag in ("--method", "--recipe", "--output", "--data", "--data-dir", "--resume"):
        if any(given.partition("=")[0] == flag for given in flags):
            raise UsageError(f"{flag} cannot come after --: the bench sets it.")
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write to --output {options.output}: {error.strerror}.") from None
    pairs = [
        (method, recipe)
        for method in options.methods or METHODS
        for recipe in METHODS[method].recipes
        if recipe.startswith("quick")  # some have one more, for another encoder
    ]
    recipes = {recipe: None for _, recipe in pairs}
    if options.recipe not in (None, *recipes):
        raise UsageError(unknown("recipe", options.recipe, recipes))
    return [pair for pair in pairs if options.recipe in (None, pair[1])]


def threads() -> int:
    import torch

    return torch.get_num_threads()


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Being terminated, or losing the terminal, is Ctrl-C too: no training is left behind."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = {n: signal.signal(n, stop) for n in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- one method ----------------------------------------------------------------------------------


def title(method: str, recipe: str) -> str:
    return method if recipe == "quick" else f"{method} {recipe.removeprefix('quick-')}"


def command_of(
    options: argparse.Namespace, method: str, recipe: str, flags: list[str]
) -> list[str]:
    """What is run, but for the run folder."""
    command = ["--method", method, "--recipe", recipe, "--data", options.data]
    if options.data_dir is not None:
        command += ["--data-dir", str(options.data_dir)]
    return [*command, *flags]


def folder_of(options: argparse.Namespace, method: str, recipe: str) -> Path:
    return options.output / title(method, recipe).replace(" ", "-")


def run(options: argparse.Namespace, method: str, recipe: str, flags: list[str]) -> Row:
    """The row of a method: trained and probed, as far as its folder does not have that already."""
    folder = folder_of(options, method, recipe)
    arguments = command_of(options, method, recipe, flags)
    row = None if options.again else earlier(folder, arguments, options.minutes)
    if row is None:
        row = {
            "method": title(method, recipe),
            "arguments": arguments,
            "minutes": options.minutes,
            "folder": str(folder),
            **train(folder, title(method, recipe), arguments, options.minutes),
        }
    probe = protocol_of(method) if not options.no_linear else None
    unknown_accuracy = row["status"] == "stopped" and "trained" not in row
    if row["status"] != "failed" and (unknown_accuracy or (probe and row.get("linear") is None)):
        row.update(evaluate(folder, probe))
    if row["status"] != "failed":
        (folder / ROW).write_text(json.dumps(row, indent=1, ensure_ascii=False) + "\n")
    return row


def earlier(folder: Path, arguments: list[str], minutes: float | None) -> Row | None:
    """The row of an earlier run of the same command, if it ended well."""
    try:
        row: Row = json.loads((folder / ROW).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    same = row.get("arguments") == arguments and row.get("minutes") == minutes
    return row if same and (folder / NAME).is_file() else None


def train(folder: Path, name: str, arguments: list[str], minutes: float | None) -> Row:
    """Status, time, memory, and what the training wrote. Raises nothing but KeyboardInterrupt."""
    if folder.exists() and not (folder / LOG).is_file():
        return {"status": "failed", "note": f"{folder} is not of this bench; move it away"}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"{name}: training; {folder / LOG}", flush=True)
    command = ["-m", "fastcl.train", *arguments, "--output", str(folder)]
    limit = None if minutes is None else 60 * minutes
    status, seconds, peak = run_process(command, folder / LOG, limit)
    found = read_metrics(folder / "metrics.jsonl")
    row: Row = {"status": "ok", "seconds": seconds, "peak_bytes": peak, **found}
    said = notes(folder / LOG)
    if status is None:
        row["status"] = "stopped"
        row.pop("trained", None)  # of an earlier epoch
        said.insert(0, f"stopped after {minutes:g} min, at epoch {row.get('epoch', 0):.1f}")
    elif status != 0:
        row["status"], said = "failed", [last_line(folder / LOG)]
    return {**row, "note": "; ".join(said)}


def run_process(
    command: list[str], log: Path, limit: float | None
) -> tuple[int | None, float, int | None]:
    """(exit status, seconds, peak resident bytes) of Python; status None: stopped at the limit.

    In a session of its own: Ctrl-C reaches only the bench, which passes it on once.
    """
    begin = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    stopped, peak, terminal, shown = False, None, sys.stderr.isatty(), ""
    try:
        while (status := process.poll()) is None:
            peak = high_water(process.pid) or peak
            if terminal and (line := last_line(log)[:70]) != shown:
                print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
                shown = line
            if limit is not None and not stopped and time.monotonic() - begin > limit:
                stopped = True
                process.send_signal(signal.SIGINT)
                limit += PATIENCE
            elif stopped and limit is not None and time.monotonic() - begin > limit:
                process.kill()
            time.sleep(0.1)
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(KeyboardInterrupt):  # again: at once
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
        raise
    finally:
        if terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        if process.returncode is None:
            process.kill()
            process.wait()
    return (None if stopped and status != 0 else status), time.monotonic() - begin, peak


def high_water(pid: int) -> int | None:
    """The most bytes that a running process has had resident; None where the system hides it.

    Not what wait4 says: that counts the process that started it, up to its exec, too.
    """
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def read_metrics(path: Path) -> Row:
    """Accuracies, rate and the last values of the collapse monitors."""
    if not path.is_file():
        return {}
    rows = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # cut short by a kill
            rows.append(json.loads(line))
    steps = [row for row in rows if "loss" in row]
    accuracies = [(row["step"], row["knn_top1"]) for row in rows if "knn_top1" in row]
    found: Row = {}
    for row in rows:
        if "knn_top1_raw_pixels" in row:
            found["raw_pixels"] = row["knn_top1_raw_pixels"]
    if accuracies and accuracies[0][0] == 0:
        found["untrained"] = accuracies[0][1]
    if accuracies and accuracies[-1][0] > 0:
        found["trained"] = accuracies[-1][1]
    if steps:
        found["images_per_second"] = statistics.median(r["images_per_second"] for r in steps)
        for name in ("epoch", "loss", "feature_std", "effective_rank"):
            found[name] = steps[-1].get(name)
    return found


def notes(log: Path) -> list[str]:
    """What the training says of collapse."""
    return re.findall(r"^note: (.+)$", log.read_text(errors="replace"), re.MULTILINE)


def last_line(log: Path) -> str:
    """The last line of a log: how far a training is, or a failed one's reason."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("fastcl.train: ") if lines else "it said nothing"


def evaluate(folder: Path, protocol: str | None) -> Row:
    """kNN, and the linear probe by this protocol, of a checkpoint: python -m fastcl.evaluate."""
    if not (folder / NAME).is_file():
        return {"probe_note": "no checkpoint to evaluate"}
    command = ["-m", "fastcl.evaluate", "--checkpoint", str(folder)]
    command += ["--linear", protocol] if protocol else []
    with (folder / LOG).open("a") as log:
        log.write(f"\n$ {shlex.join(['python', *command])}\n")
    size = (folder / LOG).stat().st_size
    status, _, _ = run_process(command, folder / LOG, None)
    with (folder / LOG).open("rb") as log:
        log.seek(size)
        answer = log.read().decode(errors="replace")
    found: Row = {"protocol": protocol, "probe_note": ""}
    for name, percent in re.findall(r"^(.+): ([\d.]+)%$", answer, re.MULTILINE):
        if name.startswith("linear"):
            found["linear"] = float(percent) / 100
        elif name.startswith("kNN"):
            found["trained"] = float(percent) / 100
    if status != 0:
        found["probe_note"] = f"evaluation failed: {last_line(folder / LOG)}"
    return found


def protocol_of(method: str) -> str:
    """The linear protocol of the method's own paper where it suits so few images; else MoCo's.

    Those of the other papers are for a million: their steps here are too few or too small.
    """
    family = method.partition("-")[0]
    return family if family in ("simclr", "swav") else "moco"


# ---- the table -----------------------------------------------------------------------------------

COLUMNS = (
    "method", "kNN", "untrained", "raw pixels", "linear", "time", "memory", "images/s",
    "loss", "std", "rank", "",
)  # fmt: skip
LEGEND = (
    "kNN, linear probe: accuracy of the encoder on the test images.  memory: peak of the training "
    "process.\nLast values of the training's monitors: loss, standard deviation of the unit "
    "embeddings (0: collapsed),\ntheir effective rank."
)


def cells(row: Row) -> tuple[str, ...]:
    def number(name: str, form: str) -> str:
        return "" if row.get(name) is None else form.format(row[name])

    return (
        row["method"],
        *(number(n, "{:.1%}") for n in ("trained", "untrained", "raw_pixels", "linear")),
        number("seconds", "{:.0f} s"),
        report.size(row.get("peak_bytes")),
        number("images_per_second", "{:,.0f}"),
        number("loss", "{:.3f}"),
        number("feature_std", "{:.3f}"),
        number("effective_rank", "{:.1f}"),
        "" if row["status"] == "ok" else row["status"],
    )


def remarks(row: Row) -> str:
    """What is to be said of a row, on a line of its own; "" for nothing."""
    text = "; ".join(filter(None, [row["note"], row.get("probe_note")]))
    return text if len(text) <= LONGEST_REMARK else f"{text[:LONGEST_REMARK]} …"


LONGEST_REMARK = 200


def say(row: Row) -> None:
    """One line as soon as a method is done."""
    named = dict(zip(COLUMNS, cells(row)))
    parts = [f"{name} {named[name]}" for name in ("kNN", "untrained", "linear", "time")]
    shown = [named[""], *(part for part in parts if not part.endswith(" ")), remarks(row)]
    print(f"{row['method']}: {', '.join(filter(None, shown))}", flush=True)


def show(record: dict[str, Any]) -> None:
    rows = record["rows"]
    report.show(f"\n{record['data']}", COLUMNS, [cells(row) for row in rows])
    for row in rows:
        if remarks(row):
            print(f"{row['method']}: {remarks(row)}")
    print(LEGEND)


def markdown(record: dict[str, Any]) -> str:
    """The table, and the command that made it."""
    about, rows = record["machine"], record["rows"]
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(cells(row))} |" for row in rows]
    said = [f"- {row['method']}: {remarks(row)}" for row in rows if remarks(row)]
    where = f"{about['processor']}, {about['threads']} threads, data: {record['data']}"
    parts = [f"```\n{record['command']}\n```", where, "\n".join(lines), "\n".join(said), LEGEND]
    return "\n\n".join(filter(None, parts)) + "\n"


def save(record: dict[str, Any], folder: Path) -> None:
    """methods.json, methods.md and methods.png."""
    report.save(record, folder / "methods.json")
    (folder / "methods.md").write_text(markdown(record))
    try:
        from bench import plots
    except ImportError:
        return
    plots.save(plots.methods(record), folder / "methods.png")
