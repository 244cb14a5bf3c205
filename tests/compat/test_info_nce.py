"""fastcl.compat.info_nce against info-nce-pytorch."""

from __future__ import annotations

import pytest
import torch

from fastcl.compat import FallbackWarning
from fastcl.compat import info_nce as ours

theirs = pytest.importorskip("info_nce")

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def keys(draw, mode, n, m, d):
    if mode is None:
        return []
    return [draw(n, m, d) if mode == "paired" else draw(m, d)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", [None, "paired", "unpaired"])
@pytest.mark.parametrize("n, m, d", [(1, 1, 2), (1, 5, 7), (32, 17, 33), (5, 1, 3)])
def test_values_and_gradients(compare, draw, n, m, d, mode, reduction, dtype):
    for temperature in (0.05, 0.1, 2.0):
        arguments = (temperature, reduction, mode or "unpaired")
        pair = compare(theirs.InfoNCE(*arguments), ours.InfoNCE(*arguments), dtype)
        inputs = (draw(n, d), 3 * draw(n, d), *keys(draw, mode, n, m, d))
        pair.step(lambda loss, *x: loss(*x), inputs)


def test_defaults_and_the_function(draw):
    x, y, z = draw(6, 4), draw(6, 4), draw(9, 4)
    torch.testing.assert_close(ours.InfoNCE()(x, y, z), theirs.InfoNCE()(x, y, z))
    torch.testing.assert_close(ours.info_nce(x, y), theirs.info_nce(x, y))
    assert vars(ours.InfoNCE()).keys() == vars(theirs.InfoNCE()).keys()


def test_negatives_without_a_gradient(compare, draw):
    pair = compare(theirs.InfoNCE(), ours.InfoNCE(), torch.float32)
    inputs = (draw(16, 8), draw(16, 8), draw(40, 8))
    pair.step(lambda loss, *x: loss(*x), inputs, needs=(True, True, False))
    pair.step(lambda loss, *x: loss(*x), inputs, needs=(True, False, False))
    pair.step(lambda loss, *x: loss(*x), inputs, needs=(False, False, True))
    pair.step(lambda loss, *x: loss(*x), inputs, needs=(False, False, False))


def test_temperature_as_a_parameter(draw):
    gradients = []
    for module in (theirs, ours):
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(0)
        x, y = torch.randn(2, 8, 5, dtype=torch.float64)
        module.info_nce(x, y, temperature=temperature).backward()
        gradients.append(temperature.grad)
    torch.testing.assert_close(*gradients)


def test_negative_temperature_runs_the_packages_code(draw):
    x, y = draw(6, 4), draw(6, 4)
    with pytest.warns(FallbackWarning, match=r"fastcl\.compat\.info_nce\.info_nce"):
        result = ours.InfoNCE(-0.3)(x, y)
    torch.testing.assert_close(result, theirs.InfoNCE(-0.3)(x, y))


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
@pytest.mark.parametrize(
    "shapes, mode",
    [
        ([(3,), (3, 4)], "unpaired"),
        ([(3, 4), (3,)], "unpaired"),
        ([(3, 4), (4, 4)], "unpaired"),
        ([(3, 4), (3, 5)], "unpaired"),
        ([(3, 4), (3, 4), (7, 5)], "unpaired"),
        ([(3, 4), (3, 4), (3, 7, 4)], "unpaired"),
        ([(3, 4), (3, 4), (7, 4)], "paired"),
        ([(3, 4), (3, 4), (2, 7, 4)], "paired"),
        ([(3, 4), (3, 4), (3, 7, 5)], "paired"),
        ([(3, 4), (3, 4), (7, 4)], "shared"),
    ],
)
def test_errors_are_the_packages(shapes, mode):
    errors = []
    for module in (theirs, ours):
        with pytest.raises(Exception) as caught:
            module.InfoNCE(negative_mode=mode)(*(torch.randn(s) for s in shapes))
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
def test_unknown_reduction():
    for module in (theirs, ours):
        with pytest.raises(ValueError, match="is not a valid value for reduction"):
            module.InfoNCE(reduction="median")(torch.randn(3, 4), torch.randn(3, 4))
