"""What `python -m bench compat` calls: a class of a library, with inputs of a size.

Each function takes the module that has the class, the library's or ours, and returns one call: the
loss and its gradients. What a call changes it sets back, so that all calls do the same.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

LIBRARIES = {  # name in fastcl.compat -> the module that has the library's classes
    "lightly": "lightly.loss",
    "open_clip": "open_clip.loss",
    "pytorch_metric_learning": "pytorch_metric_learning.losses",
    "sentence_transformers": "sentence_transformers.sentence_transformer.losses",
    "info_nce": "info_nce",
}

Sizes = dict[str, int]
Step = Callable[[], list[Tensor]]  # one call: the loss and the gradients


class Case(NamedTuple):
    """A class of a library, and what it is called with."""

    library: str
    name: str
    make: Callable[..., Step]  # of the module that has the class, and the sizes
    full: Sizes
    small: Sizes


def normal(*shape: int, grad: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).requires_grad_(grad)


def unit(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(n, d, generator=generator)).requires_grad_()


def step_of(loss: Callable[[], Tensor], *inputs: Tensor) -> Step:
    """The loss and the gradients of those inputs that need one."""
    leaves = [x for x in inputs if x.requires_grad]

    def step() -> list[Tensor]:
        value = loss()
        return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]

    return step


# ---- what is called ------------------------------------------------------------------------------


def two_views(name: str, *options: Any) -> Callable[..., Step]:
    def make(module: Any, n: int, d: int) -> Step:
        loss = getattr(module, name)(*options)
        x, y = unit(n, d, 0), unit(n, d, 1)
        return step_of(lambda: loss(x, y), x, y)

    return make


def ntxent_with_bank(module: Any, n: int, k: int, d: int) -> Step:
    loss = module.NTXentLoss(0.1, (k, d))
    bank = unit(k, d, 2).detach()
    x, y = unit(n, d, 0), unit(n, d, 1).detach()

    def call() -> Tensor:  # the same state at every call
        loss.memory_bank.bank = bank
        loss.memory_bank.bank_ptr.zero_()
        return loss(x, y)

    return step_of(call, x)


def swav(module: Any, n: int, k: int, crops: int) -> Step:
    loss = module.SwaVLoss()
    scores = [(0.3 * normal(n, k + i)[:, :k]).detach().requires_grad_() for i in range(crops)]
    return step_of(lambda: loss(scores[:2], scores[2:]), *scores)


def dino(module: Any, n: int, k: int, crops: int) -> Step:
    loss = module.DINOLoss(k)
    student = [normal(n, k + i)[:, :k].detach().requires_grad_() for i in range(crops)]
    teacher = [normal(n, k + 100 + i, grad=False)[:, :k].contiguous() for i in range(2)]

    def call() -> Tensor:
        loss.center.zero_()
        return loss(teacher, student)

    return step_of(call, *student)


def momentum(module: Any, layers: int, width: int) -> Step:
    function = getattr(module, "update_momentum", None)
    if function is None:  # lightly has it elsewhere
        function = importlib.import_module("lightly.models.utils").update_momentum
    torch.manual_seed(0)
    models = [nn.Sequential(*(nn.Linear(width, width) for _ in range(layers))) for _ in range(2)]

    def step() -> list[Tensor]:
        function(models[0], models[1], 0.999)
        return [models[1][0].weight.detach()]

    return step


def clip(name: str, *scalars: float) -> Callable[..., Step]:
    def make(module: Any, n: int, d: int) -> Step:
        loss = getattr(module, name)()
        x, y = unit(n, d, 0), unit(n, d, 1)
        given = [torch.tensor(v, requires_grad=True) for v in scalars]
        return step_of(lambda: loss(x, y, *given), x, y, *given)

    return make


def self_supervised(module: Any, n: int, d: int) -> Step:
    import pytorch_metric_learning.losses as losses

    loss = losses.SelfSupervisedLoss(module.NTXentLoss(0.1))
    x, y = unit(n, d, 0), unit(n, d, 1)
    return step_of(lambda: loss(x, y), x, y)


def supcon(module: Any, n: int, d: int, classes: int) -> Step:
    loss = module.SupConLoss()
    x, labels = unit(n, d, 0), torch.arange(n) % classes
    return step_of(lambda: loss(x, labels), x)


def cross_batch(module: Any, n: int, k: int, d: int, classes: int) -> Step:
    loss = module.CrossBatchMemory(module.SupConLoss(), d, k)
    with torch.no_grad():
        loss.embedding_memory.copy_(unit(k, d, 2))
        loss.label_memory.copy_(torch.arange(k) % classes)
    x, labels = unit(n, d, 0), torch.arange(n) % classes

    def call() -> Tensor:
        loss.queue_idx, loss.has_been_filled = 0, True
        return loss(x, labels)

    return step_of(call, x)


class NoModel(nn.Module):
    """Stands for the encoder, where the loss is given embeddings."""

    def __getitem__(self, index: int) -> NoModel:
        return self


def ranking(name: str, **options: Any) -> Callable[..., Step]:
    def make(module: Any, n: int, d: int, columns: int) -> Step:
        loss = getattr(module, name)(NoModel(), **options)
        x = [unit(n, d, i) for i in range(columns)]
        if name.startswith("Cached"):
            return step_of(lambda: loss.calculate_loss([[v] for v in x], None), *x)
        return step_of(lambda: loss.compute_loss_from_embeddings(x, None), *x)

    return make


def info_nce(mode: str) -> Callable[..., Step]:
    def make(module: Any, n: int, d: int, k: int = 0) -> Step:
        loss = module.InfoNCE(negative_mode=mode)
        x, y = unit(n, d, 0), unit(n, d, 1)
        shape = (n, k, d) if mode == "paired" else (k, d)
        negatives = normal(*shape, grad=mode == "paired") if k else None
        needed = [x, y] if negatives is None else [x, y, negatives]
        return step_of(lambda: loss(x, y, negatives), *needed)

    return make


ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")

CASES = [
    Case(
        "lightly",
        "NTXentLoss",
        two_views("NTXentLoss", 0.1),
        {"n": 2048, "d": 128},
        {"n": 32, "d": 8},
    ),
    Case(
        "lightly",
        "NTXentLoss, bank",
        ntxent_with_bank,
        {"n": 256, "k": 65536, "d": 128},
        {"n": 8, "k": 64, "d": 8},
    ),
    Case("lightly", "DCLLoss", two_views("DCLLoss"), {"n": 2048, "d": 128}, {"n": 32, "d": 8}),
    Case(
        "lightly",
        "SwaVLoss",
        swav,
        {"n": 256, "k": 3000, "crops": 8},
        {"n": 8, "k": 12, "crops": 3},
    ),
    Case(
        "lightly",
        "DINOLoss",
        dino,
        {"n": 16, "k": 65536, "crops": 10},
        {"n": 4, "k": 32, "crops": 3},
    ),
    Case(
        "lightly",
        "NegativeCosineSimilarity",
        two_views("NegativeCosineSimilarity"),
        {"n": 8192, "d": 256},
        {"n": 32, "d": 8},
    ),
    Case(
        "lightly",
        "update_momentum",
        momentum,
        {"layers": 24, "width": 1024},
        {"layers": 2, "width": 8},
    ),
    Case("open_clip", "ClipLoss", clip("ClipLoss", 14.3), {"n": 4096, "d": 512}, {"n": 32, "d": 8}),
    Case(
        "open_clip",
        "SigLipLoss",
        clip("SigLipLoss", 10.0, -10.0),
        {"n": 4096, "d": 512},
        {"n": 32, "d": 8},
    ),
    Case(
        "pytorch_metric_learning",
        "NTXentLoss",
        self_supervised,
        {"n": 256, "d": 128},
        {"n": 16, "d": 8},
    ),
    Case(
        "pytorch_metric_learning",
        "SupConLoss",
        supcon,
        {"n": 4096, "d": 128, "classes": 100},
        {"n": 32, "d": 8, "classes": 4},
    ),
    Case(
        "pytorch_metric_learning",
        "CrossBatchMemory",
        cross_batch,
        {"n": 256, "k": 16384, "d": 128, "classes": 1000},
        {"n": 8, "k": 64, "d": 8, "classes": 4},
    ),
    Case(
        "sentence_transformers",
        "MultipleNegativesRankingLoss",
        ranking("MultipleNegativesRankingLoss"),
        {"n": 2048, "d": 384, "columns": 3},
        {"n": 16, "d": 8, "columns": 3},
    ),
    Case(
        "sentence_transformers",
        "MultipleNegativesRankingLoss, all directions",
        ranking("MultipleNegativesRankingLoss", directions=ALL_DIRECTIONS),
        {"n": 2048, "d": 384, "columns": 3},
        {"n": 16, "d": 8, "columns": 3},
    ),
    Case(
        "sentence_transformers",
        "CachedMultipleNegativesRankingLoss",
        ranking("CachedMultipleNegativesRankingLoss"),
        {"n": 4096, "d": 384, "columns": 2},
        {"n": 64, "d": 8, "columns": 2},
    ),
    Case("info_nce", "InfoNCE", info_nce("unpaired"), {"n": 4096, "d": 128}, {"n": 32, "d": 8}),
    Case(
        "info_nce",
        "InfoNCE, unpaired",
        info_nce("unpaired"),
        {"n": 512, "d": 128, "k": 32768},
        {"n": 16, "d": 8, "k": 40},
    ),
    Case(
        "info_nce",
        "InfoNCE, paired",
        info_nce("paired"),
        {"n": 256, "d": 128, "k": 256},
        {"n": 16, "d": 8, "k": 5},
    ),
]
