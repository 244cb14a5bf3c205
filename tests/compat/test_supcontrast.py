"""fastcl.compat.supcontrast against its formula, written with every mask."""

from __future__ import annotations

import pytest
import torch

from fastcl.compat.supcontrast import SupConLoss


def formula(features, labels=None, mask=None, *, temperature=0.07, mode="all", base=0.07):
    """SupContrast's loss with the whole matrix of similarities."""
    b, v = features.shape[:2]
    z = torch.cat([features[:, i].reshape(b, -1) for i in range(v)])  # (V B, D), view by view
    if mask is None:
        labels = torch.arange(b) if labels is None else labels.reshape(-1)
        mask = labels[:, None] == labels[None]
    rows = b if mode == "one" else b * v
    m = mask.to(torch.promote_types(z.dtype, torch.float32)).repeat(v, v)[:rows]
    itself = torch.eye(b * v, dtype=torch.bool)[:rows]
    m = m.masked_fill(itself, 0)
    s = (z[:rows] @ z.T / temperature).to(m.dtype)
    log_p = s - s.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    weight = m.sum(1)
    mean = (m * log_p).sum(1) / torch.where(weight < 1e-6, 1, weight)
    return -(temperature / base) * mean.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("given", ["nothing", "labels", "float-labels", "mask", "weights"])
@pytest.mark.parametrize("shape", [(9, 1, 5), (8, 2, 16), (5, 4, 3, 2, 2), (2, 3, 1)])
def test_values_and_gradients(compare, draw, shape, given, mode, dtype):
    b = shape[0]
    generator = torch.Generator().manual_seed(0)
    options = {"nothing": {}}.get(given)
    if options is None:
        labels = torch.randint(3, (b,), generator=generator)
        mask = torch.rand(b, b, generator=generator)
        options = {
            "labels": {"labels": labels},
            "float-labels": {"labels": labels[:, None] * 0.5},
            "mask": {"mask": (mask > 0.6).int()},
            "weights": {"mask": mask},
        }[given]

    def plain(x, **kwargs):
        return formula(x, **kwargs, temperature=0.3, mode=mode, base=0.1)

    pair = compare(plain, SupConLoss(0.3, mode, 0.1), dtype)
    pair.step(lambda loss, x: loss(x, **options), (draw(*shape),))


def test_defaults(draw):
    x = torch.nn.functional.normalize(draw(16, 2, 8), dim=2)
    labels = torch.arange(16) // 3
    torch.testing.assert_close(SupConLoss()(x, labels), formula(x, labels))
    torch.testing.assert_close(SupConLoss()(x), formula(x))
    # Without labels it is SimCLR's loss.
    import fastcl.functional as F

    torch.testing.assert_close(
        SupConLoss(0.2, base_temperature=0.2)(x), F.nt_xent(x[:, 0], x[:, 1], temperature=0.2)
    )


def test_anchors_without_a_positive_count_as_0(draw):
    x, mask = draw(6, 1, 4), torch.zeros(6, 6)
    assert SupConLoss()(x, mask=mask) == 0
    mask[0, 1] = 1
    torch.testing.assert_close(SupConLoss()(x, mask=mask), formula(x, mask=mask))


@pytest.mark.parametrize("views", [2, 3])
def test_a_single_image(draw, views):
    x, labels = draw(1, views, 4), torch.zeros(1)
    for options in ({}, {"labels": labels}, {"mask": torch.ones(1, 1)}):
        torch.testing.assert_close(SupConLoss()(x, **options), formula(x, **options))


def test_temperature_scales_the_loss(draw):
    x = draw(6, 2, 4)
    values = [SupConLoss(0.5, base_temperature=base)(x) for base in (0.5, 0.07)]
    torch.testing.assert_close(values[1], values[0] * 0.5 / 0.07)


def test_no_matrix_is_made(largest):
    x = torch.randn(512, 2, 4).requires_grad_()
    labels = torch.arange(512) // 4
    assert largest(lambda: formula(x, labels)) >= 1024 * 1024
    assert largest(lambda: SupConLoss()(x, labels)) <= 4 * 1024 * 4


@pytest.mark.parametrize(
    "features, options, message",
    [
        (torch.randn(4, 3), {}, "at least 3 dimensions"),
        (torch.randn(4, 2, 3), {"labels": torch.zeros(3)}, "Num of labels does not match"),
        (torch.randn(4, 2, 3), {"labels": torch.zeros(4), "mask": torch.eye(4)}, "Cannot define"),
    ],
)  # fmt: skip
def test_errors(features, options, message):
    with pytest.raises(ValueError, match=message):
        SupConLoss()(features, **options)
    with pytest.raises(ValueError, match="Unknown mode: some"):
        SupConLoss(contrast_mode="some")(torch.randn(4, 2, 3))
