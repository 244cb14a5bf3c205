"""Checks of own_negatives, for interp/ and gpu/."""

import torch
from similarity_cases import TOLERANCE, assert_close, rows_of, vector

from fastcl.kernels import own_negatives
from fastcl.reference import own_negatives as reference


def check(n, k, d, t=10.0, *, normalize=True, dtype=torch.float32, device="cpu", zeros=False):
    """lse, and all gradients for a random cotangent, against float64 and autograd."""
    spread = 1.0 if normalize else d**-0.5
    query = rows_of(n, d, dtype, device, 0, spread)
    negatives = rows_of(n * k, d, dtype, device, 1, spread).view(n, k, d)
    if zeros:
        query[0], negatives[1], negatives[-1, 0] = 0, 0, 0
    scale, grad = torch.tensor(t, device=device), vector(n, device, 11)
    lse = own_negatives.forward(query, negatives, scale, normalize=normalize)
    given = grad, query, negatives, scale, lse
    needed = dict(need_query=True, need_negatives=True)
    grads = own_negatives.backward(*given, normalize=normalize, **needed)
    assert [x.dtype for x in (lse, *grads)] == [torch.float32, dtype, dtype, torch.float32]
    leaves = [x.detach().double().cpu().requires_grad_() for x in (query, negatives, scale)]
    truth = reference.forward(*leaves, normalize=normalize)
    assert_close(lse, truth, 3e-6, "lse")
    expected = torch.autograd.grad((truth * grad.double().cpu()).sum(), leaves)
    floor = abs(t) / 100
    assert_close(grads[0], expected[0], TOLERANCE[dtype], "grad_query", floor)
    assert_close(grads[1], expected[1], TOLERANCE[dtype], "grad_negatives", floor)
    size = grad.double().abs().sum().item()  # of a sum of terms of both signs
    assert abs(grads[2].item() - expected[2].item()) <= TOLERANCE[dtype] * size, "grad_scale"
    only = own_negatives.backward(
        *given, normalize=normalize, need_query=False, need_negatives=False
    )
    assert only[:2] == (None, None) and torch.equal(only[2], grads[2])
    return lse, *grads


def check_nothing_left(device):
    """No negatives, and no queries."""
    query, t = rows_of(3, 8, torch.float32, device, 0), torch.tensor(2.0, device=device)
    negatives = query.new_empty(3, 0, 8)
    lse = own_negatives.forward(query, negatives, t, normalize=True)
    assert torch.equal(lse.cpu(), torch.full((3,), -torch.inf))
    needed = dict(normalize=True, need_query=True, need_negatives=True)
    grads = own_negatives.backward(torch.ones_like(lse), query, negatives, t, lse, **needed)
    assert not grads[0].any() and grads[1].shape == (3, 0, 8) and grads[2] == 0
    none = query[:0], query.new_empty(0, 5, 8)
    lse = own_negatives.forward(*none, t, normalize=True)
    grads = own_negatives.backward(lse, *none, t, lse, **needed)
    assert lse.shape == (0,) and grads[0].shape == (0, 8) and grads[1].shape == (0, 5, 8)
    assert grads[2] == 0
