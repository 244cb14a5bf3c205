"""The soft cross entropy kernels in Triton's interpreter, against the float64 formula."""

import pytest
import streaming
import torch

from fastcl.kernels import soft_cross_entropy

# NumPy warns of lanes beyond the end, whose results are masked.
pytestmark = pytest.mark.filterwarnings("ignore:(divide|invalid|overflow):RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    "n, k",
    [
        (1, 1),
        (63, 129),  # rows that start at no 128-bit boundary, the last program ragged
        (129, 64),
        (3, 3000),  # SwAV's prototypes, split in two
        (2, 20001),  # split, the last part short
    ],
    ids=lambda size: str(size),
)
def test_matches_float64_formula(n, k, dtype):
    streaming.check_soft_cross_entropy(*streaming.logits_and_targets(n, k, dtype), scale=10.0)


def test_sum_of_more_parts_than_a_block():
    parts = streaming.randn(3000).double().round(decimals=2).float()
    total = torch.empty(())
    soft_cross_entropy.sum_kernel[(1,)](parts, total, 3000, BLOCK=soft_cross_entropy.SUM_BLOCK)
    assert abs(total.item() - parts.double().sum().item()) < 1e-4


def test_dino_rows_are_split():
    assert soft_cross_entropy.grid_of(16, 65536).splits == 32
    assert soft_cross_entropy.grid_of(4096, 3000).splits == 1


def test_rows_looped_over_without_split(monkeypatch):
    monkeypatch.setattr(soft_cross_entropy, "PROGRAMS", 1)
    assert soft_cross_entropy.grid_of(3, 9000).splits == 1
    streaming.check_soft_cross_entropy(*streaming.logits_and_targets(3, 9000), scale=3.0)


def test_split_in_parts_of_several_blocks(monkeypatch):
    monkeypatch.setattr(soft_cross_entropy, "MAX_SPLITS", 4)
    grid = soft_cross_entropy.grid_of(2, 20001)
    assert (grid.splits, grid.blocks_per_split) == (4, 3)
    streaming.check_soft_cross_entropy(*streaming.logits_and_targets(2, 20001), scale=3.0)


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
@pytest.mark.parametrize("scale", [0.1, 25.0])
def test_any_temperature_and_offset(scale, offset):
    x, y = streaming.logits_and_targets(9, 5001)
    streaming.check_soft_cross_entropy(x + offset, y, scale=scale)


def test_low_precision_logits_with_float32_targets():
    x, y = streaming.logits_and_targets(17, 130, torch.float16, targets_dtype=torch.float32)
    streaming.check_soft_cross_entropy(x, y, scale=10.0)


def test_confident_rows_have_no_loss():
    x = torch.full((3, 200), -50.0)
    x[:, 7] = 50.0
    y = torch.zeros(3, 200)
    y[:, 7] = 1.0
    loss, lse, _ = soft_cross_entropy.forward(x, y, torch.tensor(10.0))
    assert torch.equal(loss, torch.zeros(3)) and torch.equal(lse, torch.full((3,), 500.0))


def test_masked_classes_add_nothing():
    streaming.check_masked_classes("cpu")


def test_target_on_masked_class_costs_infinity():
    streaming.check_target_on_masked_class("cpu")
