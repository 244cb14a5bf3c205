"""Sums by panels of weights as compiled: values, bounds, races, repeatability."""

import instance_spread_cases
import pair_sigmoid_cases
import pytest
import torch
from similarity_cases import check_self_similarity, check_similarity, ids_of, rows_of

from fastcl.kernels import _panels


@pytest.fixture(autouse=True)
def small_panels(monkeypatch):
    """Several each way, the last ones ragged."""
    monkeypatch.setattr(_panels, "PANEL", 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_two_towers(dtype):
    q, k = rows_of(20, 40, dtype, "cuda", 0), rows_of(40, 40, dtype, "cuda", 1)
    first = check_similarity(q, k, 9.0, normalize=True, blocks="tiled")
    second = check_similarity(q, k, 9.0, normalize=True, blocks="tiled")
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_ids_and_few_rows_whose_sums_are_split():
    q, k = (rows_of(n, 40, torch.bfloat16, "cuda", n) for n in (3, 70))
    ids = dict(query_ids=ids_of(3, 4, "cuda", 2), key_ids=ids_of(70, 4, "cuda", 3))
    check_similarity(q, k, 0.2, normalize=False, blocks="tiled", **ids)


def test_one_set_of_rows():
    check_self_similarity(
        rows_of(40, 40, torch.float32, "cuda", 0), -9.0, normalize=True, blocks="tiled"
    )


def test_other_weights():
    options = dict(normalize=True, dtype=torch.bfloat16, device="cuda", blocks="tiled")
    pair_sigmoid_cases.check(35, 40, 10.0, -5.0, **options)
    instance_spread_cases.check(18, 40, 5.0, 1.3, **options)
