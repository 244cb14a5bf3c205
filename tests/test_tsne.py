"""The map of features is t-SNE: its affinities, its gradient, the same on every run."""

import numpy as np
import pytest
import torch
from torch.nn import functional as nf

from fastcl import tsne


def test_affinities_have_the_perplexity_asked_for():
    torch.manual_seed(0)
    x = torch.randn(200, 8) * torch.rand(200, 1)
    p = tsne.affinities(x, 20.0)
    assert float(p.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(p, p.T) and (p.diagonal() == 0).all()
    d = torch.cdist(x.double(), x.double()).square()
    for i in (0, 77):  # the conditional p of row i, from its definition, at some β
        row = torch.cat((d[i, :i], d[i, i + 1 :]))
        low, high = 1e-4, 1e6
        for _ in range(200):
            beta = (low * high) ** 0.5
            q = torch.softmax(-beta * row, 0)
            low, high = (beta, high) if -(torch.xlogy(q, q)).sum() > np.log(20) else (low, beta)
        others = torch.cat((p[i, :i], p[i, i + 1 :])) * 2 * 200
        assert (others.double() - q).min() > -1e-5  # the rest is p_i|j


def test_slope_is_a_quarter_of_the_gradient():
    torch.manual_seed(0)
    p = tsne.affinities(torch.randn(30, 5), 8.0).double()
    y = torch.randn(30, 2, dtype=torch.float64, requires_grad=True)
    w = 1 / (1 + (y[:, None] - y).square().sum(-1))
    q = w / (w.sum() - w.diagonal().sum())
    divergence = (torch.xlogy(p, p) - p * q.log()).sum()  # p_ii = 0
    (gradient,) = torch.autograd.grad(divergence, y)
    assert torch.allclose(4 * tsne.slope(p, y.detach()), gradient, atol=1e-10)


def test_clusters_stay_together_and_every_run_is_the_same():
    torch.manual_seed(0)
    labels = torch.arange(200) % 5
    x = nf.normalize(torch.randn(5, 32)[labels] + 0.5 * torch.randn(200, 32), dim=1)
    y = tsne.tsne(x)
    assert torch.equal(y, tsne.tsne(x))
    distance = torch.cdist(y, y).fill_diagonal_(torch.inf)
    assert (labels[distance.argmin(1)] == labels).all()
    for odd in (x[:3], torch.ones(40, 8), torch.randn(40, 1)):  # few, equal, on a line
        assert tsne.tsne(odd).isfinite().all()
