"""CPC against four ports that were run, and its networks against what they may see."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fastcl import models
from fastcl.methods.base import Progress
from fastcl.methods.cpc import CPC, Config, GRUContext, RowContext
from fastcl.models.patches import AudioEncoder, PatchEncoder

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)
AT = Progress(step=0, steps_per_epoch=10, epochs=2)


def bare(no_encoder, **changes):
    """CPC for `step_losses` alone; its networks are never called."""
    return CPC(PatchEncoder(no_encoder(4), 2, 1, 2), Config(context_dim=3, **changes))


def leaf(array, dtype):
    return torch.tensor(array, dtype=dtype, requires_grad=True)


def compare(actual, truth, dtype, name=""):
    """To rounding in float64, to some of the largest entry's last digits in float32."""
    rtol = 1e-9 if dtype == torch.float64 else 3e-6
    atol = rtol * np.abs(truth).max()
    np.testing.assert_allclose(actual.detach(), truth, rtol=0, atol=atol, err_msg=name)


@DTYPES
def test_all_patches_as_candidates_follow_the_published_pseudo_code(golden, no_encoder, dtype):
    data = golden("cpc_allneg_b2_d64_7x7_i1")
    method = bare(no_encoder, steps=1, skip=int(data["param_i"]), scale=float(data["param_scale"]))
    targets, predictions = leaf(data["targets"], dtype), leaf(data["preds"], dtype)
    (loss,) = method.step_losses((targets.permute(0, 2, 3, 1), predictions.permute(0, 2, 3, 1)))
    loss.backward()
    compare(loss, data["f64_loss"], dtype)
    compare(targets.grad, data["f64_grad_targets"], dtype, "targets")
    compare(predictions.grad, data["f64_grad_preds"], dtype, "predictions")


@DTYPES
def test_sampled_candidates_follow_greedy_infomax(golden, no_encoder, dtype, monkeypatch):
    data = golden("cpc_vision_b2_c24_7x7_k5_n16")
    z, c, w = (leaf(data[name], dtype) for name in ("z", "c", "W"))  # (N, C, T, W); W_k acts on z
    count, _, rows, columns = z.shape
    method = bare(no_encoder, steps=5, skip=1, negatives="sampled", noise=16)
    tables = []
    for k in range(1, 6):
        ahead = k + 1
        index = torch.tensor(data[f"neg_index_step{k}"]).long()
        image, place = index % count, index // count  # flat in (row, column, image)
        flat = image * rows * columns + (place // columns + ahead) * columns + place % columns
        table = flat.view(rows - ahead, columns, count, 16).permute(2, 0, 1, 3)
        tables.append(table.reshape(-1, 16))
    monkeypatch.setattr(method, "tables", lambda *_: tables)
    # f = c · (W_k z) = (W_kᵀ c) · z
    predictions = torch.einsum("nctw,kcd->ntwkd", c, w).flatten(3)
    losses = method.step_losses((z.permute(0, 2, 3, 1), predictions))
    losses.mean().backward()
    compare(losses, data["f64_loss_per_step"], dtype)
    compare(losses.mean(), data["f64_loss"], dtype)
    for name, x in (("z", z), ("c", c), ("W", w)):
        compare(x.grad, data[f"f64_grad_{name}"], dtype, name)


@DTYPES
def test_permuted_candidates_follow_the_audio_port(golden, no_encoder, dtype, monkeypatch):
    data = golden("cpc_audio_b3_l20_k4_n10")
    z, c, w = (leaf(data[name], dtype) for name in ("z", "c", "W"))
    count, length, _ = z.shape
    method = bare(no_encoder, steps=4, skip=0, negatives="permuted", noise=10)
    table = torch.tensor(data["perm"]).long()
    sizes = [count * (length - k) for k in range(1, 5)]
    tables = [table[count * length - size :] for size in sizes]
    monkeypatch.setattr(method, "tables", lambda *_: tables)
    losses = method.step_losses((z[:, :, None], (c @ w.T)[:, :, None]))
    losses.mean().backward()
    compare(losses, data["f64_loss_per_step"], dtype)
    compare(losses.mean(), data["f64_loss"], dtype)
    for name, x in (("z", z), ("c", c), ("W", w)):
        compare(x.grad, data[f"f64_grad_{name}"], dtype, name)


@DTYPES
def test_candidates_of_other_times_follow_the_other_audio_port(
    golden, no_encoder, dtype, monkeypatch
):
    data = golden("cpc_fb_b4_s26_k5_n16")
    z, c, w = (leaf(data[name], dtype) for name in ("z", "c", "W"))
    dim = z.shape[2]
    method = bare(no_encoder, steps=5, skip=0, negatives="others", noise=16, scale=1 / dim)
    index = torch.tensor(data["neg_flat_index"]).long().transpose(1, 2).reshape(-1, 16)
    monkeypatch.setattr(method, "tables", lambda *_: [index] * 5)
    predictions = torch.einsum("ntc,kdc->ntkd", c, w).flatten(2)
    losses = method.step_losses((z[:, :, None], predictions[:, :, None]))
    losses.sum().backward()
    compare(losses, data["f64_loss_per_step"], dtype)
    for name, x in (("z", z), ("c", c), ("W", w)):
        compare(x.grad, data[f"f64_grad_{name}"], dtype, name)


# ---- candidates ----------------------------------------------------------------------------------

COUNT, ROWS, COLUMNS = 3, 6, 2


def drawn(no_encoder, kind, noise):
    torch.manual_seed(0)
    method = bare(no_encoder, steps=3, skip=1, negatives=kind, noise=noise)
    return method.tables(COUNT, ROWS, COLUMNS, ROWS - 4, torch.device("cpu"))


def test_sampled_candidates_are_uniform_over_the_predicted_rows(no_encoder):
    for k, table in enumerate(drawn(no_encoder, "sampled", 2000), start=1):
        rows = table // COLUMNS % ROWS
        assert table.shape == (COUNT * (ROWS - k - 1) * COLUMNS, 2000)
        assert rows.min() == k + 1 and rows.max() == ROWS - 1
        counts = torch.bincount(table.flatten())
        counts = counts[counts > 0].double()
        assert len(counts) == len(table) and (counts / 2000 - 1).abs().max() < 0.15


def test_permuted_candidates_are_permutations_cut_from_the_front(no_encoder):
    tables = drawn(no_encoder, "permuted", 5)
    first, last = tables[0], tables[-1]
    assert torch.equal(first[len(first) - len(last) :], last)
    assert all(len(set(column.tolist())) == len(first) for column in first.T)


def test_other_candidates_are_of_other_rows_and_the_same_for_all_steps(no_encoder):
    tables = drawn(no_encoder, "others", 500)
    assert all(table is tables[0] for table in tables)
    start = torch.arange(ROWS - 4)[None, :, None].expand(COUNT, -1, COLUMNS).flatten()
    rows = tables[0] // COLUMNS % ROWS
    assert not (rows == start[:, None]).any()
    assert all(len(set(row.tolist())) == ROWS - 1 for row in rows)
    assert set((tables[0] // (ROWS * COLUMNS)).flatten().tolist()) == set(range(COUNT))


def test_detached_candidates_give_only_the_positive_a_gradient(no_encoder):
    torch.manual_seed(0)
    z = torch.randn(2, 4, 1, 5).double().requires_grad_(True)
    predictions = torch.randn(2, 4, 1, 5).double()
    method = bare(no_encoder, steps=1, skip=1, detach_negatives=True)
    method.step_losses((z, predictions)).sum().backward()
    expected = torch.zeros(2, 4, 1, 5).double()
    expected[:, 2:] = -predictions[:, :2] / 4  # four anchors
    torch.testing.assert_close(z.grad, expected)


SUCCESSOR = {"target_dim": 7, "layer_norm": True, "scale": 0.1}  # CPC v2's


@pytest.mark.parametrize("options", [{}, SUCCESSOR, {"context": "gru"}], ids=["v1", "v2", "gru"])
def test_a_whole_loss_is_the_cross_entropy_over_all_patches(options):
    """With a layer norm, targets through a linear layer and a factor, if asked for."""
    torch.manual_seed(0)
    config = Config(
        backbone="tiny-resnet", patch=8, stride=4, window=8, image_size=24, steps=2, skip=1,
        context_blocks=2, context_dim=6, **options,
    )  # fmt: skip
    method = CPC(CPC.build_encoder(config, 24), config).double().eval()
    images = torch.randn(3, 1, 24, 24).double()
    z = method.encoder.grid(images)  # (3, 5, 5, 128)
    target = z
    if options == SUCCESSOR:
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        target = z @ method.target.weight.T + method.target.bias
    dim = target.shape[-1]
    c = method.contexts[0](z)
    layer, terms = method.predictors[0], []
    biases = torch.zeros(2, dim) if layer.bias is None else layer.bias.split(dim)
    for k, (w, b) in enumerate(zip(layer.weight.split(dim), biases, strict=True)):
        ahead = k + 2
        prediction = config.scale * (c @ w.T + b)[:, : 5 - ahead].reshape(-1, dim)
        logits = prediction @ target.reshape(-1, dim).T
        label = torch.arange(75).view(3, 5, 5)[:, ahead:].flatten()
        terms.append(cross_entropy(logits, label))
    torch.testing.assert_close(method.loss([images], AT), torch.stack(terms).mean())


# ---- networks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [RowContext(4, 6, 3), GRUContext(4, 6)], ids=["rows", "gru"])
def test_context_sees_no_later_row(network):
    torch.manual_seed(0)
    z = torch.randn(2, 6, 5, 4)
    changed = z.clone()
    changed[:, 3:] += 1
    before, after = network(z), network(changed)
    assert before.shape == (2, 6, 5, network.dim)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 3], after[:, 3])
    changed = z.clone()
    changed[:, 0, 2] += 1
    if isinstance(network, RowContext):  # three blocks reach three columns and rows
        assert not torch.allclose(network(changed)[:, 2, 1], before[:, 2, 1])


def test_four_directions_are_four_turns_of_the_grid():
    torch.manual_seed(0)
    options = {"patch": 8, "stride": 4, "window": 8, "steps": 1, "skip": 0, "context_dim": 6}
    config = Config(backbone="tiny-resnet", image_size=16, directions=4, **options)
    method = CPC(CPC.build_encoder(config, 16), config).double().eval()
    seen = []
    for context in method.contexts:
        context.register_forward_hook(lambda _, x, y: seen.append(x[0]))
    images = torch.randn(2, 1, 16, 16).double()
    loss = method.loss([images], AT)
    terms = []  # the 3 × 3 patches of 2 images among each other, turned
    label = torch.arange(18).view(2, 3, 3)[:, 1:].flatten()
    for z, context, predictor in zip(seen, method.contexts, method.predictors, strict=True):
        prediction = predictor(context.forward(z))[:, :2].flatten(0, 2)
        terms.append(cross_entropy(prediction @ z.flatten(0, 2).T, label))
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert torch.equal(seen[2], seen[0].flip(1, 2))  # from below
    assert torch.equal(seen[1][:, 0], seen[0][:, :, -1])  # from the right
    assert torch.equal(seen[3][:, 0], seen[0][:, :, 0].flip(1))  # from the left


def test_patches_overlap_and_are_shown_in_the_middle():
    flat = torch.nn.Flatten()
    flat.feature_dim = 16
    encoder = PatchEncoder(flat, 4, 2, 4).eval()
    image = torch.arange(64.0).view(1, 1, 8, 8)
    grid = encoder.grid(image)
    assert grid.shape == (1, 3, 3, 16)
    assert torch.equal(grid[0, 2, 1].view(4, 4), image[0, 0, 4:8, 2:6])
    torch.testing.assert_close(encoder(image), grid.mean((1, 2)))
    windowed = PatchEncoder(flat, 4, 2, 2).eval()
    expected = torch.zeros(4, 4)
    expected[1:3, 1:3] = image[0, 0, 5:7, 3:5]
    assert torch.equal(windowed.grid(image)[0, 2, 1].view(4, 4), expected)
    windowed.train()
    torch.manual_seed(0)
    corners = {int(windowed.grid(image)[0, 2, 1].view(4, 4)[1, 1]) for _ in range(200)}
    assert corners == {8 * y + x for y in range(4, 7) for x in range(2, 5)}
    with pytest.raises(ValueError, match=r"window must be in 1 … patch \(4\); got 5"):
        PatchEncoder(flat, 4, 2, 5)


def test_each_patch_gets_a_contrast_and_brightness_of_its_own_in_training():
    torch.manual_seed(0)
    flat = torch.nn.Flatten()
    flat.feature_dim = 16
    encoder = PatchEncoder(flat, 4, 4, 4, jitter=0.5)
    image = torch.arange(256.0).view(1, 1, 16, 16) / 256
    plain, jittered = encoder.eval().grid(image), encoder.train().grid(image)
    x, y = plain.flatten(0, 2), jittered.flatten(0, 2)  # (16 patches, 16 pixels)
    a = (y[:, -1] - y[:, 0]) / (x[:, -1] - x[:, 0])
    b = y[:, 0] - a * x[:, 0]
    torch.testing.assert_close(y, a[:, None] * x + b[:, None], rtol=0, atol=1e-5)
    assert a.min() >= 0.5 and a.max() <= 1.5 and b.abs().max() <= 0.5 + 1e-5
    assert a.std() > 0.15 and b.std() > 0.15


def test_the_published_encoders_have_the_published_sizes():
    with torch.device("meta"):
        resnet = models.build("resnet101-v2-plain", image_size=64, in_channels=1)
        assert resnet(torch.empty(2, 1, 64, 64)).shape == (2, 1024)
        maps = resnet.layers(torch.empty(2, 1, 64, 64))
        assert maps.shape == (2, 1024, 4, 4)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in resnet.modules())
        sound = AudioEncoder()
        assert sound.grid(torch.empty(2, 1, 20480)).shape == (2, 128, 1, 512)  # 20480 / 160
    assert math.prod(AudioEncoder.strides) == 160


def test_a_deep_network_without_norms_starts_at_a_steady_size():
    torch.manual_seed(0)
    resnet = models.build("resnet101-v2-plain", image_size=16, in_channels=1)
    with torch.no_grad():
        z = resnet(torch.randn(8, 1, 16, 16))
    assert 0.1 < z.square().mean().sqrt() < 10


def test_choices_that_do_not_exist_are_refused(no_encoder):
    for changes, message in (
        ({"negatives": "none"}, "negatives must be all or sampled"),
        ({"context": "lstm"}, "context must be rows or gru; got 'lstm'"),
        ({"directions": 2}, "directions must be 1 or 4; got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            bare(no_encoder, **changes)
    with pytest.raises(ValueError, match="6 rows of patches: too few to predict 5 after 2"):
        CPC.build_encoder(Config(backbone="tiny-resnet"), 224)


def test_paper_recipe_has_the_published_numbers():
    expected = {
        "backbone": "resnet101-v2-plain", "image_size": 256, "patch": 64, "stride": 32,
        "window": 60, "steps": 5, "skip": 1, "negatives": "all", "batch_size": 512,
        "optimizer": "adamw", "weight_decay": 0.0, "lr": 2e-4, "colours": "grey", "scale": 1.0,
        "context": "rows", "context_blocks": 5, "context_dim": 256, "target_dim": 0,
        "layer_norm": False, "directions": 1, "patch_jitter": 0.0, "detach_negatives": False,
        "crop_scale": ((256 / 300) ** 2, (256 / 300) ** 2), "augmentation": "cpc",
    }  # fmt: skip
    assert dataclasses.asdict(CPC.recipes["paper"]).items() >= expected.items()
