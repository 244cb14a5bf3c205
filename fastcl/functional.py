"""Contrastive losses, and the operations they are made of, as functions.

    import fastcl.functional as F
    loss = F.nt_xent(z0, z1, temperature=0.5)

No function stores a similarity matrix: memory grows with the rows, not with their square.
Everything after `*` is keyword-only. `temperature` and `scale` are floats, or 0-dim tensors that
may require a gradient. `normalize=True` L2-normalises rows (x / max(‖x‖, 1e-12)) inside the
kernel, gradient included. `reduction` is "mean", "sum" or "none". Losses are float32 (float64 for
float64 input, which runs the reference formulas). Inputs are never modified unless a name ends in
`_`. With `group`, a torch.distributed process group or a fastcl.distributed.Ring of one, other
ranks' rows are candidates too; the mean over ranks of the returned loss is that of the whole batch
(fastcl/distributed.py). Bad arguments raise ValueError or TypeError before anything is changed.
"""

from fastcl._functional.clustering import (
    negative_cosine,
    self_distillation,
    sinkhorn,
    soft_cross_entropy,
)
from fastcl._functional.contrastive import (
    clip,
    dcl,
    info_nce,
    instance_spread,
    nt_xent,
    self_similarity_lse,
    siglip,
    similarity_lse,
    sup_con,
)
from fastcl._functional.memory import (
    bank_scores,
    bank_update_,
    ema_update_,
    nce,
    queue_push_,
)

__all__ = [
    "bank_scores",
    "bank_update_",
    "clip",
    "dcl",
    "ema_update_",
    "info_nce",
    "instance_spread",
    "nce",
    "negative_cosine",
    "nt_xent",
    "queue_push_",
    "self_distillation",
    "self_similarity_lse",
    "siglip",
    "similarity_lse",
    "sinkhorn",
    "soft_cross_entropy",
    "sup_con",
]
