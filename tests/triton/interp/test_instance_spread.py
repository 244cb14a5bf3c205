"""The instance loss's kernels in Triton's interpreter, against float64 and the official outputs."""

import instance_spread_cases as cases
import pytest
import torch

from fastcl.kernels import instance_spread

# NumPy warns of the logarithms of lanes that are masked.
pytestmark = pytest.mark.filterwarnings("ignore:(divide|invalid|overflow):RuntimeWarning")


# 19: 38 views, ragged blocks each way, a row and its partner in other tiles; 2: all in one.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("n, d", [(2, 2), (19, 40)])
def test_matches_formula(n, d, normalize, dtype):
    cases.check(n, d, 5.0, 1.0, normalize=normalize, dtype=dtype)


def test_weight_of_the_negatives():
    cases.check(10, 24, 5.0, 1.7, normalize=True)


def test_d_in_several_blocks():
    cases.check(10, 72, 5.0, 1.0, normalize=True, blocks="tiled")


@pytest.mark.parametrize("name", cases.FILES)
def test_is_invaspread(name):
    cases.check_golden(name, "cpu")


def test_negative_that_has_nearly_all_of_its_row():
    cases.check_large_negative("cpu")


def test_small_temperature():
    cases.check_small_temperature("cpu")


def test_identical_rows_have_shares_of_one_over_their_number():
    z = torch.nn.functional.normalize(torch.ones(6, 16))
    with cases.configs.override(**cases.BLOCKS["whole"]):
        _, log_d, log_o, b, log_large = instance_spread.forward(
            z, torch.tensor(3.0), negative_weight=1.0, normalize=True
        )
    assert torch.allclose(log_d, torch.full((6,), 3.0 + torch.tensor(5.0).log()))
    assert torch.allclose(log_o.exp(), torch.full((6,), 0.8)) and log_large.exp().sum() == 0
    assert torch.allclose(b, torch.ones(6))  # 4 negatives of (1/5) / (4/5)


def test_empty_batch():
    z, t, options = torch.empty(0, 8), torch.tensor(1.0), dict(negative_weight=1.0, normalize=True)
    outputs = instance_spread.forward(z, t, **options)
    assert all(x.shape == (0,) for x in outputs)
    grads = instance_spread.backward(
        outputs[0], z, t, *outputs[1:], detach_columns=False, **options
    )
    assert grads[0].shape == (0, 8) and grads[1] == 0
