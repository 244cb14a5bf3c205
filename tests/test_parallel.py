"""A step of W processes with a batch is the step of one process with it, for every method.

In float64, so that nothing but rounding is forgiven. The encoder is the smallest that has a batch
norm: what is slow here is exchanging.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from fastcl.methods import METHODS, Method, Progress
from fastcl.methods.cmc import Views
from fastcl.models.norms import replace_batch_norm
from fastcl.models.patches import PatchEncoder
from fastcl.optim import OPTIMIZERS
from fastcl.parallel import share_out

WORLDS = 2, 3
IMAGES, STEPS, SIDE = 40, 3, 12
SPLIT = {"queue_size": 20, "bn_splits": 6, "batch_size": 12}
PATCHES = {"steps": 2, "skip": 0, "directions": 1, "noise": 5}
CASES: dict[str, dict[str, Any]] = {
    "instdisc": {},
    "instdisc nce": {"loss": "nce", "negatives": 9, "z_momentum": 0.9, "proximal": 0.1},
    "invaspread": {},
    "cpc": PATCHES | {"directions": 4},
    "cpc sampled": PATCHES | {"negatives": "sampled"},
    "cpc permuted": PATCHES | {"negatives": "permuted"},
    "cpc others": PATCHES | {"negatives": "others", "context": "gru"},
    "cmc": {},
    "cmc nce": {"loss": "nce", "negatives": 9},
    "moco-v1": SPLIT,
    "moco-v1 one group": {"queue_size": 20, "bn_splits": 1},
    "simclr-v1": {},
    "moco-v2": SPLIT | {"symmetric": True},
    "simclr-v2": {},
    "simclr-v2 memory": {"memory": True, "queue_size": 30},
    "swav": {"prototypes": 12, "hidden": 16, "small_crops": 2, "queue_size": 22}
    | {"queue_start_epoch": 0, "freeze_epochs": 0.5},
    "byol": {"dim": 16, "hidden": 8},
    "byol-v2": {"dim": 16, "hidden": 32, "encoder_norm": "gn"},
    "byol-v2 careful": {"dim": 16, "hidden": 32, "careful_init": True}
    | {"encoder_norm": "none", "projector_norm": "none", "predictor_norm": "none"},
    "simsiam": {"dim": 16, "hidden": 8},
    "moco-v3": {"dim": 16, "hidden": 8},
    "dino": {"dim": 16, "hidden": 8, "outputs": 12, "small_crops": 2},
}


def encoder(channels: int = 3, norm: str = "bn") -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(channels, 6, 3, 2), nn.BatchNorm2d(6)]
    network = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.feature_dim = 6  # type: ignore[assignment]
    return replace_batch_norm(network, norm, groups=2, careful=norm == "none")


def made(name: str) -> Method:
    torch.manual_seed(1)
    method = METHODS[name.split()[0]]
    config: Any = dataclasses.replace(
        method.recipes["quick"], **{"batch_size": 11, "image_size": SIDE} | CASES[name]
    )
    network = encoder(norm=getattr(config, "encoder_norm", "bn"))
    if name.startswith("cmc"):
        network = Views([encoder(1), encoder(2)], (1, 2))
    if name.startswith("cpc"):
        network = PatchEncoder(encoder(1), patch=6, stride=2, window=6)
    made = method(network, config)
    made.set_images(IMAGES)
    return made.double()


def trained(method: Method, loss: Any, rows: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and state after some steps, on these rows of each batch."""
    images = method.config.batch_size
    names = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    optimizer = OPTIMIZERS["sgd"](names, 0.05, momentum=0.9, weight_decay=1e-4)
    draws = torch.Generator().manual_seed(2)  # of images
    torch.manual_seed(3)  # of negatives and permutations
    method.train()
    losses = []
    for step in range(STEPS):
        indices = torch.randperm(IMAGES, generator=draws)[:images]
        views = [
            torch.randn(images, in_channels(method), *[crop.size] * 2, generator=draws).double()
            for crop in method.crops(SIDE)
            for _ in range(crop.count)
        ]
        at = Progress(step, 2, 2, indices[rows])
        optimizer.zero_grad()
        value = loss([view[rows] for view in views], at)
        value.backward()
        method.after_backward(at)
        optimizer.step()
        method.after_step(at)
        losses.append(value.detach())
    return losses, copy.deepcopy(method.state_dict())


def in_channels(method: Method) -> int:
    return 1 if method.config.colours == "grey" else 3


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=max(WORLDS)
    )
    for world in WORLDS:
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        results = {}
        for name in CASES:
            method = made(name)
            loss = share_out(method, group)
            results[name] = trained(method, loss, slice(rank, None, world))
        torch.save(results, Path(folder) / f"{world}-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """(world, rank) -> case -> losses and state."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=max(WORLDS))
    return {
        (world, rank): torch.load(folder / f"{world}-{rank}.pt")
        for world in WORLDS
        for rank in range(world)
    }


def test_all_methods_are_here() -> None:
    assert {name.split()[0] for name in CASES} == set(METHODS)


@pytest.mark.parametrize("name", CASES)
def test_processes_take_the_steps_of_one(results, name: str) -> None:  # type: ignore[no-untyped-def]
    method = made(name)
    losses, state = trained(method, method.loss, slice(None))
    for world in WORLDS:
        ranks = [results[world, rank][name] for rank in range(world)]
        for step, expected in enumerate(losses):
            found = torch.stack([rank[0][step] for rank in ranks]).mean()
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        for key, expected in state.items():
            torch.testing.assert_close(
                *(ranks[0][1][key], expected),
                rtol=1e-7,
                atol=1e-7,
                msg=lambda text, key=key: f"{world} processes, {key}: {text}",
            )


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_have_the_same_weights_queues_banks_and_centres(  # type: ignore[no-untyped-def]
    results, name: str, world: int
) -> None:
    first = results[world, 0][name][1]
    for rank in range(1, world):
        for key, value in results[world, rank][name][1].items():
            assert torch.equal(value, first[key]), (rank, key)
