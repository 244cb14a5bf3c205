"""MoCo v1 against the official builder (identity encoder) and against its definition."""

import dataclasses

import numpy as np
import pytest
import torch

import fastcl.functional as F
from fastcl.methods.base import Progress
from fastcl.methods.moco_v1 import Config, MoCoV1
from fastcl.nn import FeatureQueue, Partition

AT = Progress(step=0, steps_per_epoch=10, epochs=1)


def bare(no_encoder, dim, size, temperature, queue):
    """MoCo without networks: views are embeddings before normalisation."""
    config = Config(dim=dim, queue_size=size, temperature=temperature, bn_splits=1)
    method = MoCoV1(no_encoder(dim), config)
    method.head = torch.nn.Identity()
    method.key_encoder = torch.nn.Identity()
    method.queue.features.copy_(torch.tensor(queue))
    return method


def truth_of(data, key):
    return torch.tensor(data[key])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize(
    "name", ["moco_b8_d128_k64", "moco_b6_d96_k30_t02", "moco_queuewrap_b7_d96_k30"]
)
def test_loss_gradient_and_queue_follow_the_official_code(golden, no_encoder, name, dtype):
    data = golden(name)
    size, dim = data["queue_before"].shape
    wrap = "wrap" in name  # that file starts from unit keys and queries
    q_name, k_name = ("q", "k") if wrap else ("im_q", "im_k")
    method = bare(no_encoder, dim, size, float(data["param_T"]), data["queue_before"]).to(dtype)
    steps = sum(key.endswith("_f64_loss") for key in data.files)
    assert steps >= 3
    rtol = 1e-7 if dtype == torch.float64 else 2e-6
    for step in range(1, steps + 1):
        q = torch.tensor(data[f"s{step}_{q_name}"], dtype=dtype, requires_grad=True)
        k = torch.tensor(data[f"s{step}_{k_name}"], dtype=dtype)
        loss = method.loss([q, k], AT)
        loss.backward()
        method.after_backward(AT)
        np.testing.assert_allclose(loss.item(), data[f"s{step}_f64_loss"], rtol=rtol)
        truth = data[f"s{step}_f64_grad_{q_name}"]
        if wrap:  # the file's gradient is before the normalisation's backward pass
            unit = data[f"s{step}_q"].astype(np.float64)
            truth = truth - unit * (truth * unit).sum(1, keepdims=True)
        scale = np.abs(truth).max()
        np.testing.assert_allclose(q.grad.numpy(), truth, rtol=0, atol=10 * rtol * scale)
        assert method.queue.pointer.item() == data[f"s{step}_ptr_after"]
    after = "f64_queue_after" if "f64_queue_after" in data.files else "queue_after"
    np.testing.assert_allclose(method.queue.features.numpy(), data[after], rtol=0, atol=1e-6)


def small(tiny_encoder, **changes):
    changes = {"dim": 4, "queue_size": 16, "bn_splits": 2, "momentum": 0.9} | changes
    return MoCoV1(tiny_encoder(), Config(**changes))


def views(n=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(n, 3, 8, 8, generator=generator) for _ in range(2)]


def test_key_encoder_moves_before_the_keys_are_computed(tiny_encoder):
    method = small(tiny_encoder)
    before = [p.clone() for p in method.key_encoder.parameters()]
    with torch.no_grad():  # so that query and key encoder differ
        for p in method.query_encoder.parameters():
            p.add_(0.1)
    method.loss(views(), AT)
    for old, new, query in zip(
        before, method.key_encoder.parameters(), method.query_encoder.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * query)
    with torch.no_grad():
        torch.manual_seed(3)
        twice = small(tiny_encoder)
        twice.load_state_dict(method.state_dict())
        state = torch.get_rng_state()
        keys = method.encode_keys(views()[1])
        torch.set_rng_state(state)
        torch.testing.assert_close(twice.encode_keys(views()[1]), keys)


def test_the_queue_is_read_before_and_filled_after_the_batch(tiny_encoder):
    method = small(tiny_encoder)
    before = method.queue.features.clone()
    loss = method.loss(views(), AT)
    assert torch.equal(method.queue.features, before)
    loss.backward()
    method.after_backward(AT)
    torch.testing.assert_close(method.queue.features[:8], method.keys)
    assert torch.equal(method.queue.features[8:], before[8:])
    torch.testing.assert_close(method.queue.features.norm(dim=1), torch.ones(16))


def test_no_gradient_reaches_the_key_encoder(tiny_encoder):
    method = small(tiny_encoder)
    method.loss(views(), AT).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.key_encoder.parameters())
    assert all(p.grad.abs().sum() > 0 for p in method.head.parameters())
    assert method.encoder[0].weight.grad.abs().sum() > 0


def test_shuffling_changes_the_groups_of_batch_norm_but_not_the_order_of_the_keys(tiny_encoder):
    method = small(tiny_encoder, bn_splits=1)
    torch.manual_seed(0)
    # One group: the statistics are of the whole batch, so shuffling must change nothing.
    view = views()[1]
    direct = torch.nn.functional.normalize(method.key_encoder(view), dim=1)
    torch.testing.assert_close(method.encode_keys(view), direct, rtol=1e-5, atol=1e-6)
    split = small(tiny_encoder, bn_splits=2)
    torch.manual_seed(0)
    direct = torch.nn.functional.normalize(split.key_encoder(view), dim=1)
    assert (split.encode_keys(view) - direct).abs().max() > 1e-3


def test_paper_recipe_has_the_published_numbers():
    paper = MoCoV1.recipes["paper"]
    expected = {
        "backbone": "resnet50", "epochs": 200, "batch_size": 256, "optimizer": "sgd", "lr": 0.03,
        "sgd_momentum": 0.9, "weight_decay": 1e-4, "schedule": "step", "milestones": (120, 160),
        "dim": 128, "queue_size": 65536, "momentum": 0.999, "temperature": 0.07, "image_size": None,
        "crop_scale": (0.2, 1.0),
    }  # fmt: skip
    assert dataclasses.asdict(paper).items() >= expected.items()


def test_symmetric_loss_adds_both_directions_and_queues_both_keys(tiny_encoder):
    small = {"dim": 4, "queue_size": 37, "bn_splits": 1, "momentum": 0.5}
    method = MoCoV1(tiny_encoder(), Config(**small, symmetric=True)).eval()
    queue = method.queue.features.clone()
    views = [torch.rand(8, 3, 8, 8) for _ in range(2)]
    loss = method.loss(views, AT)
    keys = [method.encode_keys(view) for view in views]
    first, second = (method.query(view) for view in views)
    torch.testing.assert_close(
        loss, method.contrast(first, keys[1]) + method.contrast(second, keys[0])
    )
    method.after_backward(AT)
    torch.testing.assert_close(method.queue.features[:16], torch.cat(keys))
    assert torch.equal(method.queue.features[16:], queue[16:])


def test_a_queue_of_half_the_images_is_warned_of(tiny_encoder, recwarn):
    method = MoCoV1(tiny_encoder(), Config(dim=4, queue_size=50, bn_splits=1))
    method.set_images(101)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="queue_size 50 is at least half of the 100 training"):
        method.set_images(100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_batch_norm_of_two_devices_follows_the_official_code(golden, dtype, monkeypatch):
    """Two ranks of the official builder: one process with two groups, whose rows take turns.

    Row j of rank r is row 2 j + r here; the recorded permutation of the keys is turned likewise.
    The queue holds the same keys in that order.
    """
    data = golden("moco_shufflebn_w2_b6_d24_k36")
    world, own = int(data["param_world"]), int(data["param_B_local"])
    encoder = torch.nn.Sequential(
        torch.nn.Conv2d(20, 20, 1, bias=False),
        torch.nn.BatchNorm2d(20),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
    )
    encoder.feature_dim = 20
    config = Config(
        dim=24,
        queue_size=int(data["param_K"]),
        temperature=float(data["param_T"]),
        momentum=float(data["param_m"]),
        bn_splits=world,
    )
    method = MoCoV1(encoder, config).to(dtype).train()
    weights = {
        "encoder.0.weight": "l0.weight",
        "encoder.1.weight": "bn.weight",
        "encoder.1.bias": "bn.bias",
        "head.weight": "fc.weight",
        "head.bias": "fc.bias",
    }
    parameters = dict(method.named_parameters())
    with torch.no_grad():
        for ours, theirs in weights.items():
            value = torch.tensor(data[f"init_{theirs}"], dtype=dtype)
            copy = ours.replace("encoder.", "key_encoder.0.").replace("head.", "key_encoder.1.")
            for name in (ours, copy):
                parameters[name].copy_(value.view_as(parameters[name]))
        method.queue.features.copy_(torch.tensor(data["queue_before"]))
    turns = torch.arange(world * own).view(world, own).T.flatten()  # here -> there
    place = turns.argsort()  # there -> here
    for step in (1, 2):
        order = place[torch.tensor(data[f"s{step}_perm"]).long()[turns]]
        monkeypatch.setattr(torch, "randperm", lambda n, order=order, **_: order)
        q, k = (torch.tensor(data[f"s{step}_im_{x}"], dtype=dtype)[turns] for x in "qk")
        method.zero_grad()
        loss = method.loss([q[..., None, None], k[..., None, None]], AT)
        loss.backward()
        method.after_backward(AT)
        exact = dtype == torch.float64
        truth = data[f"s{step}_f64_loss_per_rank"].mean()
        np.testing.assert_allclose(loss.item(), truth, rtol=1e-7 if exact else 2e-6)
        for ours, theirs in weights.items():
            truth = data[f"s{step}_f64_grad_{theirs}"]
            found = parameters[ours].grad.view(truth.shape).numpy()
            atol = (1e-7 if exact else 1e-5) * np.abs(truth).max()
            np.testing.assert_allclose(found, truth, rtol=0, atol=atol)
        assert method.queue.pointer.item() == data[f"s{step}_ptr_after"]
        for module, key in ((method.encoder, "q"), (method.key_encoder[0], "k")):
            for name in ("running_mean", "running_var"):
                truth = data[f"s{step}_{key}_bn_{name}_per_rank"].mean(0)
                np.testing.assert_allclose(getattr(module[1], name), truth, atol=1e-6)
    after = torch.tensor(data["f64_queue_after"]).view(3, world * own, -1)
    for batch in range(2):
        found = method.queue.features.view(3, world * own, -1)[batch][place]
        np.testing.assert_allclose(found.numpy(), after[batch], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_nce_against_a_queue_follows_cmcs_moco(golden, dtype):
    """The same queue under InstDisc's loss: its parts are enough.

    That code stores Z as a whole number.
    """
    data = golden("moco_queuewrap_nce_b6_d100_k44")
    queue = FeatureQueue(*data["queue_before"].shape).to(dtype)
    queue.features.copy_(torch.tensor(data["queue_before"]))
    partition = Partition().to(dtype)
    images, scale = int(data["param_n_data"]), 1 / float(data["param_T"])
    rtol = 1e-7 if dtype == torch.float64 else 5e-6
    for step in (1, 2, 3):
        q = torch.tensor(data[f"s{step}_q"], dtype=dtype, requires_grad=True)
        k = torch.tensor(data[f"s{step}_k"], dtype=dtype)
        scores = scale * torch.cat([(q * k).sum(1, keepdim=True), q @ queue.features.T], 1)
        z = partition(scores.detach(), images).floor()
        np.testing.assert_allclose(z.item(), data[f"s{step}_Z"], rtol=1e-6)
        loss = F.nce(scores, data_size=images, partition=z)
        loss.backward()
        queue.push(k)
        np.testing.assert_allclose(loss.item(), data[f"s{step}_f64_loss"], rtol=rtol)
        truth = data[f"s{step}_f64_grad_q"]
        np.testing.assert_allclose(q.grad, truth, rtol=0, atol=10 * rtol * np.abs(truth).max())
        assert queue.pointer.item() == data[f"s{step}_ptr_after"]
    np.testing.assert_allclose(queue.features, data["queue_after"], rtol=0, atol=1e-6)
