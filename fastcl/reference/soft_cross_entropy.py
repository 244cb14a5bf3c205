"""Cross entropy with soft targets, in plain torch.

    loss_i = −Σ_k y_ik log softmax(t x_i)_k = m_i lse_i − t Σ_k y_ik x_ik
    lse_i  = log Σ_k exp(t x_ik),   m_i = Σ_k y_ik
    ∂loss_i/∂x_ik = t (m_i softmax(t x_i)_k − y_ik),   ∂loss_i/∂t = Σ_k x_ik (m_i softmax_k − y_ik)

The torch line: -(y * (t * x).log_softmax(1)).sum(1).
"""

from __future__ import annotations

from torch import Tensor

from fastcl.reference._common import in_float


def soft_cross_entropy(logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """loss (N,) of logits (N, K) and targets (N, K); scale = 1 / temperature."""
    x = in_float(logits)
    return -(in_float(targets) * (scale.to(x.dtype) * x).log_softmax(1)).sum(1)


def forward(logits: Tensor, targets: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss, lse and mass, each (N,)."""
    x = scale.to(in_float(logits).dtype) * in_float(logits)
    return soft_cross_entropy(logits, targets, scale), x.logsumexp(1), in_float(targets).sum(1)


def backward(
    grad: Tensor, logits: Tensor, targets: Tensor, scale: Tensor, lse: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor]:
    x, y = in_float(logits), in_float(targets)
    t = scale.to(x.dtype)
    residual = grad[:, None] * (mass[:, None] * (t * x - lse[:, None]).exp() - y)
    return (t * residual).to(logits.dtype), (x * residual).sum().to(scale.dtype)
