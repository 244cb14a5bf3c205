"""Checks of label_similarity, for interp/ and gpu/."""

import torch
from similarity_cases import TOLERANCE, assert_close, rows_of, vector

from fastcl.kernels import label_similarity
from fastcl.reference import label_similarity as reference


def check(n, d, classes, *, normalize=True, dtype=torch.float32, device="cpu", short=False):
    """Means, counts and the gradient for a random cotangent, against float64 and autograd."""
    z = rows_of(n, d, dtype, device, 0, 1.0 if normalize else d**-0.5)
    generator = torch.Generator().manual_seed(1)
    labels = (7 * torch.randint(classes, (n,), generator=generator) - 9).to(device)
    grad = vector(n, device, 11)
    if short:  # below the floor of the norm, where there is no projection
        z[0], z[1] = 0, z[1] * 1e-14
    mean, others, rest = label_similarity.forward(z, labels, normalize=normalize)
    grad_z = label_similarity.backward(grad, z, labels, others, rest, normalize=normalize)
    assert [x.dtype for x in (mean, others, rest, grad_z)] == [
        *(torch.float32, torch.int64, torch.float32, dtype)
    ]
    leaf = z.double().cpu().requires_grad_()
    truth, count, _ = reference.forward(leaf, labels.cpu(), normalize=normalize)
    assert torch.equal(others.cpu(), count)
    assert_close(mean, truth.detach(), 3e-6, "mean")
    (expected,) = torch.autograd.grad((truth * grad.double().cpu()).sum(), leaf)
    ordinary = 2 if short else 0  # the short rows' gradients are 1e12 times as large
    assert_close(grad_z[ordinary:], expected[ordinary:], TOLERANCE[dtype], "grad_z", 1e-3)
    if short:
        assert_close(grad_z[:2], expected[:2], TOLERANCE[dtype], "gradients of short rows")
    return mean, others, rest, grad_z


def check_nothing_left(device):
    z, labels = torch.empty(0, 5, device=device), torch.empty(0, dtype=torch.int64, device=device)
    mean, others, rest = label_similarity.forward(z, labels, normalize=True)
    assert mean.shape == others.shape == (0,) and rest.shape == (0, 5)
    grad_z = label_similarity.backward(mean, z, labels, others, rest, normalize=True)
    assert grad_z.shape == (0, 5)
