"""MoCo v3 against three optimizer steps of the official builder on a toy encoder."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import fastcl.functional as F
from fastcl import models
from fastcl.methods.base import Progress
from fastcl.methods.moco_v3 import Config, MoCoV3
from fastcl.optim import OPTIMIZERS

AT = Progress(step=0, steps_per_epoch=10, epochs=2)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)
NAMES = {
    "base_encoder.body.": "encoder.0.", "base_encoder.fc.": "projector.",
    "momentum_encoder.body.": "key_encoder.0.0.", "momentum_encoder.fc.": "key_encoder.1.",
    "predictor.": "predictor.",
}  # fmt: skip


def ours(data, prefix):
    """The official state under our names."""
    state = {}
    for key in data.files:
        if key.startswith(prefix):
            name = key.removeprefix(prefix)
            start = next(start for start in NAMES if name.startswith(start))
            state[NAMES[start] + name.removeprefix(start)] = torch.tensor(data[key])
    return state


@DTYPES
def test_three_steps_follow_the_official_code(golden, dtype, monkeypatch):
    data = golden("mocov3_model_resnet_lars")
    encoder = torch.nn.Sequential(torch.nn.Linear(20, 24), torch.nn.ReLU())
    encoder.feature_dim = 24
    config = Config(dim=16, hidden=32, temperature=float(data["T"]))
    method = MoCoV3(encoder, config).to(dtype)
    method.load_state_dict(ours(data, "init/"))
    trained = [(name, p) for name, p in method.named_parameters() if p.requires_grad]
    optimizer = OPTIMIZERS["lars-moco-v3"](trained, 1.2, momentum=0.9, weight_decay=1e-4)
    tight = 1e-6 if dtype == torch.float64 else 5e-6  # the file's states are float32
    for step, momentum in enumerate(data["momenta"]):
        monkeypatch.setattr(method, "momentum_at", lambda at, m=float(momentum): m)
        views = [torch.tensor(view, dtype=dtype) for view in data["x"][step]]
        optimizer.zero_grad()
        loss = method.loss(views, AT)
        loss.backward()
        np.testing.assert_allclose(loss.item(), data["losses_f64"][step], rtol=0, atol=tight)
        if step == 0:
            for name, truth in ours(data, "grad0/").items():
                gradient = method.get_parameter(name).grad.float()
                torch.testing.assert_close(gradient, truth, rtol=0, atol=2e-6)
        optimizer.step()
    final = ours(data, "final/")
    assert final.keys() == method.state_dict().keys()
    for name, truth in final.items():
        actual = method.state_dict()[name].to(truth.dtype)
        torch.testing.assert_close(actual, truth, rtol=0, atol=5e-6, msg=lambda m, n=name: n + m)


@DTYPES
@pytest.mark.parametrize("name", ["mocov3_loss_b24_d256_t1.0", "mocov3_loss_b50_d96_t0.2_aligned"])
def test_loss_and_gradients_are_the_official_ones(golden, no_encoder, name, dtype):
    data = golden(name)
    q = [torch.tensor(data[k], dtype=dtype, requires_grad=True) for k in ("q1", "q2")]
    keys = iter(torch.tensor(data[k], dtype=dtype) for k in ("k1", "k2"))
    config = Config(dim=q[0].shape[1], hidden=4, temperature=float(data["T"]))
    method = MoCoV3(no_encoder(q[0].shape[1]), config)
    method.projector, method.predictor = torch.nn.Identity(), torch.nn.Identity()
    method.key_encoder = torch.nn.Identity()
    method.key_encoder.forward = lambda x: next(keys)
    loss = method.loss(q, AT)
    loss.backward()
    rtol = 1e-9 if dtype == torch.float64 else 2e-6
    np.testing.assert_allclose(loss.item(), data["loss_f64"], rtol=rtol)
    for x, key in zip(q, ("grad_q1_f64", "grad_q2_f64"), strict=True):
        truth = data[key]
        np.testing.assert_allclose(x.grad, truth, rtol=0, atol=10 * rtol * np.abs(truth).max())


@DTYPES
def test_ranks_have_their_rows_of_the_loss_over_all_keys(golden, dtype):
    """Two ranks of the official code, whose losses are of its own rows against everybody's keys."""
    data = golden("mocov3_loss_dist2_b13x2_d100")
    T = float(data["T"])
    exact = dtype == torch.float64

    def all_ranks(key):
        return torch.tensor(np.concatenate([data[f"{key}_rank{r}"] for r in (0, 1)]), dtype=dtype)

    q1, q2 = (all_ranks(key).requires_grad_() for key in ("q1", "q2"))
    k1, k2 = (all_ranks(key) for key in ("k1", "k2"))
    losses = sum(F.info_nce(q, k, temperature=T, reduction="none") for q, k in ((q1, k2), (q2, k1)))
    (2 * T * losses).sum().div(13).backward()
    for rank in (0, 1):
        own = slice(13 * rank, 13 * (rank + 1))
        loss = 2 * T * losses[own].mean().item()
        np.testing.assert_allclose(loss, data[f"loss_f64_rank{rank}"], rtol=1e-9 if exact else 2e-6)
        for q, key in ((q1, "grad_q1"), (q2, "grad_q2")):  # of float32, to 1e-6
            np.testing.assert_allclose(q.grad[own], data[f"{key}_rank{rank}"], rtol=0, atol=1e-6)


def test_keys_come_from_the_encoder_moved_before_them(tiny_encoder):
    """The momentum step is inside the loss, with the weights of before the optimizer's step."""
    method = MoCoV3(tiny_encoder(), Config(dim=4, hidden=8, momentum=0.5, momentum_cosine=False))
    with torch.no_grad():
        for p in method.base_encoder.parameters():
            p.add_(0.3)
    before = copy.deepcopy(dict(method.key_encoder.named_parameters()))
    method.loss([torch.rand(8, 3, 8, 8) for _ in range(2)], AT)
    online = dict(method.base_encoder.named_parameters())
    for name, p in method.key_encoder.named_parameters():
        torch.testing.assert_close(p, 0.5 * before[name] + 0.5 * online[name])


def test_momentum_goes_to_one_by_a_cosine_of_the_fractional_epoch(no_encoder):
    method = MoCoV3(no_encoder(5), Config(dim=4, hidden=4, momentum=0.9))
    at = Progress(step=7, steps_per_epoch=10, epochs=2)
    expected = 1 - 0.5 * (1 + math.cos(math.pi * 0.7 / 2)) * (1 - 0.9)
    assert method.momentum_at(at) == pytest.approx(expected, rel=1e-12)
    fixed = MoCoV3(no_encoder(5), Config(dim=4, hidden=4, momentum=0.9, momentum_cosine=False))
    assert fixed.momentum_at(at) == 0.9


def test_identical_embeddings_give_the_collapsed_loss(no_encoder):
    method = MoCoV3(no_encoder(5), Config(dim=5, hidden=4, batch_size=12, temperature=0.2))
    method.predictor = torch.nn.Identity()
    method.projector = torch.nn.Identity()
    method.key_encoder = torch.nn.Identity()
    same = torch.ones(12, 5)
    loss = method.loss([same, same], AT)
    assert loss.item() == pytest.approx(4 * 0.2 * math.log(12), rel=1e-6)
    assert method.collapsed_loss() == pytest.approx(loss.item(), rel=1e-6)


def test_frozen_patch_projection_gets_no_gradient_in_either_encoder():
    encoder = models.build("tiny-vit", image_size=8)
    method = MoCoV3(encoder, Config(dim=4, hidden=8, freeze_patch=True, predictor_last_norm=True))
    method.loss([torch.rand(4, 3, 8, 8) for _ in range(2)], AT).backward()
    still = {name for name, p in method.named_parameters() if p.grad is None}
    keys = {name for name, _ in method.named_parameters() if name.startswith("key_encoder.")}
    assert still == {"encoder.patch.weight", "encoder.patch.bias"} | keys
    assert isinstance(method.predictor[-1], torch.nn.BatchNorm1d)


def test_a_backbone_without_patches_cannot_freeze_them(tiny_encoder):
    with pytest.raises(ValueError, match="this backbone has no patches"):
        MoCoV3(tiny_encoder(), Config(freeze_patch=True))


def test_paper_recipe_has_the_published_numbers():
    expected = {
        "backbone": "resnet50", "zero_init_residual": True, "epochs": 1000, "batch_size": 4096,
        "optimizer": "lars-moco-v3", "lr": 4.8, "sgd_momentum": 0.9, "weight_decay": 1.5e-6,
        "schedule": "warmup-cosine-moco-v3", "warmup_epochs": 10.0, "hidden": 4096, "dim": 256,
        "momentum": 0.996, "temperature": 1.0, "projector_layers": 2, "predictor_layers": 2,
        "predictor_last_norm": False, "augmentation": "moco-v3", "crop_scale": (0.2, 1.0),
        "jitter": 1.0, "blur": True,
    }  # fmt: skip
    assert dataclasses.asdict(MoCoV3.recipes["paper"]).items() >= expected.items()


def test_paper_recipe_of_the_transformer_has_the_published_numbers():
    expected = {
        "backbone": "vit-small-moco-v3", "epochs": 300, "batch_size": 4096, "optimizer": "adamw",
        "lr": 2.4e-3, "sgd_momentum": 0.9, "weight_decay": 0.1, "warmup_epochs": 40.0,
        "hidden": 4096, "dim": 256, "momentum": 0.99, "temperature": 0.2, "projector_layers": 3,
        "predictor_layers": 2, "predictor_last_norm": True, "freeze_patch": True,
        "crop_scale": (0.08, 1.0), "augmentation": "moco-v3", "zero_init_residual": False,
    }  # fmt: skip
    assert dataclasses.asdict(MoCoV3.recipes["paper-vit"]).items() >= expected.items()
