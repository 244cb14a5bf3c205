"""Checks of pair_sigmoid, for interp/ and gpu/."""

import torch
from similarity_cases import TILED, TOLERANCE, WHOLE, assert_close, rows_of, vector

from fastcl.kernels import configs, pair_sigmoid
from fastcl.reference import pair_sigmoid as reference

# The small blocks of the similarity kernels, under these kernels' names.
NAMES = {
    "pair_sigmoid_loss": "similarity_rows",
    "pair_sigmoid_gradient": "similarity_gradient",
    "pair_sigmoid_weights": "similarity_weights",
    "panel_sums": "panel_sums",
}
BLOCKS = {
    "whole": {name: WHOLE[like] for name, like in NAMES.items()},
    "tiled": {name: TILED[like] for name, like in NAMES.items()},
    "shipped": {},
}


def check(n, d, t, b, *, normalize, dtype=torch.float32, device="cpu", blocks="whole"):
    """The losses, and all gradients for a random cotangent, against float64 and autograd."""
    spread = 1.0 if normalize else d**-0.5
    image = rows_of(n, d, dtype, device, 0, spread)
    text = (rows_of(n, d, dtype, device, 1, spread) + image) / 2
    scale, bias = torch.tensor(t, device=device), torch.tensor(b, device=device)
    grad = vector(n, device, 11)
    with configs.override(**BLOCKS[blocks]):
        loss = pair_sigmoid.forward(image, text, scale, bias, normalize=normalize)
        grads = pair_sigmoid.backward(grad, image, text, scale, bias, normalize=normalize)
    assert (grads[0].dtype, grads[1].dtype, grads[2].shape, grads[3].shape) == (
        dtype,
        dtype,
        (),
        (),
    )
    leaves = [x.detach().double().cpu().requires_grad_() for x in (image, text, scale, bias)]
    truth = reference.pair_sigmoid(*leaves, normalize=normalize)
    assert_close(loss, truth, 3e-6, "loss")
    expected = torch.autograd.grad((truth * grad.double().cpu()).sum(), leaves)
    tolerance, floor = TOLERANCE[dtype], abs(t) / 100
    assert_close(grads[0], expected[0], tolerance, "grad_image", floor)
    assert_close(grads[1], expected[1], tolerance, "grad_text", floor)
    # Sums of terms of both signs: relative to the sum of their sizes.
    size = (truth.detach() * grad.double().cpu()).abs().sum() + n
    assert abs(grads[2].item() - expected[2].item()) <= tolerance * size, "grad_scale"
    assert abs(grads[3].item() - expected[3].item()) <= tolerance * size, "grad_bias"
    return loss, *grads


def check_small_probabilities(device):
    """All terms near 6e-6, as SigLIP's first ones: 1 + exp a would keep few digits of exp a."""
    eye = torch.eye(40, device=device)
    scale, bias = torch.tensor(24.0, device=device), torch.tensor(-12.0, device=device)
    loss = pair_sigmoid.forward(eye, eye, scale, bias, normalize=True)
    inputs = (a.double().cpu() for a in (eye, eye, scale, bias))
    assert_close(loss, reference.pair_sigmoid(*inputs, normalize=True), 1e-5, "loss")
