"""The gradient contract: any number of ranks, uneven too, is one process on the whole batch."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import fastcl.functional as F
from fastcl import distributed
from fastcl.distributed import Ring

COUNTS = {2: (5, 3), 3: (2, 4, 3)}  # images on each rank
D = 6
LOSSES: dict[str, Callable[..., Tensor]] = {
    "info_nce": lambda x, y, t, **o: F.info_nce(x, y, temperature=1 / t, **o),
    "info_nce-detached": lambda x, y, t, **o: F.info_nce(x, y.detach(), temperature=1 / t, **o),
    "info_nce-queue": lambda x, y, t, **o: F.info_nce(x, y, QUEUE.to(x), temperature=1 / t, **o),
    "nt_xent": lambda x, y, t, **o: F.nt_xent(x, y, temperature=1 / t, **o),
    "dcl": lambda x, y, t, **o: F.dcl(x, y, temperature=1 / t, **o),
    "clip": lambda x, y, t, **o: F.clip(x, y, logit_scale=t, **o),
    "siglip": lambda x, y, t, **o: F.siglip(x, y, logit_scale=t, logit_bias=-t, **o),
    "siglip-raw": lambda x, y, t, **o: F.siglip(
        x, y, logit_scale=t, logit_bias=-t, normalize=False, **o
    ),
    "sup_con": lambda x, y, t, **o: F.sup_con(
        x + y, (10 * x[:, 0].detach().abs()).long() % 3, temperature=1 / t, **o
    ),
    "instance_spread": lambda x, y, t, **o: F.instance_spread(
        x, y, temperature=1 / t, negative_weight=1.5, detach_columns=False, **o
    ),
    "instance_spread-detached": lambda x, y, t, **o: F.instance_spread(
        x, y, temperature=1 / t, **o
    ),
    "info_nce-own": lambda x, y, t, **o: F.info_nce(
        x, y, torch.stack([y + 1, y - x], 1), temperature=1 / t, **o
    ),
    "negative_cosine": lambda x, y, t, **o: F.negative_cosine(t * x + 1, y, **o),
    "soft_cross_entropy": lambda x, y, t, **o: F.soft_cross_entropy(
        x, y.detach().softmax(1), temperature=1 / t, **o
    ),
    "nce": lambda x, y, t, **o: F.nce(t * (x + y), data_size=50, partition=30.0, **o),
}
QUEUE = torch.nn.functional.normalize(torch.randn(7, D, generator=torch.Generator().manual_seed(1)))


def batch(world: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(sum(COUNTS[world]), D, generator=generator) for _ in range(2))  # type: ignore[return-value]


def measured(loss: Callable[..., Tensor], x: Tensor, y: Tensor, **options) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """[loss, gradient of x, of y, of the learnable scale]; zeros where there is none."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    t = torch.tensor(3.0, dtype=torch.promote_types(x.dtype, torch.float32), requires_grad=True)
    value = loss(x, y, t, **options)
    value.sum().backward()
    return [
        value.detach(),
        *(v.new_zeros(v.shape) if v.grad is None else v.grad for v in (x, y, t)),
    ]


def parts(world: int, rank: int) -> Tensor:
    """What a rank has for all ranks' rows."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(sum(COUNTS[world]), D, 2, generator=generator)


def self_distilled(views: Tensor, **options) -> Tensor:  # type: ignore[no-untyped-def]
    """DINO's loss of views (2, N, D), which are student and teacher."""
    return F.self_distillation(views, views.detach(), center=torch.ones(D), **options)


def run_rank(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    first = sum(COUNTS[world][:rank])
    rows = slice(first, first + COUNTS[world][rank])
    results = {}
    for kind, group in (("gather", dist.group.WORLD), ("ring", Ring(dist.group.WORLD))):
        for dtype in (torch.float32, torch.float64):
            x, y = (v[rows].to(dtype) for v in batch(world))
            for name, loss in LOSSES.items():
                for reduction in ("mean", "sum", "none"):
                    results[kind, dtype, name, reduction] = measured(
                        loss, x, y, group=group, reduction=reduction
                    )
    scores = batch(world)[0][rows]
    views = torch.stack(batch(world))[:, rows].requires_grad_()
    loss = self_distilled(views, group=dist.group.WORLD)
    results["self_distillation"] = loss.detach(), *torch.autograd.grad(loss, views)
    results["sinkhorn"] = F.sinkhorn(scores, epsilon=0.3, group=dist.group.WORLD)
    at = distributed.share(COUNTS[world][rank], dist.group.WORLD, torch.device("cpu"))
    for dtype in (torch.float32, torch.bfloat16):
        x = parts(world, rank).to(dtype)
        found = distributed.scatter_sum(x, at), distributed._reduce_scatter_padded(x, at)
        results["scattered", dtype] = found  # by gloo, and as NCCL has it
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3], ids=lambda w: f"W{w}")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """(world, what each rank measured)."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, args=(world, port, str(folder)), nprocs=world)
    return world, [torch.load(folder / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ["gather", "ring"])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_give_the_gradients_of_one_process(
    ranks, name: str, kind: str, dtype: torch.dtype, reduction: str
) -> None:  # type: ignore[no-untyped-def]
    world, results = ranks
    x, y = (v.to(dtype) for v in batch(world))
    value, grad_x, grad_y, grad_t = measured(LOSSES[name], x, y, reduction=reduction)
    values, *parts = zip(*(result[kind, dtype, name, reduction] for result in results))
    gradients = [torch.cat(part) for part in parts[:2]] + [torch.stack(parts[2]).sum()]
    if reduction == "none":  # nobody averages: the rows, and the gradient of their sum
        if name.startswith(("nt_xent", "dcl", "instance_spread")):  # each rank's two views
            values = tuple(v.view(2, -1) for v in values)
            value = value.view(2, -1)
        found = torch.cat(values, -1)
    else:
        found = torch.stack(values).mean()
        gradients = [g / world for g in gradients]
    tolerance = (
        dict(rtol=2e-5, atol=2e-6) if dtype == torch.float32 else dict(rtol=1e-9, atol=1e-10)
    )
    torch.testing.assert_close(found, value, **tolerance)
    for gradient, expected in zip(gradients, (grad_x, grad_y, grad_t)):
        torch.testing.assert_close(gradient, expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_parts_are_summed_where_the_rows_are(ranks, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    world, results = ranks
    total = sum(parts(world, rank).to(dtype).double() for rank in range(world))
    for way in range(2):
        found = torch.cat([result["scattered", dtype][way] for result in results])
        rtol = 1e-6 if dtype == torch.float32 else 2**-8  # one rounding, at the end
        torch.testing.assert_close(found.double(), total, rtol=rtol, atol=rtol)


def test_sinkhorn_of_ranks_is_that_of_the_whole_batch(ranks) -> None:  # type: ignore[no-untyped-def]
    world, results = ranks
    codes = torch.cat([result["sinkhorn"] for result in results])
    torch.testing.assert_close(codes, F.sinkhorn(batch(world)[0], epsilon=0.3))


def test_self_distillation_of_ranks_is_that_of_the_whole_batch(ranks) -> None:  # type: ignore[no-untyped-def]
    world, results = ranks
    views = torch.stack(batch(world)).requires_grad_()
    loss = self_distilled(views)
    (expected,) = torch.autograd.grad(loss, views)
    losses, gradients = zip(*(result["self_distillation"] for result in results))
    torch.testing.assert_close(torch.stack(losses).mean(), loss.detach())
    torch.testing.assert_close(torch.cat(gradients, 1) / world, expected)


def test_a_group_that_is_none_says_so() -> None:
    x, y = batch(2)
    with pytest.raises(TypeError, match="process group"):
        F.nt_xent(x, y, group="world")  # type: ignore[arg-type]
