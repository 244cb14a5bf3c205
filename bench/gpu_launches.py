"""What each file of kernels/ launches, for bench/gpu_static.py and tests/triton/aot.

Each function calls the host functions of one operation with CPU tensors of the given sizes; under
bench.compiled.compiling_for nothing runs, and every launch is compiled instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcl.kernels import (
    bank,
    bank_scores,
    cosine,
    ema,
    instance_spread,
    label_similarity,
    own_negatives,
    pair_sigmoid,
    queue,
    self_distillation,
    self_similarity_lse,
    similarity_lse,
    sinkhorn,
    soft_cross_entropy,
)


@dataclass(frozen=True)
class Case:
    """n rows of d features (or classes) of one element type."""

    d: int = 128
    dtype: torch.dtype = torch.bfloat16
    ids: bool = False
    normalize: bool = True
    n: int = 16384

    def rows(self, n: int | None = None) -> Tensor:
        return torch.empty(self.n if n is None else n, self.d, dtype=self.dtype)

    def __str__(self) -> str:
        flags = "-ids" * self.ids + "-raw" * (not self.normalize)
        return f"D{self.d}-{str(self.dtype).removeprefix('torch.')}{flags}"


def _scalar() -> Tensor:
    return torch.empty(())


def of_similarity_lse(case: Case) -> None:
    q, k = case.rows(), case.rows()
    v, t = torch.empty(case.n), _scalar()
    ids = torch.empty(case.n, dtype=torch.int64) if case.ids else None
    options = dict(normalize=case.normalize)
    similarity_lse.forward(q, k, t, ids, ids, rows=True, columns=False, **options)
    similarity_lse.forward(q, k, t, ids, ids, rows=True, columns=True, **options)
    similarity_lse.forward_with_mean(q, k, t, ids, ids, **options)
    for columns in (None, v):
        similarity_lse.backward(
            v, columns, q, k, t, ids, ids, v, columns, need_query=True, need_key=True, **options
        )


def of_self_similarity_lse(case: Case) -> None:
    z, v, t = case.rows(), torch.empty(case.n), _scalar()
    ids = torch.empty(case.n, dtype=torch.int64) if case.ids else None
    self_similarity_lse.forward(z, t, ids, normalize=case.normalize)
    self_similarity_lse.backward(v, z, t, ids, v, normalize=case.normalize)


def of_pair_sigmoid(case: Case) -> None:
    image, text, t = case.rows(), case.rows(), _scalar()
    pair_sigmoid.forward(image, text, t, t, normalize=case.normalize)
    pair_sigmoid.backward(torch.empty(case.n), image, text, t, t, normalize=case.normalize)


def of_instance_spread(case: Case) -> None:
    n = case.n // 2 * 2
    z, v, t = case.rows(n), torch.empty(n), _scalar()
    options = dict(negative_weight=1.0, normalize=case.normalize)
    instance_spread.forward(z, t, **options)
    for detach in (False, True):
        instance_spread.backward(v, z, t, v, v, v, v, detach_columns=detach, **options)


def of_own_negatives(case: Case) -> None:
    query, negatives = case.rows(), torch.empty(case.n, 16, case.d, dtype=case.dtype)
    v, t, options = torch.empty(case.n), _scalar(), dict(normalize=case.normalize)
    own_negatives.forward(query, negatives, t, **options)
    for needed in (True, False):
        own_negatives.backward(
            v, query, negatives, t, v, need_query=True, need_negatives=needed, **options
        )


def of_label_similarity(case: Case) -> None:
    z, labels, v = case.rows(), torch.zeros(case.n, dtype=torch.int64), torch.empty(case.n)
    others, rest = torch.empty_like(labels), torch.empty(case.n, case.d)
    label_similarity.forward(z, labels, normalize=case.normalize)
    label_similarity.backward(v, z, labels, others, rest, normalize=case.normalize)


def of_bank_scores(case: Case) -> None:
    n, k = 256, min(case.n, 4097)
    query, rows, index = case.rows(n), case.rows(), torch.empty(n, k, dtype=torch.int64)
    bank_scores.forward(query, rows, index, _scalar())
    bank_scores.backward(torch.empty(n, k), query, rows, index, _scalar())


def of_soft_cross_entropy(case: Case) -> None:
    x, y, v = case.rows(), case.rows(), torch.empty(case.n)
    soft_cross_entropy.forward(x, y, _scalar())
    soft_cross_entropy.backward(v, x, y, _scalar(), v, v)


def of_self_distillation(case: Case) -> None:
    n = 16
    for students, teachers in ((10, 2), (4, 8)):
        student = torch.empty(students, n, case.d, dtype=case.dtype)
        teacher = torch.empty(teachers, n, case.d, dtype=case.dtype)
        given = student, teacher, torch.empty(case.d), _scalar(), _scalar()
        _, *lse = self_distillation.forward(*given)
        self_distillation.backward(torch.empty(n), *given, *lse)


def of_sinkhorn(case: Case) -> None:
    sinkhorn.forward(case.rows(), epsilon=0.05, iterations=2)


def of_cosine(case: Case) -> None:
    p, t = case.rows(), case.rows()
    cosine.forward(p, t, eps=1e-8)
    for need_target in (False, True):
        cosine.backward(
            torch.empty(case.n), p, t, eps=1e-8, need_prediction=True, need_target=need_target
        )


def of_ema(case: Case) -> None:
    # Sources in the model's type, targets in float32 or in the same.
    source = torch.empty(8192, dtype=case.dtype)
    for dtype in (torch.float32, case.dtype):
        ema.update_([torch.empty(8192, dtype=dtype)], [source], momentum=0.99)


def of_queue(case: Case) -> None:
    queue.push_(case.rows(), torch.empty(1, dtype=torch.int64), case.rows(256))


def of_bank(case: Case) -> None:
    bank.update_(case.rows(), torch.empty(256, dtype=torch.int64), case.rows(256), momentum=0.5)


LAUNCHES: dict[str, Callable[[Case], None]] = {
    "similarity_lse": of_similarity_lse,
    "self_similarity_lse": of_self_similarity_lse,
    "pair_sigmoid": of_pair_sigmoid,
    "instance_spread": of_instance_spread,
    "own_negatives": of_own_negatives,
    "label_similarity": of_label_similarity,
    "bank_scores": of_bank_scores,
    "soft_cross_entropy": of_soft_cross_entropy,
    "self_distillation": of_self_distillation,
    "sinkhorn": of_sinkhorn,
    "cosine": of_cosine,
    "ema": of_ema,
    "queue": of_queue,
    "bank": of_bank,
}
WITH_IDS = ("similarity_lse", "self_similarity_lse")
NORMALIZED = (*WITH_IDS, "pair_sigmoid", "instance_spread")
RAW_TOO = (*NORMALIZED, "own_negatives", "label_similarity")

# Kernels whose loop is products of rows: on tensor cores, unless the rows are float32.
PRODUCTS = (
    "rows_kernel",
    "pairs_kernel",
    "gradient_kernel",
    "mean_kernel",
    "loss_kernel",
    "shares_kernel",
    "weights_kernel",
    "sums_kernel",
)


def is_product(word: str, name: str) -> bool:
    """sinkhorn has a rows_kernel, too, which reads scores."""
    return name in PRODUCTS and word != "sinkhorn"


def cases(word: str, sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> list[Case]:
    """Every kind of launch of one operation."""
    return [
        Case(d, dtype, ids, normalize)
        for d in sizes
        for dtype in dtypes
        for ids in ((False, True) if word in WITH_IDS else (False,))
        for normalize in ((True, False) if word in RAW_TOO else (True,))
    ]
