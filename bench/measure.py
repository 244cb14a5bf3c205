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

import contextlib
import gc
import logging
import math
import signal
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastcl
from bench import machine, scaling
from bench.inputs import Inputs, New
from bench.workloads import (
    WORKLOADS,
    Function,
    Sizes,
    Workload,
    bytes_of,
    function_of,
    gradients_of,
)

Result = dict[str, Any]
Step = Callable[[], dict[str, Tensor]]

# Largest deviation that is not "wrong", as a fraction of the truth's largest entry. In half
# precision the plain expression rounds the logits themselves: at 1/τ = 14 by 0.03 in bfloat16.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-1}
LARGEST_TRUTH = 6 << 30  # bytes for the float64 expression; above that the small size is checked
SHORTEST_SAMPLE = 5e-3  # seconds; faster calls are made several times
FEWEST_REPEATS = 3


@dataclass(frozen=True)
class Settings:
    """How to measure."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    threads: int = 1
    repeats: int = 9
    seconds: float = 6.0  # of samples per provider and workload, but at least FEWEST_REPEATS
    longest: float = 300.0  # seconds; what is expected to take longer is not called
    memory: bool = True


@dataclass(frozen=True)
class Runner:
    """A provider that is right, ready to be timed."""

    result: Result
    step: Step
    slow: bool  # a call is expected to take all the seconds of the samples: one has to do


def quiet() -> None:
    """No remarks of torch.compile between the tables."""
    logging.getLogger("torch").setLevel(logging.ERROR)


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
                peak, reason = peak_bytes(workload, sizes, result["provider"], settings)
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


# ---- a call --------------------------------------------------------------------------------------


def make_inputs(workload: Workload, sizes: Sizes, settings: Settings) -> Inputs:
    return workload.inputs(New(settings.dtype, settings.device), **sizes)


def copied(x: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of a tensor or a list of them; floating-point ones in another dtype."""
    if isinstance(x, list):
        return [copied(t, dtype) for t in x]
    return x.detach().clone().to(dtype if dtype and x.is_floating_point() else x.dtype)


def step_of(workload: Workload, provider: str, sizes: Sizes, inputs: Inputs) -> Step:
    """One call of a provider on its own copy of the inputs."""
    function = function_of(workload, provider, sizes)
    return call_of(workload, function, inputs, gradients_of(workload, provider))


def call_of(
    workload: Workload,
    function: Function,
    inputs: Inputs,
    gradients: tuple[str, ...],
    dtype: torch.dtype | None = None,
) -> Step:
    """One call on its own copy of the inputs: the value and the gradients, or what it changed."""
    own = {name: copied(x, dtype) for name, x in inputs.items()}
    cotangent = own.pop("cotangent", None)
    leaves = [own[name].requires_grad_() for name in gradients]
    changed = [own[name] for name in workload.mutates]

    def step() -> dict[str, Tensor]:
        value = function(*own.values())
        if leaves:
            weights = None if cotangent is None else cotangent.to(value.dtype)
            found = torch.autograd.grad(value, leaves, weights)
            return {"value": value.detach(), **dict(zip(gradients, found))}
        if changed:
            return {name: flat(x) for name, x in zip(workload.mutates, changed)}
        return {"value": value}

    return step


def flat(x: Any) -> Any:
    return x if isinstance(x, Tensor) else FlatList(x)


class FlatList(list):  # type: ignore[type-arg]
    """A list of tensors that is compared as one vector, and costs nothing until then."""

    def double(self) -> Tensor:
        return torch.cat([t.double().flatten() for t in self])


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


def one_line(error: Exception) -> str:
    message = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {message[0]}"


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


# ---- memory --------------------------------------------------------------------------------------


def peak_bytes(
    workload: Workload, sizes: Sizes, provider: str, settings: Settings
) -> tuple[int | None, str]:
    """What one call adds to memory at its peak; or None, and why where there is more to say."""
    if settings.device.startswith("cuda"):
        return peak_or_reason(peak_on_gpu, workload, sizes, provider, settings)
    context = get_context("forkserver")  # a fresh process that has torch imported, no threads yet
    context.set_forkserver_preload(["torch", "fastcl.functional"])
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, workload.name, sizes, provider, settings)
    process = context.Process(target=send_peak, args=arguments)
    process.start()
    sender.close()
    try:
        found: tuple[int | None, str] = receiver.recv()
        process.join(timeout=10)
        return found
    except EOFError:
        return None, "killed while its memory was measured"  # as when memory runs out
    finally:
        process.kill()  # Ctrl-C does not wait for a long call
        process.join()


def send_peak(
    sender: Connection, name: str, sizes: Sizes, provider: str, settings: Settings
) -> None:
    """What the process does. Ctrl-C reaches it too, and is its parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()
    workload = WORKLOADS[name]
    sender.send(peak_or_reason(peak_in_this_process, workload, sizes, provider, settings))


def peak_or_reason(peak: Callable[..., int | None], *arguments: Any) -> tuple[int | None, str]:
    try:
        return peak(*arguments), ""
    except Exception as error:  # whatever another library raises
        return None, f"memory: {one_line(error)}"


def peak_in_this_process(
    workload: Workload, sizes: Sizes, provider: str, settings: Settings
) -> int | None:
    """Peak of the resident memory during one call, above what it was before."""
    torch.set_num_threads(settings.threads)
    # Threads, library handles and imports are paid on the small size. Compilation needs this one;
    # what a library keeps between calls counts for it.
    warm = sizes if provider == "compile" else workload.small
    step_of(workload, provider, warm, make_inputs(workload, warm, settings))()
    step = step_of(workload, provider, sizes, make_inputs(workload, sizes, settings))
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).malloc_trim(0)
    if not reset_peak():
        return None
    before = status_bytes("VmRSS")
    kept = step()
    peak = status_bytes("VmHWM")
    del kept
    return max(0, peak - before)


def reset_peak() -> bool:
    """Sets VmHWM back to the memory in use; False where the kernel does not offer it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_on_gpu(workload: Workload, sizes: Sizes, provider: str, settings: Settings) -> int:
    step = step_of(workload, provider, sizes, make_inputs(workload, sizes, settings))
    step()
    torch.cuda.empty_cache()
    device = torch.device(settings.device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = step()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


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
