"""The Sinkhorn kernels in Triton's interpreter, against the float64 formula."""

import pytest
import streaming
import torch

from fastcl.kernels import sinkhorn

# NumPy warns of lanes beyond the end, whose results are masked.
pytestmark = pytest.mark.filterwarnings("ignore:(divide|invalid|overflow):RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    "n, k",
    [
        (1, 1),
        (63, 129),  # rows that start at no 128-bit boundary
        (129, 64),
        (300, 70),  # more tiles of rows than programs
        (19, 3000),
        (3, 8200),  # beyond the longest block: rows and columns apart
    ],
    ids=lambda size: str(size),
)
def test_matches_float64_formula(n, k, dtype):
    streaming.check_sinkhorn(streaming.randn(n, k, dtype=dtype) / 4, epsilon=0.05)


@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_iterations(iterations):
    streaming.check_sinkhorn(streaming.randn(40, 33), epsilon=0.2, iterations=iterations)


@pytest.mark.parametrize("n, k", [(33, 100), (3, 8200)])
def test_scores_over_epsilon_of_a_thousand(n, k):
    # float32 holds S/ε = 1,000 to 3e-5.
    streaming.check_sinkhorn(streaming.extreme_scores(n, k), epsilon=0.05, slack=1e-4)


def test_more_programs_than_one_block_of_parts(monkeypatch):
    """As on a GPU, whose hundreds of programs each give a part of the columns' sums."""
    monkeypatch.setattr(sinkhorn.configs, "multiprocessors", lambda tensor: 100)
    streaming.check_sinkhorn(streaming.randn(81, 600) / 4, epsilon=0.05, iterations=2)
    assert 81 // sinkhorn.SWEEP[1024].block_n > sinkhorn.FINISH_PARTS


def test_golden_swav():
    streaming.check_sinkhorn_golden("cpu")


def test_prototype_without_scores():
    streaming.check_unavailable_prototype("cpu")


def test_rows_are_distributions_and_prototypes_balanced():
    codes = sinkhorn.forward(streaming.randn(64, 16), epsilon=1.0, iterations=20)
    assert torch.allclose(codes.sum(1), torch.ones(64), atol=1e-6)
    assert torch.allclose(codes.sum(0), torch.full((16,), 4.0), atol=1e-4)
