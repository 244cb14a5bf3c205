"""The pairwise sigmoid kernels in Triton's interpreter, against the formula in float64."""

import pair_sigmoid_cases as cases
import pytest
import torch
import triton
import triton.language as tl

from fastcl.kernels import pair_sigmoid

# NumPy warns of 2^1000 in 1 / (1 + 2^1000).
pytestmark = pytest.mark.filterwarnings("ignore:(divide|invalid|overflow):RuntimeWarning")


@triton.jit
def log1p_kernel(e, out):
    tl.store(out, pair_sigmoid.log1p_of(tl.load(e)))


# 37: ragged blocks each way; 100: D in two blocks.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("n, d", [(1, 1), (37, 40), (3, 100)])
def test_matches_formula(n, d, normalize, dtype):
    cases.check(n, d, 10.0, -10.0, normalize=normalize, dtype=dtype)


@pytest.mark.parametrize("t, b", [(100.0, 3.0), (-5.0, 0.0), (0.0, -1.0), (1.0, 200.0)])
def test_any_scale_and_bias(t, b):
    cases.check(20, 24, t, b, normalize=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_d_in_several_blocks(dtype):
    cases.check(20, 72, 10.0, -5.0, normalize=True, dtype=dtype, blocks="tiled")


@pytest.mark.parametrize("x", [-0.5, -0.0101, -0.0099, -1e-6, 0.0, 1e-7, 0.0099, 0.0101, 1.0])
def test_logarithm_of_one_plus_a_little(x):
    e, out = torch.tensor([x]), torch.empty(1)
    log1p_kernel[(1,)](e, out)
    truth = torch.log1p(e.double()).item()
    assert abs(out.item() - truth) <= 8e-6 * abs(truth)


def test_what_the_negatives_add_is_exact():
    cases.check_small_probabilities("cpu")


def test_empty_batch():
    x, t = torch.empty(0, 8), torch.tensor(1.0)
    assert pair_sigmoid.forward(x, x, t, t, normalize=True).shape == (0,)
    grads = pair_sigmoid.backward(torch.empty(0), x, x, t, t, normalize=True)
    assert grads[0].shape == grads[1].shape == (0, 8) and grads[2] == grads[3] == 0
