"""The table in the terminal, and the JSON file with everything needed to repeat it."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any

COLUMNS = ("provider", "median", "min", "spread", "× torch", "memory", "of limit", "error", "")
NARROWEST = 120  # characters; below that the notes wrap


def key(result: dict[str, Any]) -> tuple[Any, ...]:
    """What belongs in one table."""
    sizes = tuple(result["sizes"].items())
    return (result["workload"], sizes, result["dtype"], result["device"])


def title(result: dict[str, Any]) -> str:
    sizes = sizes_of(result["sizes"])
    work, limit = result["work"], result.get("limit")
    name = "FLOP" if work["unit"] == "flop" else "B"
    line = f"{result['workload']}  {sizes}  {result['dtype']}  {result['device']}"
    line += f"  {si(work['amount'])}{name}"
    if limit:
        line += f", limit {si(limit['per_second'])}{name}/s ({limit['measured_by']})"
    return line


def sizes_of(sizes: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in sizes.items())


def rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The cells of one table, a row a provider, losing and missing ones included."""
    torch_time = next(
        (r["seconds"]["median"] for r in results if r["provider"] == "torch" and "seconds" in r),
        None,
    )
    return [cells(result, torch_time) for result in results]


def cells(result: dict[str, Any], torch_time: float | None) -> tuple[str, ...]:
    provider = result["provider"]
    worst = max(result.get("errors", {}).values(), default=None)
    error = "" if worst is None else f"{worst:.0e}"
    if "seconds" not in result:
        note = result["status"] + (f": {result['note']}" if result["note"] else "")
        return (provider, *[""] * 6, error, note)
    s = result["seconds"]
    quartiles = (s["upper_quartile"] - s["lower_quartile"]) / s["median"]
    return (
        provider,
        duration(s["median"]),
        duration(s["min"]),
        f"{100 * quartiles:.0f} %" if len(s["samples"]) > 1 else "",
        ratio(torch_time / s["median"]) if torch_time else "",
        size(result.get("peak_bytes")),
        f"{100 * result['fraction_of_limit']:.1f} %" if "fraction_of_limit" in result else "",
        error,
        "; ".join(notes(result)),
    )


def notes(result: dict[str, Any]) -> list[str]:
    """What a reader must know of a measured row."""
    found = [result["note"]] if result["note"] else []
    if len(result["seconds"]["samples"]) == 1:
        found.append("one sample")
    if result.get("memory_note"):
        found.append(result["memory_note"])
    if "checked_at" in result:
        found.append("checked at " + sizes_of(result["checked_at"]))
    return found


def ratio(x: float) -> str:
    return f"{x:.2f}" if x >= 0.1 else f"{x:.1g}"


def duration(seconds: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def size(count: int | None) -> str:
    if count is None:
        return ""
    return f"{count / 2**20:.0f} MiB" if count >= 2**20 else "< 1 MiB"


def si(amount: float) -> str:
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= scale:
            return f"{amount / scale:.3g} {prefix}"
    return f"{amount:.3g} "


LEGEND = (
    "spread: interquartile range / median.  × torch: how many times as fast as plain PyTorch.  "
    "memory: peak of one call.  of limit: least work / time / what the machine does at best.  "
    "error: largest deviation from float64 / largest entry, value and gradients."
)


def print_table(results: list[dict[str, Any]]) -> None:
    """One workload's results."""
    emphasis = {"wrong": "red", "failed": "red", "ok": ""}
    styles = [emphasis.get(r["status"], "dim") for r in results]
    styles = [
        "bold" if r["provider"] == "fastcl" and not style else style
        for r, style in zip(results, styles)
    ]
    show(title(results[0]), COLUMNS, rows(results), styles)


def show(
    heading: str,
    columns: tuple[str, ...],
    lines: list[tuple[str, ...]],
    styles: list[str] | None = None,
) -> None:
    """A table with rich when it is installed. All but the first and last column are numbers."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain_table(heading, lines, columns))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        numeric = 1 <= i < len(columns) - 1
        table.add_column(column, justify="right" if numeric else "left", no_wrap=numeric)
    for line, style in zip(lines, styles or [""] * len(lines)):
        table.add_row(*line, style=style)
    console = Console()
    console.width = max(console.width, NARROWEST)  # a file or a pipe counts as 80
    console.print(heading, style="bold", highlight=False)
    console.print(table)
    console.print()


def plain_table(
    heading: str, lines: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS
) -> str:
    widths = [max(len(line[i]) for line in [columns, *lines]) for i in range(len(columns))]
    text = [heading]
    for line in [columns, *lines]:
        padded = [
            cell.rjust(w) if 1 <= i < len(columns) - 1 else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths))
        ]
        text.append("  ".join(padded).rstrip())
    return "\n".join(text) + "\n"


FITS = ("provider", "rows", "time", "last step", "memory", "last step", "")


def print_fits(fits: list[dict[str, Any]]) -> None:
    """How time and memory grew: the exponents of a --scaling run."""
    for name, group in groupby(fits, lambda fit: fit["workload"]):
        own = list(group)
        axis, work = own[0]["axis"], own[0]["work"]
        heading = f"{name}: growth with {axis}, the exponent a in {axis}^a; least work {work:.2f}"
        lines = [
            (
                fit["provider"],
                f"{fit['from']} to {fit['to']}",
                *(power(fit[key]) for key in ("seconds", "seconds_last", "bytes", "bytes_last")),
                "",
            )
            for fit in own
        ]
        show(heading, FITS, lines)


def power(exponent: float | None) -> str:
    return "" if exponent is None else f"{exponent:.2f}"


def print_machine(about: dict[str, Any]) -> None:
    """What ran where: the first lines of the output."""
    isa = about["isa"] or "no C++ kernels"
    print(f"{about['gpu'] or about['processor']}, {about['threads']} threads, {isa}")
    same = ("compile", "builtin", "solo-style")  # torch itself
    versions = {p: v for p, v in about["versions"].items() if p not in same}
    print(", ".join(f"{p} {v}" for p, v in versions.items() if v) + "\n")


def print_all(results: list[dict[str, Any]]) -> None:
    for _, group in groupby(results, key):
        print_table(list(group))


# ---- the file ------------------------------------------------------------------------------------


def save(run: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")


def load(path: Path) -> dict[str, Any]:
    run: dict[str, Any] = json.loads(path.read_text())
    return run
