"""The expressions that people write in plain PyTorch. In float64 they are also the truth.

After them the same losses as solo-learn writes them, where that is another expression; its release
on PyPI differs from its repository, so these stand for it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, logsigmoid, normalize


def nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    z = normalize(torch.cat((z0, z1)), dim=1)
    s = (z @ z.T / 0.5).fill_diagonal_(-math.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z0))
    return cross_entropy(s, partner)


def clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    s = logit_scale * normalize(image, dim=1) @ normalize(text, dim=1).T
    pair = torch.arange(len(s), device=s.device)
    return (cross_entropy(s, pair) + cross_entropy(s.T, pair)) / 2


def siglip(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    s = logit_scale * normalize(image, dim=1) @ normalize(text, dim=1).T + logit_bias
    z = 2 * torch.eye(len(s), dtype=s.dtype, device=s.device) - 1
    return -logsigmoid(z * s).sum() / len(s)


def info_nce(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    query, positive = normalize(query, dim=1), normalize(positive, dim=1)
    own = (query * positive).sum(1, keepdim=True)
    logits = torch.cat((own, query @ negatives.T), 1) / 0.07
    return cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def info_nce_paired(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    query, positive = normalize(query, dim=1), normalize(positive, dim=1)
    own = (query * positive).sum(1, keepdim=True)
    others = torch.bmm(normalize(negatives, dim=2), query[:, :, None])[:, :, 0]  # (N, K)
    logits = torch.cat((own, others), 1) / 0.07
    return cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def sup_con(features: Tensor, labels: Tensor) -> Tensor:
    z = normalize(features, dim=1)
    s = z @ z.T / 0.07
    s = s - s.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), dtype=z.dtype, device=z.device)
    positive = (labels[:, None] == labels) * others
    log_p = s - (s.exp() * others).sum(1, keepdim=True).log()
    return -((positive * log_p).sum(1) / positive.sum(1)).mean()


def dcl(z0: Tensor, z1: Tensor) -> Tensor:
    z = normalize(torch.cat((z0, z1)), dim=1)
    s = z @ z.T / 0.1
    image = torch.arange(len(z0), device=z.device).repeat(2)
    own = (z * z.roll(len(z0), 0)).sum(1) / 0.1
    return (s.masked_fill(image[:, None] == image, -math.inf).logsumexp(1) - own).mean()


def instance_spread(z0: Tensor, z1: Tensor) -> Tensor:
    z = normalize(torch.cat((z0, z1)), dim=1)
    s = (z @ z.detach().T / 0.1).fill_diagonal_(-math.inf)
    log_p = s.log_softmax(1)
    partner = torch.arange(len(z), device=z.device).roll(len(z0))[:, None]
    others = torch.log1p(-log_p.exp()).scatter(1, partner, 0.0)
    return -(log_p.gather(1, partner)[:, 0] + others.sum(1)).mean()


def bank_scores(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    rows = bank.index_select(0, index.view(-1)).view(*index.shape, -1)  # (N, K, D)
    return torch.bmm(rows, query[:, :, None])[:, :, 0] / 0.07


def nce(query: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    p = bank_scores(query, bank, index).exp() / (PARTITION * len(bank))
    c = (index.shape[1] - 1) / len(bank)  # K noise samples, each with probability 1 / M
    data = (p[:, 0] / (p[:, 0] + c + 1e-7)).log()
    noise = (c / (p[:, 1:] + c + 1e-7)).log()
    return -(data + noise.sum(1)).mean()


PARTITION = 2.2  # the mean of exp(s / 0.07) over random unit rows of 128 dimensions


@torch.no_grad()
def sinkhorn(scores: Tensor) -> Tensor:
    q = (scores / 0.05).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= q.shape[0]
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
    return (q * q.shape[1]).T


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * (logits / 0.1).log_softmax(1)).sum(1).mean()


def self_distillation(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    y = ((teacher - center) / 0.04).softmax(2)
    log_p = (student / 0.1).log_softmax(2)
    pairs = [(i, v) for i in range(len(y)) for v in range(len(log_p)) if i != v]
    return torch.stack([-(y[i] * log_p[v]).sum(1).mean() for i, v in pairs]).mean()


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return -(normalize(prediction, dim=1) * normalize(target, dim=1)).sum(1).mean()


@torch.no_grad()
def ema(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources):
        target.mul_(0.996).add_(source, alpha=1 - 0.996)


@torch.no_grad()
def queue_push(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    start = int(pointer)  # as in MoCo: the queue's size is a multiple of the batch
    queue[start : start + len(keys)] = keys
    pointer[0] = (start + len(keys)) % len(queue)


@torch.no_grad()
def bank_update(bank: Tensor, index: Tensor, features: Tensor) -> None:
    rows = bank.index_select(0, index) * 0.5 + features * 0.5
    bank.index_copy_(0, index, normalize(rows, dim=1))


# ---- as solo-learn writes them -------------------------------------------------------------------


def nt_xent_with_masks(z0: Tensor, z1: Tensor) -> Tensor:
    """Two masks over the exponentials."""
    z = normalize(torch.cat((z0, z1)), dim=1)
    e = torch.exp(torch.einsum("id,jd->ij", z, z) / 0.5)
    image = torch.arange(len(z0), device=z.device).repeat(2)
    same = image[:, None] == image
    positive = (e * same.clone().fill_diagonal_(False)).sum(1)
    negative = (e * ~same).sum(1)
    return -torch.log(positive / (positive + negative)).mean()


def info_nce_with_einsum(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    """einsum, and a division in place."""
    query, positive = normalize(query, dim=1), normalize(positive, dim=1)
    own = torch.einsum("nd,nd->n", query, positive)[:, None]
    logits = torch.cat((own, torch.einsum("nd,dk->nk", query, negatives.T)), 1)
    logits /= 0.07
    return cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def self_distillation_by_pairs(student: Tensor, teacher: Tensor, center: Tensor) -> Tensor:
    """As DINO's official code too: the student's log-softmax again for every pair of views."""
    y = ((teacher - center) / 0.04).softmax(2)
    total, terms = student.new_zeros(()), 0
    for i in range(len(y)):
        for v in range(len(student)):
            if i != v:
                total = total + (-y[i] * log_softmax(student[v] / 0.1, 1)).sum(1).mean()
                terms += 1
    return total / terms
