"""The cosine kernels on a GPU, or as ttsem executes them: bfloat16, bounds, races."""

import pytest
import streaming
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "n, d", [(1, 1), (63, 129), (130, 64), (2, 8200)], ids=lambda size: str(size)
)
def test_matches_float64_formula(n, d, dtype):
    p, t = (streaming.randn(n, d, seed=i, dtype=dtype, device="cuda") for i in (0, 1))
    streaming.check_cosine(p, t)


def test_rows_below_eps_have_no_projection():
    streaming.check_cosine_below_eps("cuda")


def test_golden_simsiam_and_byol():
    streaming.check_cosine_golden("cuda")
