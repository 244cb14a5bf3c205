"""The measured side of `python -m bench scale`: W processes on this machine, joined by gloo."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fastcl.distributed
import fastcl.functional as F
from bench.memory import reset_peak, status_bytes
from bench.scale_model import KINDS
from fastcl.distributed import Ring

LOSSES: dict[str, Callable[..., Tensor]] = {
    "nt_xent": lambda x, y, group: F.nt_xent(x, y, group=group),
    "clip": lambda x, y, group: F.clip(x, y, logit_scale=10.0, group=group),
}
MMAP_THRESHOLD = -3  # of mallopt: what is larger goes back to the system when it is freed
THP_DISABLE = 41  # of prctl: huge pages make the last one of each tensor 2 MB


def measure(world: int, losses: list[str], images: int, features: int, repeats: int) -> Any:
    """What the slowest rank found: {"link": …, (loss, kind): …}, as `run_rank` has it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own lines, in the processes
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, losses, images, features, repeats, folder)
        mp.spawn(run_rank, args=arguments, nprocs=world)
        return torch.load(Path(folder, "found.pt"), weights_only=False)


def run_rank(
    rank: int, world: int, losses: list[str], images: int, features: int, repeats: int, folder: str
) -> None:
    torch.set_num_threads(1)
    where = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
    try:
        found: dict[Any, Any] = {"link": link(world, images * features * 4, repeats)}
        for loss in losses:
            for kind in KINDS:
                step = step_of(loss, kind, images, features)
                found[loss, kind] = {
                    "seconds": timed(step, repeats),
                    "received": slowest(count(step)),
                    "allocated": slowest(allocated_by(step)),
                    "peak": slowest(peak_of(step)),
                }
        if rank == 0:
            torch.save(found, Path(folder, "found.pt"))
    finally:
        dist.destroy_process_group()


def step_of(loss: str, kind: str, images: int, features: int) -> Callable[[], None]:
    """A forward and backward of random rows; the gradients are kept, as a model's are."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    x, y = (torch.randn(images, features, generator=generator).requires_grad_() for _ in range(2))
    x.grad, y.grad = torch.zeros_like(x), torch.zeros_like(y)
    world: Any = dist.group.WORLD
    group = Ring(world) if kind == "ring" else world

    def step() -> None:
        LOSSES[loss](x, y, group).backward()

    return step


def slowest(value: float) -> float:
    """The largest of the ranks' values."""
    most = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return most.item()


def timed(step: Callable[[], object], repeats: int) -> float:
    """The quickest of some steps, each as long as its slowest rank takes; the first two are not."""
    found = []
    for _ in range(repeats + 2):
        dist.barrier()
        begin = time.perf_counter()
        step()
        found.append(slowest(time.perf_counter() - begin))
    return min(found[2:])


def link(world: int, size: int, repeats: int) -> dict[str, float]:
    """Latency and bandwidth of an exchange in which every rank sends to the next one.

    t(b) = latency + b / bandwidth, from 8 bytes and from `size`. Nothing for one rank.
    """
    if world == 1:
        return {}
    at = fastcl.distributed.share(1, dist.group.WORLD, torch.device("cpu"))
    small, large = (
        torch.zeros(1, dtype=torch.float64),
        torch.zeros(max(1 << 20, size // 4)),
    )
    quick, slow = (
        timed(lambda x=x: fastcl.distributed.pass_on(x, at, len(x)), 3 * repeats)  # type: ignore[misc]
        for x in (small, large)
    )
    return {"latency": quick, "bandwidth": large.nbytes / max(slow - quick, 1e-9)}


# ---- bytes ---------------------------------------------------------------------------------------


def count(step: Callable[[], object]) -> int:
    """The bytes that this rank receives in a step, by the sizes of what it asks torch for."""
    total = 0
    others, world = dist.get_world_size() - 1, dist.get_world_size()

    def counted(function: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal total
            total += size(*arguments)
            return function(*arguments, **options)

        return call

    module = fastcl.distributed
    with contextlib.ExitStack() as stack:
        for owner, name, size in (
            (module, "_all_gather", lambda everything, own: others * own.nbytes),
            (dist, "all_reduce", lambda x, *_: 2 * others * x.nbytes // world),
            (dist, "all_to_all_single", lambda x, *_: others * x.nbytes // world),
            (dist, "P2POp", lambda operation, x, *_: x.nbytes if operation is dist.irecv else 0),
        ):
            stack.enter_context(replaced(owner, name, counted(getattr(owner, name), size)))
        step()
    return total


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# ---- memory --------------------------------------------------------------------------------------


def allocated_by(step: Callable[[], object]) -> int:
    """The most that torch's allocator has at once for a step, gloo's own copies among it.

    The least of a few steps: a thread of gloo's may let go of a copy late.
    """
    return min(allocated_once(step) for _ in range(5))


def allocated_once(step: Callable[[], object]) -> int:
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        step()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    changes.sort(key=lambda change: change[0])
    return max(0, *itertools.accumulate(size for _, size in changes))


def peak_of(step: Callable[[], object]) -> int:
    """What a step adds to the resident memory at its peak, once everything is in its place."""
    library = None
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(MMAP_THRESHOLD, 1 << 16)
        library.prctl(THP_DISABLE, 1, 0, 0, 0)
    found = []
    for _ in range(7):
        gc.collect()
        if library is not None:
            library.malloc_trim(0)  # what is free in the heap would be taken again, unseen
        dist.barrier()
        if not reset_peak():
            return 0
        before = status_bytes("VmRSS")
        step()
        found.append(max(0, status_bytes("VmHWM") - before))
    if library is not None:
        library.prctl(THP_DISABLE, 0, 0, 0, 0)
    return min(found[1:])
