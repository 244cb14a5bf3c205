"""Log-sum-exp of the similarities of rows to the other rows, in plain torch.

    s_ij  = t · ẑ_i·ẑ_j
    lse_i = log Σ_j exp s_ij                     over the j ≠ i with id_j ≠ id_i
    W_ij  = g_i exp(s_ij − lse_i) + g_j exp(s_ij − lse_j)
    ∂/∂ẑ_i = t Σ_j W_ij ẑ_j,   ∂/∂t = ½ Σ_ij W_ij ẑ_i·ẑ_j

`self_similarity_lse` stores the matrix; the functions below it hold CHUNK rows of it at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.reference._common import in_float, normalized, through_normalization
from fastcl.reference.similarity_lse import CHUNK, similarities, weights


def self_similarity_lse(
    z: Tensor, scale: Tensor, ids: Tensor | None = None, *, normalize: bool
) -> Tensor:
    """lse (N,) of z (N, D)."""
    z = normalized(in_float(z), normalize)
    s = similarities(z, z, scale, ids, ids)
    itself = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    return s.masked_fill(itself, -torch.inf).logsumexp(1)


def other_rows(z: Tensor, scale: Tensor, ids: Tensor | None, start: int) -> Tensor:
    """The CHUNK rows of s from `start` on, −inf on the diagonal."""
    part = slice(start, start + CHUNK)
    s = similarities(z[part], z, scale, None if ids is None else ids[part], ids)
    return s.diagonal_scatter(s.new_full((s.shape[0],), -torch.inf), offset=start)


def forward(z: Tensor, scale: Tensor, ids: Tensor | None, *, normalize: bool) -> Tensor:
    z = normalized(in_float(z), normalize)
    lse = z.new_empty(z.shape[0])
    for i in range(0, z.shape[0], CHUNK):
        lse[i : i + CHUNK] = other_rows(z, scale, ids, i).logsumexp(1)
    return lse


def backward(
    grad: Tensor, z: Tensor, scale: Tensor, ids: Tensor | None, lse: Tensor, *, normalize: bool
) -> tuple[Tensor, Tensor]:
    raw, z = z, normalized(in_float(z), normalize)
    dz = torch.empty_like(z)
    for i in range(0, z.shape[0], CHUNK):
        part = slice(i, i + CHUNK)
        s = other_rows(z, scale, ids, i)
        w = grad[part, None] * weights(s, lse[part, None]) + grad * weights(s, lse)
        dz[part] = w @ z
    grad_scale = (z * dz).sum() / 2
    dz = through_normalization(scale.to(z.dtype) * dz, in_float(raw), normalize)
    return dz.to(raw.dtype), grad_scale.to(scale.dtype)
