"""SimSiam against three optimizer steps of the official code on a toy encoder."""

import dataclasses

import numpy as np
import pytest
import torch

from fastcl.methods.base import Progress
from fastcl.methods.simsiam import Config, SimSiam
from fastcl.optim import OPTIMIZERS, learning_rate, split_group

AT = Progress(step=0, steps_per_epoch=10, epochs=1)
NAMES = {"encoder.body.": "encoder.0.", "encoder.fc.": "projector.", "predictor.": "predictor."}


def ours(data, prefix):
    """The official state under our names."""
    state = {}
    for key in data.files:
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            start = next(start for start in NAMES if name.startswith(start))
            state[NAMES[start] + name.removeprefix(start)] = torch.tensor(data[key])
    return state


def toy(**changes):
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(20, 24, bias=False), torch.nn.ReLU())
    encoder.feature_dim = 24
    return SimSiam(encoder, Config(dim=40, hidden=12, **changes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_three_steps_follow_the_official_code(golden, dtype):
    data = golden("simsiam_model_fixlr")
    method = toy().to(dtype)
    method.load_state_dict(ours(data, "init/"))
    lr = 0.05 * 512 / 256
    trained = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    optimizer = OPTIMIZERS["sgd"](trained, lr, momentum=0.9, weight_decay=1e-4)
    split_group(optimizer, method.fixed_lr(), fixed=True)
    tight = 1e-7 if dtype == torch.float64 else 2e-6  # the file's states are float32
    for step, epoch in enumerate((0, 5, 9)):
        rates = []
        for group in optimizer.param_groups:
            if not group.get("fixed"):
                group["lr"] = learning_rate(
                    "cosine", epoch, images=1, batch_size=1, epochs=10, lr=lr
                )
            rates.append(group["lr"])
        np.testing.assert_allclose(rates, data["lrs"][step], rtol=1e-12)
        views = [torch.tensor(view, dtype=dtype) for view in data["x"][step]]
        optimizer.zero_grad()
        loss = method.loss(views, AT)
        loss.backward()
        np.testing.assert_allclose(loss.item(), data["losses_f64"][step], rtol=0, atol=tight)
        if step == 0:
            without = [name for name, p in method.named_parameters() if p.grad is None]
            assert without == ["projector.6.bias"] and data["grad0_none"] == ["encoder.fc.6.bias"]
            for name, truth in ours(data, "grad0/").items():
                if name not in without:
                    gradient = method.get_parameter(name).grad
                    torch.testing.assert_close(gradient.float(), truth, rtol=0, atol=1e-6)
        optimizer.step()
    for name, truth in ours(data, "final/").items():
        actual = method.state_dict()[name].to(truth.dtype)
        torch.testing.assert_close(actual, truth, rtol=0, atol=2e-6, msg=lambda m, n=name: n + m)


def test_predictor_follows_the_schedule_on_request():
    assert len(list(toy().fixed_lr())) == 5
    assert list(toy(fix_predictor_lr=False).fixed_lr()) == []


def test_fixed_groups_keep_their_settings_and_lose_no_parameter():
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    named = [*first.named_parameters(), *second.named_parameters()]
    optimizer = OPTIMIZERS["lars-byol"](named, 0.5, momentum=0.9, weight_decay=0.25)
    split_group(optimizer, second.parameters(), fixed=True)
    groups = [
        (g.get("fixed", False), g["adapt"], g["weight_decay"], [p.ndim for p in g["params"]])
        for g in optimizer.param_groups
    ]
    assert groups == [
        (False, True, 0.25, [2]),
        (False, False, 0.0, [1]),
        (True, True, 0.25, [2]),
        (True, False, 0.0, [1]),
    ]
    assert optimizer.param_groups[2]["params"][0] is second.weight


def test_each_view_has_batch_statistics_of_its_own(tiny_encoder):
    method = SimSiam(tiny_encoder(), Config(dim=4, hidden=3))
    views = [torch.rand(8, 3, 8, 8) + shift for shift in (0.0, 5.0)]
    method.loss(views, AT)
    means = [method.encoder[0](view).mean((0, 2, 3)) for view in views]
    expected = 0.9 * (0.1 * means[0]) + 0.1 * means[1]
    torch.testing.assert_close(method.encoder[1].running_mean, expected)


def test_paper_recipe_has_the_published_numbers():
    expected = {
        "backbone": "resnet50", "zero_init_residual": True, "epochs": 100, "batch_size": 512,
        "optimizer": "sgd", "lr": 0.1, "sgd_momentum": 0.9, "weight_decay": 1e-4,
        "schedule": "cosine", "warmup_epochs": 0.0, "dim": 2048, "projector_layers": 3,
        "hidden": 512, "fix_predictor_lr": True, "augmentation": "moco-v2", "blur": True,
        "crop_scale": (0.2, 1.0), "jitter": 1.0,
    }  # fmt: skip
    assert dataclasses.asdict(SimSiam.recipes["paper"]).items() >= expected.items()
