"""instance_spread against the official code's outputs and the float64 formula."""

from __future__ import annotations

import pytest
import torch

import fastcl.functional as F
from fastcl.reference.instance_spread import instance_spread
from fastcl.testing import relative_error, value_and_gradients

pytestmark = pytest.mark.usefixtures("backend")

FILES = ["n8_d128", "n37_d96_t005", "negm05_n11_d96", "late_n13_d100", "saturated_n6_d32_t005"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("detach", [True, False], ids=["detach", "true-gradient"])
def test_is_invaspread(golden, name: str, detach: bool) -> None:
    """Also late in training and saturated, where the official float32 code is off or NaN."""
    file = golden(f"invaspread_{name}")
    x = file["x"].requires_grad_()
    loss = F.instance_spread(
        *x.chunk(2),
        temperature=float(file["param_T"]),
        negative_weight=float(file["param_negM"]),
        detach_columns=detach,
        normalize=False,
    )
    assert loss.item() == pytest.approx(file["f64_loss"].item(), rel=3e-6)
    loss.backward()
    truth = file["f64_grad_x" if detach else "f64_grad_x_nodetach"]
    assert relative_error(x.grad, truth) < 5e-6


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weight", [1.0, 1.7])
@pytest.mark.parametrize(("n", "d"), [(2, 2), (33, 100), (130, 64)])
def test_matches_the_float64_formula(n: int, d: int, weight: float, normalize: bool) -> None:
    torch.manual_seed(0)
    z, t, cotangent = torch.randn(2 * n, d), torch.tensor(0.4), torch.randn(2 * n)
    z = z / d**0.5
    for detach in (True, False):
        ours = value_and_gradients(
            lambda z, t, detach=detach: F.instance_spread(
                *z.chunk(2),
                temperature=t,
                negative_weight=weight,
                detach_columns=detach,
                normalize=normalize,
                reduction="none",
            ),
            (z, t),
            cotangent,
        )
        truth = value_and_gradients(
            lambda z, t, detach=detach: instance_spread(
                z, 1 / t, negative_weight=weight, normalize=normalize, detach_columns=detach
            ),
            (z.double(), t.double()),
            cotangent,
        )
        for name, a, b in zip(("loss", "dz", "dt"), ours, truth):
            assert relative_error(a, b) < 2e-5, (name, detach)


def test_one_negative_dominates_without_cancellation() -> None:
    """The closest row is another image: 1 − p of a negative, not of the partner, is tiny."""
    z = torch.eye(6)
    z[4] = z[0] + 1e-3 * z[5]
    ours = value_and_gradients(lambda z: F.instance_spread(*z.chunk(2), temperature=0.06), (z,))
    truth = value_and_gradients(
        lambda z: instance_spread(
            z,
            torch.tensor(1 / 0.06, dtype=torch.float64),
            negative_weight=1.0,
            normalize=True,
            detach_columns=True,
        ).mean(),
        (z.double(),),
    )
    for a, b in zip(ours, truth):
        assert relative_error(a, b) < 5e-6


@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("weight", [1.0, 1.7])
@pytest.mark.parametrize("views", ["identical", "aligned", "swapped", "opposed"])
def test_any_temperature(views: str, weight: float, temperature: float) -> None:
    """Scores differ by up to 400: 1 − p and p / (1 − p) leave float32 where their product is 1."""
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(9, 24))
    partner = {
        "identical": x,
        "aligned": torch.nn.functional.normalize(x + 0.05 * torch.randn_like(x)),
        "swapped": x.roll(1, 0),  # each row's own partner is far, another image is the same
        "opposed": -x.roll(1, 0),
    }[views]
    z = torch.cat((x, partner))
    for detach in (True, False):
        ours = value_and_gradients(
            lambda z, t, detach=detach: F.instance_spread(
                *z.chunk(2),
                temperature=t,
                negative_weight=weight,
                detach_columns=detach,
                reduction="none",
            ),
            (z, torch.tensor(temperature)),
        )
        truth = value_and_gradients(
            lambda z, t, detach=detach: instance_spread(
                z, 1 / t, negative_weight=weight, normalize=True, detach_columns=detach
            ),
            (z.double(), torch.tensor(temperature).double()),
        )
        # A score of 1 / τ is itself rounded, and its exponential by as much.
        slack = 2e-5 + 1e-6 / temperature
        for name, a, b in zip(("loss", "dz", "dt"), ours, truth):
            error, size = (a - b).abs().max(), b.abs().max()
            assert a.isfinite().all() and error <= slack * size + 1e-36, (name, detach, error, size)


def test_a_tiny_loss_of_the_formula_is_the_closed_form() -> None:
    """n orthogonal images, twice: p_partner = 1 / (1 + m (2n − 2) e^(−1/τ))."""
    n, m, t = 5, 1.5, torch.tensor(80.0, dtype=torch.float64)
    z = torch.eye(n, dtype=torch.float64).repeat(2, 1)
    loss = instance_spread(z, t, negative_weight=m, normalize=True, detach_columns=True)
    others = m * (2 * n - 2) * (-t).exp()  # 1.4e-34
    expected = others.log1p() - m * (2 * n - 2) * torch.log1p(-(-t).exp() / (1 + others))
    torch.testing.assert_close(loss, expected.expand(2 * n), rtol=1e-12, atol=0)


@pytest.mark.parametrize("size", [30.0, 100.0])
def test_rows_of_any_length(size: float) -> None:
    """Raw rows of norm 100: scores of 10,000, which no exponential in float32 or float64 takes."""
    torch.manual_seed(0)
    z = size * torch.nn.functional.normalize(torch.randn(14, 8))
    ours = value_and_gradients(
        lambda z: F.instance_spread(*z.chunk(2), temperature=1.0, normalize=False), (z,)
    )
    truth = value_and_gradients(
        lambda z: instance_spread(
            z,
            torch.tensor(1.0, dtype=torch.float64),
            negative_weight=1.0,
            normalize=False,
            detach_columns=True,
        ).mean(),
        (z.double(),),
    )
    assert relative_error(ours[0], truth[0]) < 1e-5
    assert ours[1].isfinite().all() and relative_error(ours[1], truth[1]) < 1e-3


def test_a_single_image_has_nothing_to_learn() -> None:
    loss, dz = value_and_gradients(lambda z: F.instance_spread(*z.chunk(2)), (torch.randn(2, 5),))
    assert loss.abs() < 1e-6 and dz.abs().max() < 1e-6


def test_bad_arguments_say_what_must_hold() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="negative_weight must be above 0"):
        F.instance_spread(x, x, negative_weight=0.0)
    with pytest.raises(ValueError, match=r"must both be \(N, D\)"):
        F.instance_spread(x, x[:3])
