"""The picture of `python -m bench scale`: a rank's time and memory against the number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.plots import plt, save
from bench.scale_model import KINDS

COLOURS = {"gather": "#0072b2", "ring": "#d55e00"}


def draw(record: dict[str, Any], folder: Path) -> Path:
    """A row of panels for each loss: step and communication, memory; circles were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    losses = list(dict.fromkeys(row["loss"] for row in record["far"]))
    measured = bool(record["measured"])
    figure, axes = plt.subplots(
        len(losses), 4 if measured else 2,
        figsize=(16 if measured else 9, 3.6 * len(losses)), squeeze=False, layout="constrained",
    )  # fmt: skip
    for loss, row in zip(losses, axes):
        far = [r for r in record["far"] if r["loss"] == loss]
        if measured:
            near = [r for r in record["measured"] if r["loss"] == loss]
            pair(row[0], near, "step", "seconds", f"{loss}: step, here [ms]", 1e3)
            pair(row[1], near, "peak", "peak", f"{loss}: memory, here [MiB]", 2**-20)
        for kind in KINDS:
            own = [r for r in far if r["kind"] == kind]
            worlds, style = [r["world"] for r in own], {"color": COLOURS[kind], "lw": 1.6}
            row[-2].plot(worlds, [r["step"] for r in own], label=kind, **style)
            row[-2].plot(worlds, [r["communication"] or None for r in own], "--", **style)
            row[-1].plot(worlds, [r["peak"] / 2**30 for r in own], label=kind, **style)
        rows = far[0]["rows"] // far[0]["world"]
        row[-2].set_title(f"{loss}: step, - - of it communication [s]")
        row[-1].set_title(f"{loss}: memory [GiB]")
        for axis in row[-2:]:
            axis.set(xscale="log", yscale="log", xlabel=f"ranks of {rows:,} rows, the model alone")
            axis.legend()
    return save(figure, folder / "scale.png")


def pair(axis: Any, rows: Any, of_model: str, here: str, title: str, unit: float) -> None:
    """The model's line and what was measured, for both kinds."""
    for kind in KINDS:
        own = [r for r in rows if r["kind"] == kind]
        worlds, colour = [r["world"] for r in own], COLOURS[kind]
        axis.plot(worlds, [unit * r["model"][of_model] for r in own], color=colour, label=kind)
        axis.plot(worlds, [unit * r[here] for r in own], "o", color=colour)
    axis.set(title=title, xticks=worlds, ylim=(0, None))
    axis.set_xlabel("ranks; line: model, circle: measured")
    axis.legend()
