"""Checks of the kernels that work on a memory bank, for interp/ and gpu/."""

import torch
from streaming import GRAD_SLACK, LOSS_SLACK, assert_near, gradients, randn

from fastcl.kernels import bank, bank_scores
from fastcl.reference import bank as reference_bank
from fastcl.reference import bank_scores as reference_bank_scores


def index_of(*shape, size, device, seed=3):
    """Rows of a bank of `size`, int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(size, shape, generator=generator).to(device)


def check_update(
    size, d, batch, dtype=torch.float32, features_dtype=torch.float32, device="cpu", momentum=0.5
):
    """Rows named in the index against float64; every other row keeps its bits."""
    old = torch.nn.functional.normalize(randn(size, d)).to(dtype)
    index = index_of(batch, size=size, device="cpu")
    x = randn(batch, d, seed=1, dtype=features_dtype)
    truth, plain = old.double(), old.float().clone()
    reference_bank.update_(truth, index, x.double(), momentum=momentum)
    reference_bank.update_(plain, index, x.float(), momentum=momentum)
    memory = old.clone().to(device)
    bank.update_(memory, index.to(device), x.to(device), momentum=momentum)
    assert_near(memory, truth, 1e-6, plain)
    untouched = torch.ones(size, dtype=torch.bool).index_fill(0, index, False)
    assert torch.equal(memory.cpu()[untouched], old[untouched])
    return memory


def check_last_duplicate_wins(device, batch):
    """The row's earlier features count for nothing, whatever lies between. batch > bank.SCAN."""
    middle = batch // 2 + 7
    old, x = randn(7, 20, device=device), randn(batch, 20, seed=1, device=device)
    index = torch.full((batch,), 4, device=device)
    index[[0, middle]] = 2  # its duplicate lies in another block of the scan
    memory = old.clone()
    bank.update_(memory, index, x, momentum=0.25)
    for row, last in ((4, batch - 1), (2, middle)):
        expected = 0.25 * old[row].double() + 0.75 * x[last].double()
        assert_near(memory[row], (expected / expected.norm()).cpu(), 1e-6)


def check_row_of_zeros(device):
    """Nothing to normalise: 0, not NaN."""
    memory = torch.zeros(3, 16, device=device)
    bank.update_(
        memory, torch.tensor([1], device=device), torch.zeros(1, 16, device=device), momentum=0.5
    )
    assert torch.equal(memory, torch.zeros_like(memory))


def check_scores(
    n, k, d, size, dtype=torch.float32, bank_dtype=torch.float32, device="cpu", scale=14.0
):
    """Scores, and gradients for a random cotangent, against float64."""
    query = randn(n, d, dtype=dtype)
    memory = torch.nn.functional.normalize(randn(size, d, seed=1)).to(bank_dtype)
    index = index_of(n, k, size=size, device="cpu")
    t, grad = torch.tensor(scale), randn(n, k, seed=9)
    on_device = [a.to(device) for a in (query, memory, index, t)]
    scores = bank_scores.forward(*on_device)
    grad_query, grad_scale = bank_scores.backward(grad.to(device), *on_device)
    assert (scores.dtype, grad_query.dtype, grad_scale.shape) == (torch.float32, dtype, ())

    formula = reference_bank_scores.bank_scores
    q64, m64, t64, g64 = (a.double() for a in (query, memory, t, grad))
    assert_near(scores, formula(q64, m64, index, t64), LOSS_SLACK)
    truth = gradients(lambda q, t: formula(q, m64, index, t), g64, q64, t64)
    assert_near(grad_query, truth[0], GRAD_SLACK)
    # Terms of both signs: relative to what is added up.
    size_of_terms = (g64 * formula(q64, m64, index, torch.tensor(1.0))).abs().sum()
    assert abs(grad_scale.item() - truth[1].item()) <= 2e-6 * size_of_terms
    return scores, grad_query, grad_scale
