"""self_similarity_lse against the float64 formula: each pair of blocks once, for both its sides."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

import fastcl.functional as F
from fastcl.testing import GRADIENT_SLACK, LOSS_SLACK, assert_as_accurate_as

pytestmark = pytest.mark.usefixtures("backend")

# One pair; one feature; a ragged block; two, three and four blocks of 96, ragged features.
SIZES = [(2, 5), (5, 1), (63, 100), (97, 16), (230, 513), (300, 60), (385, 33)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sizes(case: object) -> str:
    if isinstance(case, tuple):
        return "-".join(f"{letter}{size}" for letter, size in zip("ND", case))
    return str(case).removeprefix("torch.")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def gradient_slack(dtype: torch.dtype) -> float:
    """Low precision: the weights and the result are rounded once, half an epsilon each."""
    return GRADIENT_SLACK + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)


def plain(z: Tensor, t: Tensor, ids: Tensor | None, normalize: bool) -> Tensor:
    """What users write, in the input's dtype."""
    z = unit(z) if normalize else z
    left_out = torch.eye(len(z), dtype=torch.bool)
    if ids is not None:
        left_out = left_out | (ids[:, None] == ids)
    return (t.to(z.dtype) * (z @ z.T)).masked_fill(left_out, -torch.inf).logsumexp(1)


def check(z: Tensor, scale: float, *, normalize: bool = True, ids: Tensor | None = None) -> None:
    """The accuracy rule, for the log-sum-exps and both gradients under random cotangents."""
    results = {}
    for name, dtype in (("fused", z.dtype), ("plain", z.dtype), ("truth", torch.float64)):
        leaf = z.detach().to(dtype).requires_grad_()
        t = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        if name == "fused":
            lse = F.self_similarity_lse(leaf, scale=t, ids=ids, normalize=normalize)
        else:
            lse = plain(leaf, t, ids, normalize)
        cotangent = random(len(z), seed=7).to(lse.dtype)
        results[name] = [lse, *torch.autograd.grad(lse, [leaf, t], cotangent)]
    for i, (fused, same, truth) in enumerate(zip(*results.values())):
        slack = gradient_slack(z.dtype) if i else LOSS_SLACK
        if i == 2:  # a sum of terms of size |g_i| that may cancel: relative to ‖g‖
            slack *= max(1.0, float(cotangent.norm() / truth.abs().clamp_min(1e-30)))
        tensors = (x.detach() for x in (fused, same, truth))
        assert_as_accurate_as(*tensors, slack=slack, name=f"output {i}")


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=sizes)
@pytest.mark.parametrize("size", SIZES, ids=sizes)
def test_matches_float64(size: tuple[int, int], dtype: torch.dtype, normalize: bool) -> None:
    if size[1] == 1 and normalize:
        pytest.skip("a unit row of one feature has no gradient: nothing to be relative to")
    check(random(*size, dtype=dtype), 2.0 if normalize else 0.3, normalize=normalize)


@pytest.mark.parametrize("scale", [1 / 0.01, 1 / 0.07, -3.0, 0.0], ids=lambda t: f"t{t:.3g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=sizes)
def test_any_temperature(dtype: torch.dtype, scale: float) -> None:
    z = random(400, 64, dtype=dtype)
    z[200:] = z[200:] * 0.3 + z[:200]  # two views of one image are close
    check(z, scale)


@pytest.mark.parametrize("scale", [2.0, 100.0])
def test_equal_ids_are_left_out(scale: float) -> None:
    z = random(390, 33)
    check(z, scale, ids=torch.arange(390) % 7)
    check(z, scale, ids=torch.arange(195).repeat(2))


def test_rows_of_norm_100_need_the_maximum() -> None:
    # Scores up to 10⁴: exp overflows and underflows by thousands of orders of magnitude.
    check(100 * unit(random(230, 24)), 1.0, normalize=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=sizes)
@pytest.mark.parametrize("n", [2, 130])
def test_identical_rows_give_log_of_candidates(n: int, dtype: torch.dtype) -> None:
    z = random(1, 48, dtype=dtype).expand(n, 48)
    lse = F.self_similarity_lse(z, scale=20.0, normalize=True)
    torch.testing.assert_close(lse, torch.full((n,), 20 + math.log(n - 1)), rtol=0, atol=1e-5)


def test_orthogonal_rows_give_log_of_candidates() -> None:
    lse = F.self_similarity_lse(torch.eye(50), scale=30.0, normalize=True)
    torch.testing.assert_close(lse, torch.full((50,), math.log(49)))


def test_zero_rows_have_zero_scores() -> None:
    z = random(60, 20)
    z[[3, 40]] = 0
    z.requires_grad_()
    lse = F.self_similarity_lse(z, scale=7.0, normalize=True)
    torch.testing.assert_close(lse[[3, 40]], torch.full((2,), math.log(59)))
    lse[:3].sum().backward()
    assert z.grad is not None and z.grad.isfinite().all()


def test_rows_without_candidates() -> None:
    one = random(1, 8).requires_grad_()
    lse = F.self_similarity_lse(one, scale=2.0, normalize=True)
    assert lse.tolist() == [-math.inf]
    lse.sum().backward()
    assert one.grad is not None and (one.grad == 0).all()
    z = random(120, 8).requires_grad_()
    lse = F.self_similarity_lse(z, scale=2.0, ids=torch.zeros(120, dtype=torch.long))
    assert (lse == -torch.inf).all()
    lse.backward(random(120, seed=2))
    assert z.grad is not None and (z.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=sizes)
def test_a_nan_is_visible(dtype: torch.dtype) -> None:
    z = random(130, 40, dtype=dtype)
    z[99, 7] = float("nan")
    z.requires_grad_()
    lse = F.self_similarity_lse(z, scale=2.0, normalize=True)
    assert lse.isnan().all()  # it is a candidate of every row
    lse.sum().backward()
    assert z.grad is not None and z.grad.isnan().any(1).all()


def test_same_bits_for_any_number_of_threads(assert_same_bits) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        z = random(900, 40, dtype=dtype)

        def run(z: Tensor = z) -> list[Tensor]:
            leaf = z.clone().requires_grad_()
            t = torch.tensor(9.0, requires_grad=True)
            lse = F.self_similarity_lse(leaf, scale=t, normalize=True)
            return [lse, *torch.autograd.grad(lse, [leaf, t], random(900, seed=3))]

        assert_same_bits(run)
