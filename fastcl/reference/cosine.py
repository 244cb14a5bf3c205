"""Negative cosine similarity of paired rows, in plain torch.

    c_i    = <p_i, t_i> / (P_i T_i)             P_i = max(‖p_i‖, ε),  T_i = max(‖t_i‖, ε)
    loss_i = −c_i
    ∂loss_i/∂p_i = −(t_i / T_i − c_i p_i / P_i) / P_i    without the second term where ‖p_i‖ < ε

The torch line: -torch.nn.functional.cosine_similarity(p, t, dim=1, eps=eps).
"""

from __future__ import annotations

from torch import Tensor

from fastcl.reference._common import in_float


def cosine(prediction: Tensor, target: Tensor, *, eps: float) -> Tensor:
    """loss (N,) of prediction (N, D) and target (N, D)."""
    p, t = in_float(prediction), in_float(target)
    P, T = p.norm(dim=1).clamp_min(eps), t.norm(dim=1).clamp_min(eps)
    return -(p * t).sum(1) / (P * T)


forward = cosine


def backward(
    grad: Tensor,
    prediction: Tensor,
    target: Tensor,
    *,
    eps: float,
    need_prediction: bool,
    need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of Σ_i grad_i loss_i; grad (N,)."""
    p, t = in_float(prediction), in_float(target)

    def gradient(p: Tensor, t: Tensor) -> Tensor:
        norm = p.norm(dim=1, keepdim=True)
        P, T = norm.clamp_min(eps), t.norm(dim=1, keepdim=True).clamp_min(eps)
        c = (p * t).sum(1, keepdim=True) / (P * T) * (norm >= eps)
        return (-grad[:, None] * (t / T - c * p / P) / P).to(prediction.dtype)

    return gradient(p, t) if need_prediction else None, gradient(t, p) if need_target else None
