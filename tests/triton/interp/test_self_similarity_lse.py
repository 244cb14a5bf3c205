"""self_similarity_lse in Triton's interpreter, against the formula in float64."""

import pytest
import torch
from similarity_cases import check_self_similarity, ids_of, rows_of

from fastcl.kernels import configs, similarity_lse


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("n, d", [(2, 3), (37, 40), (64, 64), (97, 100)])
def test_float32_matches_formula(n, d, normalize):
    z = rows_of(n, d, torch.float32, "cpu", 0)
    check_self_similarity(z, 9.0 if normalize else 0.2, normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("blocks", ["whole", "tiled", "shipped"])
def test_blocks_and_half_precision(blocks, dtype):
    n, d = (150, 100) if blocks == "shipped" else (70, 72)
    check_self_similarity(rows_of(n, d, dtype, "cpu", 0), 9.0, normalize=True, blocks=blocks)


def test_one_row_has_nothing_left():
    lse, grad = check_self_similarity(rows_of(1, 8, torch.float32, "cpu", 0), 9.0, normalize=True)
    assert lse == float("-inf") and not grad.any()


@pytest.mark.parametrize("classes", [1, 4])
def test_ids_leave_pairs_out(classes):
    z = rows_of(70, 40, torch.float32, "cpu", 0)
    lse, grad = check_self_similarity(z, 9.0, ids=ids_of(70, classes, "cpu", 1), normalize=True)
    if classes == 1:
        assert (lse == float("-inf")).all() and not grad.any()


def test_rows_of_zeros_and_identical_rows():
    z = rows_of(70, 40, torch.float32, "cpu", 0)
    z[3] = z[66] = z[20]
    check_self_similarity(z, 9.0, normalize=True)
    z[5] = 0
    lse, grad = check_self_similarity(z, 9.0, normalize=True)
    assert lse.isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("tiles", [1, 2])
def test_many_launches_fold_into_one_sum(monkeypatch, tiles):
    monkeypatch.setattr(similarity_lse, "TILES_PER_LAUNCH", tiles)
    check_self_similarity(
        rows_of(130, 40, torch.float32, "cpu", 0), 60.0, normalize=True, tolerance=3e-5
    )


@pytest.mark.parametrize("tiles", [1, 128])
@pytest.mark.parametrize("at", [0, 66])
def test_a_row_far_below_every_other_is_not_lost(monkeypatch, at, tiles):
    monkeypatch.setattr(similarity_lse, "TILES_PER_LAUNCH", tiles)
    v = torch.randn(40, generator=torch.Generator().manual_seed(0))
    z = (10 * v / v.norm()).repeat(67, 1) + 0.01 * rows_of(67, 40, torch.float32, "cpu", 0)
    z[at] = -z[at]
    lse, _ = check_self_similarity(z, 1.0, normalize=False, tolerance=1e-4)
    assert lse[at] < -90


@pytest.mark.parametrize("scale", [1e-3, 9.0, 60.0])
def test_one_processor_makes_long_loops(monkeypatch, scale):
    monkeypatch.setattr(configs, "multiprocessors", lambda tensor: 1)
    z = rows_of(137, 40, torch.float32, "cpu", 0)
    check_self_similarity(z, scale, normalize=True, tolerance=6e-5)
