"""Similarities of queries to gathered rows of a memory bank, in plain torch.

    s_nk = t · q_n · bank[index_nk]
    ∂/∂q_n = t Σ_k g_nk bank[index_nk],   ∂/∂t = Σ_nk g_nk q_n · bank[index_nk]

The torch line: t * torch.einsum("nd,nkd->nk", q, bank[index]); the functions below it gather CHUNK
queries' rows at a time.
Source: Wu et al. 2018, arXiv:1805.01978, section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.reference._common import in_float

CHUNK = 8  # queries whose rows are gathered at a time


def bank_scores(query: Tensor, bank: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    """s (N, K) of query (N, D), bank (M, D) and index int64 (N, K)."""
    q = in_float(query)
    return scale.to(q.dtype) * torch.einsum("nd,nkd->nk", q, bank[index].to(q.dtype))


def forward(query: Tensor, bank: Tensor, index: Tensor, scale: Tensor) -> Tensor:
    parts = zip(query.split(CHUNK), index.split(CHUNK))
    return torch.cat([bank_scores(q, bank, i, scale) for q, i in parts])


def backward(
    grad: Tensor, query: Tensor, bank: Tensor, index: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """grad_query (N, D), grad_scale (); grad (N, K)."""
    q = in_float(query)
    parts = zip(grad.split(CHUNK), index.split(CHUNK))
    mean = torch.cat([torch.einsum("nk,nkd->nd", g, bank[i].to(q.dtype)) for g, i in parts])
    return (scale.to(q.dtype) * mean).to(query.dtype), (q * mean).sum().to(scale.dtype)
