"""What holds for any input: invariances, marginals, limits."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastcl.functional as F

settings.register_profile(
    "fastcl",
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fastcl")

rows, features = st.integers(1, 70), st.integers(1, 40)
temperatures = st.floats(0.02, 2.0)
seeds = st.integers(0, 2**31 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64])


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(a: Tensor, b: Tensor, size: float = 1.0) -> None:
    """Equal to a few float32 roundings of numbers of this size."""
    torch.testing.assert_close(a, b, rtol=1e-5, atol=4e-6 * max(size, 1.0), check_dtype=False)


@given(n=rows, m=rows, d=features, scale=st.floats(-20, 20), seed=seeds, dtype=dtypes)
def test_lse_does_not_depend_on_the_order_of_keys(n, m, d, scale, seed, dtype) -> None:  # type: ignore[no-untyped-def]
    q, k = normal(seed, n, d, dtype=dtype), normal(seed + 1, m, d, dtype=dtype)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    rows, columns = F.similarity_lse(q, k, scale=scale, reduce="both")
    permuted_rows, permuted_columns = F.similarity_lse(q, k[order], scale=scale, reduce="both")
    size = abs(scale) * float((q @ k.T).abs().max())
    assert_near(permuted_rows, rows, size)
    assert_near(permuted_columns, columns[order], size)


@given(n=rows, m=rows, d=features, shift=st.floats(-300, 300), seed=seeds)
def test_a_constant_on_every_similarity_shifts_the_lse(n, m, d, shift, seed) -> None:  # type: ignore[no-untyped-def]
    q, k = normal(seed, n, d), normal(seed + 1, m, d)
    q1, k1 = torch.cat((q, torch.ones(n, 1)), 1), torch.cat((k, torch.full((m, 1), shift)), 1)
    assert_near(F.similarity_lse(q1, k1), F.similarity_lse(q, k) + shift, 300.0 + 40.0)


@given(n=st.integers(2, 40), d=features, temperature=temperatures, seed=seeds)
def test_losses_follow_a_permutation_of_the_images(n, d, temperature, seed) -> None:  # type: ignore[no-untyped-def]
    x, y = normal(seed, n, d), normal(seed + 1, n, d)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    labels = torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))
    options = dict(temperature=temperature, reduction="none")
    for loss in (F.nt_xent, F.dcl, F.instance_spread):
        assert_near(
            loss(x[order], y[order], **options).view(2, n),
            loss(x, y, **options).view(2, n)[:, order],
            1 / temperature,
        )
    assert_near(
        F.info_nce(x[order], y[order], **options),
        F.info_nce(x, y, **options)[order],
        1 / temperature,
    )
    assert_near(
        F.sup_con(x[order], labels[order], **options),
        F.sup_con(x, labels, **options)[order],
        1 / temperature,
    )


@given(n=st.integers(2, 60), d=features, temperature=temperatures, seed=seeds)
def test_identical_rows_give_the_log_of_the_candidates(n, d, temperature, seed) -> None:  # type: ignore[no-untyped-def]
    x = normal(seed, 1, d).add(0.1).expand(n, d)
    options = dict(temperature=temperature)
    expected = {
        F.nt_xent(x, x, **options): math.log(2 * n - 1),
        F.info_nce(x, x, **options): math.log(n),
        F.info_nce(x, x, x[:1].expand(5, d), **options): math.log(6),
        F.dcl(x, x, **options): math.log(2 * n - 2),
        F.clip(x, x, logit_scale=1 / temperature): math.log(n),
        F.sup_con(x, torch.zeros(n, dtype=torch.int64), **options): math.log(n - 1),
    }
    for loss, value in expected.items():
        assert loss.item() == pytest.approx(value, abs=2e-5 / temperature)


@given(n=rows, k=st.integers(1, 50), shift=st.floats(-500, 500), seed=seeds)
def test_soft_cross_entropy_ignores_a_constant_on_a_row_of_logits(n, k, shift, seed) -> None:  # type: ignore[no-untyped-def]
    logits, targets = normal(seed, n, k), normal(seed + 1, n, k).softmax(1)
    assert_near(
        F.soft_cross_entropy(logits + shift, targets, reduction="none"),
        F.soft_cross_entropy(logits, targets, reduction="none"),
        abs(shift) / 8,
    )


@given(
    n=rows, k=st.integers(1, 50), iterations=st.integers(1, 5), shift=st.floats(-50, 50), seed=seeds
)
def test_sinkhorn_rows_sum_to_one_and_ignore_a_constant(n, k, iterations, shift, seed) -> None:  # type: ignore[no-untyped-def]
    scores = normal(seed, n, k)
    codes = F.sinkhorn(scores, epsilon=0.3, iterations=iterations)
    assert (codes >= 0).all()
    assert_near(codes.sum(1), torch.ones(n))
    assert_near(F.sinkhorn(scores + shift, epsilon=0.3, iterations=iterations), codes, 10.0)


@given(n=st.integers(2, 40), k=st.integers(2, 40), seed=seeds)
def test_sinkhorn_converges_to_equal_shares(n, k, seed) -> None:  # type: ignore[no-untyped-def]
    scores = normal(seed, n, k)
    gaps = [
        float((F.sinkhorn(scores, epsilon=1.0, iterations=i).sum(0) * k / n - 1).abs().max())
        for i in (1, 4, 60)
    ]
    assert gaps[-1] < 1e-3
    assert all(later <= earlier + 1e-5 for earlier, later in pairwise(gaps))


@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5),
    momentum=st.floats(0, 1),
    seed=seeds,
)
def test_ema_between_its_ends(shapes, momentum, seed) -> None:  # type: ignore[no-untyped-def]
    old = [normal(seed + i, *shape) for i, shape in enumerate(shapes)]
    new = [normal(seed - i - 1, *shape) for i, shape in enumerate(shapes)]

    def updated(m: float) -> list[Tensor]:
        targets = [x.clone() for x in old]
        F.ema_update_(targets, new, momentum=m)
        return targets

    assert all(map(torch.equal, updated(1.0), old))
    assert all(map(torch.equal, updated(0.0), new))
    for x, a, b in zip(updated(momentum), old, new):
        assert_near(x, momentum * a + (1 - momentum) * b, 4.0)


@given(n=rows, d=features, seed=seeds, by=st.floats(0.01, 100))
def test_normalised_losses_ignore_the_length_of_rows(n, d, seed, by) -> None:  # type: ignore[no-untyped-def]
    x, y = normal(seed, n, d), normal(seed + 1, n, d)
    for loss in (
        lambda a, b: F.nt_xent(a, b, temperature=0.2),
        lambda a, b: F.clip(a, b, logit_scale=5.0),
        lambda a, b: F.siglip(a, b, logit_scale=5.0, logit_bias=-5.0),
        lambda a, b: F.negative_cosine(a, b, eps=1e-12),
    ):
        assert_near(loss(by * x, y / by), loss(x, y), 5.0)
