"""The cosine kernels in Triton's interpreter, against the float64 formula."""

import pytest
import streaming
import torch

from fastcl.kernels import cosine


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    "n, d",
    [
        (1, 1),
        (63, 129),  # rows that start at no 128-bit boundary, the last program ragged
        (129, 64),
        (5, 96),
        (3, 5000),  # backward: one block; forward: three
        (2, 8200),  # beyond the longest block: backward reads twice
    ],
    ids=lambda size: str(size),
)
def test_matches_float64_formula(n, d, dtype):
    streaming.check_cosine(
        streaming.randn(n, d, dtype=dtype), streaming.randn(n, d, seed=1, dtype=dtype)
    )


def test_large_and_small_norms():
    p = streaming.randn(7, 33) * torch.logspace(-3, 3, 7)[:, None]
    streaming.check_cosine(p, 100 * streaming.randn(7, 33, seed=1))


def test_rows_below_eps_have_no_projection():
    streaming.check_cosine_below_eps("cpu")


def test_golden_simsiam_and_byol():
    streaming.check_cosine_golden("cpu")


@pytest.mark.parametrize("d", [40, 8300])
def test_only_the_gradients_asked_for(d):
    p, t, g = streaming.randn(3, d), streaming.randn(3, d, seed=1), streaming.randn(3, seed=2)
    both = cosine.backward(g, p, t, eps=1e-8, need_prediction=True, need_target=True)
    dp, none = cosine.backward(g, p, t, eps=1e-8, need_prediction=True, need_target=False)
    assert none is None and torch.equal(dp, both[0])
    none, dt = cosine.backward(g, p, t, eps=1e-8, need_prediction=False, need_target=True)
    assert none is None and torch.equal(dt, both[1])
