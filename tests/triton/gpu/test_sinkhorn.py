"""The Sinkhorn kernels on a GPU, or as ttsem executes them: bfloat16, bounds, races."""

import pytest
import streaming
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "n, k", [(1, 1), (63, 129), (300, 72), (2, 8200)], ids=lambda size: str(size)
)
def test_matches_float64_formula(n, k, dtype):
    scores = streaming.randn(n, k, dtype=dtype, device="cuda") / 4
    streaming.check_sinkhorn(scores, epsilon=0.05)


def test_scores_over_epsilon_of_a_thousand():
    scores = streaming.extreme_scores(33, 100).to("cuda")
    streaming.check_sinkhorn(scores, epsilon=0.05, slack=1e-4)


def test_golden_swav():
    streaming.check_sinkhorn_golden("cuda")


def test_prototype_without_scores():
    streaming.check_unavailable_prototype("cuda")
