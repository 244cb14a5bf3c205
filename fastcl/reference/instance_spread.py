"""InvaSpread's instance loss, in plain torch.

Rows r are 2N views, row r's partner is (r + N) mod 2N, m weighs the negatives (c ≠ r, partner).

    s_rc   = t · ẑ_r·ẑ_c + [c negative] log m            c ≠ r
    p_rc   = exp(s_rc) / D_r,   D_r = Σ_{c≠r} exp s_rc
    loss_r = −log p_r,partner − m Σ_negatives log(1 − p_rc / m)
    R_rc   = p_rc / (m − p_rc),   B_r = Σ_negatives R_rc
    G_rc   = ∂loss_r/∂s_rc = p_rc (1 − m B_r) + m R_rc [negative] − [partner]

1 − p is never formed by a subtraction that cancels: only the largest entry of a row can exceed ½,
and its 1 − p is o_r, the others' share of D_r, so that m − p = o_r + m − 1; and −log p_r,partner is
softplus of the others' log-sum-exp less the partner's s. At τ = 0.01 scores differ by up to 200:
o_r and R_rc are beyond float32 and only their logarithms are kept.
For m < 1 an entry may exceed m; the loss is then not defined, and NaN.
Source: Ye et al. 2019, arXiv:1904.03436, as its authors' code computes it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastcl.reference._common import in_float, normalized, through_normalization
from fastcl.reference.similarity_lse import CHUNK


def scores(z: Tensor, columns: Tensor, t: Tensor, m: float, start: int) -> tuple[Tensor, Tensor]:
    """s (rows of z, 2N), the rows being start, start + 1, …, and which entries are negatives."""
    s = t * (z @ columns.T)
    r = torch.arange(start, start + s.shape[0], device=s.device)[:, None]
    c = torch.arange(s.shape[1], device=s.device)
    itself, partner = c == r, c == (r + s.shape[1] // 2) % s.shape[1]
    negative = ~(itself | partner)
    s = torch.where(negative, s + torch.tensor(m, dtype=s.dtype).log(), s)
    return s.masked_fill(itself, -torch.inf), negative


def shares(s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log D (rows, 1), p (rows, 2N) with the largest entry 0, that entry's place, and log o."""
    log_d = s.logsumexp(1, keepdim=True)
    top = s.argmax(1, keepdim=True)
    without = s.scatter(1, top, -torch.inf)
    log_o = without.logsumexp(1, keepdim=True) - log_d
    return log_d, (without - log_d).exp(), top, log_o


def losses(s: Tensor, negative: Tensor, partner: Tensor, m: float) -> Tensor:
    """loss (rows,) of s (rows, 2N)."""
    _, p, top, log_o = shares(s)
    others = s.scatter(1, partner, -torch.inf).logsumexp(1, keepdim=True)
    own = softplus(others - s.gather(1, partner), threshold=40)[:, 0]  # −log p_r,partner
    log_rest = torch.log1p(-p / m).scatter(1, top, log_of_rest(log_o, m))
    return own - m * torch.where(negative, log_rest, 0.0).sum(1)


def log_of_rest(log_o: Tensor, m: float) -> Tensor:
    """log (m − p) / m of the entry with 1 − p = o."""
    return log_o if m == 1 else ((log_o.exp() + (m - 1)) / m).log()


def instance_spread(
    z: Tensor, scale: Tensor, *, negative_weight: float, normalize: bool, detach_columns: bool
) -> Tensor:
    """loss (2N,) of z (2N, D): view 0 of every image, then view 1. Differentiable."""
    z, m = normalized(in_float(z), normalize), negative_weight
    columns = z.detach() if detach_columns else z
    s, negative = scores(z, columns, scale.to(z.dtype), m, 0)
    return losses(s, negative, partners(0, len(z), z), m)


def forward(
    z: Tensor, scale: Tensor, *, negative_weight: float, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, log D, log o, B of the negatives up to ½, and log R of one above (or −∞), each (2N,).

    The latter apart, so that backward can leave it out where it would cancel.
    """
    z, m = normalized(in_float(z), normalize), negative_weight
    results = []
    for i in range(0, len(z), CHUNK):
        s, negative = scores(z[i : i + CHUNK], z, scale.to(z.dtype), m, i)
        log_d, p, top, log_o = shares(s)
        loss = losses(s, negative, partners(i, len(s), z), m)
        o = log_o.exp()
        large = negative.gather(1, top) & (o < 0.5)
        largest = torch.where(large, 0.0, (1 - o) / (o + (m - 1)))
        ratio = torch.where(negative, (p / (m - p)).scatter(1, top, largest), 0.0)
        log_large = torch.log1p(-o) - log_of_rest(log_o, m) - math.log(m)
        log_large = torch.where(large, log_large, -torch.inf)
        results.append((loss, log_d[:, 0], log_o[:, 0], ratio.sum(1), log_large[:, 0]))
    loss, log_d, log_o, b, log_large = (torch.cat(column) for column in zip(*results))
    return loss, log_d, log_o, b, log_large


def partners(start: int, rows: int, z: Tensor) -> Tensor:
    """(rows, 1): the column of each row's other view."""
    r = torch.arange(start, start + rows, device=z.device)
    return ((r + len(z) // 2) % len(z))[:, None]


def backward(
    grad: Tensor,
    z: Tensor,
    scale: Tensor,
    log_d: Tensor,
    log_o: Tensor,
    b: Tensor,
    log_large: Tensor,
    *,
    negative_weight: float,
    normalize: bool,
    detach_columns: bool,
) -> tuple[Tensor, Tensor]:
    """grad_z (2N, D) and grad_scale (); with detach_columns only rows carry a gradient.

    With q = 1 − p, free of cancellation, and B' = B without the entry's own R:
    G = −q − m p B on the partner, p (1 − m B') + m R q on a negative.
    """
    raw, z, m = z, normalized(in_float(z), normalize), negative_weight
    dz, dscale = torch.zeros_like(z), z.new_zeros(())
    for i in range(0, len(z), CHUNK):
        part = slice(i, i + CHUNK)
        s, negative = scores(z[part], z, scale.to(z.dtype), m, i)
        log_p = s - log_d[part, None]
        p, o, large = log_p.exp(), log_o[part, None].exp(), log_large[part, None]
        p_large = (log_p + large).exp()  # p times the large R, either of which may be out of range
        q = torch.where(p > 0.5, o, 1 - p)
        ratio = p / (m - 1 + q)
        others = p * b[part, None] + torch.where(p > 0.5, 0.0, p_large - p * ratio)
        on_negative = p - m * others + (p if m == 1 else m * ratio * q)
        on_partner = -q - m * (p * b[part, None] + p_large)
        partner = partners(i, len(s), z)
        own = torch.zeros_like(s).scatter(1, partner, on_partner.gather(1, partner))
        g = torch.where(negative, on_negative, own) * grad[part, None]
        rows = g @ z
        dscale = dscale + (z[part] * rows).sum()
        dz[part] += rows
        if not detach_columns:
            dz += g.T @ z[part]
    dz = through_normalization(scale.to(z.dtype) * dz, in_float(raw), normalize)
    return dz.to(raw.dtype), dscale.to(scale.dtype)
