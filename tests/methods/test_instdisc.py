"""InstDisc against the official code: two steps on one bank, and the softmax over all images."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastcl.methods.base import Progress
from fastcl.methods.instdisc import Config, InstDisc

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)


def at(y):
    return Progress(step=0, steps_per_epoch=10, epochs=1, indices=torch.as_tensor(y))


def bare(no_encoder, data, dtype=torch.float32, **changes):
    """InstDisc without a network, on the bank of a golden file."""
    size, dim = data["mem_before"].shape
    config = Config(
        dim=dim,
        temperature=float(data["param_T"]),
        momentum=float(data["param_momentum"]),
        **changes,
    )
    method = InstDisc(no_encoder(dim), config)
    method.head = torch.nn.Identity()
    method.set_images(size)
    method.to(dtype).bank.features.copy_(torch.tensor(data["mem_before"]))
    return method


def one_step(method, x, y):
    """The loss and its gradient before and (by hand) after normalisation; then the bank moves."""
    x = x.clone().requires_grad_(True)
    loss = method.loss([x], at(y))
    loss.backward()
    method.after_backward(at(y))
    return loss.item(), x.grad


def tangent(gradient, x):
    """A gradient on the sphere, through the normalisation of rows x that are unit already."""
    gradient = torch.tensor(gradient)
    return (gradient - (gradient * x).sum(1, keepdim=True) * x).numpy()


@DTYPES
def test_two_steps_of_nce_follow_the_official_code(golden, no_encoder, dtype, monkeypatch):
    data = golden("instdisc_nce_b8_d128_n200_k64")
    method = bare(no_encoder, data, dtype, loss="nce", negatives=64)
    rtol = 1e-6 if dtype == torch.float64 else 5e-6  # x is unit to float32 only
    for step in ("s1_", "s2_"):
        x, y = torch.tensor(data[f"{step}x"], dtype=dtype), data[f"{step}y"]
        index = torch.tensor(data[f"{step}idx"]).long()
        monkeypatch.setattr(method, "candidates", lambda y, index=index: index)
        loss, gradient = one_step(method, x, y)
        np.testing.assert_allclose(loss, data[f"{step}f64_loss"], rtol=rtol)
        np.testing.assert_allclose(method.partition.z.item(), data[f"{step}f64_Z"], rtol=rtol)
        truth = tangent(data[f"{step}f64_grad_x"], x)
        np.testing.assert_allclose(gradient, truth, rtol=0, atol=5 * rtol * np.abs(truth).max())
        rows = method.bank.features[torch.tensor(y)]
        np.testing.assert_allclose(rows, data[f"{step}f64_mem_rows_after"], rtol=0, atol=1e-6)
    untouched = np.setdiff1d(np.arange(200), np.concatenate([data["s1_y"], data["s2_y"]]))
    np.testing.assert_array_equal(
        method.bank.features[untouched].float(), data["mem_before"][untouched]
    )


@DTYPES
def test_softmax_over_all_images_follows_the_official_code(golden, no_encoder, dtype):
    data = golden("instdisc_softmax_b8_d128_n150")
    method = bare(no_encoder, data, dtype, loss="softmax", negatives=0)
    x, y = torch.tensor(data["x"], dtype=dtype), data["y"]
    loss, gradient = one_step(method, x, y)
    rtol = 1e-6 if dtype == torch.float64 else 5e-6
    np.testing.assert_allclose(loss, data["f64_loss"], rtol=rtol)
    truth = tangent(data["f64_grad_x"], x)
    np.testing.assert_allclose(gradient, truth, rtol=0, atol=5 * rtol * np.abs(truth).max())
    rows = method.bank.features[torch.tensor(y)]
    np.testing.assert_allclose(rows, data["f64_mem_rows_after"], rtol=0, atol=1e-6)


def small(no_encoder, **changes):
    torch.manual_seed(0)
    method = InstDisc(no_encoder(5), Config(dim=5, **changes))
    method.head = torch.nn.Identity()
    method.set_images(40)
    return method.double(), torch.randn(6, 5).double(), torch.tensor([3, 0, 39, 7, 7, 21])


def test_sampled_softmax_is_the_cross_entropy_of_its_candidates(no_encoder):
    method, x, y = small(no_encoder, loss="softmax", negatives=9, temperature=0.2)
    drawn = []
    draw = method.candidates
    method.candidates = lambda y: drawn.append(draw(y)) or drawn[-1]
    loss = method.loss([x], at(y))
    unit = x / x.norm(dim=1, keepdim=True)
    logits = torch.einsum("nd,nkd->nk", unit, method.bank.features[drawn[0]]) / 0.2
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(loss, expected)


def test_noise_is_uniform_over_the_bank_and_the_image_comes_first(no_encoder):
    method, _, y = small(no_encoder, negatives=20000)
    index = method.candidates(y)
    assert index.shape == (6, 20001) and torch.equal(index[:, 0], y)
    counts = torch.bincount(index[:, 1:].flatten(), minlength=40).double()
    assert (counts / 3000 - 1).abs().max() < 0.1  # 3,000 of each, ± 54


def test_noise_has_the_distribution_of_the_official_tables(golden, no_encoder):
    """Their alias tables over equal weights say what one draw from all images says."""
    data = golden("instdisc_alias_tables")
    assert data["one1_implied"] == 1
    implied = data["uniform7_implied"]
    config = Config(dim=4, loss="softmax", negatives=70_000)
    method = InstDisc(no_encoder(4), config)
    method.set_images(len(implied))
    noise = method.candidates(torch.tensor([3]))[0, 1:]
    share = torch.bincount(noise, minlength=len(implied)) / len(noise)
    deviation = (implied * (1 - implied) / len(noise)) ** 0.5
    assert (np.abs(share.numpy() - implied) < 5 * deviation).all()


def test_proximal_term_pulls_towards_the_remembered_features(no_encoder):
    changes = {"loss": "softmax", "negatives": 0}
    plain, x, y = small(no_encoder, **changes)
    pulled, _, _ = small(no_encoder, proximal=0.5, **changes)
    unit = x / x.norm(dim=1, keepdim=True)
    away = (unit - plain.bank.features[y]).square().sum(1).mean()
    torch.testing.assert_close(pulled.loss([x], at(y)), plain.loss([x], at(y)) + 0.5 * away)


def test_partition_stays_or_averages(no_encoder):
    scores = torch.full((2, 4), math.log(2.0)).double(), torch.full((2, 4), math.log(4.0)).double()
    frozen, _, _ = small(no_encoder)
    assert [frozen.partition(s, len(frozen.bank.features)).item() for s in scores] == pytest.approx(
        [80, 80]
    )
    moving, _, _ = small(no_encoder, z_momentum=0.75)
    assert [moving.partition(s, len(moving.bank.features)).item() for s in scores] == pytest.approx(
        [80, 100]
    )
    assert moving.state_dict()["partition.z"].item() == pytest.approx(100)


def test_one_view_and_a_bank_that_starts_uniform(no_encoder):
    method = InstDisc(no_encoder(5), Config(dim=12))
    method.set_images(5000)
    (crops,) = method.crops(24)
    assert (crops.count, crops.size) == (1, 24)
    bank = method.bank.features
    assert bank.abs().max() <= 0.5 and bank.square().sum(1).mean().item() == pytest.approx(1, 0.02)


def test_losses_that_do_not_exist_are_refused(no_encoder):
    with pytest.raises(ValueError, match="unknown loss 'ce'"):
        InstDisc(no_encoder(5), Config(loss="ce"))
    with pytest.raises(ValueError, match="nce loss needs negatives"):
        InstDisc(no_encoder(5), Config(loss="nce", negatives=0))


def test_paper_recipe_has_the_published_numbers():
    expected = {
        "backbone": "resnet50", "epochs": 200, "batch_size": 256, "optimizer": "sgd", "lr": 0.03,
        "sgd_momentum": 0.9, "weight_decay": 1e-4, "schedule": "step", "milestones": (120, 160),
        "dim": 128, "loss": "nce", "negatives": 4096, "temperature": 0.07, "momentum": 0.5,
        "z_momentum": 0.0, "proximal": 0.0, "augmentation": "instdisc", "crop_scale": (0.2, 1.0),
    }  # fmt: skip
    assert dataclasses.asdict(InstDisc.recipes["paper"]).items() >= expected.items()
