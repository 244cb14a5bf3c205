"""bank_scores and nce against the official memory-bank code and the float64 formula."""

from __future__ import annotations

import pytest
import torch

import fastcl.functional as F
from fastcl import ops
from fastcl.ops.bank_scores import bank_scores_backward
from fastcl.reference.bank_scores import bank_scores
from fastcl.testing import relative_error, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "m", "d"),
    [
        (1, 1, 1, 1),
        (5, 33, 40, 100),
        (17, 129, 300, 64),  # more pairs than rows: ranges of a few rows each
        (7, 50, 300, 129),  # fewer
        (3, 2100, 8000, 64),  # pieces of a query
        (6, 7000, 20000, 250),  # ranges of the bank of several blocks
        (700, 17, 300, 250),  # groups that begin in the middle of a query
    ],
)
def test_matches_the_float64_formula(n: int, k: int, m: int, d: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, bank = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    index, t, cotangent = torch.randint(m, (n, k)), torch.tensor(3.0), torch.randn(n, k)
    ours = value_and_gradients(
        lambda q, t: F.bank_scores(q, bank, index, scale=t), (query, t), cotangent
    )
    truth = value_and_gradients(
        lambda q, t: bank_scores(q, bank.double(), index, t),
        (query.double(), t.double()),
        cotangent,
    )
    half = dtype != torch.float32
    for a, b, slack in zip(ours, truth, (2e-6, torch.finfo(dtype).eps if half else 1e-5, 5e-5)):
        assert relative_error(a, b) < slack


@pytest.mark.parametrize(
    ("n", "k", "m", "d"),
    [(40, 257, 3000, 100), (3, 2100, 8000, 64), (6, 7000, 20000, 250), (700, 17, 300, 250)],
)
def test_same_bits_for_any_number_of_threads(
    assert_same_bits, n: int, k: int, m: int, d: int
) -> None:
    torch.manual_seed(0)
    query, bank = torch.randn(n, d), torch.randn(m, d)
    index, cotangent = torch.randint(m, (n, k)), torch.randn(n, k)
    assert_same_bits(
        lambda: value_and_gradients(lambda q: F.bank_scores(q, bank, index), (query,), cotangent)
    )


@pytest.mark.parametrize("wrong", [-1, 9])
def test_the_kernel_refuses_an_index_outside(kernels, wrong: int) -> None:
    """Compiled code comes to it without the look at the index before."""
    query, bank, index = torch.randn(3, 16), torch.randn(9, 16), torch.tensor([[0], [wrong], [1]])
    with pytest.raises(IndexError, match="outside the bank"):
        ops.bank_scores(query, bank, index, torch.tensor(1.0))
    with pytest.raises(IndexError, match="outside the bank"):
        bank_scores_backward(torch.ones(3, 1), query, bank, index, torch.tensor(1.0))


def test_a_bank_in_half_precision_serves_float32_queries() -> None:
    query, bank, index = torch.randn(3, 16), torch.randn(9, 16).half(), torch.randint(9, (3, 4))
    scores = F.bank_scores(query, bank, index)
    torch.testing.assert_close(scores, F.bank_scores(query, bank.float(), index))


def test_float64_on_either_side_is_served() -> None:
    query, bank, index = torch.randn(3, 16), torch.randn(9, 16), torch.randint(9, (3, 4))
    scores = F.bank_scores(query, bank, index)
    for q, b in ((query.double(), bank), (query, bank.double())):
        torch.testing.assert_close(F.bank_scores(q, b, index).float(), scores)


@pytest.mark.parametrize("name", ["instdisc_nce_b8_d128_n200_k64"])
def test_nce_over_a_bank_is_instdisc(golden, name: str) -> None:
    """Two steps: the partition from the first batch, the bank updated after scoring."""
    file = golden(name)
    bank, data_size = file["mem_before"].clone(), int(file["param_N"])
    partition = None
    for step in (1, 2):
        x = file[f"s{step}_x"].requires_grad_()
        index = file[f"s{step}_idx"].long()
        scores = F.bank_scores(x, bank, index, scale=1 / float(file["param_T"]))
        if partition is None:
            partition = data_size * scores.detach().exp().mean()
            torch.testing.assert_close(
                partition.double(), file["s1_f64_Z"].double(), rtol=1e-5, atol=0
            )
        loss = F.nce(scores, data_size=data_size, partition=partition)
        assert loss.item() == pytest.approx(file[f"s{step}_f64_loss"].item(), rel=2e-6)
        loss.backward()
        assert relative_error(x.grad, file[f"s{step}_f64_grad_x"]) < 1e-5
        rows = file[f"s{step}_y"].long()
        F.bank_update_(bank, rows, x.detach(), momentum=float(file["param_momentum"]))
        truth = file[f"s{step}_f64_mem_rows_after"]
        torch.testing.assert_close(bank[rows].double(), truth, rtol=0, atol=1e-6)


def test_nce_survives_scores_that_overflow() -> None:
    scores = torch.tensor([[300.0, -300.0, 200.0]], requires_grad=True)
    loss = F.nce(scores, data_size=100, partition=50.0)
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all()
    assert loss.item() == pytest.approx(200 - torch.tensor(50.0 * 2 / 100).log().item(), rel=1e-5)


def test_bad_arguments_change_nothing_and_say_what_must_hold() -> None:
    query, bank, index = torch.randn(3, 4), torch.randn(5, 4), torch.randint(5, (3, 2))
    with pytest.raises(IndexError, match=r"in \[0, 5\)"):
        F.bank_scores(query, bank, index + 4)
    with pytest.raises(TypeError, match="integers"):
        F.bank_scores(query, bank, index.float())
    with pytest.raises(ValueError, match=r"index must be \(3, K\)"):
        F.bank_scores(query, bank, index[:2])
    with pytest.raises(ValueError, match="partition must be above 0"):
        F.nce(torch.randn(2, 3), data_size=10, partition=0.0)
    with pytest.raises(ValueError, match="K ≥ 1"):
        F.nce(torch.randn(2, 1), data_size=10, partition=1.0)
