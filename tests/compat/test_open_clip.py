"""fastcl.compat.open_clip against open_clip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcl.compat import FallbackWarning, patch
from fastcl.compat import open_clip as ours

pytest.importorskip("open_clip")
from open_clip import loss as theirs

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SIZES = [(1, 3), (2, 1), (7, 33), (64, 16)]


def features(draw, n, d):
    return [nn.functional.normalize(draw(n, d), dim=1) for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0, -3.0])
@pytest.mark.parametrize("n, d", SIZES)
def test_clip(compare, draw, n, d, scale, dtype):
    pair = compare(theirs.ClipLoss(), ours.ClipLoss(), dtype)
    # The scale's gradient is compared too, as a third input.
    scale = torch.tensor(scale, dtype=torch.float64)
    pair.step(lambda loss, *x: loss(*x), (*features(draw, n, d), scale))
    pair.step(lambda loss, *x: loss(*x), (2 * draw(n, d), draw(n, d), scale / 10))


@pytest.mark.parametrize("cache", [False, True])
def test_clip_options(compare, draw, cache):
    pair = compare(
        theirs.ClipLoss(cache_labels=cache), ours.ClipLoss(cache_labels=cache), torch.float32
    )
    for n in (4, 4, 6):
        pair.step(lambda loss, *x: loss(*x, 20.0), features(draw, n, 8))
        pair.step(lambda loss, *x: loss(*x, 20.0, 0.5), features(draw, n, 8))
        pair.step(
            lambda loss, *x: loss(*x, output_dict=True)["contrastive_loss"],
            (*features(draw, n, 8), torch.tensor(9.0), torch.tensor(-2.0)),
        )
        assert pair.ours.prev_num_logits == pair.theirs.prev_num_logits
        assert pair.ours.labels.keys() == pair.theirs.labels.keys()
    assert vars(pair.ours).keys() == vars(pair.theirs).keys()


def test_clip_scale_as_a_vector_of_one(compare, draw):
    pair = compare(theirs.ClipLoss(), ours.ClipLoss(), torch.float32)
    pair.step(lambda loss, *x: loss(*x), (*features(draw, 5, 8), torch.full((1,), 7.0)))


def test_clip_with_a_bias_matrix_runs_open_clips_code(compare, draw):
    pair = compare(theirs.ClipLoss(), ours.ClipLoss(), torch.float32, fused=False)
    with pytest.warns(FallbackWarning, match=r"fastcl\.compat\.open_clip\.ClipLoss"):
        pair.step(lambda loss, *x: loss(*x), (*features(draw, 5, 8), torch.tensor(7.0), draw(5, 5)))


def test_clip_logits_and_labels(draw):
    image, text = features(draw, 6, 8)
    for bias in (None, torch.tensor(0.5)):
        results = [m.ClipLoss().get_logits(image, text, 3.0, bias) for m in (theirs, ours)]
        torch.testing.assert_close(*results)
    results = [m.ClipLoss().get_ground_truth(image.device, 6) for m in (theirs, ours)]
    torch.testing.assert_close(*results)
    results = [
        m.ClipLoss(True, rank=2, world_size=3).get_ground_truth(image.device, 6)
        for m in (theirs, ours)
    ]
    torch.testing.assert_close(*results)


def test_subclasses_that_use_or_override_logits(draw):
    image, text = features(draw, 6, 8)

    class Distill(ours.ClipLoss):
        def forward(self, image, text, scale):
            per_image, per_text = self.get_logits(image, text, scale)
            labels = self.get_ground_truth(image.device, len(image))
            return nn.functional.cross_entropy(per_image + per_text, labels)

    per_image, per_text = theirs.ClipLoss().get_logits(image, text, 5.0)
    expected = nn.functional.cross_entropy(per_image + per_text, torch.arange(6))
    torch.testing.assert_close(Distill()(image, text, 5.0), expected)

    class Margin(ours.ClipLoss):
        def get_logits(self, image, text, scale, logit_bias=None):
            logits = scale * (image @ text.T - 0.1 * torch.eye(len(image)))
            return logits, logits.T

    logits = 5.0 * (image @ text.T - 0.1 * torch.eye(6))
    labels = torch.arange(6)
    expected = nn.functional.cross_entropy(logits, labels) / 2
    expected = expected + nn.functional.cross_entropy(logits.T, labels) / 2
    with pytest.warns(FallbackWarning, match="a subclass has its own"):
        torch.testing.assert_close(Margin()(image, text, 5.0), expected)


@pytest.mark.filterwarnings("ignore::fastcl.compat.FallbackWarning")
@pytest.mark.parametrize("shapes", [((3, 4), (5, 4)), ((3, 4), (3, 5)), ((3,), (3,))])
@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_errors_are_open_clips(shapes, name):
    errors = []
    for module in (theirs, ours):
        try:
            getattr(module, name)()(*(torch.randn(s) for s in shapes), 2.0, None)
            errors.append(None)
        except Exception as error:
            errors.append((type(error), str(error)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale, bias", [(10.0, -10.0), (1.0, 0.0), (100.0, -5.0)])
@pytest.mark.parametrize("n, d", SIZES)
def test_siglip(compare, draw, n, d, scale, bias, dtype):
    pair = compare(theirs.SigLipLoss(), ours.SigLipLoss(), dtype)
    scalars = (torch.tensor(scale).double(), torch.tensor(bias).double())
    pair.step(lambda loss, *x: loss(*x), (*features(draw, n, d), *scalars))
    pair.step(lambda loss, *x: loss(*x, scale, None), features(draw, n, d))
    pair.step(
        lambda loss, *x: loss(*x, output_dict=True)["contrastive_loss"],
        (draw(n, d), draw(n, d), scalars[0] / 10, scalars[1]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_siglip_block_of_another_process(compare, draw, dtype):
    """What SigLipLoss computes for the texts of the other processes."""
    pair = compare(theirs.SigLipLoss(), ours.SigLipLoss(), dtype)
    inputs = (*features(draw, 9, 8), torch.tensor(10.0), torch.tensor(-10.0))
    pair.step(lambda loss, *x: loss._loss(*x, negative_only=True), inputs)


def test_siglip_logits_and_labels(draw):
    image, text = features(draw, 6, 8)
    for bias in (None, 0.5):
        results = [m.SigLipLoss().get_logits(image, text, 3.0, bias) for m in (theirs, ours)]
        torch.testing.assert_close(*results)
    for negative in (False, True):
        results = [
            m.SigLipLoss().get_ground_truth(image.device, torch.float32, 6, negative)
            for m in (theirs, ours)
        ]
        torch.testing.assert_close(*results)
    assert vars(ours.SigLipLoss()).keys() == vars(theirs.SigLipLoss()).keys()
    with pytest.raises(AssertionError):
        ours.SigLipLoss(dist_impl="ring")


def test_autocast(draw):
    image, text = (x.float() for x in features(draw, 8, 16))
    with torch.autocast("cpu", torch.bfloat16):
        for name, bias in (("ClipLoss", None), ("SigLipLoss", -5.0)):
            expected = getattr(theirs, name)()(image, text, torch.tensor(10.0), bias)
            result = getattr(ours, name)()(image, text, torch.tensor(10.0), bias)
            assert result.dtype == expected.dtype
            torch.testing.assert_close(result, expected, rtol=2e-2, atol=0)


def test_factory_under_patch(draw):
    """open_clip's own create_loss gives ours."""
    from types import SimpleNamespace

    from open_clip.factory import create_loss

    options = {
        "distill": False, "model": "ViT-B-32", "siglip": False, "local_loss": True, "rank": 0,
        "gather_with_grad": True, "world_size": 1, "horovod": False, "loss_dist_impl": None,
    }  # fmt: skip
    with patch("open_clip"):
        assert isinstance(create_loss(SimpleNamespace(**options)), ours.ClipLoss)
        options["siglip"] = True
        assert isinstance(create_loss(SimpleNamespace(**options)), ours.SigLipLoss)
