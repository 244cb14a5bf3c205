"""The workloads: what is computed, who computes it, and the least work that it takes.

Each names the PyTorch expression that people write (`plain`: in float64 it is also the truth), the
fastcl call, and the same thing in other libraries. `work` counts the fewest operations known:
G = 2·N·M·D for one similarity GEMM, times the passes; or bytes, each tensor once per sweep.
Temperatures are the papers'. One literal table, WORKLOADS, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

import fastcl.functional as F

Sizes = dict[str, int]
Inputs = dict[str, Any]  # name -> Tensor, or list of Tensors
Function = Callable[..., Any]  # takes the inputs in their order


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


@dataclass(frozen=True)
class Workload:
    """One row group of the bench. Callables take the sizes as keywords, `inputs` a `New` first."""

    name: str
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


class New:
    """Makes inputs: seeded, of one dtype, on one device."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def view_of(self, x: Tensor) -> Tensor:
        """Rows at an angle of 45° to those of x: what a half-trained encoder makes of two views."""
        return x + self.normal(*x.shape)

    def scalar(self, value: float) -> Tensor:
        return torch.tensor(value, device=self.device)


# ---- the expressions that people write -----------------------------------------------------------


def nt_xent(z0: Tensor, z1: Tensor) -> Tensor:
    z = normalize(torch.cat((z0, z1)), dim=1)
    s = (z @ z.T / 0.5).fill_diagonal_(-math.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z0))
    return cross_entropy(s, partner)


def clip(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    s = logit_scale * normalize(image, dim=1) @ normalize(text, dim=1).T
    pair = torch.arange(len(s), device=s.device)
    return (cross_entropy(s, pair) + cross_entropy(s.T, pair)) / 2


def info_nce(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
    query, positive = normalize(query, dim=1), normalize(positive, dim=1)
    own = (query * positive).sum(1, keepdim=True)
    logits = torch.cat((own, query @ negatives.T), 1) / 0.07
    return cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def sup_con(features: Tensor, labels: Tensor) -> Tensor:
    z = normalize(features, dim=1)
    s = z @ z.T / 0.07
    s = s - s.max(1, keepdim=True).values.detach()
    others = 1 - torch.eye(len(z), dtype=z.dtype, device=z.device)
    positive = (labels[:, None] == labels) * others
    log_p = s - (s.exp() * others).sum(1, keepdim=True).log()
    return -((positive * log_p).sum(1) / positive.sum(1)).mean()


def dcl(z0: Tensor, z1: Tensor) -> Tensor:
    z = normalize(torch.cat((z0, z1)), dim=1)
    s = z @ z.T / 0.1
    image = torch.arange(len(z0), device=z.device).repeat(2)
    own = (z * z.roll(len(z0), 0)).sum(1) / 0.1
    return (s.masked_fill(image[:, None] == image, -math.inf).logsumexp(1) - own).mean()


@torch.no_grad()
def sinkhorn(scores: Tensor) -> Tensor:
    q = (scores / 0.05).exp().T
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= q.shape[0]
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
    return (q * q.shape[1]).T


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * (logits / 0.1).log_softmax(1)).sum(1).mean()


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    return -(normalize(prediction, dim=1) * normalize(target, dim=1)).sum(1).mean()


@torch.no_grad()
def ema(targets: list[Tensor], sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources):
        target.mul_(0.996).add_(source, alpha=1 - 0.996)


@torch.no_grad()
def queue_push(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
    start = int(pointer)  # as in MoCo: the queue's size is a multiple of the batch
    queue[start : start + len(keys)] = keys
    pointer[0] = (start + len(keys)) % len(queue)


# ---- other libraries -----------------------------------------------------------------------------


def lightly_nt_xent(**sizes: int) -> Function:
    from lightly.loss import NTXentLoss

    return NTXentLoss(temperature=0.5)


def lightly_info_nce(*, N: int, M: int, D: int) -> Function:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(temperature=0.07, memory_bank_size=(M, D))

    def call(query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        loss.memory_bank.bank = negatives
        return loss(query, positive)

    return call


def lightly_dcl(**sizes: int) -> Function:
    from lightly.loss import DCLLoss

    return DCLLoss(temperature=0.1)


def lightly_sinkhorn(**sizes: int) -> Function:
    from lightly.loss.swav_loss import sinkhorn

    return torch.no_grad()(lambda scores: sinkhorn(scores, iterations=3, epsilon=0.05))


def lightly_negative_cosine(**sizes: int) -> Function:
    from lightly.loss import NegativeCosineSimilarity

    return NegativeCosineSimilarity()


def lightly_ema(**sizes: int) -> Function:
    from lightly.models.utils import update_momentum

    def parameters(tensors: list[Tensor]) -> nn.Module:
        module = nn.Module()  # update_momentum takes modules
        module.all = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in tensors)
        return module

    modules: list[nn.Module] = []

    def call(targets: list[Tensor], sources: list[Tensor]) -> None:
        if not modules:  # parameters that share the tensors' memory, made once
            modules.extend((parameters(sources), parameters(targets)))
        update_momentum(*modules, m=0.996)

    return call


def lightly_queue_push(*, B: int, M: int, D: int) -> Function:
    from lightly.models.modules.memory_bank import MemoryBankModule

    module = MemoryBankModule((M, D))

    def call(queue: Tensor, pointer: Tensor, keys: Tensor) -> None:
        module.bank, module.bank_ptr = queue, pointer
        module(keys, update=True)

    return call


def metric_learning_nt_xent(**sizes: int) -> Function:
    from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss

    return SelfSupervisedLoss(NTXentLoss(temperature=0.5))


def metric_learning_sup_con(**sizes: int) -> Function:
    from pytorch_metric_learning.losses import SupConLoss

    return SupConLoss(temperature=0.07)


def open_clip_clip(**sizes: int) -> Function:
    from open_clip.loss import ClipLoss

    loss = ClipLoss()
    return lambda image, text, t: loss(normalize(image, dim=1), normalize(text, dim=1), t)


def info_nce_pytorch(**sizes: int) -> Function:
    from info_nce import InfoNCE

    return InfoNCE(temperature=0.07)


def solo_nt_xent(*, N: int, D: int) -> Function:
    from solo.losses.simclr import simclr_loss_func

    return lambda z0, z1: simclr_loss_func(
        torch.cat((z0, z1)), torch.arange(N, device=z0.device).repeat(2), temperature=0.5
    )


# ---- inputs --------------------------------------------------------------------------------------


def two_views(new: New, *, N: int, D: int) -> Inputs:
    z0 = new.normal(N, D)
    return {"z0": z0, "z1": new.view_of(z0)}


def image_and_text(new: New, *, N: int, D: int) -> Inputs:
    image = new.normal(N, D)
    return {"image": image, "text": new.view_of(image), "logit_scale": new.scalar(1 / 0.07)}


def query_and_queue(new: New, *, N: int, M: int, D: int) -> Inputs:
    query = new.normal(N, D)
    negatives = normalize(new.normal(M, D), dim=1)  # a queue holds what was normalised before
    return {"query": query, "positive": new.view_of(query), "negatives": negatives}


def labelled(new: New, *, N: int, D: int) -> Inputs:
    labels = torch.arange(N, device=new.device) % max(1, N // 8)  # 8 rows of each class
    return {"features": new.normal(N, D), "labels": labels}


def prototype_scores(new: New, *, N: int, K: int) -> Inputs:
    return {"scores": normalize(new.normal(N, 128), dim=1) @ normalize(new.normal(K, 128), dim=1).T}


def soft_targets(new: New, *, N: int, K: int) -> Inputs:
    return {"logits": new.normal(N, K), "targets": (new.normal(N, K) / 0.5).softmax(1)}


def predictions(new: New, *, N: int, D: int) -> Inputs:
    prediction = new.normal(N, D)
    return {"prediction": prediction, "target": new.view_of(prediction)}


def resnet_shapes(width: int) -> list[tuple[int, ...]]:
    """The parameters of a bottleneck ResNet: ResNet-50's 161 tensors for width 64."""

    def convolution(k: int, inside: int, outside: int) -> list[tuple[int, ...]]:
        return [(outside, inside, k, k), (outside,), (outside,)]  # and batch normalisation

    shapes, inside = convolution(7, 3, width), width
    for stage, blocks in enumerate((3, 4, 6, 3)):
        middle = width * 2**stage
        for block in range(blocks):
            shapes += convolution(1, inside, middle) + convolution(3, middle, middle)
            shapes += convolution(1, middle, 4 * middle)
            shapes += convolution(1, inside, 4 * middle) if block == 0 else []
            inside = 4 * middle
    return [*shapes, (1000, inside), (1000,)]


def encoder_and_its_average(new: New, *, width: int) -> Inputs:
    shapes = resnet_shapes(width)
    return {
        "targets": [new.normal(*shape) for shape in shapes],
        "sources": [new.normal(*shape) for shape in shapes],
    }


def queue_and_keys(new: New, *, B: int, M: int, D: int) -> Inputs:
    pointer = torch.zeros(1, dtype=torch.long, device=new.device)
    return {"queue": new.normal(M, D), "pointer": pointer, "keys": new.normal(B, D)}


# ---- the table -----------------------------------------------------------------------------------

TABLE = [
    Workload(
        name="nt_xent",
        what="SimCLR's loss of 2N views, forward + backward",
        small={"N": 128, "D": 64},
        full={"N": 4096, "D": 128},
        inputs=two_views,
        gradients=("z0", "z1"),
        plain=nt_xent,
        fused=lambda z0, z1: F.nt_xent(z0, z1, temperature=0.5),
        peers={
            "lightly": Peer(lightly_nt_xent),
            "pytorch-metric-learning": Peer(
                metric_learning_nt_xent,  # a mask of positives × negatives, and floats from it
                bytes=lambda *, N, D: 13 * (2 * N) * (2 * N) * (2 * N),
            ),
            "solo-learn": Peer(solo_nt_xent),
        },
        # Z Zᵀ is symmetric: half a GEMM forward, one and a half backward.
        work=lambda b, *, N, D: Work(2 * (2 * (2 * N) ** 2 * D), "flop"),
        matrix=lambda *, N, D: (2 * N) ** 2,
        scaling="N",
    ),
    Workload(
        name="clip",
        what="CLIP's symmetric loss with a learnable scale, forward + backward",
        small={"N": 128, "D": 64},
        full={"N": 4096, "D": 512},
        inputs=image_and_text,
        gradients=("image", "text", "logit_scale"),
        plain=clip,
        fused=lambda image, text, t: F.clip(image, text, logit_scale=t),
        peers={"open_clip": Peer(open_clip_clip)},
        # One pass forward; backward the scores again and one pass for each gradient.
        work=lambda b, *, N, D: Work(4 * (2 * N * N * D), "flop"),
        matrix=lambda *, N, D: N * N,
        scaling="N",
    ),
    Workload(
        name="info_nce",
        what="MoCo's loss against a queue of M keys, forward + backward to the query",
        small={"N": 32, "M": 1024, "D": 64},
        full={"N": 256, "M": 65536, "D": 128},
        inputs=query_and_queue,
        gradients=("query",),
        plain=info_nce,
        fused=lambda q, k, queue: F.info_nce(q, k, queue, temperature=0.07),
        peers={
            "info-nce-pytorch": Peer(info_nce_pytorch),
            "lightly": Peer(lightly_info_nce, note="also clones and fills the queue"),
        },
        # Scores, and their weighted sum of keys.
        work=lambda b, *, N, M, D: Work(2 * (2 * N * M * D), "flop"),
        matrix=lambda *, N, M, D: N * M,
        scaling="M",
    ),
    Workload(
        name="sup_con",
        what="supervised contrastive loss, 8 rows a class, forward + backward",
        small={"N": 128, "D": 64},
        full={"N": 4096, "D": 128},
        inputs=labelled,
        gradients=("features",),
        plain=sup_con,
        fused=lambda features, labels: F.sup_con(features, labels, temperature=0.07),
        peers={"pytorch-metric-learning": Peer(metric_learning_sup_con)},
        work=lambda b, *, N, D: Work(2 * (2 * N * N * D), "flop"),
        matrix=lambda *, N, D: N * N,
        scaling="N",
    ),
    Workload(
        name="dcl",
        what="decoupled contrastive loss of 2N views, forward + backward",
        small={"N": 128, "D": 64},
        full={"N": 2048, "D": 128},
        inputs=two_views,
        gradients=("z0", "z1"),
        plain=dcl,
        fused=lambda z0, z1: F.dcl(z0, z1, temperature=0.1),
        peers={"lightly": Peer(lightly_dcl)},
        work=lambda b, *, N, D: Work(2 * (2 * (2 * N) ** 2 * D), "flop"),
        matrix=lambda *, N, D: (2 * N) ** 2,
        scaling="N",
    ),
    Workload(
        name="sinkhorn",
        what="SwAV's codes, 3 iterations, no gradient",
        small={"N": 64, "K": 300},
        full={"N": 4096, "K": 3000},
        inputs=prototype_scores,
        plain=sinkhorn,
        fused=lambda scores: F.sinkhorn(scores, epsilon=0.05, iterations=3),
        peers={"lightly": Peer(lightly_sinkhorn)},
        # The scores once per iteration and once for the codes, which are written in float32.
        work=lambda b, *, N, K: Work(N * K * (4 * b + 4), "byte"),
        matrix=lambda *, N, K: N * K,
        scaling="N",
    ),
    Workload(
        name="soft_cross_entropy",
        what="DINO's cross entropy against soft targets, forward + backward",
        small={"N": 16, "K": 4096},
        full={"N": 160, "K": 65536},
        inputs=soft_targets,
        gradients=("logits",),
        plain=soft_cross_entropy,
        fused=lambda logits, y: F.soft_cross_entropy(logits, y, temperature=0.1),
        peers={
            "builtin": Peer(
                lambda **sizes: lambda logits, y: cross_entropy(logits / 0.1, y),
                note="torch's cross_entropy with probabilities",
            )
        },
        # Logits and targets are read in both directions, the gradient is written once.
        work=lambda b, *, N, K: Work(5 * N * K * b, "byte"),
        matrix=lambda *, N, K: N * K,
        scaling="N",
    ),
    Workload(
        name="negative_cosine",
        what="SimSiam's loss, forward + backward to the prediction",
        small={"N": 256, "D": 64},
        full={"N": 8192, "D": 256},
        inputs=predictions,
        gradients=("prediction",),
        plain=negative_cosine,
        fused=lambda p, z: F.negative_cosine(p, z),
        peers={
            "builtin": Peer(
                lambda **sizes: lambda p, z: -cosine_similarity(p, z, dim=1).mean(),
                note="torch's cosine_similarity",
            ),
            "lightly": Peer(lightly_negative_cosine),
        },
        work=lambda b, *, N, D: Work(5 * N * D * b, "byte"),
        matrix=lambda *, N, D: N * D,
        scaling="N",
    ),
    Workload(
        name="ema",
        what="the momentum update of a ResNet-50's 161 tensors (width 64)",
        small={"width": 8},
        full={"width": 64},
        inputs=encoder_and_its_average,
        mutates=("targets",),
        plain=ema,
        fused=lambda targets, sources: F.ema_update_(targets, sources, momentum=0.996),
        peers={
            "builtin": Peer(
                lambda **sizes: (
                    lambda targets, sources: torch._foreach_lerp_(targets, sources, 1 - 0.996)
                ),
                note="torch._foreach_lerp_",
            ),
            "lightly": Peer(lightly_ema),
        },
        work=lambda b, *, width: Work(
            3 * b * sum(math.prod(shape) for shape in resnet_shapes(width)), "byte"
        ),
    ),
    Workload(
        name="queue_push",
        what="writing B keys into MoCo's queue",
        small={"B": 32, "M": 1024, "D": 64},
        full={"B": 256, "M": 65536, "D": 128},
        inputs=queue_and_keys,
        mutates=("queue", "pointer"),
        plain=queue_push,
        fused=lambda queue, pointer, keys: F.queue_push_(queue, pointer, keys),
        peers={"lightly": Peer(lightly_queue_push, note="also clones the queue")},
        work=lambda b, *, B, M, D: Work(2 * B * D * b, "byte"),
    ),
]

WORKLOADS = {workload.name: workload for workload in TABLE}

# Every provider, and the distribution whose version is reported. The first three, and "builtin"
# (torch's own single call for the whole thing, where there is one), need no further package.
PROVIDERS = {
    "fastcl": "fastcl",
    "torch": "torch",
    "compile": "torch",
    "builtin": "torch",
    "lightly": "lightly",
    "pytorch-metric-learning": "pytorch-metric-learning",
    "open_clip": "open_clip_torch",
    "info-nce-pytorch": "info-nce-pytorch",
    "solo-learn": "solo-learn",
}


def providers_of(workload: Workload) -> list[str]:
    """Those that have this workload, in the order of PROVIDERS."""
    return [p for p in PROVIDERS if p in ("fastcl", "torch", "compile", *workload.peers)]


def function_of(workload: Workload, provider: str, sizes: Sizes) -> Function:
    """The provider's function, from the inputs in their order. Raises ImportError without it."""
    if provider == "fastcl":
        return workload.fused
    if provider == "torch":
        return workload.plain
    if provider == "compile":
        return torch.compile(workload.plain)
    return workload.peers[provider].make(**sizes)


def bytes_of(workload: Workload, provider: str, sizes: Sizes, itemsize: int) -> int:
    """An estimate of what a call allocates, so that nothing is started that cannot fit."""
    if provider == "fastcl":
        return 0  # O(rows)
    peer = workload.peers.get(provider)
    if peer is not None and peer.bytes is not None:
        return peer.bytes(**sizes)
    return 8 * itemsize * workload.matrix(**sizes)  # logits, their copies and masks, gradients
