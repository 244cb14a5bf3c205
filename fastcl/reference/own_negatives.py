"""Log-sum-exp of each query's similarities to negatives of its own, in plain torch.

    s_nk  = t · q̂_n · k̂_nk                         q̂ = q / max(‖q‖, 1e-12) where normalize, else q
    lse_n = log Σ_k exp s_nk
    dk̂_nk = t W_nk q̂_n,   dq̂_n = t Σ_k W_nk k̂_nk,   dt = Σ_nk W_nk q̂_n·k̂_nk
    W_nk  = g_n exp(s_nk − lse_n)

The torch line: (t * torch.einsum("nd,nkd->nk", q, k)).logsumexp(1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.reference._common import NORM_FLOOR, in_float, normalized, through_normalization


def cosines(q: Tensor, k: Tensor, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """q̂ (N, D), q̂·k̂ (N, K) and what k̂ is divided by, (N, K) or ()."""
    unit = normalized(q, normalize)
    dot = torch.einsum("nd,nkd->nk", unit, k)
    if not normalize:
        return unit, dot, dot.new_ones(())
    norm = torch.linalg.vector_norm(k, dim=2).clamp_min(NORM_FLOOR)
    return unit, dot / norm, norm  # the scores rather than a copy of the negatives are divided


def forward(query: Tensor, negatives: Tensor, scale: Tensor, *, normalize: bool) -> Tensor:
    """lse (N,) of query (N, D) and negatives (N, K, D)."""
    q, k = in_float(query), in_float(negatives)
    return (scale.to(q.dtype) * cosines(q, k, normalize)[1]).logsumexp(1)


def backward(
    grad: Tensor,
    query: Tensor,
    negatives: Tensor,
    scale: Tensor,
    lse: Tensor,
    *,
    normalize: bool,
    need_query: bool,
    need_negatives: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """grad_query (N, D), grad_negatives (N, K, D), grad_scale (); grad (N,)."""
    q, k, t = in_float(query), in_float(negatives), scale.to(lse.dtype)
    unit, cosine, norm = cosines(q, k, normalize)
    s = t * cosine
    w = grad[:, None] * (s - lse[:, None]).exp().masked_fill(s == -torch.inf, 0.0)
    share = t * w / norm  # (N, K)
    grad_query = grad_negatives = None
    if need_query:
        dq = torch.einsum("nk,nkd->nd", share, k)
        grad_query = through_normalization(dq, q, normalize).to(query.dtype)
    if need_negatives:
        dk = share[:, :, None] * unit[:, None]
        if normalize:
            along = share * cosine / norm * (norm > NORM_FLOOR)
            dk.addcmul_(along[:, :, None], k, value=-1)
        grad_negatives = dk.to(negatives.dtype)
    return grad_query, grad_negatives, (w * cosine).sum().to(scale.dtype)
