"""A step of W processes with a batch is the step of one process with it, for every method.

In float64, so that nothing but rounding is forgiven. The encoder is the smallest that has a batch
norm: what is slow here is exchanging.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import fastcl.functional as F
from fastcl.cached import in_chunks_
from fastcl.compiled import compile_
from fastcl.methods import METHODS, Method, Progress
from fastcl.methods.cmc import Views
from fastcl.models.norms import replace_batch_norm
from fastcl.models.patches import PatchEncoder
from fastcl.optim import OPTIMIZERS
from fastcl.parallel import share_out

GOLDEN = Path(__file__).parents[1] / "golden"
WORLDS = 2, 3
IMAGES, STEPS, SIDE = 40, 2, 12
SPLIT = {"queue_size": 20, "bn_splits": 6, "batch_size": 12}
PATCHES = {"steps": 2, "skip": 0, "directions": 1, "noise": 5}
CHUNKS = {"dim": 16, "hidden": 32, "encoder_norm": "gn", "batch_size": 12}
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
    "swav": {"prototypes": 12, "hidden": 16, "small_crops": 2, "queue_size": 11}
    | {"queue_start_epoch": 0, "freeze_epochs": 0.5},
    "byol": {"dim": 16, "hidden": 8},
    "byol-v2": {"dim": 16, "hidden": 32, "encoder_norm": "gn"},
    "byol-v2 careful": {"dim": 16, "hidden": 32, "careful_init": True}
    | {"encoder_norm": "none", "projector_norm": "none", "predictor_norm": "none"},
    "simsiam": {"dim": 16, "hidden": 8},
    "moco-v3": {"dim": 16, "hidden": 8},
    "dino": {"dim": 16, "hidden": 8, "outputs": 12, "small_crops": 2},
    "moco-v2 crops": SPLIT | {"small_crops": 2},
    "simclr-v1 crops": {"small_crops": 2},
    "byol crops": {"dim": 16, "hidden": 8, "small_crops": 2},
    "simsiam crops": {"dim": 16, "hidden": 8, "small_crops": 2},
    "moco-v3 crops": {"dim": 16, "hidden": 8, "small_crops": 2},
    # An encoder whose rows do not see each other, so that a few at a time are as good.
    "byol-v2 few": CHUNKS,
    "byol-v2 compiled": CHUNKS,
    "byol-v2 few compiled": CHUNKS,
    "dino centred": {"dim": 16, "hidden": 8, "outputs": 12, "sinkhorn_iterations": 0},
}


def encoder(channels: int = 3, norm: str = "bn") -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(channels, 6, 3, 2), nn.BatchNorm2d(6)]
    network = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.feature_dim = 6  # type: ignore[assignment]
    return replace_batch_norm(network, norm, groups=2, careful=norm == "none")


def made(name: str, faster: bool = True) -> Method:
    """A method; --micro-batch and --compile, up to machine code, where its name says so."""
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
    made = made.double()
    for part in made.encoders() if faster else ():
        if "compiled" in name:
            compile_(part)
        if "few" in name:
            in_chunks_(part, 4)  # of 12 or 8 crops
    return made


def trained(method: Method, loss: Any, rows: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Losses and state after some steps, on these rows of each batch."""
    images = method.config.batch_size
    names = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    optimizer = OPTIMIZERS["sgd"](names, 0.05, momentum=0.9, weight_decay=1e-4)
    draws = torch.Generator().manual_seed(2)  # of images
    torch.manual_seed(3 + (rows.start or 0))  # of negatives and permutations: the first rank's
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


def published(rank: int, group: dist.ProcessGroup) -> dict[str, Any]:
    """What rank of two has of the inputs of the official codes' two-rank runs, in float64."""
    found: dict[str, Any] = {}
    data = np.load(GOLDEN / "swav_sinkhorn_dist2_b19x2_k300.npz")
    scores = torch.from_numpy(data[f"scores_rank{rank}"]).double()
    options = {"epsilon": float(data["eps"]), "iterations": int(data["iters"])}
    found["codes"] = F.sinkhorn(scores, group=group, **options)

    data = np.load(GOLDEN / "mocov3_loss_dist2_b13x2_d100.npz")
    q1, q2, k1, k2 = (
        torch.from_numpy(data[f"{name}_rank{rank}"]).double() for name in ("q1", "q2", "k1", "k2")
    )
    tau = float(data["T"])
    q1.requires_grad_()
    terms = [F.info_nce(q, k, temperature=tau, group=group) for q, k in ((q1, k2), (q2, k1))]
    (2 * tau * (terms[0] + terms[1])).backward()
    found["MoCo v3"] = 2 * tau * (terms[0] + terms[1]).detach(), q1.grad

    data = np.load(GOLDEN / "moco_shufflebn_w2_b6_d24_k36.npz")
    encoder = nn.Sequential(
        nn.Linear(20, 20), nn.Unflatten(1, (20, 1, 1)), nn.BatchNorm2d(20), nn.ReLU(), nn.Flatten()
    )
    encoder.feature_dim = 20  # type: ignore[assignment]
    recipe = METHODS["moco-v1"].recipes["paper"]
    config = dataclasses.replace(recipe, bn_splits=2, dim=24, queue_size=36, momentum=0.99)
    method = METHODS["moco-v1"](encoder, config).double()
    queries, keys = method.query_encoder, method.key_encoder
    with torch.no_grad():
        for name, place in PLACES.items():
            for network in (queries, keys):
                network.get_parameter(place).copy_(torch.from_numpy(data[f"init_{name}"]))
        method.queue.features.copy_(torch.from_numpy(data["queue_before"]))
    loss = share_out(method, group)
    for step in ("s1", "s2"):
        method.zero_grad()
        method.agreed = lambda _, step=step: shared(torch.from_numpy(data[f"{step}_perm"]).long())
        views = [torch.from_numpy(data[f"{step}_{x}"]).double() for x in ("im_q", "im_k")]
        value = loss([view[6 * rank : 6 * rank + 6] for view in views], Progress(0, 1, 1))
        value.backward()
        method.after_backward(Progress(0, 1, 1))
        gradients = {name: queries.get_parameter(place).grad for name, place in PLACES.items()}
        found[step] = value.detach(), copy.deepcopy(gradients)
    found["queue"] = method.queue.features
    return found


# Of the official run's network, in ours.
PLACES = {
    "l0.weight": "0.0.weight",
    "bn.weight": "0.2.weight",
    "bn.bias": "0.2.bias",
    "fc.weight": "1.weight",
    "fc.bias": "1.bias",
}


def shared(order: Tensor) -> Tensor:
    """A permutation of 12 rows that two ranks have as 0–5 and 6–11, as if they had every other."""
    place = torch.arange(12).view(2, 6).T.flatten()  # our row n is their row place[n]
    return place.argsort()[order[place]]


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # type: ignore[assignment]
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
        if world == 2:
            results["published"] = published(rank, group)
            assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0  # it was compiled
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
    method = made(name, faster=False)
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
                msg=lambda text, where=f"{world} processes, {key}": f"{where}: {text}",
            )


def test_two_ranks_balance_codes_as_the_official_swav(results) -> None:  # type: ignore[no-untyped-def]
    data = np.load(GOLDEN / "swav_sinkhorn_dist2_b19x2_k300.npz")
    codes = torch.cat([results[2, rank]["published"]["codes"] for rank in range(2)])
    torch.testing.assert_close(codes.float(), torch.from_numpy(data["q_f64"]))


def test_two_ranks_have_the_loss_of_the_official_moco_v3(results) -> None:  # type: ignore[no-untyped-def]
    data = np.load(GOLDEN / "mocov3_loss_dist2_b13x2_d100.npz")
    for rank in range(2):
        value, grad = results[2, rank]["published"]["MoCo v3"]
        expected = torch.from_numpy(data[f"loss_f64_rank{rank}"])
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-7)
        expected = torch.from_numpy(data[f"grad_q1_rank{rank}"])
        torch.testing.assert_close(grad.float(), expected, rtol=1e-4, atol=1e-7)


def test_two_ranks_shuffle_and_queue_keys_as_the_official_moco(results) -> None:  # type: ignore[no-untyped-def]
    data = np.load(GOLDEN / "moco_shufflebn_w2_b6_d24_k36.npz")
    ranks = [results[2, rank]["published"] for rank in range(2)]
    for step in ("s1", "s2"):
        losses = torch.stack([rank[step][0] for rank in ranks])
        expected = torch.from_numpy(data[f"{step}_f64_loss_per_rank"])
        torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
        for rank in ranks:  # averaged over ranks
            for name in PLACES:
                expected = torch.from_numpy(data[f"{step}_f64_grad_{name}"])
                torch.testing.assert_close(rank[step][1][name], expected, rtol=1e-5, atol=1e-6)
    expected = torch.from_numpy(data["f64_queue_after"])
    pushed = expected[:24].view(2, 2, 6, -1)  # step, rank, row: ours have every other row
    expected[:24] = pushed.transpose(1, 2).reshape(24, -1)
    for rank in ranks:
        torch.testing.assert_close(rank["queue"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_have_the_same_weights_queues_banks_and_centres(  # type: ignore[no-untyped-def]
    results, name: str, world: int
) -> None:
    first = results[world, 0][name][1]
    for rank in range(1, world):
        for key, value in results[world, rank][name][1].items():
            assert torch.equal(value, first[key]), (rank, key)
