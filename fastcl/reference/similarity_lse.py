"""Log-sum-exp of a similarity matrix, in plain torch.

    s_ij     = t · q̂_i·k̂_j                      q̂ = q / max(‖q‖, 1e-12), or q
    row_i    = log Σ_j exp s_ij                  over the j with id_i ≠ id_j
    column_j = log Σ_i exp s_ij
    W_ij     = g_i exp(s_ij − row_i) + h_j exp(s_ij − column_j)
    ∂/∂q̂_i  = t Σ_j W_ij k̂_j,   ∂/∂k̂_j = t Σ_i W_ij q̂_i,   ∂/∂t = Σ_ij W_ij q̂_i·k̂_j

`similarity_lse` stores the matrix; the functions below it hold CHUNK rows of it at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.reference._common import in_float, normalized, through_normalization

CHUNK = 512  # rows of the matrix held at a time


def similarities(
    q: Tensor, k: Tensor, scale: Tensor, query_ids: Tensor | None, key_ids: Tensor | None
) -> Tensor:
    """s (N, M) of normalised rows, −inf where the ids are equal."""
    s = scale.to(q.dtype) * (q @ k.T)
    if query_ids is not None and key_ids is not None:
        s = s.masked_fill(query_ids[:, None] == key_ids[None, :], -torch.inf)
    return s


def similarity_lse(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    *,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Row (N,) and column (M,) log-sum-exp of query (N, D) against key (M, D)."""
    q, k = normalized(in_float(query), normalize), normalized(in_float(key), normalize)
    s = similarities(q, k, scale, query_ids, key_ids)
    return s.logsumexp(1), s.logsumexp(0)


def forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    *,
    normalize: bool,
    rows: bool,
    columns: bool,
) -> tuple[Tensor | None, Tensor | None]:
    q, k = normalized(in_float(query), normalize), normalized(in_float(key), normalize)
    row_lse = q.new_full((q.shape[0],), -torch.inf)
    column_lse = q.new_full((k.shape[0],), -torch.inf)
    for i in range(0, q.shape[0], CHUNK):
        part = slice(i, i + CHUNK)
        s = similarities(q[part], k, scale, None if query_ids is None else query_ids[part], key_ids)
        row_lse[part] = s.logsumexp(1)
        column_lse = torch.logaddexp(column_lse, s.logsumexp(0))
    return row_lse if rows else None, column_lse if columns else None


def forward_with_mean(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    *,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    """Row log-sum-exp (N,) and Σ_j p_ij k̂_j (N, D), the mean key under the row's softmax."""
    q, k = normalized(in_float(query), normalize), normalized(in_float(key), normalize)
    row_lse, mean_key = q.new_empty(q.shape[0]), torch.empty_like(q)
    for i in range(0, q.shape[0], CHUNK):
        part = slice(i, i + CHUNK)
        s = similarities(q[part], k, scale, None if query_ids is None else query_ids[part], key_ids)
        row_lse[part] = s.logsumexp(1)
        mean_key[part] = weights(s, row_lse[part, None]) @ k
    return row_lse, mean_key


def weights(s: Tensor, lse: Tensor) -> Tensor:
    """exp(s − lse), and 0 where nothing was summed."""
    return torch.where(lse == -torch.inf, 0.0, (s - lse).exp())


def backward(
    grad_rows: Tensor | None,
    grad_columns: Tensor | None,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    row_lse: Tensor | None,
    column_lse: Tensor | None,
    *,
    normalize: bool,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    q, k = normalized(in_float(query), normalize), normalized(in_float(key), normalize)
    t = scale.to(q.dtype)
    dq, dk = torch.empty_like(q), torch.zeros_like(k)
    for i in range(0, q.shape[0], CHUNK):
        part = slice(i, i + CHUNK)
        s = similarities(q[part], k, scale, None if query_ids is None else query_ids[part], key_ids)
        w = torch.zeros_like(s)
        if grad_rows is not None and row_lse is not None:
            w += grad_rows[part, None] * weights(s, row_lse[part, None])
        if grad_columns is not None and column_lse is not None:
            w += grad_columns * weights(s, column_lse)
        dq[part] = w @ k
        dk += w.T @ q[part]
    grad_scale = (q * dq).sum()
    dq = through_normalization(t * dq, in_float(query), normalize).to(query.dtype)
    dk = through_normalization(t * dk, in_float(key), normalize).to(key.dtype)
    return dq if need_query else None, dk if need_key else None, grad_scale.to(scale.dtype)
