"""`python -m bench step`: where the time of a training step goes, by the quick recipes.

    python -m bench step                            all methods, on the embedded images
    python -m bench step swav moco-v2 --steps 50
    python -m bench step simclr-v1 -- --channels-last --precision bf16    flags of fastcl.train
    python -m bench step --clock cpu --threads 1    on a machine that has other work to do

Nothing is prepared ahead, so that the parts add up to the step: a training with --workers 1
prepares the next batch while it computes. The parts, forward and backward together:

    augmentation    the views of a batch
    networks        encoder, heads and what else has parameters
    momentum        the forward pass of the encoder's moving average
    loss            what the method calls in fastcl.functional: similarities, codes, bank scores
    optimizer       clipping and the step
    updates         of moving averages, queues and banks

Medians over the steps. Exit status: 2 for wrong usage, or where --compile cannot.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import shlex
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastcl.functional as F
from bench import machine, report
from bench.usage import UsageError, unknown
from fastcl.compiled import CompileError
from fastcl.config import UsageError as TrainUsageError
from fastcl.config import parse
from fastcl.interrupt import Interrupt
from fastcl.methods import METHODS
from fastcl.train import Trainer

PARTS = ("augmentation", "networks", "momentum", "loss", "optimizer", "updates")
UPDATES = ("ema_update_", "queue_push_", "bank_update_")
WARM_UP = 3  # steps that are not counted
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Row = dict[str, Any]


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m bench step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [-h] [options] [method ...] [-- flags of fastcl.train]",
    )
    p.add_argument("methods", nargs="*", metavar="method", help=f"all: {', '.join(METHODS)}")
    p.add_argument("--steps", type=int, default=20, metavar="N", help="steps that are timed; 20")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    p.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: the process's time on all cores"
    )
    p.add_argument("--json", type=Path, metavar="FILE")
    return p


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options, flags = parser().parse_args(arguments[:split]), arguments[split + 1 :]
    record: Row = {"command": shlex.join(["python", "-m", "bench", "step", *arguments])}
    try:
        for name in options.methods:
            if name not in METHODS:
                raise UsageError(unknown("method", name, METHODS))
        if min(options.steps, options.threads) < 1:
            raise UsageError("--steps and --threads must be at least 1.")
        torch.set_num_threads(options.threads)
        record["machine"] = machine.describe("cpu", options.threads)
        report.print_machine(record["machine"])
        names, clock = options.methods or list(METHODS), CLOCKS[options.clock]
        record["rows"] = [profile(name, flags, options.steps, clock) for name in names]
    except (UsageError, TrainUsageError) as error:
        print(f"python -m bench step: {error}", file=sys.stderr)
        return 2
    show(record["rows"])
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def profile(method: str, flags: list[str], steps: int, clock: Callable[[], float]) -> Row:
    """The row of a method: seconds of each part of a step, and images per second."""
    with tempfile.TemporaryDirectory() as folder:
        given = ["--method", method, "--output", str(Path(folder, "run")), "--workers", "0"]
        request = parse([*given, "--no-report", "--no-tensorboard", *flags])
        with warnings.catch_warnings(), Interrupt() as interrupt:
            warnings.simplefilter("ignore")
            try:
                trainer = Trainer(request, interrupt)
            except (ValueError, OSError) as error:
                raise UsageError(" ".join(str(error).split())) from None
            try:
                spent = time_steps(trainer, WARM_UP + steps, clock)[WARM_UP:]
            except CompileError as error:
                raise UsageError(str(error)) from None
            finally:
                trainer.metrics.close()
                trainer.bar.close()
    seconds = {part: statistics.median(step[part] for step in spent) for part in PARTS}
    total = statistics.median(sum(step.values()) for step in spent)
    images = trainer.config.batch_size / total
    return {"method": method, "seconds": seconds, "step": total, "images_per_second": images}


class Watch:
    """Adds up the time of the parts: `now(part)` says what begins."""

    def __init__(self, clock: Callable[[], float], device: torch.device) -> None:
        self.clock, self.device = clock, device
        self.part, self.spent = PARTS[0], dict.fromkeys(PARTS, 0.0)
        self.since = clock()

    def now(self, part: str) -> str:
        """From now on it is this part; returns the one before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        time = self.clock()
        self.spent[self.part] += time - self.since
        before, self.part, self.since = self.part, part, time
        return before


def time_steps(trainer: Trainer, count: int, clock: Callable[[], float]) -> list[dict[str, float]]:
    """The seconds of the parts of each of `count` steps."""
    steps: list[dict[str, float]] = []
    with watching(trainer, clock) as watch:
        while len(steps) < count:
            batches = iter(trainer.loader)
            while len(steps) < count:
                watch.spent = dict.fromkeys(PARTS, 0.0)
                watch.now("augmentation")
                batch = next(batches, None)
                if batch is None:
                    break
                views, _, indices = batch
                watch.now("networks")
                views = [trainer._placed(view) for view in views]
                trainer._step(views, indices.to(trainer.device))
                watch.now("augmentation")
                steps.append(watch.spent)
    return steps


@contextlib.contextmanager
def watching(trainer: Trainer, clock: Callable[[], float]) -> Iterator[Watch]:
    """A watch that knows where the trainer is; the trainer is left with hooks on it."""
    watch, method = Watch(clock, trainer.device), trainer.method
    for encoder in method.encoders():
        encoder.register_forward_pre_hook(
            lambda *_: void(watch.now("networks" if torch.is_grad_enabled() else "momentum"))
        )
    after_backward = method.after_backward

    def clip_and_push(at: Any) -> None:
        watch.now("optimizer")
        after_backward(at)

    method.after_backward = clip_and_push  # type: ignore[method-assign]
    trainer.optimizer.register_step_post_hook(lambda *_: void(watch.now("updates")))
    names = [n for n, f in vars(F).items() if callable(f) and f.__module__ != "typing"]
    originals = {name: getattr(F, name) for name in names}
    for name, function in originals.items():
        setattr(F, name, timed(function, "updates" if name in UPDATES else "loss", watch))
    try:
        yield watch
    finally:
        for name, function in originals.items():
            setattr(F, name, function)


def timed(function: Callable[..., Any], part: str, watch: Watch) -> Callable[..., Any]:
    """function, its time and that of its backward pass counted as `part`.

    Its backward pass begins when the gradient of a result is there, and ends when that of an
    argument is.
    """

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        before = watch.now(part)
        on_gradient(arguments, "networks", watch)
        results = function(*arguments, **keywords)
        on_gradient(results if isinstance(results, tuple) else (results,), part, watch)
        watch.now("networks" if before == "momentum" else before)
        return results

    return call


def on_gradient(tensors: tuple[Any, ...], part: str, watch: Watch) -> None:
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda _: void(watch.now(part)))


def void(_: object) -> None:
    """For hooks, which may replace what they are given by what they return."""


def show(rows: list[Row]) -> None:
    """The table, and which loss takes the most of its step."""
    header = ("method", "images/s", "ms a step", *(f"{part} %" for part in PARTS))
    lines = [header]
    for row in rows:
        shares = (f"{100 * row['seconds'][part] / row['step']:.1f}" for part in PARTS)
        first = (row["method"], f"{row['images_per_second']:,.0f}", f"{1e3 * row['step']:.1f}")
        lines.append((*first, *shares))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print(line[0].ljust(widths[0]), *cells, sep="  ")
    most = max(rows, key=lambda row: row["seconds"]["loss"] / row["step"])
    share = most["seconds"]["loss"] / most["step"]
    print(f"\nthe loss takes at most {share:.1%} of a step, in {most['method']}")
