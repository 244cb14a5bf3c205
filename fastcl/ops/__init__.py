"""The registered operations, one file each.

OPS maps an operation's word (the name of its file in every layer) to what is registered under
torch.ops.fastcl; tests and benches go through it.
"""

from __future__ import annotations

from fastcl.ops._backend import Backend, backend_of
from fastcl.ops._library import Operation
from fastcl.ops.bank import bank_update_
from fastcl.ops.bank_scores import bank_scores
from fastcl.ops.cosine import cosine
from fastcl.ops.ema import ema_
from fastcl.ops.instance_spread import instance_spread
from fastcl.ops.own_negatives import own_negatives
from fastcl.ops.pair_sigmoid import pair_sigmoid, pair_sigmoid_sum
from fastcl.ops.queue import queue_push_
from fastcl.ops.self_distillation import self_distillation
from fastcl.ops.self_similarity_lse import self_similarity_lse
from fastcl.ops.similarity_lse import similarity_lse, similarity_lse_mean
from fastcl.ops.sinkhorn import sinkhorn
from fastcl.ops.soft_cross_entropy import soft_cross_entropy

OPS: dict[str, tuple[Operation, ...]] = {
    "similarity_lse": (similarity_lse, similarity_lse_mean),
    "self_similarity_lse": (self_similarity_lse,),
    "instance_spread": (instance_spread,),
    "own_negatives": (own_negatives,),
    "pair_sigmoid": (pair_sigmoid, pair_sigmoid_sum),
    "soft_cross_entropy": (soft_cross_entropy,),
    "self_distillation": (self_distillation,),
    "sinkhorn": (sinkhorn,),
    "cosine": (cosine,),
    "ema": (ema_,),
    "queue": (queue_push_,),
    "bank_scores": (bank_scores,),
    "bank": (bank_update_,),
}

__all__ = [
    "OPS",
    "Backend",
    "Operation",
    "backend_of",
    "bank_scores",
    "bank_update_",
    "cosine",
    "ema_",
    "instance_spread",
    "own_negatives",
    "pair_sigmoid",
    "pair_sigmoid_sum",
    "queue_push_",
    "self_distillation",
    "self_similarity_lse",
    "similarity_lse",
    "similarity_lse_mean",
    "sinkhorn",
    "soft_cross_entropy",
]
