"""The pictures of a run: its curves, a map of its features, nearest neighbours.

Each function draws into a figure that it is given; report.py puts them together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as nf

# Okabe and Ito's palette, which the colour-blind can tell apart.
OURS, OTHER, GOOD, WRONG = "#0072b2", "#e69f00", "#009e73", "#d55e00"
REFERENCE: dict[str, Any] = {
    "color": "#444444",
    "linewidth": 1,
    "linestyle": (0, (4, 3)),
    "zorder": 1,
}
STYLE: Any = {  # matplotlib's settings
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
SOLID: Any = "solid"
DASHED: Any = (0, (2, 1.2))
LONG = 24  # characters of a class name
MANY = 20  # classes that colours can still tell apart
DPI = 100
SIDE = 64  # pixels of an image in the grid
GAP = 8  # pixels between images

Row = dict[str, Any]


@dataclass(frozen=True)
class Neighbours:
    """Some test images, each with those whose features are nearest, the nearest first."""

    images: Tensor  # uint8 (Q, 1 + k, 3, H, W): the query, then its neighbours
    labels: Tensor  # (Q, 1 + k), −1 where there is none
    right: float | None  # share of neighbours of the query's class, over all test images looked at
    looked_at: int


def style() -> AbstractContextManager[None]:
    """matplotlib's settings here, and no others than here."""
    return matplotlib.rc_context(STYLE)


def draw(size: tuple[float, float], into: Callable[..., Any], *what: Any) -> NDArray[np.uint8]:
    """What `into(figure, *what)` draws on a figure of that size in inches: (height, width, 3)."""
    figure = Figure(size, dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)
    into(figure, *what)
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


# ---- curves --------------------------------------------------------------------------------------


def curves(figure: Figure, rows: Sequence[Row]) -> dict[str, Axes]:
    """Loss, kNN, learning rate, feature std, effective rank and rate, against epochs."""
    axes = figure.subplots(2, 3)
    names = ("loss", "knn", "lr", "feature_std", "effective_rank", "images_per_second")
    panels = dict(zip(names, axes.flat))
    steps = [row for row in rows if "loss" in row]
    last = steps[-1] if steps else {}
    _curve(panels["loss"], "Loss", steps, "loss")
    _line(panels["loss"], last.get("loss_if_collapsed"), "all embeddings the same")
    _accuracy(panels["knn"], rows)
    _curve(panels["lr"], "Learning rate", steps, "lr", floor=True)
    if any(row.get("momentum") is not None for row in steps):
        _momentum(panels["lr"], steps)
    _curve(panels["feature_std"], "Feature standard deviation", steps, "feature_std", floor=True)
    _line(panels["feature_std"], last.get("feature_std_even"), "spread evenly")
    _curve(panels["effective_rank"], "Effective rank", steps, "effective_rank", floor=True)
    _line(panels["effective_rank"], last.get("effective_rank_most"), "the most there can be")
    title = "Images per second"
    _curve(panels["images_per_second"], title, steps, "images_per_second", floor=True)
    for panel in panels.values():
        panel.set_xlabel("epoch")
        panel.grid(True, color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=last.get("epoch", 0) > 3))
        panel.set_xlim(0, 1.02 * max([row["epoch"] for row in rows] + [0.01]))
    return panels


def _curve(panel: Axes, title: str, rows: Sequence[Row], key: str, floor: bool = False) -> None:
    own = [row for row in rows if row.get(key) is not None]
    marker = "o" if len(own) < 25 else ""
    x, y = [row["epoch"] for row in own], [row[key] for row in own]
    panel.plot(x, y, color=OURS, marker=marker, markersize=3.5, linewidth=1.6)
    panel.set_title(title)
    if y and key != "lr":  # there the right is the momentum's
        panel.set_title(f"{y[-1]:,.4g}", loc="right", color=OURS)
    if floor and y:
        panel.set_ylim(0, 1.08 * max(y) or 1)


def _line(panel: Axes, value: float | None, label: str, side: str = "right") -> None:
    """A dashed line that says what the curve is to be held against."""
    if value is None:
        return
    panel.axhline(value, **REFERENCE)
    low, high = panel.get_ylim()
    panel.set_ylim(low, max(high, value + 0.12 * (value - low)))
    panel.annotate(
        label, (1 if side == "right" else 0.02, value), xycoords=("axes fraction", "data"),
        xytext=(0, 2), textcoords="offset points", ha=side, va="bottom", fontsize=8.5,
        color="#444444",
    )  # fmt: skip


def _accuracy(panel: Axes, rows: Sequence[Row]) -> None:
    """kNN accuracy, above the untrained encoder's and that of the images' pixels."""
    found = [row for row in rows if row.get("knn_top1") is not None]
    raw = next((r["knn_top1_raw_pixels"] for r in rows if "knn_top1_raw_pixels" in r), None)
    x, y = [row["epoch"] for row in found], [row["knn_top1"] for row in found]
    panel.plot(x, y, color=OURS, marker="o", markersize=5, linewidth=1.6, zorder=3)
    references = [("untrained encoder", found[0]["knn_top1"])] if found and x[0] == 0 else []
    references += [("raw pixels", raw)] if raw is not None else []
    panel.set_title("kNN accuracy")
    panel.set_title(f"{y[-1]:.1%}" if y else "", loc="right", color=OURS)
    panel.set_ylim(0, min(1.05, 1.25 * max([*y, *(v for _, v in references), 0.01])))
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for name, value in references:  # on either side: they may be close
        side = "left" if name == "raw pixels" else "right"
        _line(panel, value, f"{name} {value:.1%}", side)


def _momentum(panel: Axes, steps: Sequence[Row]) -> None:
    """The momentum of the key encoder, on an axis of its own at the right."""
    own = [row for row in steps if row.get("momentum") is not None]
    right = panel.twinx()
    right.plot(
        [row["epoch"] for row in own], [row["momentum"] for row in own], color=OTHER, linewidth=1.6
    )
    low = min(row["momentum"] for row in own)
    right.set_ylim(low - 0.08 * (1 - low) - 1e-4, 1 + 0.05 * (1 - low) + 1e-4)
    right.ticklabel_format(axis="y", useOffset=False)
    right.tick_params(axis="y", colors=OTHER)
    right.spines["right"].set_visible(True)
    panel.tick_params(axis="y", colors=OURS)
    panel.set_title("Learning rate", color=OURS)
    right.set_title("momentum", loc="right", color=OTHER)


# ---- features ------------------------------------------------------------------------------------


def feature_map(figure: Figure, places: Tensor, labels: Tensor, classes: Sequence[str]) -> Axes:
    """places (N, 2) in the colours of labels (N,); a legend of as many classes as one can tell."""
    panel = figure.subplots()
    x, y = places.numpy().T
    known = labels.unique().tolist()
    named = [c for c in known if c >= 0]
    for label in known:
        chosen = (labels == label).numpy()
        colour = "#cccccc" if label < 0 else _colour(label, len(classes))
        name = "no label" if label < 0 else _plain(classes[label])
        panel.scatter(
            x[chosen], y[chosen], s=11, color=colour, linewidths=0, alpha=0.85, label=name
        )
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_aspect("equal", "datalim")
    panel.spines[["left", "bottom"]].set_visible(False)
    panel.set_title(f"Features of {len(places):,} test images (t-SNE)")
    if named and len(known) <= MANY:
        longest = max(len(_plain(classes[c])) for c in named)
        columns = max(1, min(5, 80 // (longest + 8)))
        figure.legend(loc="outside lower center", ncols=columns, markerscale=2, handletextpad=0.2)
    elif named:
        panel.set_xlabel(f"{len(classes):,} classes, in colours by their order")
    return panel


def _colour(label: int, classes: int) -> Any:
    if classes <= MANY:
        return matplotlib.colormaps["tab10" if classes <= 10 else "tab20"](label)
    return matplotlib.colormaps["hsv"](label / classes)


def _plain(text: str) -> str:
    """Text in which matplotlib sees no formula, and which a legend does not take for hidden."""
    short = text if len(text) <= LONG else text[: LONG - 1] + "…"
    return " " + short.replace("$", r"\$")


def neighbour_grid(
    figure: Figure, found: Neighbours, classes: Sequence[str]
) -> tuple[Axes, NDArray[np.uint8]]:
    """A line a query: the image, then its neighbours, framed by whether the class is the same."""
    panel = figure.subplots()
    queries = len(found.labels)
    mosaic = tile(found.images)
    panel.imshow(mosaic, interpolation="nearest")
    for i, labels in enumerate(found.labels.tolist()):
        for j, label in enumerate(labels):
            x, y = _corner(i, j)
            colour, dashes = GOOD, SOLID
            if j == 0:
                colour = "#000000"
            elif labels[0] < 0:
                colour = "#999999"
            elif label != labels[0]:
                colour, dashes = WRONG, DASHED
            frame = Rectangle((x - 2.5, y - 2.5), SIDE + 4, SIDE + 4, fill=False, clip_on=False)
            frame.set(edgecolor=colour, linewidth=1.8, linestyle=dashes)
            panel.add_patch(frame)
    panel.set_xticks([])
    panel.set_anchor("N")
    panel.spines[:].set_visible(False)
    names = [_plain(classes[c]) if c >= 0 else "" for c in found.labels[:, 0].tolist()]
    panel.set_yticks([(SIDE + GAP) * i + SIDE / 2 for i in range(queries)], names)
    panel.tick_params(axis="y", length=0)
    panel.set_title(f"Nearest neighbours among {found.looked_at:,} test images")
    if found.right is not None:
        panel.set_xlabel(f"{found.right:.0%} of all images' neighbours are of the same class")
    handles = [
        Line2D([], [], color="#000000", lw=1.8, label="query"),
        Line2D([], [], color=GOOD, lw=1.8, label="same class"),
        Line2D([], [], color=WRONG, lw=1.8, linestyle=DASHED, label="another class"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3)
    return panel, mosaic


def tile(images: Tensor) -> NDArray[np.uint8]:
    """uint8 (Q, C, 3, H, W) as one picture with white between them."""
    queries, columns = images.shape[:2]
    mode = "nearest" if images.shape[-1] <= SIDE else "area"
    scaled = nf.interpolate(images.flatten(0, 1).float(), (SIDE, SIDE), mode=mode)
    pixels = scaled.round().to(torch.uint8).view(queries, columns, 3, SIDE, SIDE)
    right, bottom = _corner(queries - 1, columns - 1)
    mosaic = np.full((bottom + SIDE, right + SIDE, 3), 255, np.uint8)
    for i in range(queries):
        for j in range(columns):
            x, y = _corner(i, j)
            mosaic[y : y + SIDE, x : x + SIDE] = pixels[i, j].permute(1, 2, 0).numpy()
    return mosaic


def _corner(i: int, j: int) -> tuple[int, int]:
    """x, y of image j of line i; the query stands somewhat apart."""
    return (SIDE + GAP) * j + (2 * GAP if j else 0), (SIDE + GAP) * i
