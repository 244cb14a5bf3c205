"""BYOL: its loss, its MLP and its target against the official code and the definitions."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from fastcl.methods.base import Progress
from fastcl.methods.byol import BYOL, Config
from fastcl.nn import byol_mlp

AT = Progress(step=0, steps_per_epoch=10, epochs=2)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)
MLP = {
    "linear/w": "0.weight", "linear/b": "0.bias", "batch_norm/scale": "1.weight",
    "batch_norm/offset": "1.bias", "linear_1/w": "3.weight",
}  # fmt: skip


class Given(torch.nn.Module):
    """Gives the outputs it was made with, one a call."""

    def __init__(self, *outputs):
        super().__init__()
        self.outputs = iter(outputs)

    def forward(self, x):
        return next(self.outputs)


@DTYPES
def test_loss_and_gradients_are_the_official_ones(golden, no_encoder, dtype):
    data = golden("byol_loss_b19_d256")
    p1, p2, z1, z2 = (torch.tensor(data[k], dtype=dtype) for k in ("p1", "p2", "z1", "z2"))
    p1.requires_grad_(True), p2.requires_grad_(True)
    method = BYOL(no_encoder(256), Config(hidden=8, dim=256))
    method.predictor, method.target = Given(p1, p2), Given(z1, z2)
    loss = method.loss([torch.randn(19, 256), torch.randn(19, 256)], AT)
    loss.backward()
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    np.testing.assert_allclose(loss.item(), data["loss_f64"], rtol=rtol)
    for p, key in ((p1, "grad_p1_f64"), (p2, "grad_p2_f64")):
        truth = data[key]
        np.testing.assert_allclose(p.grad, truth, rtol=0, atol=5 * rtol * np.abs(truth).max())


def arranged(data, prefix, dtype):
    """The official parameters or gradients under torch's names and shapes."""
    found = {}
    for key, name in MLP.items():
        value = torch.tensor(data[f"{prefix}projector/{key}"], dtype=dtype)
        found[name] = value.T.contiguous() if key.endswith("/w") else value.flatten()
    return found


@DTYPES
def test_mlp_follows_the_official_one(golden, dtype):
    data = golden("byol_mlp_bn")
    mlp = byol_mlp(24, 40, 16).to(dtype)
    mlp.load_state_dict(arranged(data, "p/", dtype), strict=False)
    for step in range(2):
        x = torch.tensor(data["x"][step], dtype=dtype, requires_grad=True)
        mlp.zero_grad()
        y = mlp(x)
        y.backward(torch.tensor(data["grad_y"][step], dtype=dtype))
        exact = 1e-7 if dtype == torch.float64 else 5e-6
        np.testing.assert_allclose(y.detach(), data["y_f64"][step], rtol=0, atol=exact)
        np.testing.assert_allclose(x.grad, data["grad_x"][step], rtol=0, atol=5e-6)
        for name, truth in arranged(data, f"grad{step}/", torch.float32).items():
            torch.testing.assert_close(
                mlp.get_parameter(name).grad.float(), truth, rtol=1e-5, atol=1e-5
            )


def test_evaluation_with_the_official_statistics_is_the_official_one(golden):
    data = golden("byol_mlp_bn")
    mlp = byol_mlp(24, 40, 16).double()
    statistics = "state1/projector/batch_norm/~/{}_ema/average"
    mlp.load_state_dict(
        arranged(data, "p/", torch.float64)
        | {
            f"1.running_{name}": torch.tensor(data[statistics.format(name)]).flatten()
            for name in ("mean", "var")
        },
        strict=False,
    )
    y = mlp.eval()(torch.tensor(data["x"][0]).double())
    np.testing.assert_allclose(y.detach(), data["y_eval_f64"], rtol=0, atol=3e-6)


def test_target_moves_after_the_step_with_the_momentum_of_before(tiny_encoder):
    method = BYOL(tiny_encoder(), Config(hidden=8, dim=4, momentum=0.9)).double()
    before = copy.deepcopy(method.target.state_dict())
    views = [torch.rand(8, 3, 8, 8).double() for _ in range(2)]
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.5)
    at = Progress(step=5, steps_per_epoch=10, epochs=2)
    tau = 1 - 0.1 * (np.cos(np.pi * 5 / 20) + 1) / 2
    method.loss(views, at).backward()
    method.after_backward(at)
    for name, p in method.target.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])
    optimizer.step()
    method.after_step(at)
    online = dict(method.online.named_parameters())
    assert method.momentum_at(at) == pytest.approx(tau, rel=1e-12)
    for name, p in method.target.named_parameters():
        torch.testing.assert_close(p, tau * before[name] + (1 - tau) * online[name])
        assert not torch.equal(p, before[name])


def test_target_has_batch_statistics_of_its_own_and_no_predictor(tiny_encoder):
    method = BYOL(tiny_encoder(), Config(hidden=8, dim=4))
    views = [torch.rand(8, 3, 8, 8) + shift for shift in (0.0, 5.0)]
    method.loss(views, AT)
    twin = method.target[0]
    means = [twin[0](view).mean((0, 2, 3)) for view in views]
    torch.testing.assert_close(twin[1].running_mean, 0.09 * means[0] + 0.1 * means[1])
    assert len(list(method.target.parameters())) == len(list(method.online.parameters()))


@pytest.mark.parametrize("norm, kind", [("bn", torch.nn.BatchNorm1d), ("ln", torch.nn.LayerNorm)])
def test_norms_are_where_they_are_asked_for(no_encoder, norm, kind):
    config = Config(hidden=8, dim=4, projector_norm=norm, predictor_norm="none")
    method = BYOL(no_encoder(6), config)
    assert isinstance(method.projector[1], kind) and isinstance(method.target[1][1], kind)
    assert isinstance(method.predictor[1], torch.nn.Identity)


def test_unknown_norm_is_named():
    with pytest.raises(ValueError, match=r"unknown norm 'gn'\. Norms: bn, ln, none"):
        byol_mlp(4, 4, 4, "gn")


def test_paper_recipe_has_the_published_numbers():
    expected = {
        "backbone": "resnet50", "zero_init_residual": False, "epochs": 1000, "batch_size": 4096,
        "optimizer": "lars-byol", "lr": 3.2, "sgd_momentum": 0.9, "weight_decay": 1.5e-6,
        "schedule": "warmup-cosine-byol", "warmup_epochs": 10.0, "hidden": 4096, "dim": 256,
        "momentum": 0.996, "projector_norm": "bn", "predictor_norm": "bn", "augmentation": "byol",
        "crop_scale": (0.08, 1.0), "jitter": 1.0, "blur": True,
    }  # fmt: skip
    assert dataclasses.asdict(BYOL.recipes["paper"]).items() >= expected.items()
