"""The registered operation fastcl::sinkhorn, without a gradient.

Formula in fastcl/reference/sinkhorn.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcl import _C
from fastcl.ops._backend import DTYPE_CODES, implementation, pointer
from fastcl.ops._library import define, statistics_dtype

WORD = "sinkhorn"


class Cpp:
    """Allocates the codes and calls csrc/sinkhorn.cpp."""

    @staticmethod
    def forward(scores: Tensor, *, epsilon: float, iterations: int) -> Tensor:
        n, k = scores.shape
        codes = torch.empty_like(scores, dtype=torch.float32)
        _C.kernels.sinkhorn_forward(
            pointer(scores),
            pointer(codes),
            *(n, k, epsilon, iterations, DTYPE_CODES[scores.dtype], torch.get_num_threads()),
        )
        return codes


def run(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    codes: Tensor = implementation(WORD, scores, Cpp).forward(
        scores.contiguous(), epsilon=epsilon, iterations=iterations
    )
    return codes


def fake(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    return scores.new_empty(scores.shape, dtype=statistics_dtype(scores))


sinkhorn = define("sinkhorn(Tensor scores, float epsilon, int iterations) -> Tensor", run, fake)
