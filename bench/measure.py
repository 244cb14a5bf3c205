"""Measures one workload: correctness first, then time, then memory.

    correctness  value and gradients against the plain expression in float64 on the same inputs;
                 a provider that is wrong gets no time
    time         providers take turns within each repeat, in one process, so that what disturbs the
                 machine disturbs all; the first call is left out, and so is compilation
    memory       each provider in a process of its own: what one call adds to the resident memory at
                 its peak, results included (on a GPU: torch's own peak counter)

A result is a dict that goes into the JSON file as it is.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fastcl
from bench import machine, memory, scaling
from bench.calls import Settings, Step, call_of, make_inputs, one_line, step_of
from bench.inputs import Inputs
from bench.workloads import Sizes, Workload, bytes_of

Result = dict[str, Any]

# Largest deviation that is not "wrong", as a fraction of the truth's largest entry. In half
# precision the plain expression rounds the logits themselves: at 1/τ = 14 by 0.03 in bfloat16.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-1}
LARGEST_TRUTH = 6 << 30  # bytes for the float64 expression; above that the small size is checked
SHORTEST_SAMPLE = 5e-3  # seconds; faster calls are made several times
FEWEST_REPEATS = 3


@dataclass(frozen=True)
class Runner:
    """A provider that is right, ready to be timed."""

    result: Result
    step: Step
    slow: bool  # a call is expected to take all the seconds of the samples: one has to do


def measure(
    workload: Workload,
    sizes: Sizes,
    providers: list[str],
    settings: Settings,
    earlier: Sequence[Result] = (),
) -> list[Result]:
    """One result for each provider. `earlier` ones, of smaller sizes, tell what to expect."""
    torch._dynamo.reset()
    results = [begin(workload, sizes, provider, settings, earlier) for provider in providers]
    runners = []
    if any("status" not in result for result in results):
        inputs = make_inputs(workload, sizes, settings)
        for result in results:
            if "status" not in result:
                runners += checked(workload, sizes, result, inputs, settings)
    for runner, samples in zip(runners, take_turns(runners, settings)):
        if runner.result["status"] == "ok":
            runner.result["seconds"] = summary(samples)
    runners.clear()
    if settings.memory:
        for result in results:
            if result["status"] == "ok":
                peak, reason = memory.peak_bytes(workload, sizes, result["provider"], settings)
                result["peak_bytes"], result["memory_note"] = peak, reason
    return results


def begin(
    workload: Workload,
    sizes: Sizes,
    provider: str,
    settings: Settings,
    earlier: Sequence[Result] = (),
) -> Result:
    """The result so far: what is measured, and whether it can be at all."""
    itemsize = settings.dtype.itemsize
    amount, unit = workload.work(itemsize, **sizes)
    peer = workload.peers.get(provider)
    result: Result = {
        "workload": workload.name,
        "sizes": sizes,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "device": settings.device,
        "provider": provider,
        "version": machine.version(provider),
        "note": peer.note if peer else "",
        "work": {"amount": amount, "unit": unit},
    }
    if provider == "fastcl":
        backend = fastcl.backend_of(torch.empty(0, dtype=settings.dtype, device=settings.device))
        result["backend"] = backend.name
        result["note"] = "" if backend.name in ("cpp", "triton") else f"backend {backend.name}"
    result["expected"] = scaling.expected(workload, result, earlier)
    needed = result["expected"]["bytes"] or bytes_of(workload, provider, sizes, itemsize)
    if result["version"] is None:
        result["status"] = "not installed"
    elif needed > free_bytes(settings.device) / 2:
        result["status"] = "does not fit"
        result["note"] = f"asks for about {needed / 2**30:.0f} GiB"
    elif (result["expected"]["seconds"] or 0) > settings.longest:
        result["status"] = "too slow"
        result["note"] = f"a call takes about {result['expected']['seconds']:.0f} s"
    return result


def free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return machine.available_bytes()


# ---- correctness ---------------------------------------------------------------------------------


def checked(
    workload: Workload, sizes: Sizes, result: Result, inputs: Inputs, settings: Settings
) -> list[Runner]:
    """The provider after its first call, or none: then `status` says why."""
    provider = result["provider"]
    slow = (result["expected"]["seconds"] or 0) > settings.seconds
    at, at_inputs = sizes, inputs
    if slow or bytes_of(workload, "torch", sizes, 8) > LARGEST_TRUTH:
        at, at_inputs = workload.small, make_inputs(workload, workload.small, settings)
        result["checked_at"] = at
    try:
        step = step_of(workload, provider, at, at_inputs)
        result["errors"] = errors(step(), truth(workload, at_inputs))
        if not all(e <= TOLERANCE[settings.dtype] for e in result["errors"].values()):
            result["status"] = "wrong"  # NaN included
            return []
        if at is not sizes:
            torch._dynamo.reset()  # or it compiles for any size, having seen a second one
            step = step_of(workload, provider, sizes, inputs)
            if provider == "compile" or not slow:
                step()
    except Exception as error:  # a row of the table, whatever another library raises
        result["status"], result["note"] = "failed", one_line(error)
        return []
    result["status"] = "ok"
    return [Runner(result, step, slow)]


def truth(workload: Workload, inputs: Inputs) -> dict[str, Tensor]:
    """The plain expression in float64; kept for the providers that follow on the same inputs."""
    if truth_of.get("inputs") is not inputs:
        truth_of.clear()
        step = call_of(workload, workload.plain, inputs, workload.gradients, torch.float64)
        truth_of.update(inputs=inputs, truth=step())
    return truth_of["truth"]


truth_of: dict[str, Any] = {}


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The largest deviation of each result, as a fraction of its largest entry."""
    deviations = {}
    for name, value in actual.items():
        exact = expected[name].double()
        scale = exact.abs().max().clamp_min(1e-300)
        deviation = (value.double().reshape(exact.shape) - exact).abs().max() / scale
        deviations[name] = float(deviation)
    return deviations


# ---- time ----------------------------------------------------------------------------------------


def take_turns(runners: list[Runner], settings: Settings) -> list[list[float]]:
    """Samples of each provider. Slow ones sit out the later repeats; only a call that takes all of
    the settings' seconds has fewer than three samples. One that raises is out, with that status."""
    samples: list[list[float]] = [[] for _ in runners]
    plans = [plan(runner, settings) for runner in runners]
    gc.collect()
    gc.disable()
    try:
        for repeat in range(settings.repeats):
            for turn in range(len(runners)):
                i = (turn + repeat) % len(runners)  # nobody always follows the same one
                loops, repeats = plans[i]
                if repeat < repeats:
                    samples[i] += timed(runners[i], loops, settings.device)
    finally:
        gc.enable()
    return samples


def plan(runner: Runner, settings: Settings) -> tuple[int, int]:
    """(calls a sample, samples) that the provider can afford."""
    once = math.inf
    if not runner.slow:
        if runner.result["provider"] == "compile":
            timed(runner, 1, settings.device)  # the second call compiles again if a number changed
        once = sum(timed(runner, 1, settings.device)) or math.inf
    loops = max(1, math.ceil(SHORTEST_SAMPLE / max(once, 1e-7)))
    least = 1 if once > settings.seconds else min(FEWEST_REPEATS, settings.repeats)
    return loops, max(least, int(settings.seconds / (once * loops)))


def timed(runner: Runner, loops: int, device: str) -> list[float]:
    """One sample; none when the call raises, or did so before."""
    if runner.result.get("status") == "failed":
        return []
    try:
        return [machine.seconds(runner.step, loops, device)]
    except Exception as error:
        runner.result["status"], runner.result["note"] = "failed", one_line(error)
        return []


def summary(samples: list[float]) -> dict[str, Any]:
    """Median and spread in seconds, and the samples themselves."""
    ordered = sorted(samples)
    lower, _, upper = (
        statistics.quantiles(ordered, n=4, method="inclusive")
        if (len(ordered) > 1)
        else ordered * 3
    )
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "lower_quartile": lower,
        "upper_quartile": upper,
        "samples": samples,
    }


# ---- the machine's limit -------------------------------------------------------------------------


def limit_rates(workload: Workload, sizes: Sizes, settings: Settings) -> dict[str, float]:
    """What the machine does at best of the workload's kind of work: amount per second, by how."""
    work = workload.work(settings.dtype.itemsize, **sizes)
    if work.unit == "flop":
        return machine.multiply_add_rates(settings.dtype, settings.device)
    inputs = make_inputs(workload, sizes, settings)
    tensors = [t for x in inputs.values() for t in (x if isinstance(x, list) else [x])]
    tensors += [inputs[name] for name in workload.gradients]  # as large as their inputs
    touched = sum(t.numel() * t.itemsize for t in tensors)
    if not workload.gradients:
        touched += 4 * workload.matrix(**sizes)  # a result as large as the input, in float32
    touched = min(work.amount, touched)
    return machine.byte_rates(int(touched), settings.device)


def set_fractions(results: list[Result], rates: dict[str, float]) -> None:
    """Fraction of the best rate: counted work / time / limit."""
    how = max(rates, key=rates.__getitem__)
    limit = rates[how]
    for result in results:
        result["limit"] = {"per_second": limit, "measured_by": how, "all": rates}
        if "seconds" in result:
            amount = result["work"]["amount"]
            result["fraction_of_limit"] = amount / result["seconds"]["median"] / limit
