"""fastcl.compat.lightly's SwAV, DINO and negative cosine against lightly's."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastcl.compat import FallbackWarning
from fastcl.compat import lightly as ours

pytest.importorskip("lightly")
from lightly import loss as theirs
from lightly.loss.swav_loss import sinkhorn

DTYPES = [torch.float32, torch.float64, torch.bfloat16]

# ---- SwAV ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("n, k", [(1, 5), (8, 1), (17, 33)])
def test_sinkhorn(draw, n, k, iterations, dtype):
    scores = draw(n, k).clamp(-1, 1)
    truth = sinkhorn(scores, iterations, 0.1)
    result = ours.sinkhorn(scores.to(dtype), iterations, 0.1)
    assert result.dtype == dtype and result.shape == (n, k)
    tolerance = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(result.double(), truth, rtol=tolerance, atol=tolerance)


def test_sinkhorn_does_not_overflow():
    scores = torch.tensor([[60.0, 0.0], [0.0, 60.0]])
    assert sinkhorn(scores).isnan().any()
    assert ours.sinkhorn(scores).equal(torch.eye(2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("high", [1, 2, 3])
@pytest.mark.parametrize("low", [0, 1, 6])
@pytest.mark.parametrize("queue", [False, True])
def test_swav(compare, draw, high, low, queue, dtype):
    if high + low == 1:
        pytest.skip("one crop: NaN, below")
    n, k = 11, 20
    crops = [draw(n, k).clamp(-1, 1) for _ in range(high + low)]
    queues = [draw(30, k).clamp(-1, 1) for _ in range(high if queue else 0)]
    for arguments in ((), (0.2, 0, 0.1), (0.1, 1, 0.5)):

        def call(loss, *tensors):
            return loss(
                list(tensors[:high]),
                list(tensors[high : high + low]),
                list(tensors[high + low :]) if queue else None,
            )

        pair = compare(theirs.SwaVLoss(*arguments), ours.SwaVLoss(*arguments), dtype)
        result = pair.step(call, crops + queues)
        assert result.shape == (1,)


def test_swav_of_one_crop_is_nan(draw):
    for module in (theirs, ours):
        assert module.SwaVLoss()([draw(3, 4)], []).isnan().tolist() == [True]


def test_swav_subloss(compare, draw):
    pair = compare(theirs.SwaVLoss(0.3), ours.SwaVLoss(0.3), torch.float32)
    pair.step(
        lambda loss, z, q: loss.subloss(z, q),
        (draw(5, 7), draw(5, 7).softmax(1)),
        needs=(True, False),
    )


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
@pytest.mark.parametrize("high, low", [([], []), ([(3, 4), (2, 4)], []), ([(3, 4)], [(3, 5)])])
def test_swav_errors_are_lightlys(high, low):
    errors = []
    for module in (theirs, ours):
        with pytest.raises(Exception) as caught:
            module.SwaVLoss()([torch.randn(s) for s in high], [torch.randn(s) for s in low])
        errors.append((caught.type, str(caught.value)))
    assert errors[0] == errors[1]


# ---- DINO ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("teachers, students", [(1, 2), (2, 1), (2, 2), (2, 6), (3, 2)])
def test_dino_over_steps(compare, draw, teachers, students, dtype):
    k = 13
    arguments = (k, 0.02, 0.07, 4, 0.2, 0.8)
    pair = compare(
        theirs.DINOLoss(*arguments).to(dtype), ours.DINOLoss(*arguments).to(dtype), dtype
    )
    for step in range(6):
        views = [draw(5, k) for _ in range(teachers + students)]

        def call(loss, *tensors, epoch=step):
            return loss(list(tensors[:teachers]), list(tensors[teachers:]), epoch=epoch)

        pair.step(call, views, needs=[False] * teachers + [True] * students)
    assert list(pair.ours.state_dict()) == ["center"]


@pytest.mark.parametrize(
    "given",
    [{}, {"teacher_temp": 0.09}, {"epoch": 0}, {"epoch": 9}, {"teacher_temp": 0.5, "epoch": 1}],
)
@pytest.mark.parametrize("warmup", [0, 1, 5])
def test_dino_teacher_temperature(compare, draw, given, warmup):
    arguments = (7, 0.01, 0.06, warmup)
    pair = compare(theirs.DINOLoss(*arguments), ours.DINOLoss(*arguments), torch.float32)
    views = [draw(4, 7) for _ in range(4)]
    needs = [False] * 2 + [True] * 2
    pair.step(lambda loss, *x: loss([*x[:2]], [*x[2:]], **given), views, needs=needs)


def test_dino_teacher_with_a_gradient_runs_lightlys_code(draw):
    views = [draw(3, 5).float() for _ in range(4)]
    gradients = []
    for module in (theirs, ours):
        leaves = [x.clone().requires_grad_() for x in views]
        loss = module.DINOLoss(5)
        if module is ours:
            with pytest.warns(FallbackWarning, match="the teacher needs a gradient"):
                value = loss(leaves[:2], leaves[2:])
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # said once
                loss(leaves[:2], leaves[2:])
        else:
            value = loss(leaves[:2], leaves[2:])
        value.backward()
        gradients.append([x.grad for x in leaves])
    torch.testing.assert_close(*gradients)


def test_dino_loads_lightlys_checkpoint_and_back(draw):
    reference, loss = theirs.DINOLoss(6), ours.DINOLoss(6)
    reference.update_center(draw(2, 3, 6).float())
    loss.load_state_dict(reference.state_dict(), strict=True)
    assert loss.center.equal(reference.center)
    loss.update_center(draw(2, 6).float())  # 2-D, as lightly's tests do
    reference.load_state_dict(loss.state_dict(), strict=True)


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
def test_dino_of_one_output_is_exactly_0(draw):
    """Its tests compare such a loss with 0 to 1e-8, which a kernel's rounding can exceed."""
    views = [draw(3, 1).float() for _ in range(6)]
    assert theirs.DINOLoss(1)(views[:2], views) == ours.DINOLoss(1)(views[:2], views) == 0


def test_dino_wrong_arguments(draw):
    with pytest.raises(ValueError, match="Unknown mode 'median'"):
        ours.DINOLoss(4, center_mode="median")
    loss = ours.DINOLoss(4)
    with pytest.raises(ValueError, match="at least two views"):
        loss([draw(2, 4).float()], [draw(2, 4).float()])
    assert not loss.center.any(), "a loss that raised has not moved the centre"


# ---- NegativeCosineSimilarity --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, other, dim", [((8, 5), (8, 5), 1), ((8, 5), (8, 5), 0), ((4, 6, 3), (4, 6, 3), 1),
                          ((4, 6, 3), (4, 6, 3), -1), ((8, 5), (1, 5), 1)],
)  # fmt: skip
@pytest.mark.parametrize("eps", [1e-8, 0.5])
def test_negative_cosine_similarity(compare, draw, shape, other, dim, eps, dtype):
    pair = compare(
        theirs.NegativeCosineSimilarity(dim, eps), ours.NegativeCosineSimilarity(dim, eps), dtype
    )
    pair.step(lambda loss, x, y: loss(x, y), (draw(*shape), draw(*other)))
