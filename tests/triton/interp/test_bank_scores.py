"""The scores of gathered bank rows in Triton's interpreter, against float64."""

import bank_cases
import pytest
import torch

from fastcl.kernels import bank_scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("bank_dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    "n, k, d, size",
    [
        (1, 1, 1, 1),
        (5, 33, 100, 50),  # rows off a 128-bit boundary, the last block of K short
        (2, 200, 128, 300),  # split over K
        (3, 5, 1100, 20),  # rows longer than a block
    ],
    ids=lambda size: str(size),
)
def test_matches_float64_formula(n, k, d, size, dtype, bank_dtype):
    bank_cases.check_scores(n, k, d, size, dtype, bank_dtype)


def test_negative_scale():
    bank_cases.check_scores(3, 20, 64, 9, scale=-0.5)


def test_nothing_to_score():
    scores, grad_query, grad_scale = bank_cases.check_scores(3, 0, 32, 9)
    assert scores.shape == (3, 0) and not grad_query.any() and grad_scale == 0
    q, bank, t = torch.empty(0, 8), torch.ones(4, 8), torch.tensor(1.0)
    index = torch.empty(0, 5, dtype=torch.int64)
    assert bank_scores.forward(q, bank, index, t).shape == (0, 5)
    grad_query, grad_scale = bank_scores.backward(torch.empty(0, 5), q, bank, index, t)
    assert grad_query.shape == (0, 8) and grad_scale == 0
