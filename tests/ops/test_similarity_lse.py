"""similarity_lse against the float64 formula: rows, columns, both, and keys without a gradient."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize as unit

import fastcl.functional as F
from fastcl import _C
from fastcl.testing import GRADIENT_SLACK, LOSS_SLACK, assert_as_accurate_as

pytestmark = pytest.mark.usefixtures("backend")

# One pair; one feature; ragged tiles; ragged features; blocks that are not full; long rows.
SIZES = [(1, 1, 5), (5, 3, 1), (63, 129, 100), (97, 1, 16), (300, 500, 60), (130, 97, 513)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sizes(case: object) -> str:
    if isinstance(case, tuple):
        return "-".join(f"{letter}{size}" for letter, size in zip("NMD", case))
    return str(case).removeprefix("torch.")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def gradient_slack(dtype: torch.dtype) -> float:
    """Low precision: the weights and the result are rounded once, half an epsilon each."""
    return GRADIENT_SLACK + (0 if dtype == torch.float32 else torch.finfo(dtype).eps)


def cancellation(cotangents: list[Tensor], scale_gradient: Tensor) -> float:
    """Σ_i g_i ∂lse_i/∂t has terms of size |g_i| that may cancel: its slack is relative to ‖g‖."""
    return max(1.0, float(torch.cat(cotangents).norm() / scale_gradient.abs().clamp_min(1e-30)))


def plain(q: Tensor, k: Tensor, t: Tensor, keep: Tensor | None, normalize: bool) -> list[Tensor]:
    """What users write, in the inputs' dtype."""
    if normalize:
        q, k = unit(q), unit(k)
    s = t.to(q.dtype) * (q @ k.T)
    if keep is not None:
        s = s.masked_fill(~keep, -torch.inf)
    return [s.logsumexp(1), s.logsumexp(0)]


def check(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    normalize: bool = True,
    ids: tuple[Tensor, Tensor] | None = None,
    reduce: str = "both",
    frozen_keys: bool = False,
) -> None:
    """The accuracy rule, for the log-sum-exps and every gradient under random cotangents."""
    keep = None if ids is None else ids[0][:, None] != ids[1]
    sides = {"rows": [0], "columns": [1], "both": [0, 1]}[reduce]
    results = {}
    for name, dtype in (("fused", q.dtype), ("plain", q.dtype), ("truth", torch.float64)):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k)]
        t = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
        if frozen_keys:
            leaves[1].requires_grad_(False)
        if name == "fused":
            query_ids, key_ids = ids or (None, None)
            lse = F.similarity_lse(
                *leaves,
                scale=t,
                normalize=normalize,
                query_ids=query_ids,
                key_ids=key_ids,
                reduce=reduce,
            )
            lse = list(lse) if reduce == "both" else [lse]
        else:
            lse = [plain(*leaves, t, keep, normalize)[side] for side in sides]
        cotangents = [random(*x.shape, seed=7).to(x.dtype) for x in lse]
        wanted = [x for x in (*leaves, t) if x.requires_grad]
        results[name] = [*lse, *torch.autograd.grad(lse, wanted, cotangents)]
    for i, (fused, same, truth) in enumerate(zip(*results.values())):
        slack = LOSS_SLACK if i < len(sides) else gradient_slack(q.dtype)
        if i >= len(sides) and truth.dim() == 0:
            slack *= cancellation(cotangents, truth)
        tensors = (x.detach() for x in (fused, same, truth))
        assert_as_accurate_as(*tensors, slack=slack, name=f"output {i}")


@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("dtype", DTYPES, ids=sizes)
@pytest.mark.parametrize("size", SIZES, ids=sizes)
def test_matches_float64(size: tuple[int, int, int], dtype: torch.dtype, normalize: bool) -> None:
    n, m, d = size
    if d == 1 and normalize:
        pytest.skip("a unit row of one feature has no gradient: nothing to be relative to")
    q, k = random(n, d, dtype=dtype), random(m, d, dtype=dtype, seed=1)
    check(q, k, 5.0 if normalize else 0.3, normalize=normalize)


@pytest.mark.parametrize("frozen_keys", [False, True], ids=["keys-learn", "keys-frozen"])
@pytest.mark.parametrize("scale", [1 / 0.01, 1 / 0.07, -3.0, 0.0], ids=lambda t: f"t{t:.3g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=sizes)
def test_any_temperature(dtype: torch.dtype, scale: float, frozen_keys: bool) -> None:
    q, k = random(140, 64, dtype=dtype), random(450, 64, dtype=dtype, seed=1)
    k[:140] = k[:140] * 0.3 + q  # some pairs are close, as in training
    check(q, k, scale, reduce="rows" if frozen_keys else "both", frozen_keys=frozen_keys)


@pytest.mark.parametrize("reduce", ["rows", "columns"])
def test_each_side_alone(reduce: str) -> None:
    check(random(63, 40), random(200, 40, seed=1), 10.0, reduce=reduce)


@pytest.mark.parametrize("reduce", ["rows", "columns", "both"])
@pytest.mark.parametrize("scale", [2.0, 100.0])
def test_equal_ids_are_left_out(scale: float, reduce: str) -> None:
    q, k = random(150, 33), random(410, 33, seed=1)
    ids = torch.arange(150) % 7, torch.arange(410) % 9
    check(q, k, scale, ids=ids, reduce=reduce)
    check(q, k, scale, ids=(torch.arange(150), torch.arange(410)), reduce=reduce)
    if reduce == "rows":
        check(q, k, scale, ids=ids, reduce=reduce, frozen_keys=True)


@pytest.mark.parametrize("frozen_keys", [False, True], ids=["keys-learn", "keys-frozen"])
def test_rows_of_norm_100_need_the_maximum(frozen_keys: bool) -> None:
    # Scores up to 10⁴: exp overflows and underflows by thousands of orders of magnitude.
    q, k = 100 * unit(random(120, 24)), 100 * unit(random(300, 24, seed=1))
    reduce = "rows" if frozen_keys else "both"
    check(q, k, 1.0, normalize=False, reduce=reduce, frozen_keys=frozen_keys)


def test_a_row_far_below_the_others_keeps_its_sum() -> None:
    # Row 0 of s is −300, the others +300: a maximum shared by rows would flush row 0 to log 0.
    q = torch.ones(200, 1)
    q[0] = -1
    rows, columns = F.similarity_lse(q, torch.full((150, 1), 300.0), reduce="both")
    torch.testing.assert_close(rows[0], torch.tensor(math.log(150) - 300))
    torch.testing.assert_close(rows[1:], torch.full((199,), math.log(150) + 300))
    torch.testing.assert_close(columns, torch.full((150,), math.log(199) + 300))


@pytest.mark.parametrize("dtype", DTYPES, ids=sizes)
def test_identical_rows_give_log_of_candidates(dtype: torch.dtype) -> None:
    x = random(1, 48, dtype=dtype).expand(130, 48)
    rows, columns = F.similarity_lse(x, x[:77], scale=20.0, normalize=True, reduce="both")
    # float32's rounding of a unit norm, times 20.
    torch.testing.assert_close(rows, torch.full((130,), 20 + math.log(77)), rtol=0, atol=1e-5)
    torch.testing.assert_close(columns, torch.full((77,), 20 + math.log(130)), rtol=0, atol=1e-5)


def test_orthogonal_rows() -> None:
    rows = F.similarity_lse(torch.eye(50), torch.eye(50), scale=3.0, normalize=True)
    torch.testing.assert_close(rows, torch.full((50,), math.log(math.exp(3) + 49)))


@pytest.mark.parametrize("dtype", DTYPES, ids=sizes)
def test_a_zero_row_has_zero_scores_and_a_finite_gradient(dtype: torch.dtype) -> None:
    q, k = random(5, 20, dtype=dtype), random(40, 20, seed=1, dtype=dtype)
    q[2] = 0
    q.requires_grad_()
    rows = F.similarity_lse(q, k, scale=7.0, normalize=True)
    torch.testing.assert_close(rows[2].item(), math.log(40), rtol=1e-6, atol=0)
    (rows * torch.tensor([1.0, 1.0, 1e-12, 1.0, 1.0])).sum().backward()
    assert q.grad is not None and q.grad.isfinite().all()
    # Below the floor of 1e-12 the norm is a constant: 1e-12 · 7 · mean key / 1e-12.
    mean_key = 7 * unit(k.float()).mean(0)
    torch.testing.assert_close(q.grad[2].float(), mean_key, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("factor", [1e-10, 1e15], ids=["tiny", "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=sizes)
def test_normalised_rows_of_any_length(dtype: torch.dtype, factor: float) -> None:
    check(random(40, 36, dtype=dtype) * factor, random(70, 36, dtype=dtype, seed=1), 8.0)


@pytest.mark.parametrize("frozen_keys", [False, True], ids=["keys-learn", "keys-frozen"])
def test_rows_without_candidates(frozen_keys: bool) -> None:
    q, k = random(100, 8).requires_grad_(), random(120, 8, seed=1).requires_grad_(not frozen_keys)
    query_ids = torch.zeros(100, dtype=torch.long)
    query_ids[50:] = 1
    rows = F.similarity_lse(q, k, scale=5.0, query_ids=query_ids, key_ids=torch.zeros(120).long())
    assert (rows[:50] == -torch.inf).all() and rows[50:].isfinite().all()
    rows.backward(random(100, seed=3))
    assert q.grad is not None and (q.grad[:50] == 0).all() and (q.grad[50:] != 0).all()
    assert frozen_keys or k.grad.isfinite().all()


def test_no_keys_at_all() -> None:
    q = random(5, 8).requires_grad_()
    k = torch.empty(0, 8, requires_grad=True)
    rows, columns = F.similarity_lse(q, k, scale=2.0, normalize=True, reduce="both")
    assert (rows == -torch.inf).all() and columns.shape == (0,)
    rows.backward(torch.ones(5))
    assert q.grad is not None and (q.grad == 0).all() and k.grad.shape == (0, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=sizes)
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
def test_a_broken_input_is_visible(value: float, dtype: torch.dtype, normalize: bool) -> None:
    q, k = random(120, 40, dtype=dtype), random(110, 40, seed=1, dtype=dtype)
    q[99, 7] = value
    q.requires_grad_(), k.requires_grad_()
    rows, columns = F.similarity_lse(q, k, normalize=normalize, reduce="both")
    assert not rows[99].isfinite()
    assert rows[:99].isfinite().all() and rows[100:].isfinite().all()
    assert not columns.isfinite().any() or value == float("inf")
    (rows.sum() + columns.sum()).backward()
    assert q.grad is not None and q.grad[99].isnan().any()


def test_inputs_of_mixed_precision_promote() -> None:
    q, k = random(20, 30, dtype=torch.bfloat16), random(30, 30, seed=1)
    mixed = F.similarity_lse(q, k, scale=4.0)
    assert torch.equal(mixed, F.similarity_lse(q.float(), k, scale=4.0))


def test_same_bits_for_any_number_of_threads(assert_same_bits) -> None:
    cases = [(torch.float32, 500, 900), (torch.bfloat16, 500, 900), (torch.float32, 64, 3000)]
    for dtype, n, m in cases:
        q, k = random(n, 40, dtype=dtype), random(m, 40, dtype=dtype, seed=1)

        def both(q: Tensor = q, k: Tensor = k) -> list[Tensor]:
            leaves = [x.clone().requires_grad_() for x in (q, k)]
            t = torch.tensor(9.0, requires_grad=True)
            lse = F.similarity_lse(*leaves, scale=t, normalize=True, reduce="both")
            grads = torch.autograd.grad(lse, [*leaves, t], [random(*x.shape, seed=3) for x in lse])
            return [*lse, *grads]

        def frozen(q: Tensor = q, k: Tensor = k) -> list[Tensor]:
            leaf = q.clone().requires_grad_()
            lse = F.similarity_lse(leaf, k, scale=9.0, normalize=True)
            return [lse, *torch.autograd.grad(lse, leaf, random(*lse.shape, seed=3))]

        assert_same_bits(both)
        assert_same_bits(frozen)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str, backend: str) -> None:
    if backend != "cpp" or isa not in _C.kernels.supported_isas() or isa == _C.ISA:
        pytest.skip("needs the kernels of another instruction set")
    files = [Path(__file__), Path(__file__).with_name("test_self_similarity_lse.py")]
    chosen = "cpp and (N300 or norm_100 or without or (ids and 100.0))"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files, "-k", chosen],
        env={**os.environ, "FASTCL_ISA": isa, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-3000:] + run.stderr[-2000:]


MEMORY = """
import resource, torch, fastcl.functional as F
def step(n):
    x, y = (torch.randn(n, 128, requires_grad=True) for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    F.clip(x, y, logit_scale=20.0).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
step(256)
print(step(8192))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads ru_maxrss in KiB")
def test_memory_is_linear(backend: str) -> None:
    if backend != "cpp":
        pytest.skip("the promise of the kernels")
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    # The matrix would be 268 MB and torch holds several. An eighth of 400 MB at 65,536 rows.
    assert int(run.stdout) < 50_000, f"{run.stdout} KiB"
