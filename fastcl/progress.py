"""What a run says while it works: a progress bar, metrics.jsonl, the collapse monitor's numbers."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcl.checkpoint import replace_text

PLAIN_SECONDS = 10.0  # between lines where there is no terminal


class Metrics:
    """metrics.jsonl: one JSON object a line, on the disk at once: a killed run keeps its rows.

    With tensorboard, where it is installed, its numbers are events in the same folder too.
    """

    def __init__(
        self, path: Path, resume_at: int | None = None, *, tensorboard: bool = False
    ) -> None:
        """With resume_at, rows of later steps than it are cut off: they will be written again."""
        kept: list[str] = []
        if resume_at is not None and path.exists():
            kept = [row for row in path.read_text().splitlines() if _step_of(row) <= resume_at]
        replace_text(path, "".join(row + "\n" for row in kept))
        self.path = path
        self.events: Any = None
        if tensorboard:
            self.events = _event_writer(path.parent, None if resume_at is None else resume_at + 1)

    def write(self, **row: Any) -> None:
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        with self.path.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        if self.events is not None:
            for key, value in finite.items():
                if key not in ("step", "epoch") and value is not None:
                    self.events.add_scalar(key, value, finite["step"])
            self.events.flush()  # a resumed run continues curves that have no gap

    def close(self) -> None:
        if self.events is not None:
            self.events.close()


def _event_writer(folder: Path, purge_step: int | None) -> Any:
    """TensorBoard's writer, events from purge_step on taken back; None where it is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=purge_step)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without those that a kill cut short."""
    lines = path.read_text().splitlines()
    return [json.loads(line) for line in lines if math.isfinite(_step_of(line))]


def _step_of(row: str) -> float:
    """The step of a row; a row that a kill cut short counts as the latest."""
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class ProgressBar:
    """Loss, rate and time left: a bar in a terminal with rich, else a line every ten seconds."""

    def __init__(self, total: int, start: int) -> None:
        self.total, self.done, self.start = total, start, start
        self.began = self.said = time.monotonic()
        self.bar: Any = None
        if sys.stderr.isatty():
            self.bar = _rich_bar()
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task("", total=total, completed=start, loss="", rate="")

    def update(self, done: int, loss: float, rate: float) -> None:
        """`done` steps of the total, the latest loss, images per second."""
        self.done = done
        if self.bar is not None:
            self.bar.update(
                self.task, completed=done, loss=f"loss {loss:.4f}", rate=f"{rate:.0f} img/s"
            )
        elif time.monotonic() - self.said >= PLAIN_SECONDS or done == self.total:
            self.said = time.monotonic()
            left = (self.said - self.began) / max(done - self.start, 1) * (self.total - done)
            self.say(
                f"step {done}/{self.total}  loss {loss:.4f}  {rate:.0f} img/s  {_clock(left)} left"
            )

    def say(self, line: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _rich_bar() -> Any:
    """rich's bar on stderr, or None without rich."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    return Progress(
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@torch.no_grad()
def feature_std(embedding: Tensor) -> float:
    """The standard deviation over the batch of unit embeddings (N, D), averaged over D.

    1/√D when they are spread evenly over the sphere, 0 when all are the same.
    Source: Chen and He 2020 (SimSiam), arXiv:2011.10566, section 4.1.
    """
    return float(embedding.float().std(0, correction=0).mean())


@torch.no_grad()
def effective_rank(embedding: Tensor) -> float:
    """exp of the entropy of the normalised singular values of embeddings (N, D); 1 to min(N, D).

    Source: Roy and Vetterli 2007; as a monitor: Garrido et al. 2022 (RankMe), arXiv:2210.02885.
    """
    values = torch.linalg.svdvals(embedding.float())
    p = values / values.sum()
    return float(torch.exp(-torch.xlogy(p, p).sum()))


STILL = 0.1  # share of an even spread's standard deviation below which embeddings hardly differ
FLAT = 0.005  # relative distance of the loss to that of equal embeddings
FEW = 1.5, 0.02  # effective rank, and its share of what there can be, that are next to nothing


def collapse_signs(row: Mapping[str, Any]) -> list[str]:
    """What a row of metrics.jsonl says against the embeddings; nothing when they are well."""
    signs = []
    flat, loss = row.get("loss_if_collapsed"), row.get("loss")
    if flat is not None and loss is not None and abs(loss / flat - 1) < FLAT:
        signs.append(f"the loss sits at {flat:.3f}, what it is when all embeddings are the same")
    even, std = row.get("feature_std_even"), row.get("feature_std")
    if even is not None and std is not None and std < STILL * even:
        signs.append(
            f"they hardly differ, with a standard deviation of {std:.1e} "
            f"({even:.1e} when spread evenly)"
        )
    most, rank = row.get("effective_rank_most"), row.get("effective_rank")
    if most is not None and rank is not None and rank < min(max(FEW[0], FEW[1] * most), most):
        signs.append(f"they fill few directions, with an effective rank of {rank:.2f} of {most}")
    return signs


def collapse_sentence(row: Mapping[str, Any]) -> str:
    """The same in one plain sentence, for better or worse."""
    if any(row.get(key) is None for key in ("loss", "feature_std", "effective_rank")):
        return "Nothing can be said of collapse: there is no step with a finite loss."
    if signs := collapse_signs(row):
        return f"The embeddings have collapsed: {'; '.join(signs)}."
    flat = row.get("loss_if_collapsed")
    loss = f", and the loss {row['loss']:.3f} is not the {flat:.3f} of equal ones" if flat else ""
    return (
        f"The embeddings have not collapsed: their standard deviation is {row['feature_std']:.3f} "
        f"({row['feature_std_even']:.3f} when spread evenly), their effective rank "
        f"{row['effective_rank']:.1f} of at most {row['effective_rank_most']}{loss}."
    )
