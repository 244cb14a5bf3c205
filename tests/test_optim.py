"""LARS and the schedules against what the official code computed (tests/golden/README.md)."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcl.optim import (
    LARS,
    cosine,
    learning_rate,
    linspace_cosine,
    simclr_steps,
    step_decay,
    warmup_cosine,
)

GOLDEN = Path(__file__).parent / "golden"


def load(name):
    return np.load(GOLDEN / f"{name}.npz")


def run(optimizer_of, start, gradients, lrs, dtype=torch.float64):
    """The parameters after as many steps as there are learning rates."""
    parameters = {k: torch.nn.Parameter(torch.tensor(v, dtype=dtype)) for k, v in start.items()}
    optimizer = optimizer_of(list(parameters.items()))
    for step, lr in enumerate(lrs):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, parameter in parameters.items():
            if name != "none_w":  # the file's parameter that never gets a gradient
                parameter.grad = torch.tensor(gradients[name][step], dtype=dtype)
        optimizer.step()
        yield {name: parameter.detach().numpy().copy() for name, parameter in parameters.items()}


def check(result, truth, dtype):
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    for name, value in truth.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(result[name], value, rtol=0, atol=rtol * scale, err_msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("form", ["mocov3", "swav_larc", "dino", "byol"])
def test_lars_follows_the_official_steps(form, dtype):
    if form == "byol":
        data = load("byol_lars_steps")
        names = [key[3:] for key in data.files if key.startswith("p0/")]
        start, gradients, truth = (
            {name: data[f"{prefix}/{name}"] for name in names} for prefix in ("p0", "g", "p64")
        )
        preset = LARS.byol
        # The official filter, by name; the preset excludes by dimension.
        options = {
            "exclude": lambda name, _: (
                name.split(".")[-1] == "b" or "norm" in name.rsplit(".", 1)[0]
            )
        }
    else:
        data = load("swav_larc_steps" if form == "swav_larc" else f"{form}_lars_steps")
        names = [key[3:] for key in data.files if key.startswith("p0_")]
        start, gradients, truth = (
            {name: data[f"{prefix}_{name}"] for name in names} for prefix in ("p0", "g", "p64")
        )
        preset = {"mocov3": LARS.moco_v3, "swav_larc": LARS.larc, "dino": LARS.dino}[form]
        options = {}
    options["weight_decay"] = float(data["weight_decay"])
    lrs = np.broadcast_to(data["lr"], len(next(iter(gradients.values()))))
    *_, result = run(lambda named: preset(named, 1.0, **options), start, gradients, lrs, dtype)
    check(result, truth, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_simclr_lars_follows_the_official_steps(dtype):
    data = load("simclr_lars_lr48_wd1e4")
    names = [key[5:] for key in data.files if key.startswith("init:")]
    start = {name: data[f"init:{name}"] for name in names}
    steps = int(data["param_steps"])
    gradients = {n: [data[f"s{s}:grad:{n}"] for s in range(1, steps + 1)] for n in names}

    def exclude(name, _):
        return any(word in name for word in ("batch_normalization", "bias", "head_supervised"))

    def optimizer_of(named):
        return LARS.simclr(named, 1.0, weight_decay=float(data["param_wd"]), exclude=exclude)

    lrs = [float(data["param_lr"])] * steps
    for step, result in enumerate(run(optimizer_of, start, gradients, lrs, dtype), start=1):
        check(result, {name: data[f"s{step}:f64_after:{name}"] for name in names}, dtype)


def test_lr_inside_and_outside_the_momentum_differ_once_lr_changes():
    start = {"w": np.full((2, 2), 3.0)}
    gradients = {"w": [np.ones((2, 2))] * 2}
    inside, outside = (
        [
            result["w"]
            for result in run(
                lambda named, inside=inside: LARS(named, 1.0, lr_inside=inside),
                start,
                gradients,
                [1.0, 0.5],
            )
        ]
        for inside in (True, False)
    )
    np.testing.assert_allclose(inside[0], outside[0])
    # Second step: inside keeps 0.9 of the first step at its own lr, outside at the new lr.
    assert np.abs(inside[1] - outside[1]).max() > 1e-4


def test_lars_skips_parameters_without_gradient():
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = LARS.larc([("w", parameter)], 1.0)
    optimizer.step()
    assert torch.equal(parameter, torch.ones(2, 2))
    assert not optimizer.state


def test_lars_state_survives_saving():
    torch.manual_seed(0)

    def make(model):
        return LARS.simclr(model.named_parameters(), 0.5)

    def step(model, optimizer, x):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    x = torch.randn(4, 5)
    model = torch.nn.Linear(5, 3)
    optimizer = make(model)
    step(model, optimizer, x)
    twin = torch.nn.Linear(5, 3)
    twin.load_state_dict(model.state_dict())
    restored = make(twin)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, x)
    step(twin, restored, x)
    assert torch.equal(model.weight, twin.weight)
    assert torch.equal(model.bias, twin.bias)


def test_lars_says_what_a_wrong_argument_must_be():
    named = [("w", torch.nn.Parameter(torch.ones(2, 2)))]
    with pytest.raises(ValueError, match="form must be norm_of_sum or sum_of_norms; got 'larc'"):
        LARS(named, 1.0, form="larc")
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\); got 1.5"):
        LARS(named, 1.0, momentum=1.5)


def test_simclr_schedule():
    data = load("simclr_lr_schedule")
    assert simclr_steps(1281167, 4096, 100, 10) == (data["linear_total"], data["linear_warmup"])
    for name in ("linear", "sqrt", "cifar"):
        total, warmup, peak = (data[f"{name}_{key}"].item() for key in ("total", "warmup", "peak"))
        lrs = [
            warmup_cosine(int(step), total=total, warmup=warmup, peak=peak)
            for step in data[f"{name}_steps"]
        ]
        np.testing.assert_allclose(lrs, data[f"{name}_f64_lr"], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("recipe", ["big_batch", "small_batch"])
def test_swav_schedule(recipe):
    data = load("swav_lr_schedule")
    peak, end, start, warmup, epochs, steps = data[f"{recipe}_args"].tolist()
    lrs = [
        linspace_cosine(
            step,
            total=int(epochs * steps),
            warmup=int(warmup * steps),
            peak=peak,
            start=start,
            end=end,
        )
        for step in range(int(epochs * steps))
    ]
    np.testing.assert_allclose(lrs, data[recipe], rtol=1e-12)


@pytest.mark.parametrize("suffix", ["", "_vit"])
def test_moco_v3_schedules(suffix):
    data = load("mocov3_schedules")
    peak, warmup, epochs, momentum = data[f"args{suffix}"].tolist()
    times = data[f"epoch{suffix}"]
    lrs = [warmup_cosine(t, total=epochs, warmup=warmup, peak=peak) for t in times]
    np.testing.assert_allclose(lrs, data[f"lr{suffix}"], rtol=1e-12, atol=1e-15)
    momenta = [cosine(t, total=epochs, start=momentum, end=1.0) for t in times]
    np.testing.assert_allclose(momenta, data[f"m{suffix}"], rtol=1e-12)


def test_byol_schedules():
    data = load("byol_schedules")
    for base in (0.996, 0.99, 0.97):
        taus = [cosine(int(s), total=1000, start=base, end=1.0) for s in data["steps_tau"]]
        np.testing.assert_allclose(taus, data[f"tau64_{base}"], rtol=1e-12)
    lrs = [
        warmup_cosine(int(s), total=1000, warmup=100, peak=0.2 * 4096 / 256)
        for s in data["steps_lr"]
    ]
    np.testing.assert_allclose(lrs, data["lr64"], rtol=1e-12, atol=1e-15)
    lrs = [
        warmup_cosine(int(s), total=500, warmup=0, peak=0.2 * 1024 / 256)
        for s in data["steps_lr_nowarm"]
    ]
    np.testing.assert_allclose(lrs, data["lr_nowarm64"], rtol=1e-12, atol=1e-15)


def test_byol_and_moco_v3_count_their_steps_as_their_code_does():
    data = load("byol_schedules")
    # 1,030 images in batches of 10, 10 epochs: 1,030 steps by BYOL; 103 whole batches an epoch.
    arguments = {"images": 1030, "batch_size": 10, "epochs": 10, "lr": 3.2, "warmup_epochs": 1.0}
    for step in (0, 50, 103, 104, 600, 1029):
        expected = warmup_cosine(step, total=1030, warmup=103, peak=3.2)
        assert learning_rate("warmup-cosine-byol", step, **arguments) == expected
    official = {"images": 4096, "batch_size": 41, "epochs": 10, "lr": 3.2, "warmup_epochs": 1.0}
    assert 4096 * 10 // 41 == 999 and 4096 // 41 == 99  # partial batches count in the total only
    assert learning_rate("warmup-cosine-byol", 99, **official) == pytest.approx(3.2)
    assert learning_rate("warmup-cosine-byol", 998, **official) > 0
    exact = {"images": 1000, "batch_size": 1, "epochs": 1, "lr": 3.2, "warmup_epochs": 0.1}
    lrs = [learning_rate("warmup-cosine-byol", int(s), **exact) for s in data["steps_lr"]]
    np.testing.assert_allclose(lrs, data["lr64"], rtol=1e-12, atol=1e-15)

    data = load("mocov3_schedules")
    peak, warmup, epochs, _ = data["args"].tolist()
    per_epoch = round(1 / data["epoch"][data["epoch"] > 0].min())
    lrs = [
        learning_rate(
            "warmup-cosine-moco-v3", round(t * per_epoch), images=per_epoch * 7 + 3, batch_size=7,
            epochs=int(epochs), lr=peak, warmup_epochs=warmup,
        )
        for t in data["epoch"]
    ]  # fmt: skip
    exact = np.abs(data["epoch"] * per_epoch - np.round(data["epoch"] * per_epoch)) < 1e-6
    assert exact.all()
    np.testing.assert_allclose(lrs, data["lr"], rtol=1e-9, atol=1e-12)


def test_dino_schedules():
    data = load("dino_schedules")
    lrs = [
        linspace_cosine(s, total=140, warmup=21, peak=0.0005 * 1024 / 256, end=1e-6)
        for s in range(140)
    ]
    np.testing.assert_allclose(lrs, data["lr"], rtol=1e-12, atol=1e-18)
    for name, start, end in (("wd", 0.04, 0.4), ("momentum", 0.996, 1.0)):
        values = [cosine(s, total=140, start=start, end=end) for s in range(140)]
        np.testing.assert_allclose(values, data[name], rtol=1e-12)


def test_simsiam_and_moco_v2_take_a_cosine_of_the_whole_epoch():
    data = load("simsiam_lr_schedule")
    epochs, peak = int(data["epochs"]), float(data["init_lr"])
    lrs = [cosine(epoch, total=epochs, start=peak) for epoch in range(epochs)]
    # Column 0 decays; column 1 is the predictor's, which stays.
    decayed = data["lr"][:, 0] if data["lr"][-1, 0] != peak else data["lr"][:, 1]
    np.testing.assert_allclose(lrs, decayed, rtol=1e-12)


def test_moco_v1_steps_down_at_its_milestones():
    lrs = [step_decay(epoch, start=0.03, milestones=(120, 160)) for epoch in (0, 119, 120, 160)]
    np.testing.assert_allclose(lrs, [0.03, 0.03, 0.003, 0.0003])
