"""Balanced soft assignments by Sinkhorn's iterations, in plain torch.

    L = S / ε                                         S (N, K): N samples, K prototypes
    log u_k = −log K − log Σ_n exp(L_nk + log v_n)    prototypes first: each gets N / K samples
    log v_n = −log N − log Σ_k exp(L_nk + log u_k)    samples last: each is assigned exactly once
    Q_n     = softmax_k(L_n + log u)                  after the last iteration

Everything stays in the logarithm, so no scores overflow or vanish.
Source: Caron et al. 2020, arXiv:2006.09882; Cuturi 2013, arXiv:1306.0895.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl.reference._common import in_float


def sinkhorn(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """codes (N, K), rows sum to 1, of scores (N, K)."""
    L = in_float(scores) / epsilon
    log_u, log_v = L.new_zeros(L.shape[1]), L.new_zeros(L.shape[0])
    for _ in range(iterations):
        # The constants −log K and −log N cancel in the softmax.
        log_u = -(L + log_v[:, None]).logsumexp(0)
        log_v = -(L + log_u).logsumexp(1)
    return torch.softmax(L + log_u, 1)


forward = sinkhorn
