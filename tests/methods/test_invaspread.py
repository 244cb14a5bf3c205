"""InvaSpread against the official criterion."""

import dataclasses

import numpy as np
import pytest
import torch

from fastcl.methods.base import Progress
from fastcl.methods.invaspread import Config, InvaSpread
from fastcl.optim import learning_rate

AT = Progress(step=0, steps_per_epoch=10, epochs=1)


def bare(no_encoder, dim, **changes):
    method = InvaSpread(no_encoder(dim), Config(dim=dim, **changes))
    method.head = torch.nn.Identity()
    return method


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "whole-gradient"])
@pytest.mark.parametrize("name", ["n8_d128", "n37_d96_t005", "negm05_n11_d96"])
def test_loss_and_gradient_are_the_official_ones(golden, no_encoder, name, detach, dtype):
    data = golden(f"invaspread_{name}")
    x = torch.tensor(data["x"], dtype=dtype)
    length = torch.rand(len(x), 1).to(dtype) + 0.5  # the method puts rows on the sphere itself
    h = (x * length).requires_grad_(True)
    method = bare(
        no_encoder,
        x.shape[1],
        temperature=float(data["param_T"]),
        negative_weight=float(data["param_negM"]),
        detach_columns=detach,
    )
    loss = method.loss(list(h.chunk(2)), AT)
    loss.backward()
    np.testing.assert_allclose(
        loss.item(), data["f64_loss"], rtol=1e-6 if dtype == torch.float64 else 5e-6
    )
    truth = data["f64_grad_x" if detach else "f64_grad_x_nodetach"]
    unit = x / x.norm(dim=1, keepdim=True)
    radial = (torch.tensor(truth) * unit).sum(1, keepdim=True) * unit
    truth = ((torch.tensor(truth) - radial) / length).numpy()
    np.testing.assert_allclose(h.grad, truth, rtol=0, atol=2e-5 * np.abs(truth).max())


def test_batch_norm_sees_both_views_at_once(tiny_encoder):
    method = InvaSpread(tiny_encoder(), Config(dim=4))
    views = [torch.rand(8, 3, 8, 8) + shift for shift in (0.0, 5.0)]
    method.loss(views, AT)
    expected = 0.1 * method.encoder[0](torch.cat(views)).mean((0, 2, 3))
    torch.testing.assert_close(method.encoder[1].running_mean, expected)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_identical_embeddings_give_the_collapsed_loss(no_encoder, weight):
    method = bare(no_encoder, 5, batch_size=12, negative_weight=weight)
    same = torch.ones(12, 5)
    loss = method.loss([same, same], AT)
    assert method.collapsed_loss() == pytest.approx(loss.item(), rel=1e-5)


def test_paper_recipe_has_the_published_numbers():
    paper = InvaSpread.recipes["paper"]
    expected = {
        "backbone": "resnet18", "epochs": 301, "batch_size": 128, "optimizer": "sgd", "lr": 0.03,
        "sgd_momentum": 0.9, "weight_decay": 5e-4, "schedule": "step", "dim": 128,
        "temperature": 0.1, "negative_weight": 1.0, "detach_columns": True,
        "augmentation": "invaspread", "crop_scale": (0.2, 1.0), "image_size": None,
    }  # fmt: skip
    assert dataclasses.asdict(paper).items() >= expected.items()
    rates = [
        learning_rate(
            paper.schedule, 10 * epoch, images=10, batch_size=1, epochs=301, lr=paper.lr,
            milestones=paper.milestones, factors=paper.factors,
        )
        for epoch in (0, 119, 120, 159, 160, 199, 200, 300)
    ]  # fmt: skip
    expected = [0.03, 0.03, 0.003, 0.003, 0.0015, 0.0015, 0.0003, 0.0003]
    np.testing.assert_allclose(rates, expected, rtol=1e-12)
