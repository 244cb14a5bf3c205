"""SwAV against the official training loop (toy model) and its queue against the definition."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax, normalize

from fastcl.methods.base import Progress
from fastcl.methods.swav import Config, SwAV
from fastcl.optim import OPTIMIZERS

FILES = [
    "swav_step_2crop_b12_d96_k100",
    "swav_step_2crop_b13_d24_k300",
    "swav_step_freeze_b8_d32_k50",
]


def bare(no_encoder, dim, **changes):
    changes = {"batch_size": 8, "freeze_epochs": 0.0} | changes
    method = SwAV(no_encoder(dim), Config(dim=dim, **changes))
    method.head = torch.nn.Identity()
    return method


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", FILES)
def test_steps_follow_the_official_code(golden, no_encoder, name, dtype):
    data = golden(name)
    x, start = data["x"], data["prototypes_init"]
    (steps, _, _, dim), count = x.shape, len(start)
    method = bare(
        no_encoder,
        dim,
        prototypes=count,
        temperature=float(data["temperature"]),
        epsilon=float(data["eps"]),
        sinkhorn_iterations=int(data["iters"]),
        freeze_epochs=int(data["freeze_niters"]) / 10,
    ).to(dtype)
    with torch.no_grad():
        method.prototypes.weight.copy_(torch.tensor(start))
    options = {"momentum": float(data["momentum"]), "weight_decay": float(data["weight_decay"])}
    name = "larc" if "larc" in str(data["meta"]) else "sgd"
    optimizer = OPTIMIZERS[name](method.prototypes.named_parameters(), float(data["lr"]), **options)
    rtol = 2e-6  # the file's arrays are float32
    for step in range(steps):
        at = Progress(step=step, steps_per_epoch=10, epochs=1)
        views = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in x[step]]
        optimizer.zero_grad()
        loss = method.loss(views, at)
        loss.backward()
        if step == 0:
            first = data["prototypes_normalized"].reshape(count, dim)
            weight = method.prototypes.weight.detach().numpy()
            np.testing.assert_allclose(weight, first, rtol=0, atol=1e-6)
        method.after_backward(at)
        np.testing.assert_allclose(loss.item(), data["loss_f64"][step], rtol=rtol)
        for view, truth in zip(views, data["grad_x"][step], strict=True):
            np.testing.assert_allclose(
                view.grad.numpy(), truth, rtol=0, atol=10 * rtol * np.abs(truth).max()
            )
        is_none = method.prototypes.weight.grad is None
        assert is_none == bool(data["grad_prototypes_is_none"][step])
        if not is_none:
            gradient = method.prototypes.weight.grad.clone()
        optimizer.step()
    truth = data["grad_prototypes_f64_last"]
    np.testing.assert_allclose(
        gradient.numpy(), truth, rtol=0, atol=10 * rtol * np.abs(truth).max()
    )
    np.testing.assert_allclose(
        method.prototypes.weight.detach().numpy(), data["prototypes_after"], rtol=0, atol=2e-6
    )


def official_loss(views, prototypes, queues, config):
    """The loss written out pair by pair, with the queue in front, as the official code reads."""
    scores = [normalize(v, dim=1) @ prototypes.T for v in views]
    total = 0.0
    for i in range(2):
        rows = scores[i] if queues is None else torch.cat([queues[i] @ prototypes.T, scores[i]])
        q = torch.exp(rows / config.epsilon).T
        q /= q.sum()
        for _ in range(config.sinkhorn_iterations):
            q /= q.sum(1, keepdim=True)
            q /= q.shape[0]
            q /= q.sum(0, keepdim=True)
            q /= q.shape[1]
        q = (q * q.shape[1]).T[-len(views[i]) :]
        for v in range(len(views)):
            if v != i:
                log_p = log_softmax(scores[v] / config.temperature, dim=1)
                total -= (q * log_p).sum(1).mean() / (len(views) - 1) / 2
    return total


def test_the_queue_fills_first_and_then_joins_the_codes(no_encoder):
    torch.manual_seed(0)
    method = bare(
        no_encoder, 5, prototypes=7, queue_size=17, queue_start_epoch=1, batch_size=8
    ).double()
    assert [len(queue.features) for queue in method.queues] == [16, 16]  # a multiple of the batch
    batches = [[torch.randn(8, 5).double() for _ in range(3)] for _ in range(6)]
    for step, views in enumerate(batches):
        at = Progress(step=step, steps_per_epoch=2, epochs=3)
        method.prototypes.normalize_()
        weight = method.prototypes.weight.detach()
        queues = None
        if step >= 4:  # epoch 1 starts at step 2; two batches fill the queue
            queues = [
                normalize(torch.cat([b[i] for b in batches[step - 2 : step]]), dim=1)
                for i in (0, 1)
            ]
        expected = official_loss(views, weight, queues, method.config)
        plain = official_loss(views, weight, None, method.config)
        loss = method.loss(views, at)
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
        assert (queues is None) == (abs(expected - plain) < 1e-9)


def test_frozen_prototypes_ignore_weight_decay(no_encoder):
    torch.manual_seed(0)
    method = bare(no_encoder, 5, prototypes=7, freeze_epochs=1.0)
    optimizer = torch.optim.SGD(method.prototypes.parameters(), 1.0, weight_decay=0.5)
    views = [torch.randn(8, 5) for _ in range(2)]
    for step, moves in ((0, False), (9, False), (10, True)):
        at = Progress(step=step, steps_per_epoch=10, epochs=2)
        optimizer.zero_grad()
        method.loss(views, at).backward()
        before = method.prototypes.weight.detach().clone()
        method.after_backward(at)
        optimizer.step()
        assert torch.equal(before, method.prototypes.weight) != moves


def test_small_crops_are_encoded_together_and_large_crops_together(tiny_encoder):
    method = SwAV(tiny_encoder(), Config(dim=4, hidden=8, prototypes=6, batch_size=4))
    sizes = []
    method.encoder[0].register_forward_hook(lambda _, x, y: sizes.append(tuple(x[0].shape)))
    views = [torch.rand(4, 3, size, size) for size in (16, 16, 8, 8, 8)]
    loss = method.loss(views, Progress(0, 10, 1))
    assert torch.isfinite(loss)
    assert sizes == [(8, 3, 16, 16), (12, 3, 8, 8)]


def test_collapsed_loss_is_the_log_of_the_prototypes(no_encoder):
    method = bare(no_encoder, 5, prototypes=11)
    with torch.no_grad():
        method.prototypes.weight.copy_(torch.ones(11, 5))
    loss = method.loss([torch.randn(8, 5), torch.randn(8, 5)], Progress(0, 10, 1))
    assert loss.item() == pytest.approx(math.log(11), rel=1e-5)
    assert method.collapsed_loss() == pytest.approx(math.log(11))


def test_paper_recipe_has_the_published_numbers():
    paper = SwAV.recipes["paper"]
    expected = {
        "backbone": "resnet50", "epochs": 800, "batch_size": 4096, "optimizer": "larc", "lr": 4.8,
        "start_lr": 0.3, "final_lr": 0.0048, "warmup_epochs": 10.0, "weight_decay": 1e-6,
        "prototypes": 3000, "temperature": 0.1, "epsilon": 0.05, "sinkhorn_iterations": 3,
        "queue_size": 0, "freeze_epochs": 1.0, "hidden": 2048, "dim": 128,
    }  # fmt: skip
    assert dataclasses.asdict(paper).items() >= expected.items()


def test_crops_are_the_published_ones_at_224(no_encoder):
    large, small = bare(no_encoder, 5).crops(224)
    assert (large.count, large.size, large.scale) == (2, 224, (0.14, 1.0))
    assert (small.count, small.size, small.scale) == (6, 96, (0.05, 0.14))
    assert len(bare(no_encoder, 5, small_crops=0).crops(224)) == 1
