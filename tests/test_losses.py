"""fastcl.losses are the functions with their hyper-parameters held."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastcl.functional as F
from fastcl import losses

X, Y, QUEUE = torch.randn(6, 8), torch.randn(6, 8), torch.randn(20, 8)
LABELS = torch.tensor([0, 1, 0, 1, 2, 2])

CASES = {
    "InfoNCELoss": (
        losses.InfoNCELoss(temperature=0.2)(X, Y, QUEUE),
        F.info_nce(X, Y, QUEUE, temperature=0.2),
    ),
    "NTXentLoss": (
        losses.NTXentLoss(temperature=0.2, reduction="sum")(X, Y),
        F.nt_xent(X, Y, temperature=0.2, reduction="sum"),
    ),
    "DCLLoss": (losses.DCLLoss(normalize=False)(X, Y), F.dcl(X, Y, normalize=False)),
    "ClipLoss": (losses.ClipLoss(logit_scale=5.0)(X, Y), F.clip(X, Y, logit_scale=5.0)),
    "SupConLoss": (
        losses.SupConLoss(base_temperature=0.1)(X, LABELS),
        F.sup_con(X, LABELS, base_temperature=0.1),
    ),
    "NegativeCosineLoss": (losses.NegativeCosineLoss(eps=1e-6)(X, Y), F.negative_cosine(X, Y)),
}


@pytest.mark.parametrize("name", CASES)
def test_module_equals_function(name: str) -> None:
    module, function = CASES[name]
    torch.testing.assert_close(module, function)


def test_a_parameter_as_temperature_is_trained() -> None:
    loss = losses.NTXentLoss(temperature=nn.Parameter(torch.tensor(0.3)))
    loss(X, Y).backward()
    (temperature,) = loss.parameters()
    assert temperature.grad.abs() > 0


def test_repr_shows_the_hyper_parameters() -> None:
    assert repr(losses.DCLLoss(temperature=0.25)).startswith("DCLLoss(temperature=0.25, ")


def test_swav_averages_over_codes_and_the_other_crops() -> None:
    scores = [torch.randn(6, 10) for _ in range(4)]
    queue = [torch.randn(15, 10) for _ in range(2)]
    loss = losses.SwAVLoss(temperature=0.2)(scores[:2], scores[2:], queue)
    terms = []
    for i in range(2):
        code = F.sinkhorn(torch.cat((queue[i], scores[i])))[-6:]
        others = [s for v, s in enumerate(scores) if v != i]
        terms += [-(code * (s / 0.2).log_softmax(1)).sum(1).mean() for s in others]
    torch.testing.assert_close(loss, sum(terms) / 6)


def test_swav_codes_have_no_gradient() -> None:
    scores = [torch.randn(6, 10, requires_grad=True) for _ in range(2)]
    loss = losses.SwAVLoss()(scores)
    loss.backward()
    code = F.sinkhorn(scores[1])
    expected = (scores[0].div(0.1).softmax(1) - code) / (2 * 6 * 0.1)
    torch.testing.assert_close(scores[0].grad, expected.detach())


def test_swav_refuses_one_crop_and_a_short_queue() -> None:
    with pytest.raises(ValueError, match="two crops"):
        losses.SwAVLoss()([X])
    with pytest.raises(ValueError, match="one tensor for each large crop"):
        losses.SwAVLoss()([X, Y], queue=[QUEUE])
