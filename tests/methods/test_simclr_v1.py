"""SimCLR v1 against the official objective."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from fastcl.methods.base import Progress
from fastcl.methods.simclr_v1 import Config, SimCLRV1

AT = Progress(step=0, steps_per_epoch=10, epochs=1)


def bare(no_encoder, dim, **changes):
    method = SimCLRV1(no_encoder(dim), Config(dim=dim, **changes))
    method.head = torch.nn.Identity()
    return method


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_loss_and_gradient_have_the_official_scale(golden, no_encoder, dtype):
    data = golden("simclr_ntxent_n8_d128_t01")
    method = bare(no_encoder, 128, temperature=float(data["param_T"]))
    h = torch.tensor(data["h"], dtype=dtype, requires_grad=True)
    loss = method.loss(list(h.chunk(2)), AT)
    loss.backward()
    rtol = 1e-9 if dtype == torch.float64 else 2e-6
    # The loss is a difference of logits of size 10, so float32 is good to some 1e-6.
    np.testing.assert_allclose(loss.item(), data["f64_loss"], rtol=0, atol=rtol)
    truth = data["f64_grad_h"]
    np.testing.assert_allclose(h.grad.numpy(), truth, rtol=0, atol=10 * rtol * np.abs(truth).max())
    np.testing.assert_allclose(loss.item(), 2 * data["f64_loss_paper_mean"], rtol=0, atol=rtol)


def test_batch_norm_sees_both_views_at_once(tiny_encoder):
    method = SimCLRV1(tiny_encoder(), Config(dim=4, temperature=0.5))
    generator = torch.Generator().manual_seed(0)
    views = [torch.rand(8, 3, 8, 8, generator=generator) + shift for shift in (0.0, 5.0)]
    loss = method.loss(views, AT)
    assert torch.isfinite(loss)
    expected = 0.1 * method.encoder[0](torch.cat(views)).mean((0, 2, 3))
    torch.testing.assert_close(method.encoder[1].running_mean, expected)


def test_identical_embeddings_give_the_collapsed_loss(no_encoder):
    method = bare(no_encoder, 5, batch_size=12)
    same = torch.ones(12, 5)
    loss = method.loss([same, same], AT)
    assert loss.item() == pytest.approx(2 * math.log(23), rel=1e-6)
    assert method.collapsed_loss() == pytest.approx(loss.item(), rel=1e-6)


def test_paper_recipe_has_the_published_numbers():
    expected = {
        "backbone": "resnet50", "epochs": 1000, "batch_size": 4096, "optimizer": "lars-simclr",
        "lr": 4.8, "weight_decay": 1e-6, "schedule": "warmup-cosine", "warmup_epochs": 10.0,
        "zero_init_residual": True, "truncated_init": True,
        "dim": 128, "temperature": 0.1, "crop_scale": (0.08, 1.0), "jitter": 1.0, "blur": True,
    }  # fmt: skip
    assert dataclasses.asdict(SimCLRV1.recipes["paper"]).items() >= expected.items()


def test_paper_encoder_starts_as_in_the_code():
    torch.manual_seed(0)
    config = Config(backbone="tiny-resnet")
    encoder = SimCLRV1.build_encoder(config, 32)
    conv = encoder.stages[2].conv2
    assert conv.weight.std().item() == pytest.approx((9 * 128) ** -0.5, rel=0.02)
    assert all(not stage.bn2.weight.any() for stage in encoder.stages)
