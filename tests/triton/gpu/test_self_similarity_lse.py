"""self_similarity_lse as compiled, in every type: values, bounds, races, repeatability."""

import pytest
import torch
from similarity_cases import check_self_similarity, ids_of, rows_of

from fastcl.kernels import configs, similarity_lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
def test_matches_formula(dtype, normalize):
    z = rows_of(70, 40, dtype, "cuda", 0)
    check_self_similarity(z, 9.0 if normalize else 0.2, normalize=normalize)


@pytest.mark.parametrize("blocks", ["tiled", "shipped"])
def test_other_blocks_match_formula(blocks):
    check_self_similarity(
        rows_of(135, 72, torch.bfloat16, "cuda", 0), 9.0, normalize=True, blocks=blocks
    )


def test_ids_and_rows_with_nothing_left():
    z = rows_of(70, 40, torch.bfloat16, "cuda", 0)
    check_self_similarity(z, 9.0, ids=ids_of(70, 3, "cuda", 1), normalize=True)
    lse, _ = check_self_similarity(z, 9.0, ids=ids_of(70, 1, "cuda", 1), normalize=True)
    assert (lse == float("-inf")).all()


def test_many_launches_and_lost_sums(monkeypatch):
    monkeypatch.setattr(similarity_lse, "TILES_PER_LAUNCH", 1)
    v = torch.randn(40, generator=torch.Generator().manual_seed(0))
    z = (10 * v / v.norm()).repeat(67, 1)
    z[66] = -z[66]
    z = (z.cuda() + 0.1 * rows_of(67, 40, torch.float32, "cuda", 0)).to(torch.bfloat16)
    lse, _ = check_self_similarity(z, 1.0, normalize=False, tolerance=2e-2)
    assert lse[66] < -90


def test_the_same_bits_every_time():
    z = rows_of(70, 40, torch.bfloat16, "cuda", 0)
    first = check_self_similarity(z, 9.0, normalize=True)
    second = check_self_similarity(z, 9.0, normalize=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_one_processor_makes_long_loops(monkeypatch):
    monkeypatch.setattr(configs, "multiprocessors", lambda tensor: 1)
    z = rows_of(137, 40, torch.bfloat16, "cuda", 0)
    check_self_similarity(z, 9.0, normalize=True)
