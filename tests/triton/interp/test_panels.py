"""Sums by panels of weights in Triton's interpreter, against the formulas in float64.

D in several blocks, and panels of 32 by 32: several each way, the last ones ragged.
"""

import instance_spread_cases
import pair_sigmoid_cases
import pytest
import torch
from similarity_cases import (
    BLOCKS,
    TOLERANCE,
    assert_close,
    check_mean,
    check_self_similarity,
    check_similarity,
    ids_of,
    leaves,
    log_sum,
    rows_of,
    scores,
    vector,
)

from fastcl.kernels import _panels, configs, self_similarity_lse, similarity_lse

pytestmark = pytest.mark.filterwarnings("ignore:(divide|invalid|overflow):RuntimeWarning")

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
BOTH = pytest.mark.parametrize(
    "dtype, normalize",
    [(torch.float32, False), (torch.float16, True)],
    ids=["float32-raw", "float16-normalised"],
)


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    monkeypatch.setattr(_panels, "PANEL", 32)


def pair(n, m, d, dtype=torch.float32, spread=1.0):
    return rows_of(n, d, dtype, "cpu", 0, spread), rows_of(m, d, dtype, "cpu", 1, spread)


@TYPES
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
def test_both_directions_match_formula(dtype, normalize):
    scale = -9.0 if normalize else 0.2
    check_similarity(*pair(33, 50, 40, dtype), scale, normalize=normalize, blocks="tiled")


@BOTH
def test_one_direction_matches_formula(dtype, normalize):
    rows = dtype == torch.float32
    q, k = pair(33, 40, 40, dtype, 0.5)
    check_similarity(
        q, k, 3.0, normalize=normalize, rows=rows, columns=not rows, blocks="tiled", tolerance=1e-3
    )


def test_few_rows_have_wide_panels_whose_sums_are_split():
    check_similarity(*pair(3, 150, 40), 9.0, normalize=True, blocks="tiled")


def test_log_sum_exps_too_far_apart_for_one_exponential():
    """Rows whose scores are all small beside others that reach 400."""
    q, k = pair(33, 36, 40, spread=0.1)
    q[20:] *= 20
    k[:, 0] += 20
    row_lse, *_ = check_similarity(
        q, k, 3.0, normalize=False, blocks="tiled", tolerance=1e-4, lse_tolerance=4e-6
    )
    assert row_lse.max() - row_lse.min() > 80


def test_ids_leave_pairs_out():
    q, k = pair(33, 40, 40, torch.float16)
    ids = dict(query_ids=ids_of(33, 5, "cpu", 2), key_ids=ids_of(40, 5, "cpu", 3))
    ids["query_ids"][7:9] = ids["key_ids"][3]
    ids["key_ids"][:20] = ids["key_ids"][3]
    check_similarity(q, k, 9.0, normalize=True, blocks="tiled", **ids)
    ids["key_ids"][:] = ids["key_ids"][3]  # rows 7 and 8 have nothing left
    row_lse, _, grad_query, *_ = check_similarity(
        q, k, 9.0, normalize=True, columns=False, blocks="tiled", **ids
    )
    assert (row_lse[7:9] == float("-inf")).all() and not grad_query[7:9].any()
    check_mean(q, k, 9.0, normalize=True, blocks="tiled", **ids)


@BOTH
def test_mean_key_matches_formula(dtype, normalize):
    scale = 9.0 if normalize else 0.2
    check_mean(*pair(33, 50, 40, dtype), scale, normalize=normalize, blocks="tiled")


@pytest.mark.parametrize(
    "dtype, classes", [(torch.float32, None), (torch.float16, 4)], ids=["float32", "float16-ids"]
)
def test_panels_above_the_diagonal_serve_both_sides(dtype, classes):
    ids = None if classes is None else ids_of(70, classes, "cpu", 1)
    z = rows_of(70, 40, dtype, "cpu", 0)
    check_self_similarity(z, 9.0, ids=ids, normalize=True, blocks="tiled")


@pytest.mark.parametrize("towers", [2, 1])
def test_float16_rows_of_very_different_norms(towers):
    """Each row's gradient is right by its own measure, though factors differ by 2^22: their
    products would be beyond float16."""
    sizes = torch.logspace(-4, 2.5, 40)[torch.randperm(40, generator=torch.manual_seed(0))]
    q = rows_of(40, 40, torch.float32, "cpu", 0)
    q = (q / q.norm(dim=1, keepdim=True) * sizes[:, None]).half()
    k = q.flip(0).roll(5, 0) if towers == 2 else q
    t, g, h = torch.tensor(5.0), vector(40, "cpu", 2), vector(40, "cpu", 3)
    q64, k64 = leaves(q, k)
    with configs.override(**BLOCKS["tiled"]):
        if towers == 2:
            s = scores(q64, k64, 5.0, None, None, True)
            lse = log_sum(s, 1), log_sum(s, 0)
            loss = (g * lse[0] + h * lse[1]).sum()
            got = similarity_lse.backward(
                g, h, q, k, t, None, None, *(x.detach().float() for x in lse),
                normalize=True, need_query=True, need_key=True,
            )[:2]  # fmt: skip
        else:
            s = scores(q64, q64, 5.0, None, None, True)
            lse = log_sum(s.masked_fill(torch.eye(40, dtype=torch.bool), float("-inf")), 1)
            loss = (g * lse).sum()
            got = self_similarity_lse.backward(g, q, t, None, lse.detach().float(), normalize=True)[
                :1
            ]
    expected = torch.autograd.grad(loss, (q64, k64)[:towers])
    for x, dx, true_dx in zip((q64, k64), got, expected):
        size = x.detach().norm(dim=1, keepdim=True)
        # What float16 cannot store of dx itself (1 / 1e-4 · 5 · 40 fits) is not the kernels' error.
        assert_close(dx * size, true_dx * size, 2 * TOLERANCE[torch.float16], "dx̂")


@BOTH
def test_pair_sigmoid(dtype, normalize):
    pair_sigmoid_cases.check(40, 40, 10.0, -5.0, normalize=normalize, dtype=dtype, blocks="tiled")


@BOTH
def test_instance_spread(dtype, normalize):
    """A row's partner lies in another panel."""
    instance_spread_cases.check(20, 40, 5.0, 1.3, normalize=normalize, dtype=dtype, blocks="tiled")


@pytest.mark.parametrize("n, m", [(1, 1), (3, 10**6), (10**6, 3), (5000, 70), (10**6, 10**6)])
def test_panels_are_bounded(monkeypatch, n, m):
    monkeypatch.setattr(_panels, "PANEL", 4096)
    blocks = dict(BLOCK_X=128, BLOCK_Y=64)
    height, width = _panels.panel_shape(n, m, blocks, blocks)
    assert height % 128 == width % 128 == 0 and height * width <= 4096**2
    assert (height, width) == (4096, 4096) if min(n, m) > 4096 else min(height, width) <= 4992
    assert height >= min(n, 4096) and width >= min(m, 4096)
