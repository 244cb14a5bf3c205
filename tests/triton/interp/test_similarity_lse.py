"""The similarity kernels in Triton's interpreter, against the formula in float64."""

import pytest
import torch
from similarity_cases import (
    check_mean,
    check_similarity,
    ids_of,
    rows_of,
    vector,
)

from fastcl.kernels import configs, similarity_lse

REDUCTIONS = {"rows": (True, False), "columns": (False, True), "both": (True, True)}
# 37 × 50: several ragged blocks each way; 64 × 32: none ragged; 3 × 90: one block of rows, split
# keys; 1 × 1: everything at once. D = 40 is padded to 64, D = 100 goes in two blocks.
SHAPES = [(37, 50, 40), (64, 32, 64), (3, 90, 100), (1, 1, 1)]


def pair(n, m, d, dtype=torch.float32, spread=1.0):
    return rows_of(n, d, dtype, "cpu", 0, spread), rows_of(m, d, dtype, "cpu", 1, spread)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("n, m, d", SHAPES)
def test_float32_matches_formula(n, m, d, normalize, reduce):
    rows, columns = REDUCTIONS[reduce]
    scale = 9.0 if normalize else 0.2
    check_similarity(*pair(n, m, d), scale, normalize=normalize, rows=rows, columns=columns)


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
def test_float16_matches_formula(normalize, reduce):
    rows, columns = REDUCTIONS[reduce]
    q, k = pair(37, 50, 40, torch.float16)
    scale = 9.0 if normalize else 0.2
    check_similarity(q, k, scale, normalize=normalize, rows=rows, columns=columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_d_in_several_blocks_matches_formula(dtype):
    check_similarity(*pair(20, 35, 72, dtype), 9.0, normalize=True, blocks="tiled")


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("n, m, d", SHAPES)
def test_mean_key_matches_formula(n, m, d, normalize):
    check_mean(*pair(n, m, d), 9.0 if normalize else 0.2, normalize=normalize)


def test_mean_key_in_float16_and_in_several_blocks_of_d():
    check_mean(*pair(37, 50, 40, torch.float16), 9.0, normalize=True)
    check_mean(*pair(20, 35, 72), 9.0, normalize=True, blocks="tiled")


@pytest.mark.parametrize("scale", [60.0, -60.0, 0.0])
def test_scales_that_need_a_maximum(scale):
    """2 |t| log₂ e beyond what is safe without one; negative; and none at all."""
    q, k = pair(37, 50, 40)
    check_similarity(q, k, scale, normalize=True, tolerance=3e-5)
    check_mean(q, k, scale, normalize=True)


@pytest.mark.parametrize("scale", [1e-3, 9.0, 60.0])
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
def test_one_processor_makes_long_loops(monkeypatch, normalize, scale):
    """Several tiles for each program, the last ragged. With all scores near 0, a row of padding
    would weigh as much as a real one."""
    monkeypatch.setattr(configs, "multiprocessors", lambda tensor: 1)
    q, k = pair(69, 130, 40, spread=1.0 if normalize else 0.3)
    check_similarity(q, k, scale, normalize=normalize, tolerance=6e-5)
    check_similarity(q, k, scale, normalize=normalize, columns=False, tolerance=6e-5)
    check_mean(q, k, scale, normalize=normalize, tolerance=6e-5)


def test_ids_leave_pairs_out():
    q, k = pair(37, 50, 40)
    ids = dict(query_ids=ids_of(37, 5, "cpu", 2), key_ids=ids_of(50, 5, "cpu", 3))
    check_similarity(q, k, 9.0, normalize=True, **ids)
    check_similarity(q, k, 0.2, normalize=False, columns=False, **ids)
    check_mean(q, k, 9.0, normalize=True, **ids)


def test_nothing_left_is_minus_infinity_with_zero_gradient():
    q, k = pair(37, 50, 40)
    query_ids, key_ids = torch.zeros(37, dtype=torch.int64), torch.zeros(50, dtype=torch.int64)
    query_ids[5] = 1  # the only row that keeps anything
    row_lse, column_lse, grad_query, *_ = check_similarity(
        q, k, 9.0, normalize=True, query_ids=query_ids, key_ids=key_ids
    )
    assert row_lse.isfinite().sum() == 1 and column_lse.isfinite().all()
    assert grad_query[0].abs().max() == 0
    row_lse, _, grad_query, grad_key, grad_scale = check_similarity(
        q, k, 9.0, normalize=True, query_ids=key_ids[:37], key_ids=key_ids
    )
    assert (row_lse == float("-inf")).all() and grad_scale == 0
    assert not grad_query.any() and not grad_key.any()
    check_mean(q, k, 9.0, normalize=True, query_ids=query_ids, key_ids=key_ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_rows_of_zeros(dtype):
    q, k = pair(37, 50, 40, dtype)
    q[7] = 0
    k[11] = 0
    if dtype == torch.float32:
        # r = 1e12 multiplies a zero row's gradient, as in torch: compare the others with it out.
        grads = check_similarity(q, k, 9.0, normalize=True)[2:4]
        assert all(g.isfinite().all() for g in grads)
        assert grads[0][7].abs().max() > 1e9
    with configs.override():
        t = torch.tensor(9.0)
        row_lse, _ = similarity_lse.forward(
            q, k, t, None, None, normalize=True, rows=True, columns=False
        )
        grad_query, grad_key, _ = similarity_lse.backward(
            torch.ones(37), None, q, k, t, None, None, row_lse, None,
            normalize=True, need_query=True, need_key=True,
        )  # fmt: skip
    others = torch.arange(37) != 7, torch.arange(50) != 11
    assert grad_query[others[0]].isfinite().all() and grad_key[others[1]].isfinite().all()
    check_mean(q, k, 9.0, normalize=True)


def test_rows_of_norm_100():
    """Scores of ±10⁴: an exponent of that size is known to 10⁴ · 2⁻²⁴ in float32."""
    q = torch.nn.functional.normalize(rows_of(37, 40, torch.float32, "cpu", 0)) * 100
    k = torch.nn.functional.normalize(rows_of(50, 40, torch.float32, "cpu", 1)) * 100
    check_similarity(q, k, 1.0, normalize=False, tolerance=4e-3)


def test_columns_far_below_every_row_are_not_lost():
    """All scores of one column lie 200 below the others of their row, far beyond float32."""
    v = torch.randn(40, generator=torch.Generator().manual_seed(0))
    v = 10 * v / v.norm()
    q, k = v.repeat(37, 1), v.repeat(50, 1)
    q += 0.01 * rows_of(37, 40, torch.float32, "cpu", 0)
    k[41] = -k[41]
    _, column_lse, *_ = check_similarity(q, k, 1.0, normalize=False, tolerance=1e-4)
    assert column_lse[41] < -90


def test_many_launches_fold_into_one_sum(monkeypatch):
    monkeypatch.setattr(similarity_lse, "TILES_PER_LAUNCH", 1)
    check_similarity(*pair(37, 100, 40), 60.0, normalize=True, tolerance=3e-5)


def test_shipped_blocks():
    """The blocks of the table instead of small ones."""
    q, k = pair(130, 70, 100)
    check_similarity(q, k, 9.0, normalize=True, blocks="shipped")
    check_mean(q, k, 9.0, normalize=True, blocks="shipped")


def test_gradients_that_are_not_needed_are_not_made():
    q, k = pair(20, 30, 24)
    t = torch.tensor(5.0)
    row_lse, _ = similarity_lse.forward(
        q, k, t, None, None, normalize=True, rows=True, columns=False
    )
    results = {}
    for need in [(True, True), (True, False), (False, True), (False, False)]:
        results[need] = similarity_lse.backward(
            vector(20, "cpu", 4), None, q, k, t, None, None, row_lse, None,
            normalize=True, need_query=need[0], need_key=need[1],
        )  # fmt: skip
        assert (results[need][0] is not None, results[need][1] is not None) == need
    full = results[True, True]
    for need, (grad_query, grad_key, grad_scale) in results.items():
        assert grad_query is None or torch.equal(grad_query, full[0])
        assert grad_key is None or torch.equal(grad_key, full[1])
        assert torch.allclose(grad_scale, full[2], rtol=1e-4), need


def test_bfloat16_is_refused_here():
    """Triton's interpreter multiplies its bit patterns: better no answer than that one."""
    q = torch.ones(4, 16, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="bfloat16"):
        similarity_lse.forward(
            q, q, torch.tensor(1.0), None, None, normalize=True, rows=True, columns=False
        )
