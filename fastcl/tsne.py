"""t-SNE: a map of points in the plane that keeps neighbours together.

    p_j|i ∝ exp(−β_i ‖x_i − x_j‖²),  β_i such that p_·|i has the perplexity asked for
    p_ij  = (p_j|i + p_i|j) / 2N
    q_ij  ∝ 1 / (1 + ‖y_i − y_j‖²)
    ∂KL(p‖q)/∂y_i = 4 Σ_j (p_ij − q_ij) (y_i − y_j) / (1 + ‖y_i − y_j‖²)

Exact, with N × N matrices: for some thousand points. The same bits on every run: it starts at the
first two principal components.
Source: van der Maaten and Hinton 2008; start and learning rate: Kobak and Berens 2019.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXAGGERATION, EARLY = 12.0, 100  # p counts twelvefold in the first steps: clusters find together
TINY = 1e-12


@torch.no_grad()
def tsne(x: Tensor, *, perplexity: float = 30.0, steps: int = 400) -> Tensor:
    """Places y (N, 2) in the plane for points x (N, D), N ≥ 3."""
    count = len(x)
    x = x.float() - x.float().mean(0)
    p = affinities(x, min(perplexity, (count - 1) / 3))
    y = principal(x)
    y = 1e-2 * y / y[:, 0].std().clamp_min(TINY)
    velocity, gain = torch.zeros_like(y), torch.ones_like(y)
    rate = max(count / EXAGGERATION / 4, 10.0)
    for step in range(steps):
        early = step < EARLY
        gradient = slope(EXAGGERATION * p if early else p, y)
        against = gradient.sign() == velocity.sign()
        gain = torch.where(against, 0.8 * gain, gain + 0.2).clamp_min(0.01)
        velocity = (0.5 if early else 0.8) * velocity - 4 * rate * gain * gradient
        y = y + velocity
    return y - y.mean(0)


def principal(x: Tensor) -> Tensor:
    """Centred x (N, D) on its first two principal components, their signs fixed: (N, 2)."""
    _, vectors = torch.linalg.eigh((x.T @ x).double())
    axes = torch.zeros(x.shape[1], 2)
    found = vectors[:, -2:].flip(1).float()  # one column where D = 1
    axes[:, : found.shape[1]] = found
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    return x @ (axes * torch.where(largest < 0, -1.0, 1.0))


def affinities(x: Tensor, perplexity: float, halvings: int = 50) -> Tensor:
    """p_ij (N, N): β_i by bisection of the entropy, log perplexity."""
    distance = torch.cdist(x, x).square()
    distance.fill_diagonal_(math.inf)
    distance -= distance.amin(
        1, keepdim=True
    )  # the nearest at 0: p is the same, nothing underflows
    low, high = torch.zeros(len(x), 1), torch.full((len(x), 1), math.inf)
    beta = torch.ones(len(x), 1)
    for _ in range(halvings):
        p = torch.exp(-beta * distance)
        p /= p.sum(1, keepdim=True)
        wide = -torch.xlogy(p, p).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(wide, beta, low), torch.where(wide, high, beta)
        beta = torch.where(high.isinf(), 2 * beta, (low + high) / 2)
    return (p + p.T) / (2 * len(x))


def slope(p: Tensor, y: Tensor) -> Tensor:
    """Σ_j (p_ij − q_ij) (y_i − y_j) / (1 + ‖y_i − y_j‖²): a quarter of the gradient, (N, 2)."""
    square = y.square().sum(1)
    w = 1 / (1 + (square[:, None] + square - 2 * y @ y.T).clamp_min_(0))
    w.fill_diagonal_(0)
    weight = (p - w / w.sum()) * w
    return weight.sum(1, keepdim=True) * y - weight @ y
