"""How time and memory grow: what to expect of the next size, and the exponents of a whole run.

    t(n) ≈ c · n^a       a: the slope of a straight line through (log n, log t), least squares

NT-Xent's least work is a = 2; plain expressions store a matrix, a = 2 in memory, and fastcl a = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from bench.workloads import PROVIDERS, WORKLOADS, Sizes, Workload

Result = dict[str, Any]
SMALLEST_PEAK = 1 << 20  # bytes; less is the allocator's noise


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of log y against log x; None with fewer than two different x."""
    logs = [(math.log(x), math.log(y)) for x, y in points]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(logs) for values in zip(*logs))
    above = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return above / sum((x - mean_x) ** 2 for x, _ in logs)


def peak(result: Result) -> float | None:
    """The peak memory, where it says something."""
    found = result.get("peak_bytes")
    return found if found is not None and found >= SMALLEST_PEAK else None


def median(result: Result) -> float | None:
    return result["seconds"]["median"] if "seconds" in result else None


def points_of(
    results: Sequence[Result], axis: str, quantity: Callable[[Result], float | None]
) -> list[tuple[float, float]]:
    """(size, quantity) of those that have it, smallest size first."""
    pairs = [(r["sizes"][axis], quantity(r)) for r in results]
    return sorted((x, y) for x, y in pairs if y is not None)


# ---- the next size -------------------------------------------------------------------------------


def expected(
    workload: Workload, result: Result, earlier: Sequence[Result]
) -> dict[str, float | None]:
    """Seconds and bytes of a call, from the same provider's smaller sizes; None without any.

    The larger of two guesses: growth with the counted work (for memory: with the matrix that the
    plain expression stores, fastcl's with the rows), and growth as in the last step, but at most
    one power more.
    """
    axis, provider = workload.scaling, result["provider"]
    own = [r for r in earlier if (r["workload"], r["provider"]) == (workload.name, provider)]
    if not axis or not own:
        return {"seconds": None, "bytes": None}
    itemsize = 4

    def work(sizes: Sizes) -> float:
        return workload.work(itemsize, **sizes).amount

    def stored(sizes: Sizes) -> float:
        matrix = 0 if provider == "fastcl" else workload.matrix(**sizes)
        return matrix or sizes[axis]

    guesses: dict[str, float | None] = {}
    for name, quantity, cost in (("seconds", median, work), ("bytes", peak, stored)):
        points = points_of(own, axis, quantity)
        guesses[name] = None
        if points:
            x, y = points[-1]
            size = result["sizes"][axis]
            grown = cost(result["sizes"]) / cost({**result["sizes"], axis: int(x)})
            last = exponent(points[-2:])
            steps = y * (size / x) ** last if last is not None else 0.0
            guesses[name] = min(max(y * grown, steps), y * grown * size / x)  # noise has any slope
    return guesses


# ---- the run -------------------------------------------------------------------------------------


def fits(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The exponents of every provider that was measured at two sizes or more."""

    def of_one(result: Result) -> tuple[Any, ...]:
        axis = WORKLOADS[result["workload"]].scaling
        fixed = tuple((k, v) for k, v in result["sizes"].items() if k != axis)
        return (result["workload"], fixed, result["dtype"], result["device"], result["provider"])

    found = []
    for key, group in groupby(sorted(results, key=lambda r: str(of_one(r))), of_one):
        own, workload = list(group), WORKLOADS[key[0]]
        axis = workload.scaling
        if not axis:
            continue
        times, peaks = (points_of(own, axis, quantity) for quantity in (median, peak))
        if exponent(times) is None:
            continue
        work = [(x, workload.work(4, **{**own[0]["sizes"], axis: int(x)}).amount) for x, _ in times]
        found.append(
            {
                "workload": key[0],
                "provider": key[-1],
                "axis": axis,
                "from": times[0][0],
                "to": times[-1][0],
                "work": exponent(work),
                "seconds": exponent(times),
                "seconds_last": exponent(times[-2:]),
                "bytes": exponent(peaks),
                "bytes_last": exponent(peaks[-2:]),
            }
        )
    workloads, providers = list(WORKLOADS), list(PROVIDERS)
    return sorted(
        found, key=lambda f: (workloads.index(f["workload"]), providers.index(f["provider"]))
    )
