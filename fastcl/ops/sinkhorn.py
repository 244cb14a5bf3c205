"""The registered operation fastcl::sinkhorn, without a gradient.

Formula in fastcl/reference/sinkhorn.py.
"""

from __future__ import annotations

from torch import Tensor

from fastcl.ops._backend import implementation
from fastcl.ops._library import define, statistics_dtype
from fastcl.reference import sinkhorn as Cpp

WORD = "sinkhorn"


def run(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    codes: Tensor = implementation(WORD, scores, Cpp).forward(
        scores.contiguous(), epsilon=epsilon, iterations=iterations
    )
    return codes


def fake(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=statistics_dtype(scores))


sinkhorn = define("sinkhorn(Tensor scores, float epsilon, int iterations) -> Tensor", run, fake)
