"""SigLIP's pairwise sigmoid loss, in plain torch.

    s_ij   = t · x̂_i·ŷ_j + b,   z_ij = 1 on the diagonal, −1 off it
    loss_i = Σ_j softplus(−z_ij s_ij)
    W_ij   = g_i ∂/∂s_ij = −g_i z_ij σ(−z_ij s_ij)
    ∂/∂x̂_i = t Σ_j W_ij ŷ_j,  ∂/∂ŷ_j = t Σ_i W_ij x̂_i,  ∂/∂t = Σ_ij W_ij x̂_i·ŷ_j,  ∂/∂b = Σ_ij W_ij

`pair_sigmoid` stores the matrix; the functions below it hold CHUNK rows of it at a time.
Source: Zhai et al. 2023, arXiv:2303.15343, equation 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastcl.reference._common import in_float, normalized, through_normalization
from fastcl.reference.similarity_lse import CHUNK


def pair_sigmoid(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, normalize: bool
) -> Tensor:
    """loss (N,) of image (N, D) and text (N, D)."""
    x, y = normalized(in_float(image), normalize), normalized(in_float(text), normalize)
    s = scale.to(x.dtype) * (x @ y.T) + bias.to(x.dtype)
    return -logsigmoid(signs(s, 0) * s).sum(1)


def signs(s: Tensor, start: int) -> Tensor:
    """1 where row start + i meets column start + i, −1 elsewhere."""
    z = torch.full_like(s, -1.0)
    return z.diagonal_scatter(z.new_ones(s.shape[0]), offset=start)


def forward(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, normalize: bool) -> Tensor:
    x, y = normalized(in_float(image), normalize), normalized(in_float(text), normalize)
    losses = []
    for i in range(0, len(x), CHUNK):
        s = scale.to(x.dtype) * (x[i : i + CHUNK] @ y.T) + bias.to(x.dtype)
        losses.append(-logsigmoid(signs(s, i) * s).sum(1))
    return torch.cat(losses)


def backward(
    grad: Tensor, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, *, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad_image (N, D), grad_text (N, D), grad_scale (), grad_bias (); grad (N,)."""
    x, y = normalized(in_float(image), normalize), normalized(in_float(text), normalize)
    t = scale.to(x.dtype)
    dx, dy, dbias = torch.empty_like(x), torch.zeros_like(y), x.new_zeros(())
    for i in range(0, len(x), CHUNK):
        part = slice(i, i + CHUNK)
        s = t * (x[part] @ y.T) + bias.to(x.dtype)
        z = signs(s, i)
        w = -grad[part, None] * z * torch.sigmoid(-z * s)
        dx[part] = w @ y
        dy += w.T @ x[part]
        dbias = dbias + w.sum()
    dscale = (x * dx).sum()
    dx = through_normalization(t * dx, in_float(image), normalize).to(image.dtype)
    dy = through_normalization(t * dy, in_float(text), normalize).to(text.dtype)
    return dx, dy, dscale.to(scale.dtype), dbias.to(bias.dtype)
