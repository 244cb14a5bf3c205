"""BYOL v2: weight standardisation, group norm and careful initialisation."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fastcl.methods.base import Progress
from fastcl.methods.byol_v2 import BYOLV2, Config
from fastcl.models.norms import (
    Affine,
    StandardisedConv2d,
    StandardisedLinear,
    careful_init_,
    mlp,
    replace_batch_norm,
    standardise,
)

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)
SMALL = {"backbone": "tiny-resnet", "hidden": 64, "dim": 8}


def close(found, truth, atol):
    np.testing.assert_allclose(np.asarray(found.detach()), truth, rtol=0, atol=atol)


@DTYPES
def test_standardised_convolution_and_group_norm_are_those_of_bit(golden, dtype):
    data = golden("byolv2_wsconv_gn_bit")
    x, weight, grad = (torch.tensor(data[k], dtype=dtype) for k in ("x", "weight", "grad_y"))
    net = nn.Sequential(nn.Conv2d(6, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)).to(dtype)
    net = replace_batch_norm(net, "gn+ws", groups=int(data["groups"])).to(dtype)
    net[0].weight.data, x = weight, x.requires_grad_()
    net[1].weight.data = torch.tensor(data["gn_weight"], dtype=dtype)
    net[1].bias.data = torch.tensor(data["gn_bias"], dtype=dtype)
    y = net(x)
    y.backward(grad)
    exact = dtype == torch.float64
    close(standardise(weight), data["weight_std_f64"], 1e-9 if exact else 5e-6)
    close(net[0](x), data["conv_out"], 1e-5)
    close(y, data["y"], 5e-6)
    close(x.grad, data["grad_x"], 2e-5)
    close(net[0].weight.grad, data["grad_weight_f64"], 1e-9 if exact else 1e-4)
    close(net[1].weight.grad, data["grad_gn_weight"], 5e-5)
    close(net[1].bias.grad, data["grad_gn_bias"], 5e-5)


@DTYPES
def test_head_is_the_formula(golden, dtype):
    data = golden("byolv2_head_bit")
    head = mlp(24, 96, 16, "gn+ws", groups=int(data["groups"])).to(dtype)
    names = {"0.weight": "p_w1", "0.bias": "p_b1", "1.weight": "p_g", "1.bias": "p_bt"}
    names["3.weight"] = "p_w2"
    head.load_state_dict({k: torch.tensor(data[v]) for k, v in names.items()})
    x = torch.tensor(data["x"], dtype=dtype, requires_grad=True)
    y = head(x)
    y.backward(torch.tensor(data["grad_y"], dtype=dtype))
    exact = dtype == torch.float64
    close(y, data["y_f64"], 1e-9 if exact else 7e-6)
    close(head[0].weight.grad, data["grad_w1_f64"], 1e-9 if exact else 2e-5)
    close(x.grad, data["grad_x"], 1e-5)


def test_careful_initialisation_is_the_formula(golden):
    data = golden("byolv2_careful_init")
    net = nn.Sequential(
        nn.Linear(24, 32, bias=False), Affine(32), nn.ReLU(), nn.Linear(32, 16, bias=False),
        Affine(16),
    ).double()  # fmt: skip
    net[0].weight.data, net[3].weight.data = (torch.tensor(data[k]) for k in ("W1", "W2"))
    x = torch.tensor(data["x"])
    careful_init_(net, x)
    for affine, i in ((net[1], 1), (net[4], 2)):
        close(affine.weight, data[f"scale{i}"], 1e-10)
        close(affine.bias, data[f"offset{i}"], 1e-10)
    close(net(x), data["y"], 1e-10)
    close(net(torch.tensor(data["x_new"])), data["y_new"], 1e-10)  # no statistics of the new batch


def test_qiao_standardises_by_the_unbiased_deviation():
    weight = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    w = weight.reshape(5, -1).numpy()
    expected = (w - w.mean(1, keepdims=True)) / (w.std(1, ddof=1, keepdims=True) + 1e-5)
    close(standardise(weight, "qiao"), expected.reshape(weight.shape), 1e-12)


def test_no_batch_norm_is_left_and_no_image_sees_another():
    torch.manual_seed(0)
    config = Config(**SMALL)
    method = BYOLV2(BYOLV2.build_encoder(config, 16), config)
    kinds = [type(module) for module in method.modules()]
    assert not any(issubclass(kind, nn.modules.batchnorm._BatchNorm) for kind in kinds)
    assert nn.Conv2d not in kinds and StandardisedConv2d in kinds and StandardisedLinear in kinds
    images = torch.rand(6, 3, 16, 16)
    whole = method.predictor(method.online(images))
    torch.testing.assert_close(method.predictor(method.online(images[:2])), whole[:2])


@pytest.mark.parametrize("norm", ["bn", "gn", "gn+ws", "ln", "none"])
def test_every_norm_trains_every_parameter(norm):
    torch.manual_seed(0)
    config = Config(**SMALL, encoder_norm=norm, projector_norm=norm, predictor_norm=norm)
    method = BYOLV2(BYOLV2.build_encoder(config, 16), config)
    views = [torch.rand(4, 3, 16, 16) for _ in range(2)]
    method.loss(views, Progress(0, 10, 1)).backward()
    for parameter in [*method.online.parameters(), *method.predictor.parameters()]:
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()


def test_careful_init_is_done_once_and_copied_to_the_target():
    torch.manual_seed(0)
    none = dict.fromkeys(("encoder_norm", "projector_norm", "predictor_norm"), "none")
    config = Config(**SMALL, **none, careful_init=True)
    method = BYOLV2(BYOLV2.build_encoder(config, 16), config)
    views = [torch.rand(8, 3, 16, 16) for _ in range(2)]
    method.loss(views, Progress(0, 10, 1))
    hidden = method.projector[:2](method.encoder(torch.cat(views)))
    # 1/√(var + 10⁻⁵) falls short of 1 where the variance is small.
    assert hidden.mean(0).abs().max() < 1e-4 and (hidden.std(0, correction=0) < 1.001).all()
    assert hidden.std() > 0.5
    for a, b in zip(method.online.parameters(), method.target.parameters(), strict=True):
        assert torch.equal(a, b)
    before = copy.deepcopy(method.state_dict())
    method.loss([view + 1 for view in views], Progress(1, 10, 1))
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items())


def test_wrong_names_are_named():
    with pytest.raises(ValueError, match="unknown norm 'in'"):
        mlp(4, 4, 4, "in")
    with pytest.raises(ValueError, match="unknown weight standardisation 'x'"):
        mlp(4, 16, 4, "gn+ws", kind="x")
    with pytest.raises(ValueError, match="20 channels cannot be split into 16 groups"):
        mlp(4, 20, 4, "gn")


def test_paper_recipe_has_the_published_numbers():
    expected = {
        "encoder_norm": "gn+ws", "projector_norm": "gn+ws", "predictor_norm": "gn+ws",
        "norm_groups": 16, "standardisation": "bit", "careful_init": False, "epochs": 1000,
        "batch_size": 4096, "optimizer": "lars-byol", "lr": 3.2, "weight_decay": 1.5e-6,
        "momentum": 0.996, "hidden": 4096, "dim": 256,
    }  # fmt: skip
    assert dataclasses.asdict(BYOLV2.recipes["paper"]).items() >= expected.items()
