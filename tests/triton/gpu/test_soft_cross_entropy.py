"""The soft cross entropy kernels on a GPU, or as ttsem executes them: bfloat16, bounds, races."""

import pytest
import streaming
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("n, k", [(1, 1), (63, 129), (3, 5001)], ids=lambda size: str(size))
def test_matches_float64_formula(n, k, dtype):
    x, y = streaming.logits_and_targets(n, k, dtype, device="cuda")
    streaming.check_soft_cross_entropy(x, y, scale=10.0)


def test_low_precision_logits_with_float32_targets():
    x, y = streaming.logits_and_targets(
        17, 136, torch.bfloat16, device="cuda", targets_dtype=torch.float32
    )
    streaming.check_soft_cross_entropy(x, y, scale=10.0)


def test_large_offset():
    x, y = streaming.logits_and_targets(5, 3001, device="cuda")
    streaming.check_soft_cross_entropy(x + 1000, y, scale=25.0)


def test_masked_classes_add_nothing():
    streaming.check_masked_classes("cuda")


def test_target_on_masked_class_costs_infinity():
    streaming.check_target_on_masked_class("cuda")
