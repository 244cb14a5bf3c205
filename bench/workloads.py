"""The workloads: what is computed, who computes it, and the least work that it takes.

Each names the PyTorch expression that people write (plain.py: in float64 it is also the truth), the
fastcl call, and the same thing in other libraries (peers.py). `work` counts the fewest operations
known: G = 2·N·M·D for one similarity GEMM, times the passes; or bytes, each tensor once per sweep.
Temperatures are the papers'. One literal table, WORKLOADS; every word of fastcl's OPS is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.nn.functional import cosine_similarity, cross_entropy

import fastcl.functional as F
from bench import inputs, peers, plain
from bench.inputs import Inputs
from bench.peers import Function

Sizes = dict[str, int]


class Work(NamedTuple):
    """The least to be done: floating-point operations ("flop") or memory traffic ("byte")."""

    amount: float
    unit: str


@dataclass(frozen=True)
class Peer:
    """Another library's function. `make(**sizes)` imports it; `bytes` is what it asks for."""

    make: Callable[..., Function]
    note: str = ""
    bytes: Callable[..., int] | None = None
    device: str = ""  # "cuda": it runs nowhere else
    gradients: tuple[str, ...] | None = None  # where it has fewer than the workload asks for


@dataclass(frozen=True)
class Workload:
    """One row group of the bench. Callables take the sizes as keywords, `inputs` a `New` first."""

    name: str
    op: str  # the word in fastcl's OPS that does the work; "" for what is composed of torch's own
    what: str
    small: Sizes
    full: Sizes
    inputs: Callable[..., Inputs]
    plain: Function
    fused: Function
    work: Callable[..., Work]  # (bytes per element, **sizes)
    gradients: tuple[str, ...] = ()  # the inputs that get one
    mutates: tuple[str, ...] = ()  # the inputs whose new value is the result
    peers: dict[str, Peer] = field(default_factory=dict)
    matrix: Callable[..., int] = lambda **sizes: 0  # entries that the plain expression stores
    scaling: str = ""  # the size that --scaling varies


def same(function: Function) -> Callable[..., Function]:
    """A `make` of what needs no import and is the same for all sizes."""
    return lambda **sizes: function


TABLE = [
    Workload(
        name="nt_xent",
        op="self_similarity_lse",
        what="SimCLR's loss of 2N views, forward + backward",
        small={"N": 128, "D": 64},
        full={"N": 4096, "D": 128},
        inputs=inputs.two_views,
        gradients=("z0", "z1"),
        plain=plain.nt_xent,
        fused=lambda z0, z1: F.nt_xent(z0, z1, temperature=0.5),
        peers={
            "lightly": Peer(peers.lightly_nt_xent),
            "pytorch-metric-learning": Peer(  # a mask of positives × negatives, and floats from it
                peers.metric_learning_nt_xent,
                bytes=lambda *, N, D: 13 * (2 * N) * (2 * N) * (2 * N),
            ),
            "solo-style": Peer(same(plain.nt_xent_with_masks)),
        },
        # Z Zᵀ is symmetric: half a GEMM forward, one and a half backward.
        work=lambda b, *, N, D: Work(2 * (2 * (2 * N) ** 2 * D), "flop"),
        matrix=lambda *, N, D: (2 * N) ** 2,
        scaling="N",
    ),
    Workload(
        name="clip",
        op="similarity_lse",
        what="CLIP's symmetric loss with a learnable scale, forward + backward",
        small={"N": 128, "D": 64},
        full={"N": 4096, "D": 512},
        inputs=inputs.image_and_text,
        gradients=("image", "text", "logit_scale"),
        plain=plain.clip,
        fused=lambda image, text, t: F.clip(image, text, logit_scale=t),
        peers={
            "open_clip": Peer(peers.open_clip_clip),
            "memeff": Peer(
                peers.memeff_clip,
                note="no gradient of the scale",
                device="cuda",
                gradients=("image", "text"),
            ),
            "inf-cl": Peer(peers.inf_cl_clip, note="one direction a call", device="cuda"),
            "liger-kernel": Peer(
                peers.liger_clip, note="fused linear cross entropy, each direction", device="cuda"
            ),
        },
        # One pass forward; backward the scores again and one pass for each gradient.
        work=lambda b, *, N, D: Work(4 * (2 * N * N * D), "flop"),
        matrix=lambda *, N, D: N * N,
        scaling="N",
    ),
    Workload(
        name="siglip",
        op="pair_sigmoid",
        what="SigLIP's loss with a learnable scale and bias, forward + backward",
        small={"N": 128, "D": 64},
        full={"N": 4096, "D": 512},
        inputs=inputs.image_text_and_bias,
        gradients=("image", "text", "logit_scale", "logit_bias"),
        plain=plain.siglip,
        fused=lambda image, text, t, b: F.siglip(image, text, logit_scale=t, logit_bias=b),
        peers={
            "open_clip": Peer(peers.open_clip_siglip),
            "siglip-kernel": Peer(peers.siglip_kernel_siglip, device="cuda"),
        },
        # One pass gives the scores and, as nothing is normalised over a row, both gradients.
        work=lambda b, *, N, D: Work(3 * (2 * N * N * D), "flop"),
        matrix=lambda *, N, D: N * N,
        scaling="N",
    ),
    Workload(
        name="info_nce",
        op="similarity_lse",
        what="MoCo's loss against a queue of M keys, forward + backward to the query",
        small={"N": 32, "M": 1024, "D": 64},
        full={"N": 256, "M": 65536, "D": 128},
        inputs=inputs.query_and_queue,
        gradients=("query",),
        plain=plain.info_nce,
        fused=lambda q, k, queue: F.info_nce(q, k, queue, temperature=0.07),
        peers={
            "solo-style": Peer(same(plain.info_nce_with_einsum)),
            "info-nce-pytorch": Peer(peers.info_nce_pytorch),
            "lightly": Peer(peers.lightly_info_nce, note="also clones and fills the queue"),
        },
        # Scores, and their weighted sum of keys.
        work=lambda b, *, N, M, D: Work(2 * (2 * N * M * D), "flop"),
        matrix=lambda *, N, M, D: N * M,
        scaling="M",
    ),
    Workload(
        name="info_nce_paired",
        op="own_negatives",
        what="InfoNCE with K negatives of each query's own, forward + backward to all",
        small={"N": 32, "K": 16, "D": 64},
        full={"N": 256, "K": 1024, "D": 128},
        inputs=inputs.query_and_its_negatives,
        gradients=("query", "positive", "negatives"),
        plain=plain.info_nce_paired,
        fused=lambda q, k, own: F.info_nce(q, k, own, temperature=0.07),
        peers={"info-nce-pytorch": Peer(peers.info_nce_pytorch_paired)},
        # The negatives are read in both directions, their gradient is written once.
        work=lambda b, *, N, K, D: Work(3 * N * K * D * b, "byte"),
        matrix=lambda *, N, K, D: N * K * D // 2,  # a few copies of the negatives
        scaling="N",
    ),
    Workload(
        name="sup_con",
        op="self_similarity_lse",
        what="supervised contrastive loss, 8 rows a class, forward + backward",
        small={"N": 128, "D": 64},
        full={"N": 4096, "D": 128},
        inputs=inputs.labelled,
        gradients=("features",),
        plain=plain.sup_con,
        fused=lambda features, labels: F.sup_con(features, labels, temperature=0.07),
        peers={"pytorch-metric-learning": Peer(peers.metric_learning_sup_con)},
        work=lambda b, *, N, D: Work(2 * (2 * N * N * D), "flop"),
        matrix=lambda *, N, D: N * N,
        scaling="N",
    ),
    Workload(
        name="dcl",
        op="self_similarity_lse",
        what="decoupled contrastive loss of 2N views, forward + backward",
        small={"N": 128, "D": 64},
        full={"N": 2048, "D": 128},
        inputs=inputs.two_views,
        gradients=("z0", "z1"),
        plain=plain.dcl,
        fused=lambda z0, z1: F.dcl(z0, z1, temperature=0.1),
        peers={"lightly": Peer(peers.lightly_dcl)},
        work=lambda b, *, N, D: Work(2 * (2 * (2 * N) ** 2 * D), "flop"),
        matrix=lambda *, N, D: (2 * N) ** 2,
        scaling="N",
    ),
    Workload(
        name="instance_spread",
        op="instance_spread",
        what="InvaSpread's loss of 2N views, gradient through the rows, forward + backward",
        small={"N": 128, "D": 64},
        full={"N": 2048, "D": 128},
        inputs=inputs.two_views,
        gradients=("z0", "z1"),
        plain=plain.instance_spread,
        fused=lambda z0, z1: F.instance_spread(z0, z1, temperature=0.1),
        work=lambda b, *, N, D: Work(2.5 * (2 * (2 * N) ** 2 * D), "flop"),
        matrix=lambda *, N, D: (2 * N) ** 2,
        scaling="N",
    ),
    Workload(
        name="bank_scores",
        op="bank_scores",
        what="similarities to 1 + K rows of a memory bank, forward + backward to the query",
        small={"N": 32, "K": 64, "M": 1000, "D": 64},
        full={"N": 256, "K": 4096, "M": 200_000, "D": 128},
        inputs=inputs.bank_and_cotangent,
        gradients=("query",),
        plain=plain.bank_scores,
        fused=lambda q, bank, index: F.bank_scores(q, bank, index, scale=1 / 0.07),
        # Each row and its index once in both directions; scores and their gradient.
        work=lambda b, *, N, K, M, D: Work(2 * N * (1 + K) * (D * b + 8 + 4), "byte"),
        matrix=lambda *, N, K, M, D: N * (1 + K) * D // 2,  # the gathered rows, once or twice
        scaling="N",
    ),
    Workload(
        name="nce",
        op="bank_scores",
        what="InstDisc's loss against 1 + K rows of a memory bank, forward + backward",
        small={"N": 32, "K": 64, "M": 1000, "D": 64},
        full={"N": 256, "K": 4096, "M": 200_000, "D": 128},
        inputs=inputs.query_and_bank,
        gradients=("query",),
        plain=plain.nce,
        fused=lambda q, bank, index: F.nce(
            F.bank_scores(q, bank, index, scale=1 / 0.07),
            data_size=len(bank),
            partition=plain.PARTITION * len(bank),
        ),
        work=lambda b, *, N, K, M, D: Work(2 * N * (1 + K) * (D * b + 8), "byte"),
        matrix=lambda *, N, K, M, D: N * (1 + K) * D // 2,
        scaling="N",
    ),
    Workload(
        name="sinkhorn",
        op="sinkhorn",
        what="SwAV's codes, 3 iterations, no gradient",
        small={"N": 64, "K": 300},
        full={"N": 4096, "K": 3000},
        inputs=inputs.prototype_scores,
        plain=plain.sinkhorn,
        fused=lambda scores: F.sinkhorn(scores, epsilon=0.05, iterations=3),
        peers={"lightly": Peer(peers.lightly_sinkhorn)},
        # The scores once per iteration and once for the codes, which are written in float32.
        work=lambda b, *, N, K: Work(N * K * (4 * b + 4), "byte"),
        matrix=lambda *, N, K: N * K,
        scaling="N",
    ),
    Workload(
        name="soft_cross_entropy",
        op="soft_cross_entropy",
        what="DINO's cross entropy against soft targets, forward + backward",
        small={"N": 16, "K": 4096},
        full={"N": 160, "K": 65536},
        inputs=inputs.soft_targets,
        gradients=("logits",),
        plain=plain.soft_cross_entropy,
        fused=lambda logits, y: F.soft_cross_entropy(logits, y, temperature=0.1),
        peers={
            "builtin": Peer(
                same(lambda logits, y: cross_entropy(logits / 0.1, y)),
                note="torch's cross_entropy with probabilities",
            )
        },
        # Logits and targets are read in both directions, the gradient is written once.
        work=lambda b, *, N, K: Work(5 * N * K * b, "byte"),
        matrix=lambda *, N, K: N * K,
        scaling="N",
    ),
    Workload(
        name="self_distillation",
        op="self_distillation",
        what="DINO's loss of S student and T teacher views, forward + backward",
        small={"S": 4, "T": 2, "N": 8, "K": 512},
        full={"S": 10, "T": 2, "N": 16, "K": 65536},
        inputs=inputs.student_and_teacher,
        gradients=("student",),
        plain=plain.self_distillation,
        fused=lambda student, teacher, center: F.self_distillation(student, teacher, center=center),
        peers={
            "solo-style": Peer(same(plain.self_distillation_by_pairs)),
            "lightly": Peer(peers.lightly_self_distillation, note="also updates the centre"),
        },
        # Logits of both are read in both directions, the student's gradient is written once.
        work=lambda b, *, S, T, N, K: Work((3 * S + 2 * T) * N * K * b, "byte"),
        matrix=lambda *, S, T, N, K: (S + T) * N * K,
        scaling="N",
    ),
    Workload(
        name="negative_cosine",
        op="cosine",
        what="SimSiam's loss, forward + backward to the prediction",
        small={"N": 256, "D": 64},
        full={"N": 8192, "D": 256},
        inputs=inputs.predictions,
        gradients=("prediction",),
        plain=plain.negative_cosine,
        fused=lambda p, z: F.negative_cosine(p, z),
        peers={
            "builtin": Peer(
                same(lambda p, z: -cosine_similarity(p, z, dim=1).mean()),
                note="torch's cosine_similarity",
            ),
            "lightly": Peer(peers.lightly_negative_cosine),
        },
        work=lambda b, *, N, D: Work(5 * N * D * b, "byte"),
        matrix=lambda *, N, D: N * D,
        scaling="N",
    ),
    Workload(
        name="ema",
        op="ema",
        what="the momentum update of a ResNet-50's 161 tensors (width 64)",
        small={"width": 8},
        full={"width": 64},
        inputs=inputs.encoder_and_its_average,
        mutates=("targets",),
        plain=plain.ema,
        fused=lambda targets, sources: F.ema_update_(targets, sources, momentum=0.996),
        peers={
            "builtin": Peer(
                same(lambda targets, sources: torch._foreach_lerp_(targets, sources, 1 - 0.996)),
                note="torch._foreach_lerp_",
            ),
            "lightly": Peer(peers.lightly_ema),
        },
        work=lambda b, *, width: Work(
            3 * b * sum(math.prod(shape) for shape in inputs.resnet_shapes(width)), "byte"
        ),
    ),
    Workload(
        name="queue_push",
        op="queue",
        what="writing B keys into MoCo's queue",
        small={"B": 32, "M": 1024, "D": 64},
        full={"B": 256, "M": 65536, "D": 128},
        inputs=inputs.queue_and_keys,
        mutates=("queue", "pointer"),
        plain=plain.queue_push,
        fused=lambda queue, pointer, keys: F.queue_push_(queue, pointer, keys),
        peers={"lightly": Peer(peers.lightly_queue_push, note="also clones the queue")},
        work=lambda b, *, B, M, D: Work(2 * B * D * b, "byte"),
    ),
    Workload(
        name="bank_update",
        op="bank",
        what="mixing B features into rows of a memory bank",
        small={"B": 32, "M": 1000, "D": 64},
        full={"B": 4096, "M": 200_000, "D": 128},
        inputs=inputs.bank_and_features,
        mutates=("bank",),
        plain=plain.bank_update,
        fused=lambda bank, index, x: F.bank_update_(bank, index, x, momentum=0.5),
        work=lambda b, *, B, M, D: Work(3 * B * D * b, "byte"),
    ),
]

WORKLOADS = {workload.name: workload for workload in TABLE}

# Every provider, and the distribution whose version is reported. Of the first five, "builtin" is
# torch's own single call for the whole thing, where there is one, and "solo-style" the expression
# that solo-learn's code has, where it differs from the plain one.
PROVIDERS = {
    "fastcl": "fastcl",
    "torch": "torch",
    "compile": "torch",
    "builtin": "torch",
    "solo-style": "torch",
    "lightly": "lightly",
    "pytorch-metric-learning": "pytorch-metric-learning",
    "open_clip": "open_clip_torch",
    "info-nce-pytorch": "info-nce-pytorch",
    "memeff": "memeff",
    "inf-cl": "inf-cl",
    "siglip-kernel": "siglip-kernel",
    "liger-kernel": "liger-kernel",
}


def providers_of(workload: Workload, device: str = "cpu") -> list[str]:
    """Those that have this workload on this kind of device, in the order of PROVIDERS."""
    kind = device.partition(":")[0]
    own = [name for name, peer in workload.peers.items() if peer.device in ("", kind)]
    return [p for p in PROVIDERS if p in ("fastcl", "torch", "compile", *own)]


def function_of(workload: Workload, provider: str, sizes: Sizes) -> Function:
    """The provider's function, from the inputs in their order. Raises ImportError without it."""
    if provider == "fastcl":
        return workload.fused
    if provider == "torch":
        return workload.plain
    if provider == "compile":
        return torch.compile(workload.plain)
    return workload.peers[provider].make(**sizes)


def gradients_of(workload: Workload, provider: str) -> tuple[str, ...]:
    """The inputs whose gradient the provider computes."""
    peer = workload.peers.get(provider)
    return workload.gradients if peer is None or peer.gradients is None else peer.gradients


def bytes_of(workload: Workload, provider: str, sizes: Sizes, itemsize: int) -> int:
    """An estimate of what a call allocates, so that nothing is started that cannot fit."""
    peer = workload.peers.get(provider)
    if provider == "fastcl" or (peer is not None and peer.device == "cuda"):
        return 0  # O(rows): such a peer exists because of that
    if peer is not None and peer.bytes is not None:
        return peer.bytes(**sizes)
    return 8 * itemsize * workload.matrix(**sizes)  # logits, their copies and masks, gradients
