"""Rows on several processes: who has how many, gathering them, and sending them round.

    loss = F.nt_xent(z0, z1, group=torch.distributed.group.WORLD)
    loss = F.nt_xent(z0, z1, group=Ring(torch.distributed.group.WORLD))

With a group, the rows of every rank are candidates. A rank's loss is W · (sum over its own rows) /
(rows on all ranks), so that the mean over ranks is the loss of the whole batch; and a gradient
reaches the rank that the row came from, so that after the averaging of
DistributedDataParallel the parameters' gradients are those of one process on the whole batch.
Ranks may have different numbers of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Named anew in torch 2.14.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Ring:
    """A process group whose columns travel from rank to rank, so that no rank ever holds them all.

    Time and traffic are those of gathering, in W steps; memory for columns is two ranks' shares.
    """

    group: dist.ProcessGroup


Group = dist.ProcessGroup | Ring


class Share(NamedTuple):
    """How many rows each rank has, and which rank this is."""

    counts: tuple[int, ...]
    rank: int
    group: Group | None

    @property
    def world(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        return sum(self.counts)

    def offset(self, rank: int) -> int:
        """The number of a rank's first row."""
        return sum(self.counts[:rank])

    def numbers(self, rank: int, device: torch.device) -> Tensor:
        """Of a rank's rows: their numbers among all rows."""
        return torch.arange(self.counts[rank], device=device) + self.offset(rank)

    @property
    def own(self) -> slice:
        first = self.offset(self.rank)
        return slice(first, first + self.counts[self.rank])


def share(rows: int, group: Group | None, device: torch.device) -> Share:
    """Asks every rank for its number of rows."""
    if group is None:
        return Share((rows,), 0, None)
    process_group = members_of(group)
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "group must be a torch.distributed process group or a Ring of one, and this process a "
            f"member of it; got {process_group!r}."
        )
    world = dist.get_world_size(process_group)
    counts = torch.empty(world, dtype=torch.int64, device=device)
    _all_gather(counts, torch.tensor([rows], device=device), group=process_group)
    return Share(tuple(counts.tolist()), dist.get_rank(process_group), group)


# ---- gathering -----------------------------------------------------------------------------------


def gather(x: Tensor, at: Share) -> Tensor:
    """The rows of all ranks, in the order of the ranks: (total, ...) of x (N, ...).

    Differentiable: the gradient that all ranks have for a row is added up where the row came from.
    """
    if at.group is None:
        return x
    gathered: Tensor = _Gather.apply(x, at) if needs_grad(x) else _gather(x, at)
    return gathered


def needs_grad(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _gather(x: Tensor, at: Share) -> Tensor:
    longest = max(at.counts)
    padded = x.contiguous()
    if len(x) < longest:
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
    everything = x.new_empty(at.world * longest, *x.shape[1:])
    _all_gather(everything, padded, group=process_group(at))
    if min(at.counts) == longest:
        return everything
    parts = everything.split(longest)
    return torch.cat([part[:count] for part, count in zip(parts, at.counts)])


def scatter_sum(x: Tensor, at: Share) -> Tensor:
    """The sum over ranks of the rows that are this rank's: (N, ...) of x (total, ...).

    In float32 at least. gloo has no reduce-scatter, torch all-reduces a copy in its place: so there
    each rank gets the others' parts of its rows and adds them up, in the order of the ranks.
    """
    if dist.get_backend(process_group(at)) == "gloo":
        return _scatter_parts(x, at)
    return _reduce_scatter_padded(x, at)


def _scatter_parts(x: Tensor, at: Share) -> Tensor:
    mine = at.counts[at.rank]
    parts = exchange(x.contiguous(), at)  # (W · N, ...)
    wide = torch.promote_types(x.dtype, torch.float32)
    return parts.view(at.world, mine, *x.shape[1:]).sum(0, dtype=wide).to(x.dtype)


def _reduce_scatter_padded(x: Tensor, at: Share) -> Tensor:
    longest = max(at.counts)
    padded = x.new_zeros(
        at.world, longest, *x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32)
    )
    for part, rows in zip(padded, x.split(at.counts)):
        part[: len(rows)] = rows
    own = padded.new_empty(padded.shape[1:])
    _reduce_scatter(own, padded.flatten(0, 1), group=process_group(at))
    return own[: at.counts[at.rank]].to(x.dtype)


def exchange(x: Tensor, at: Share) -> Tensor:
    """What each rank has for this one, (W · N, ...), of its x (total, ...) for all of them."""
    mine = at.counts[at.rank]
    received = x.new_empty(at.world * mine, *x.shape[1:])
    sizes = [mine] * at.world, list(at.counts)
    dist.all_to_all_single(received, x, *sizes, group=process_group(at))
    return received


def process_group(at: Share) -> dist.ProcessGroup:
    assert at.group is not None
    return members_of(at.group)


def sum_over_ranks(x: Tensor, at: Share) -> Tensor:
    """The sum of every rank's x, on every rank, with its gradient."""
    if at.group is None:
        return x
    total: Tensor = _SumOverRanks.apply(x, at)
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Share) -> Tensor:
        ctx.at = at
        total = x.clone()
        dist.all_reduce(total, group=process_group(at))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone()
        dist.all_reduce(total, group=process_group(ctx.at))
        return total, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Share) -> Tensor:
        ctx.at = at
        return _gather(x, at)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scatter_sum(grad.contiguous(), ctx.at), None


# ---- a batch that is shared out: rank r has its rows r, r + W, r + 2W, … -------------------------


def whole(x: Tensor, group: Group | None) -> Tensor:
    """The rows of the whole batch in its order: (total, ...) of x (N, ...), this rank's rows.

    Differentiable, as `gather`. Raises ValueError when the ranks' numbers of rows are not those of
    one batch that was shared out.
    """
    if group is None:
        return x
    at = share(len(x), group, x.device)
    if any(count != len(range(rank, at.total, at.world)) for rank, count in enumerate(at.counts)):
        raise ValueError(f"whole: no batch is shared out as {at.counts} rows.")
    row = torch.arange(at.total, device=x.device)
    first = torch.tensor([at.offset(rank) for rank in range(at.world)], device=x.device)
    return gather(x, at).index_select(0, first[row % at.world] + row // at.world)


def own(x: Tensor, group: Group | None) -> Tensor:
    """This rank's rows (N, ...) of the whole batch's x (total, ...): the inverse of `whole`."""
    if group is None:
        return x
    members = members_of(group)
    return x[dist.get_rank(members) :: dist.get_world_size(members)]


def agreed(x: Tensor, group: Group | None) -> Tensor:
    """The first rank's x, on every rank: for what is drawn at random for the whole batch."""
    if group is None:
        return x
    members, x = members_of(group), x.contiguous()
    dist.broadcast(x, dist.get_global_rank(members, 0), group=members)
    return x


@torch.no_grad()
def average(x: Tensor, rows: int, group: Group | None) -> Tensor:
    """The mean over all ranks' rows of what x is the mean of over this rank's `rows`."""
    if group is None:
        return x
    weight = x.new_full((1,), rows)
    total = torch.cat((x.flatten() * weight, weight))
    dist.all_reduce(total, group=members_of(group))
    return (total[:-1] / total[-1]).view(x.shape)


def members_of(group: Group) -> dist.ProcessGroup:
    return group.group if isinstance(group, Ring) else group


# ---- sending round -------------------------------------------------------------------------------


def around(x: Tensor, at: Share) -> Iterator[tuple[int, Tensor]]:
    """(rank, its rows) for every rank, this one first; only two ranks' rows are held at a time."""
    for step in range(at.world):
        owner = (at.rank - step) % at.world
        yield owner, x
        if step + 1 < at.world:
            x = pass_on(x, at, at.counts[(owner - 1) % at.world])


def pass_on(x: Tensor, at: Share, rows: int) -> Tensor:
    """Sends x to the next rank, and returns what the previous one sends: (rows, ...)."""
    if at.world == 1:
        return x
    group = process_group(at)
    received = x.new_empty(rows, *x.shape[1:])
    following, previous = (dist.get_global_rank(group, (at.rank + i) % at.world) for i in (1, -1))
    exchanges = [
        dist.P2POp(dist.isend, x.contiguous(), following, group),
        dist.P2POp(dist.irecv, received, previous, group),
    ]
    for work in dist.batch_isend_irecv(exchanges):
        work.wait()
    return received
