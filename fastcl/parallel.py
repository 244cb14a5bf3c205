"""One run on the processes that torchrun started: who they are, and what they do together.

    torchrun --nproc-per-node 4 -m fastcl.train --method simclr-v1 …

Rank r of W has the rows r, r + W, r + 2W, … of each batch. Gradients are averaged, statistics of
batch norm and losses are the whole batch's, and what a method remembers is the same on every rank:
a step is that of one process with the whole batch. The first rank evaluates and is the only one
that writes and speaks.

A rank that fails or dies ends the others: their next exchange with it fails, or runs into the time
limit, and the first of them to notice says in a line which rank it was.
"""

from __future__ import annotations

import inspect
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fastcl.config import UsageError
from fastcl.distributed import Group, gather, share
from fastcl.methods import Method, Progress
from fastcl.nn import FeatureQueue, MemoryBank, Partition
from fastcl.sync_batch_norm import share_batch_norm_

T = TypeVar("T")
RandomState = tuple[Tensor, list[Tensor]]  # the CPU's, each GPU's
Loss = Callable[[Sequence[Tensor], Progress], Tensor]
# Whether each forward pass takes the first rank's buffers; named anew in torch 2.14.
BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel).parameters
)
PATIENCE = 5.0  # seconds in which the others may show that it was not they who died


class Processes:
    """The processes of a run, of which this is number `rank`: alone, unless `started` gives more.

    `group` exchanges tensors of the run's device, `control` small things on the CPU.
    """

    rank, world = 0, 1
    group: Group | None = None
    device: str | None = None  # where it is not what was asked for
    launcher = "python"  # what starts them

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share_out(self, method: Method, seed: int) -> Loss:
        """The loss of this process's rows, whose backward pass averages gradients over all."""
        return method.loss

    def check_chunks(self, batch_size: int) -> None:
        """Raises ValueError where processes would go through a batch in unequal chunks."""
        if batch_size % self.world:  # statistics of a chunk are of all processes' rows
            raise ValueError(
                f"with micro_batch, {self.world} processes need a batch_size that is a multiple of "
                f"their number; got {batch_size}"
            )

    def first_does(self, work: Callable[[], T]) -> T:
        """The result of work, done by the first process only, or what it raises (OSError, …)."""
        return work()

    def of_each(self, x: T) -> list[T]:
        """Every process's x."""
        return [x]

    def random_states(self) -> list[RandomState]:
        """The state of every process's random numbers."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return self.of_each((torch.get_rng_state(), cuda))

    def set_random_states(self, states: list[RandomState]) -> None:
        """Go on from there. Of another number of processes only the first has where to go on."""
        if len(states) == self.world or self.first:
            cpu, cuda = states[self.rank]
            torch.set_rng_state(cpu)
            if cuda and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(cuda)
        if len(states) != self.world and self.first:
            print(
                f"resumed on {self.world} processes a run of {len(states)}: "
                "not bit for bit what it would have been",
                flush=True,
            )

    def agree(self, signal: int) -> int:
        """The largest signal that any process got: 0 where none got one."""
        return signal

    def means(self, losses: list[Tensor]) -> list[Tensor]:
        """Of every loss (), the mean over processes; of such means, they themselves."""
        return losses

    def rows(self, x: Tensor) -> Tensor:
        """All processes' rows x (N, …)."""
        return x

    def may_speak(self) -> bool:
        """Whether this process is the one that says why the run ends: the first that asks."""
        return True

    def lost(self, error: Exception) -> str | None:
        """Which process is gone, if that is why error was raised in an exchange; else None."""
        return None


ALONE = Processes()


class Launched(Processes):
    """The processes that torchrun started."""

    def __init__(self, backend: str, device: str, limit: timedelta) -> None:
        self.device = device
        self.launcher = f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
        self.store, self.rank, self.world = next(rendezvous("env://", timeout=limit))
        self.store.set_timeout(limit)
        dist.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.world, timeout=limit
        )
        self.prefix = f"fastcl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self.group = self.members = cast(dist.ProcessGroup, dist.group.WORLD)
        self.control = self.members
        if backend != "gloo":
            self.control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=limit))
        self.where = self.of_each((socket.gethostname(), os.getpid()))

    # ---- training ----------------------------------------------------------------------------

    def share_out(self, method: Method, seed: int) -> Loss:
        loss = share_out(method, self.members)
        if not self.first:  # dropout and the like: other than the first process's
            state = np.random.SeedSequence((seed, self.rank)).generate_state(1, np.uint64)
            torch.manual_seed(int(state[0]))
        return loss

    def means(self, losses: list[Tensor]) -> list[Tensor]:
        if not losses:
            return []
        total = torch.stack(losses).double()  # in which a mean of equal numbers is that number
        dist.all_reduce(total, group=self.members)
        return list((total / self.world).to(losses[0].dtype))

    @torch.no_grad()
    def rows(self, x: Tensor) -> Tensor:
        return gather(x, share(len(x), self.group, x.device))

    # ---- agreeing ----------------------------------------------------------------------------

    def first_does(self, work: Callable[[], T]) -> T:
        result: list[Any] = [None, None]
        if self.first:
            try:
                result[0] = work()
            except Exception as error:
                result[1] = error
        dist.broadcast_object_list(result, src=0, group=self.control)
        if result[1] is not None:
            raise result[1]
        found: T = result[0]
        return found

    def of_each(self, x: T) -> list[T]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, x, group=self.control)
        return found

    def agree(self, signal: int) -> int:
        largest = torch.tensor(signal)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    # ---- ending ------------------------------------------------------------------------------

    def may_speak(self) -> bool:
        with suppress(RuntimeError):  # the store is gone with torchrun, or with the first process
            return self.store.add(f"{self.prefix}/told", 1) == 1
        return self.first

    def lost(self, error: Exception) -> str | None:
        if not is_of_an_exchange(error):
            return None
        dead, silent = self._missing()
        if dead:
            return f"{' and '.join(map(self._named, dead))} died"
        if silent:
            return f"{' and '.join(map(self._named, silent))} did not answer"
        return f"an exchange between the processes failed: {str(error).splitlines()[0]}"

    def _named(self, rank: int) -> str:
        host, pid = self.where[rank]
        return f"rank {rank} of {self.world} (process {pid} on {host})"

    def _missing(self) -> tuple[list[int], list[int]]:
        """Ranks that are dead, or else those that have not come here within PATIENCE."""
        here = set()
        with suppress(RuntimeError):
            self.store.set(f"{self.prefix}/here/{self.rank}", "")
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if dead := [rank for rank in range(self.world) if not self._alive(rank)]:
                return dead, []
            with suppress(RuntimeError):
                here = {r for r in range(self.world) if self._has_come(r)}
            if len(here) == self.world:
                break
            time.sleep(0.05)
        return [], sorted(set(range(self.world)) - here - {self.rank})

    def _has_come(self, rank: int) -> bool:
        return bool(self.store.check([f"{self.prefix}/here/{rank}"]))

    def _alive(self, rank: int) -> bool:
        """False only for a process of this machine that has ended."""
        host, pid = self.where[rank]
        if host != socket.gethostname():
            return True
        try:
            os.kill(pid, 0)
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except ProcessLookupError:
            return False
        except OSError:  # no /proc here
            return True


class Silent:
    """In place of what only the first process has: whatever is asked of it, it does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def launched_first() -> bool:
    """Whether this process is not one of many, or the first of them."""
    return os.environ.get("RANK", "0") == "0" or not dist.is_torchelastic_launched()


def is_of_an_exchange(error: Exception) -> bool:
    """Whether torch.distributed raised it, rather than the model or the data."""
    signs = ("gloo", "nccl", "connection closed", "connection reset", "timed out", "broken pipe")
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in signs)


@contextmanager
def started(device: str, minutes: float) -> Iterator[Processes]:
    """The processes of this run; they part at the end.

    device "auto" and "cuda" are a GPU for each process. Raises UsageError for too few of them.
    """
    if not dist.is_torchelastic_launched() or os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if device.startswith("cuda:"):
        raise UsageError(f"{device} is one GPU, and each process wants its own: take --device cuda")
    if cuda:
        local, local_world = (int(os.environ[f"LOCAL_{name}"]) for name in ("RANK", "WORLD_SIZE"))
        if local_world > torch.cuda.device_count():
            raise UsageError(
                f"{local_world} processes want a GPU each, and there are "
                f"{torch.cuda.device_count()}: take --device cpu, or fewer --nproc-per-node"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(local)
    processes = Launched("nccl" if cuda else "gloo", device, timedelta(minutes=minutes))
    try:
        yield processes
    finally:
        with suppress(RuntimeError):
            dist.destroy_process_group()


def device_of(name: str) -> torch.device:
    """The device of that name; auto is cuda where there is one. Raises ValueError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None
    return device


# ---- a method on many processes ------------------------------------------------------------------


def share_out(method: Method, group: dist.ProcessGroup) -> Loss:
    """Let method work on this process's rows of each batch; returns its loss.

    The loss's backward pass averages gradients over the group. Weights and buffers are the first
    process's from here on, and the same everywhere. Raises ValueError where batch-norm groups
    cannot be shared out.
    """
    share_batch_norm_(method, group)
    for part in method.modules():
        if isinstance(part, Method | FeatureQueue | MemoryBank | Partition):
            part.group = group
    options: dict[str, Any] = {BUFFERS: False}  # each is kept the same by what changes it
    return DistributedDataParallel(_LossOf(method), process_group=group, **options)


class _LossOf(nn.Module):
    """DistributedDataParallel averages gradients of what is reached by forward."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, views: Sequence[Tensor], at: Progress) -> Tensor:
        return self.method.loss(views, at)
