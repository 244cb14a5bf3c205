"""Checks of instance_spread, for interp/ and gpu/."""

import torch
from similarity_cases import TILED, TOLERANCE, WHOLE, assert_close, rows_of, vector
from streaming import golden

from fastcl.kernels import configs, instance_spread
from fastcl.reference import instance_spread as reference

# The small blocks of the similarity kernels, under these kernels' names.
NAMES = {
    "instance_spread_shares": "similarity_rows",
    "instance_spread_loss": "similarity_rows",
    "instance_spread_gradient": "similarity_gradient",
    "instance_spread_weights": "similarity_weights",
    "panel_sums": "panel_sums",
}
BLOCKS = {
    "whole": {name: WHOLE[like] for name, like in NAMES.items()},
    "tiled": {name: TILED[like] for name, like in NAMES.items()},
    "shipped": {},
}


def check_rows(z, t, m, *, normalize, blocks="whole", tolerance=None):
    """Forward's five outputs, and the gradients of both conventions for a random cotangent."""
    tolerance = tolerance or TOLERANCE[z.dtype]
    scale, grad = torch.tensor(t, device=z.device), vector(len(z), z.device, 11)
    z64 = z.detach().double().cpu().requires_grad_()
    t64 = torch.tensor(t).double().requires_grad_()
    options = dict(negative_weight=m, normalize=normalize)
    with configs.override(**BLOCKS[blocks]):
        results = list(instance_spread.forward(z, scale, **options))
        loss, log_d, log_o, b, log_large = results
        _, true_log_d, true_log_o, true_b, true_log_large = reference.forward(
            z64.detach(), t64.detach(), **options
        )
        assert_close(log_d, true_log_d, 3e-6, "log_d")
        assert_close(log_o.exp(), true_log_o.exp(), 2e-5, "o")
        both, true_both = (
            x.double() + y.double().exp() for x, y in ((b, log_large), (true_b, true_log_large))
        )
        assert_close(both.log1p(), true_both.log1p(), 5e-5, "b")
        for detach in (True, False):
            truth = reference.instance_spread(z64, t64, detach_columns=detach, **options)
            assert_close(loss, truth, 5e-6, "loss", 1e-6)
            grads = instance_spread.backward(
                grad, z, scale, *results[1:5], detach_columns=detach, **options
            )
            expected = torch.autograd.grad((truth * grad.double().cpu()).sum(), (z64, t64))
            assert grads[0].dtype == z.dtype and grads[1].shape == ()
            assert_close(grads[0], expected[0], tolerance, "grad_z", 0.1 * abs(t))
            size = (truth.detach() * grad.double().cpu()).abs().sum() + len(z)
            assert abs(grads[1].item() - expected[1].item()) <= tolerance * size, "grad_scale"
            results += grads
    return results


def check(n, d, t, m, *, normalize, dtype=torch.float32, device="cpu", blocks="whole"):
    """Views of n images that resemble each other."""
    z = rows_of(n, d, dtype, device, 0, 1.0 if normalize else d**-0.5)
    other = z + 0.5 * rows_of(n, d, dtype, device, 1, 1.0 if normalize else d**-0.5)
    return check_rows(torch.cat([z, other]), t, m, normalize=normalize, blocks=blocks)


# What the official code computes, also late in training and saturated, where its own float32 is
# off or NaN.
FILES = ["n8_d128", "negm05_n11_d96", "late_n13_d100", "saturated_n6_d32_t005"]


def check_golden(name, device):
    file = golden(f"invaspread_{name}")
    z = file["x"].to(device)
    scale = torch.tensor(1 / float(file["param_T"]), device=device)
    options = dict(negative_weight=float(file["param_negM"]), normalize=False)
    with configs.override(**BLOCKS["whole"]):
        loss, *saved = instance_spread.forward(z, scale, **options)
        assert abs(loss.mean().item() / file["f64_loss"].item() - 1) < 3e-6
        grad = torch.full_like(loss, 1 / len(loss))
        for detach, key in ((True, "f64_grad_x"), (False, "f64_grad_x_nodetach")):
            grad_z, _ = instance_spread.backward(
                grad, z, scale, *saved, detach_columns=detach, **options
            )
            assert_close(grad_z, file[key], 8e-6, key)


def check_large_negative(device):
    """A negative that has nearly all of its row: 1 − p is 1e-9, far below p's rounding."""
    z = 0.1 * rows_of(6, 16, torch.float32, device, 0)
    z[4] = z[1]  # row 1's partner is row 7 mod 6 = 4: leave it, and make row 2 the largest
    z[2] = 5 * z[1] / z[1].norm()
    z[1] = 5 * z[1] / z[1].norm()
    results = check_rows(z, 1.0, 1.0, normalize=False, tolerance=1e-4)
    assert results[4].max() > 14  # log R


def check_small_temperature(device):
    """τ = 0.01: scores differ by up to 200, so that 1 − p and R are beyond float32."""
    x, y = (torch.nn.functional.normalize(rows_of(5, 16, torch.float32, device, i)) for i in (0, 1))
    near = x + 0.02 * y
    for partner in (x, near, x.roll(1, 0), -x.roll(1, 0)):
        check_rows(torch.cat([x, partner]), 100.0, 1.0, normalize=True, tolerance=3e-5)
