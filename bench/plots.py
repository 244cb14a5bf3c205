"""The pictures: time and memory against the rows, and the fraction of the machine's limit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench import report
from bench.scaling import fits, peak
from bench.workloads import PROVIDERS, WORKLOADS

# Okabe and Ito's palette, which the colour-blind can tell apart, and a marker for those who print.
STYLE = {
    "fastcl": ("#d55e00", "o"),
    "torch": ("#0072b2", "s"),
    "compile": ("#56b4e9", "^"),
    "builtin": ("#009e73", "v"),
    "lightly": ("#cc79a7", "D"),
    "pytorch-metric-learning": ("#e69f00", "P"),
    "open_clip": ("#8c6d31", "X"),
    "info-nce-pytorch": ("#666666", "<"),
    "solo-style": ("#000000", ">"),
    "memeff": ("#7570b3", "h"),
    "inf-cl": ("#a6761d", "*"),
    "siglip-kernel": ("#1b9e77", "p"),
    "liger-kernel": ("#e7298a", "d"),
}
plt.rcParams.update(
    {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "legend.frameon": False,
        "savefig.dpi": 160,
    }
)

assert STYLE.keys() == PROVIDERS.keys()

RANK = {provider: i for i, provider in enumerate(STYLE)}


def draw(results: list[dict[str, Any]], folder: Path) -> list[Path]:
    """Every picture that the results have data for. Returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    # Of a case that several files have, the last counts.
    results = list({(*report.key(r), r["provider"]): r for r in results}.values())
    paths = []
    for of_one, name in named(results, what_varies, lambda r: f"scaling_{r['workload']}"):
        axis = WORKLOADS[of_one[0]["workload"]].scaling
        if axis and len({r["sizes"][axis] for r in of_one if "seconds" in r}) > 1:
            paths.append(save(scaling(of_one, axis), folder / f"{name}.png"))
    timed = [r for r in results if "fraction_of_limit" in r]
    for of_one, name in named(timed, kind, lambda r: "fraction_of_limit"):
        paths.append(save(fractions(largest(of_one)), folder / f"{name}.png"))
    return paths


def kind(result: dict[str, Any]) -> tuple[str, str]:
    return (result["dtype"], result["device"])


def what_varies(result: dict[str, Any]) -> tuple[Any, ...]:
    """What the points of one picture have in common: all but the size that --scaling varies."""
    axis = WORKLOADS[result["workload"]].scaling
    fixed = tuple((k, v) for k, v in result["sizes"].items() if k != axis)
    return (result["workload"], *kind(result), fixed)


def named(
    results: list[dict[str, Any]],
    key: Callable[[dict[str, Any]], tuple[Any, ...]],
    name: Callable[[dict[str, Any]], str],
) -> list[tuple[list[dict[str, Any]], str]]:
    """The groups of equal key, and a file name for each: dtype, device and number when needed."""
    groups = [list(group) for _, group in groupby(sorted(results, key=key), key)]
    several = len({kind(r) for r in results}) > 1
    found: list[tuple[list[dict[str, Any]], str]] = []
    for group in groups:
        base = name(group[0])
        if several:
            base += "_" + "_".join(kind(group[0])).replace(":", "")
        taken = {other for _, other in found}
        numbered = (base if n == 1 else f"{base}_{n}" for n in itertools.count(1))
        found.append((group, next(n for n in numbered if n not in taken)))
    return found


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    plt.close(figure)
    return path


def largest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each workload the largest case: a --scaling run counts once."""
    most: dict[str, tuple[float, Any]] = {}
    for r in results:
        case = (r["work"]["amount"], report.key(r))
        most[r["workload"]] = max(most.get(r["workload"], case), case, key=lambda c: c[0])
    return [r for r in results if report.key(r) == most[r["workload"]][1]]


# ---- time and memory against the rows ------------------------------------------------------------


def scaling(results: list[dict[str, Any]], axis: str) -> Figure:
    """Two log-log panels: milliseconds and MiB against the size that varied."""
    figure, (time, memory) = plt.subplots(1, 2, figsize=(10, 5), layout="constrained")
    timed = [r for r in results if "seconds" in r]
    sizes = sorted({r["sizes"][axis] for r in timed})
    for provider in sorted({r["provider"] for r in timed}, key=RANK.__getitem__):
        colour, marker = STYLE[provider]
        all_sizes = [r for r in results if r["provider"] == provider]
        all_sizes.sort(key=lambda r: r["sizes"][axis])
        own = [r for r in all_sizes if "seconds" in r]
        front = {"zorder": 3, "linewidth": 2.2} if provider == "fastcl" else {"linewidth": 1.3}
        line = {"color": colour, "marker": marker, "markersize": 5, **front}
        x = [r["sizes"][axis] for r in own]
        time.plot(
            x,
            [1e3 * r["seconds"]["median"] for r in own],
            label=legend_line(provider, all_sizes, axis),
            **line,
        )
        time.fill_between(
            x,
            [1e3 * r["seconds"]["lower_quartile"] for r in own],
            [1e3 * r["seconds"]["upper_quartile"] for r in own],
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
        measured = [r for r in own if peak(r)]
        memory.plot(
            [r["sizes"][axis] for r in measured],
            [r["peak_bytes"] / 2**20 for r in measured],
            **line,
        )
    fixed = {k: v for k, v in results[0]["sizes"].items() if k != axis}
    about = ", ".join(f"{k} = {v:,}" for k, v in fixed.items())
    figure.suptitle(
        f"{results[0]['workload']}: {WORKLOADS[results[0]['workload']].what} "
        f"({about}, {results[0]['dtype']}, {results[0]['device']})",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    for panel, title, unit in (
        (time, "Time of a call", "ms"),
        (memory, "Peak memory of a call", "MiB"),
    ):
        logarithmic(panel, sizes, axis)
        panel.set_title(title)
        panel.set_ylabel(unit)
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, fontsize=9)
    return figure


def legend_line(provider: str, own: list[dict[str, Any]], axis: str) -> str:
    """Name, exponents, and why the line ends before the last size."""
    line = provider
    (fit,) = fits(own) or [None]
    if fit:
        powers = [("time", fit["seconds"]), ("memory", fit["bytes"])]
        shown = [f"{name} ${axis}^{{{a:.2f}}}$" for name, a in powers if a is not None]
        line += ": " + ", ".join(shown)
    last = max(r["sizes"][axis] for r in own if "seconds" in r)
    after = [r for r in own if r["sizes"][axis] > last]
    return line + (f"; above {last:,} {after[0]['status']}" if after else "")


def logarithmic(panel: Axes, sizes: list[int], axis: str) -> None:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.xaxis.set_major_locator(FixedLocator(sizes))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{int(x):,}"))
    plain = FuncFormatter(lambda y, _: f"{y:,.10g}")
    low, high = panel.get_ylim()
    few = high / low < 100  # then 1, 10, 100 are too far apart
    panel.yaxis.set_major_locator(LogLocator(10, (1, 2, 5) if few else (1,), numticks=20))
    panel.yaxis.set_major_formatter(plain)
    panel.yaxis.set_minor_formatter(NullFormatter())
    if len(sizes) > 6:
        panel.tick_params(axis="x", rotation=30)
        for label in panel.get_xticklabels():
            label.set_horizontalalignment("right")
            label.set_rotation_mode("anchor")
    panel.set_xlabel(axis)
    panel.grid(True, which="major", color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)


# ---- fraction of the limit -----------------------------------------------------------------------


def fractions(results: list[dict[str, Any]]) -> Figure:
    """One line a workload, one mark a provider, from 0 to what the machine can do."""
    names = [name for name in WORKLOADS if any(r["workload"] == name for r in results)]
    figure, panel = plt.subplots(figsize=(8.5, 1.5 + 0.46 * len(names)), layout="constrained")
    for y, name in enumerate(names):
        own = [r for r in results if r["workload"] == name]
        shares = [100 * r["fraction_of_limit"] for r in own]
        panel.plot([min(shares), max(shares)], [y, y], color="#cccccc", linewidth=1.5, zorder=1)
        for r, share in sorted(zip(own, shares), key=lambda pair: -RANK[pair[0]["provider"]]):
            colour, marker = STYLE[r["provider"]]
            panel.scatter(share, y, s=55, color=colour, marker=marker, zorder=3, ec="white", lw=0.6)
            if r["provider"] == "fastcl":
                panel.annotate(
                    f"{share:.0f}",
                    (share, y),
                    xytext=(0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8.5,
                    color=colour,
                )
    panel.axvline(100, color="#444444", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    units = {r["workload"]: r["work"]["unit"] for r in results}
    kind = {"flop": "multiply-adds", "byte": "memory traffic"}
    panel.set_yticks(range(len(names)), [f"{name}\n{kind[units[name]]}" for name in names])
    for label in panel.get_yticklabels():
        label.set_fontsize(8.5)
    panel.set_ylim(len(names) - 0.5, -0.7)
    top = max(100.0, *(100 * r["fraction_of_limit"] for r in results))
    panel.set_xlim(-0.02 * top, 1.05 * top)
    panel.set_xlabel("least work ÷ time ÷ the machine's best rate, %")
    panel.set_title(
        f"Fraction of the machine's limit ({results[0]['dtype']}, {results[0]['device']})"
    )
    panel.grid(True, axis="x", color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(axis="y", length=0)
    providers = sorted({r["provider"] for r in results}, key=RANK.__getitem__)
    handles = [
        plt.Line2D([], [], color=STYLE[p][0], marker=STYLE[p][1], linestyle="", label=p)
        for p in providers
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(providers), 5))
    return figure


# ---- methods -------------------------------------------------------------------------------------

MARKS = {  # accuracy -> (marker, colour, label)
    "untrained": ("o", "#999999", "kNN, untrained encoder"),
    "trained": ("o", "#d55e00", "kNN, trained"),
    "linear": ("D", "#0072b2", "linear probe"),
}


def methods(record: dict[str, Any]) -> Figure:
    """`python -m bench methods`: what each method learned, and the time that it took."""
    rows = record["rows"]
    figure, (accuracy, time) = plt.subplots(
        1, 2, figsize=(10, 1.9 + 0.42 * len(rows)), width_ratios=(2, 1), sharey=True,
        layout="constrained",
    )  # fmt: skip
    for y, row in enumerate(rows):
        shares = {n: 100 * row[n] for n in MARKS if row.get(n) is not None}
        if {"untrained", "trained"} <= shares.keys():
            ends = [shares["untrained"], shares["trained"]]
            accuracy.plot(ends, [y, y], color="#cccccc", linewidth=2.5, zorder=1)
        for name, share in shares.items():
            marker, colour, _ = MARKS[name]
            size, front = (66, 3) if name == "linear" else (46, 4)  # one may lie on the other
            accuracy.scatter(
                share, y, s=size, color=colour, marker=marker, ec="white", lw=0.6, zorder=front
            )
        if "trained" in shares:
            accuracy.annotate(
                f"{shares['trained']:.0f}", (shares["trained"], y), xytext=(0, 6),
                textcoords="offset points", ha="center", fontsize=8.5, color="#d55e00",
            )  # fmt: skip
        if row["status"] == "failed":
            accuracy.annotate(
                "failed",
                (0.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color="#b00020",
            )
        if row.get("seconds") and row["status"] != "failed":
            time.barh(y, row["seconds"], height=0.5, color="#bbbbbb")
            about = f" {report.duration(row['seconds'])}"
            if row.get("peak_bytes"):
                about += f", {report.size(row['peak_bytes'])}"
            time.annotate(about, (row["seconds"], y), va="center", fontsize=8.5)
    for pixels in {row["raw_pixels"] for row in rows if row.get("raw_pixels") is not None}:
        accuracy.axvline(
            100 * pixels, color="#444444", linewidth=1, linestyle=(0, (4, 3)), zorder=0
        )
    accuracy.set_yticks(range(len(rows)), [row["method"] for row in rows])
    accuracy.set_ylim(len(rows) - 0.5, -0.7)
    accuracy.set_xlim(-1, 103)
    accuracy.set_xlabel("accuracy, %")
    accuracy.set_title(f"What the encoder learned ({record['data']})")
    time.set_title("Training: time, peak memory")
    time.set_xlabel("seconds")
    time.set_xlim(0, 1.75 * max([row.get("seconds") or 0 for row in rows] + [1e-3]))
    for panel in (accuracy, time):
        panel.grid(True, axis="x", color="#dddddd", linewidth=0.7)
        panel.set_axisbelow(True)
        panel.tick_params(axis="y", length=0)
    handles = [
        plt.Line2D([], [], color=c, marker=m, linestyle="", label=label)
        for m, c, label in MARKS.values()
    ]
    handles.append(
        plt.Line2D(
            [], [], color="#444444", linewidth=1, linestyle=(0, (4, 3)), label="kNN, raw pixels"
        )
    )
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=9)
    return figure
