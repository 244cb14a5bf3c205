"""The similarity kernels as compiled, in every type: values, bounds, races, repeatability."""

import pytest
import torch
from similarity_cases import check_mean, check_similarity, ids_of, rows_of

from fastcl.kernels import configs

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
IDS = ["float32", "float16", "bfloat16"]


def pair(n, m, d, dtype):
    return rows_of(n, d, dtype, "cuda", 0), rows_of(m, d, dtype, "cuda", 1)


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_both_directions_match_formula(dtype, normalize):
    check_similarity(*pair(37, 50, 40, dtype), 9.0 if normalize else 0.2, normalize=normalize)


@pytest.mark.parametrize("rows", [True, False], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_one_direction_matches_formula(dtype, rows):
    q, k = pair(37, 50, 40, dtype)
    check_similarity(q, k, 9.0, normalize=True, rows=rows, columns=not rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_mean_key_matches_formula(dtype):
    check_mean(*pair(37, 50, 40, dtype), 9.0, normalize=True)
    check_mean(*pair(3, 90, 72, dtype), 0.2, normalize=False, blocks="tiled")


def test_d_in_several_blocks_matches_formula():
    check_similarity(*pair(20, 35, 72, torch.bfloat16), 9.0, normalize=True, blocks="tiled")


def test_scale_that_needs_a_maximum():
    check_similarity(*pair(37, 50, 40, torch.bfloat16), -60.0, normalize=True, tolerance=2e-2)


def test_ids_and_rows_with_nothing_left():
    q, k = pair(37, 50, 40, torch.bfloat16)
    query_ids, key_ids = (
        ids_of(37, 2, "cuda", 2),
        torch.zeros_like(ids_of(50, 2, "cuda", 3)) + (1 << 40),
    )
    ids = dict(query_ids=query_ids, key_ids=key_ids)
    row_lse, *_ = check_similarity(q, k, 9.0, normalize=True, **ids)
    assert 0 < row_lse.isfinite().sum() < 37
    check_mean(q, k, 9.0, normalize=True, **ids)


def test_shipped_blocks():
    check_similarity(*pair(130, 70, 100, torch.bfloat16), 9.0, normalize=True, blocks="shipped")


def test_the_same_bits_every_time():
    q, k = pair(37, 50, 40, torch.bfloat16)
    first = check_similarity(q, k, 9.0, normalize=True)
    second = check_similarity(q, k, 9.0, normalize=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("scale", [1e-3, 60.0])
def test_one_processor_makes_long_loops(monkeypatch, scale):
    """Several tiles for each program, the last ragged."""
    monkeypatch.setattr(configs, "multiprocessors", lambda tensor: 1)
    q, k = pair(69, 130, 40, torch.bfloat16)
    check_similarity(q, k, scale, normalize=True, tolerance=2e-2)
    check_mean(q, k, scale, normalize=True, tolerance=2e-2)
