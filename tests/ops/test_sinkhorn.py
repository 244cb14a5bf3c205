"""sinkhorn against float64, SwAV's code, and scores that the published form cannot take."""

from __future__ import annotations

import pytest
import torch

import fastcl.functional as F
from fastcl import ops
from fastcl.reference import sinkhorn as reference
from fastcl.testing import assert_as_accurate_as

on_each_backend = pytest.mark.usefixtures("backend")
on_the_kernels = pytest.mark.usefixtures("kernels")

GOLDEN = ["b48_k300", "large_b29_k300", "iter1_b33_k100", "collapsed_b16_k100", "underflow_b21_k96"]
# One score, one column, less than a vector, ragged ends, more than one block of rows.
SIZES = [(1, 1), (5, 1), (1, 40), (7, 5), (33, 100), (129, 63), (70, 1000), (300, 3)]


def random_scores(n: int, k: int, size: float) -> torch.Tensor:
    return size * torch.randn(n, k, generator=torch.Generator().manual_seed(n * k))


def assert_codes(
    scores: torch.Tensor, epsilon: float, iterations: int, slack: float = 1e-6
) -> torch.Tensor:
    """Codes as near to float64's as plain PyTorch's, in parts of the largest; rows sum to 1."""
    actual = ops.sinkhorn(scores, epsilon, iterations)
    plain = reference.sinkhorn(scores.float(), epsilon=epsilon, iterations=iterations)
    truth = reference.sinkhorn(scores.double(), epsilon=epsilon, iterations=iterations)
    assert_as_accurate_as(actual, plain, truth, slack=slack, name="codes")
    torch.testing.assert_close(actual.sum(1), torch.ones(len(scores)), rtol=0, atol=2e-6)
    return actual


@on_each_backend
@pytest.mark.parametrize("name", GOLDEN)
def test_is_swavs(golden, name: str) -> None:
    file = golden(f"swav_sinkhorn_{name}")
    codes = F.sinkhorn(file["scores"], epsilon=float(file["eps"]), iterations=int(file["iters"]))
    torch.testing.assert_close(
        codes.double(), file["q_f64"], rtol=0, atol=2e-6 if "under" in name else 3e-7
    )


@on_each_backend
def test_ranks_together_are_one_process(golden) -> None:
    file = golden("swav_sinkhorn_dist2_b19x2_k300")
    scores = torch.cat([file["scores_rank0"], file["scores_rank1"]])
    codes = F.sinkhorn(scores, epsilon=float(file["eps"]), iterations=int(file["iters"]))
    torch.testing.assert_close(
        codes, torch.cat([file["q_rank0"], file["q_rank1"]]), rtol=0, atol=3e-7
    )


@on_the_kernels
@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize(("n", "k"), SIZES, ids=str)
# S/ε of about 3, 20 (unit vectors), 1000 and 30,000 (beyond any float32 exponential)
@pytest.mark.parametrize("size", [0.15, 1.0, 50.0, 1500.0])
def test_matches_float64(n: int, k: int, size: float, iterations: int) -> None:
    assert_codes(random_scores(n, k, size), 0.05, iterations)


@on_the_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "k"), [(7, 5), (33, 100)], ids=str)
def test_low_precision_scores_have_float32_codes(n: int, k: int, dtype: torch.dtype) -> None:
    assert assert_codes(random_scores(n, k, 1.0).to(dtype), 0.05, 3).dtype == torch.float32


@on_the_kernels
@pytest.mark.parametrize("iterations", [1, 3])
def test_offsets_of_rows_do_not_matter(iterations: int) -> None:
    # Every row is far below the columns' maxima but one: its sum is found from its own maximum.
    scores = random_scores(40, 50, 1.0)
    offset = torch.arange(40.0)[:, None] * 64  # exact in float32 beside the scores' own bits
    scores = (scores * 1024).round() / 1024
    truth = reference.sinkhorn((scores + offset).double(), epsilon=0.05, iterations=iterations)
    codes = ops.sinkhorn(scores + offset, 0.05, iterations)
    torch.testing.assert_close(codes.double(), truth, rtol=0, atol=1e-6)


@on_each_backend
@pytest.mark.parametrize("value", [-1e4, 0.0, 1e4])
def test_equal_scores_are_shared_equally(value: float) -> None:
    codes = F.sinkhorn(torch.full((50, 7), value))
    torch.testing.assert_close(codes, torch.full((50, 7), 1 / 7))


@on_each_backend
def test_prototypes_are_balanced_in_the_limit() -> None:
    codes = F.sinkhorn(random_scores(200, 16, 0.3), iterations=100)
    torch.testing.assert_close(codes.sum(0), torch.full((16,), 200 / 16), rtol=1e-4, atol=0)


@on_each_backend
def test_a_prototype_that_some_sample_cannot_have() -> None:
    scores = random_scores(20, 33, 0.3)
    scores[3, 5] = scores[19, 32] = -torch.inf
    codes = assert_codes(scores, 0.05, 3)
    assert codes[3, 5] == codes[19, 32] == 0


@on_each_backend
def test_a_nan_is_visible() -> None:
    scores = random_scores(20, 33, 0.3)
    scores[4, 7] = torch.nan
    assert F.sinkhorn(scores)[4].isnan().all()


@on_each_backend
def test_scores_are_not_changed_and_may_be_strided() -> None:
    scores = random_scores(33, 40, 0.3)
    kept = scores.clone()
    assert torch.equal(F.sinkhorn(scores.t()), F.sinkhorn(scores.t().contiguous()))
    assert torch.equal(scores, kept)


# The second is larger than what is written past the caches, and its rows are not aligned.
@pytest.mark.parametrize(("n", "k"), [(131, 300), (1601, 2709)])
def test_same_bits_for_any_number_of_threads(assert_same_bits, n: int, k: int) -> None:
    scores = random_scores(n, k, 0.3)
    assert_same_bits(lambda: [F.sinkhorn(scores)])


@on_the_kernels
def test_large_output_is_as_accurate() -> None:
    assert_codes(random_scores(1601, 2709, 0.3), 0.05, 2)
