"""DINO against the official code: head, loss and centre, clipping, positions, and whole steps."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax, softmax

import fastcl.functional as F
from fastcl import models
from fastcl.methods.base import Progress
from fastcl.methods.dino import DINO, Config
from fastcl.nn import DINOHead
from fastcl.optim import LARS, OPTIMIZERS, clip_each_, learning_rate, split_group

DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)
AT = Progress(step=0, steps_per_epoch=10, epochs=2)


def under(data, prefix):
    """The arrays under `prefix` of a golden file, by the rest of their names."""
    return {
        k.removeprefix(prefix): torch.tensor(data[k]) for k in data.files if k.startswith(prefix)
    }


# ---- head ----------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("unit", [False, True])
def test_head_follows_the_official_code(golden, unit, dtype):
    data = golden(f"dino_head_normlast{int(unit)}")
    head = DINOHead(20, 32, 16, 50, unit=unit).to(dtype)
    head.load_state_dict(under(data, "p/"))
    x = torch.tensor(data["x"], dtype=dtype, requires_grad=True)
    y = head(x)
    y.backward(torch.tensor(data["grad_out"], dtype=dtype))
    slack = 1e-9 if dtype == torch.float64 else 2e-6
    np.testing.assert_allclose(y.detach(), data["y_f64"], rtol=0, atol=slack)
    np.testing.assert_allclose(x.grad, data["grad_x_f64"], rtol=0, atol=max(slack, 1e-8) * 3)
    for name, parameter in head.named_parameters():
        if parameter.requires_grad:
            truth = data[f"grad/{name}"]
            np.testing.assert_allclose(parameter.grad, truth, rtol=0, atol=2e-5, err_msg=name)
    assert head.last_layer.weight_g.requires_grad != unit


def test_head_starts_as_the_official_one():
    torch.manual_seed(0)
    head = DINOHead(300, 200, 100, 400, layers=3)
    for linear in (head.mlp[0], head.mlp[2], head.mlp[4]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert linear.bias.abs().max() == 0
    assert torch.equal(head.last_layer.weight_g, torch.ones(400, 1))
    y = head(torch.randn(6, 300))
    assert y.abs().max() <= 1 + 1e-6  # cosines
    normed = DINOHead(300, 200, 100, 400, layers=4, batch_norm=True)
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in normed.mlp) == 3


# ---- loss and centre -----------------------------------------------------------------------------


class Gives(torch.nn.Module):
    """A network that gives the same outputs whatever it sees."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        return self.outputs


def bare(no_encoder, outputs, **changes):
    """DINO without networks: the views are the student's outputs; `Gives` are the teacher's."""
    method = DINO(no_encoder(4), Config(dim=3, hidden=5, outputs=outputs, **changes))
    method.head = torch.nn.Identity()
    method.head.embedding = torch.zeros(1, 3)
    return method


def test_three_steps_of_loss_and_centre_follow_the_official_code(golden, no_encoder):
    data = golden("dino_loss_b5_k300_c6_3steps")
    warmup = {"teacher_temperature": 0.07, "teacher_warmup_epochs": 4}
    method = bare(no_encoder, 300, **warmup)
    for step, epoch in enumerate(data["epochs"]):
        student = torch.tensor(data["student"][step], requires_grad=True)
        teacher = torch.tensor(data["teacher"][step])
        method.teacher = Gives(teacher)
        at = Progress(step=int(epoch) * 10, steps_per_epoch=10, epochs=8)
        assert method.teacher_temperature(at.epoch) == pytest.approx(data["temps"][step])
        loss = method.loss(student.chunk(6), at)
        loss.backward()
        assert loss.item() == pytest.approx(data["loss_f64"][step], rel=1e-6)
        np.testing.assert_allclose(method.center, data["center"][step, 0], rtol=0, atol=5e-7)
    np.testing.assert_allclose(student.grad, data["grad_student_last"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(method.center, data["center_f64_last"][0], rtol=0, atol=5e-7)


def hashed(n, k, salt):
    """The inputs of dino_loss_b2_k65536_hashed."""
    i = np.arange(n * k, dtype=np.uint64).reshape(n, k) + np.uint64(salt * 1000003)
    x = (i * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(16)
    x = (x * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(13)
    return torch.tensor((x / 2.0**32 * 6 - 3).astype(np.float32))


def test_loss_at_the_published_size_follows_the_official_code(golden, no_encoder):
    data = golden("dino_loss_b2_k65536_hashed")
    warmup = {"teacher_temperature": 0.07, "teacher_warmup_epochs": 30}
    method = bare(no_encoder, 65536, **warmup)
    student, teacher = hashed(8, 65536, 1).requires_grad_(True), hashed(4, 65536, 2)
    method.teacher = Gives(teacher)
    at = Progress(step=100, steps_per_epoch=10, epochs=100)
    loss = method.loss(student.chunk(4), at)
    loss.backward()
    assert method.teacher_temperature(10) == pytest.approx(float(data["temp"]))
    assert loss.item() == pytest.approx(data["loss_f64"][0], abs=1e-4)
    columns = data["cols"]
    np.testing.assert_allclose(
        student.grad[:, columns], data["grad_student_cols"], rtol=0, atol=2e-8
    )
    assert student.grad.norm().item() == pytest.approx(float(data["grad_student_f64_norm"]), 1e-5)
    np.testing.assert_allclose(method.center[columns], data["center_cols"][0], rtol=0, atol=5e-7)


@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_in_the_place_of_the_centre(iterations, no_encoder):
    """The targets are the codes of SwAV's operation, the teacher's temperature its ε."""
    torch.manual_seed(0)
    method = bare(no_encoder, 7, sinkhorn_iterations=iterations, teacher_temperature=0.3).double()
    method.center.fill_(1.0)  # of no account, and not moved
    views, teacher = [torch.randn(5, 7).double() for _ in range(3)], torch.randn(10, 7).double()
    method.teacher = Gives(teacher)
    codes = F.sinkhorn(teacher, epsilon=0.3, iterations=iterations).view(2, 5, 7)
    terms = [
        -(codes[i] * log_softmax(views[v] / 0.1, dim=-1)).sum(-1).mean()
        for i in range(2)
        for v in range(3)
        if i != v
    ]
    loss = method.loss(views, AT)
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-6, atol=1e-6)
    assert (method.center == 1).all()


def test_without_centring_the_centre_stays(no_encoder):
    torch.manual_seed(0)
    method = bare(no_encoder, 7, centring=False).double()
    views, teacher = [torch.randn(3, 7).double() for _ in range(3)], torch.randn(6, 7).double()
    method.teacher = Gives(teacher)
    targets = softmax(teacher.view(2, 3, 7) / 0.04, dim=-1)
    terms = [
        -(targets[i] * log_softmax(views[v] / 0.1, dim=-1)).sum(-1).mean()
        for i in range(2)
        for v in range(3)
        if i != v
    ]
    torch.testing.assert_close(method.loss(views, AT), torch.stack(terms).mean())
    assert method.center.abs().max() == 0


def test_schedules_are_the_official_ones(golden, no_encoder):
    data = golden("dino_schedules")
    recipe = Config(lr=0.0005 * 1024 / 256, warmup_epochs=3, epochs=20)
    method = DINO(no_encoder(4), dataclasses.replace(recipe, dim=3, hidden=5, outputs=7))
    for step in range(140):
        at = Progress(step=step, steps_per_epoch=7, epochs=20)
        assert method.weight_decay_at(at) == pytest.approx(data["wd"][step], rel=1e-14)
        assert method.momentum_at(at) == pytest.approx(data["momentum"][step], rel=1e-14)
        lr = learning_rate(
            recipe.schedule, step, images=70, batch_size=10, epochs=20, lr=recipe.lr,
            warmup_epochs=3, final_lr=recipe.final_lr,
        )  # fmt: skip
        assert lr == pytest.approx(data["lr"][step], rel=1e-14)
    for name, epochs in (("0.04_0.07_30_100", 100), ("0.04_0.04_0_10", 10), ("0.04_0.07_1_5", 5)):
        start, end, warmup, _ = name.split("_")
        method.config = dataclasses.replace(
            recipe,
            start_teacher_temperature=float(start),
            teacher_temperature=float(end),
            teacher_warmup_epochs=int(warmup),
        )
        mine = [method.teacher_temperature(epoch) for epoch in range(epochs)]
        np.testing.assert_allclose(mine, data[f"tt_{name}"], rtol=1e-14)


# ---- steps ---------------------------------------------------------------------------------------


class Toy(torch.nn.Module):
    """The golden file's backbone: spatial mean, linear, ReLU, layer norm."""

    feature_dim = 20

    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(3, 20)
        self.norm = torch.nn.LayerNorm(20)

    def forward(self, x):
        return self.norm(torch.relu(self.lin(x.mean((2, 3)))))


def renamed(name):
    """Official names to ours: of the student, or of the teacher."""
    return name.replace("backbone.", "encoder.")


@DTYPES
@pytest.mark.parametrize("kind", ["adamw_freeze1", "lars"])
def test_whole_steps_follow_the_official_code(golden, kind, dtype):
    data = golden(f"dino_train_{kind}")
    config = Config(
        hidden=16, dim=8, outputs=30, clip_grad=0.05, momentum=float(data["momentum"][0]),
        weight_decay=0.04, final_weight_decay=0.4, small_crops=3, freeze_last_layer=1.0,
        teacher_temperature=0.07, teacher_warmup_epochs=1,
    )  # fmt: skip
    method = DINO(Toy(), config).to(dtype)
    start = {renamed(k): v.to(dtype) for k, v in under(data, "init/").items()}
    assert all(not k.startswith("teacher") for k in start)
    own = method.state_dict()
    method.load_state_dict(own | start)
    method.teacher.load_state_dict(method.student.state_dict())
    optimizer = OPTIMIZERS["adamw" if kind == "adamw_freeze1" else "lars-dino"](
        [(n, p) for n, p in method.named_parameters() if p.requires_grad],
        1.0,
        momentum=0.9,
        weight_decay=0.0,
    )
    split_group(optimizer, method.undecayed(), undecayed=True, weight_decay=0.0)
    decayed = [g for g in optimizer.param_groups if not g.get("undecayed")]
    assert sum(len(g["params"]) for g in decayed) == data["n_regularized"]
    for step in range(4):
        at = Progress(step=step, steps_per_epoch=2, epochs=2)
        assert method.weight_decay_at(at) == pytest.approx(data["wd"][step])
        for group in optimizer.param_groups:
            group["lr"] = float(data["lr"][step])
            if not group.get("undecayed"):
                group["weight_decay"] = method.weight_decay_at(at)
        epoch, batch = divmod(step, 2)
        views = [torch.tensor(data[f"crop{v}"][epoch, batch], dtype=dtype) for v in range(5)]
        optimizer.zero_grad()
        loss = method.loss(views, at)
        loss.backward()
        method.after_backward(at)
        assert (method.head.last_layer.weight_v.grad is None) == (step < 2)
        optimizer.step()
        method.after_step(at)
        assert loss.item() == pytest.approx(data["losses_f64"][step], abs=5e-6)
    slack = 2e-6
    np.testing.assert_allclose(method.center, data["center"][0], rtol=0, atol=slack)
    for name, truth in under(data, "student/").items():
        actual = method.state_dict()[renamed(name)].float()
        torch.testing.assert_close(actual, truth, rtol=0, atol=slack, msg=lambda m, n=name: n + m)
    for name, truth in under(data, "teacher/").items():
        name = name.replace("backbone.", "0.").replace("head.", "1.")
        actual = method.teacher.state_dict()[name].float()
        torch.testing.assert_close(actual, truth, rtol=0, atol=slack, msg=lambda m, n=name: n + m)


@DTYPES
def test_each_gradient_is_clipped_by_itself(golden, dtype):
    data = golden("dino_clip")
    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    parameters = [torch.nn.Parameter(torch.zeros(data[f"g_{n}"].shape, dtype=dtype)) for n in names]
    for parameter, name in zip(parameters, names):
        parameter.grad = torch.tensor(data[f"g_{name}"], dtype=dtype)
    clip_each_([*parameters, torch.nn.Parameter(torch.zeros(2))], float(data["clip"]))
    for parameter, name in zip(parameters, names):
        np.testing.assert_allclose(parameter.grad, data[f"clipped_{name}"], rtol=0, atol=2e-7)


def test_one_global_norm_on_request(tiny_encoder):
    changes = {"dim": 3, "hidden": 5, "outputs": 7, "freeze_last_layer": 0.0, "clip": "global"}
    method = DINO(tiny_encoder(), Config(clip_grad=0.01, **changes))
    method.loss([torch.rand(4, 3, 8, 8) for _ in range(2)], AT).backward()
    before = [p.grad.clone() for p in method.student.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in before]).norm()
    assert norm > 0.01
    method.after_backward(AT)
    after = [p.grad for p in method.student.parameters() if p.grad is not None]
    for a, b in zip(after, before):
        torch.testing.assert_close(a, b * 0.01 / norm, rtol=1e-3, atol=1e-9)
    with pytest.raises(ValueError, match="clip must be each or global; got 'all'"):
        DINO(tiny_encoder(), Config(dim=3, clip="all"))


# ---- crops and backbones -------------------------------------------------------------------------


def test_the_teacher_sees_large_crops_only_and_drops_no_paths():
    config = Config(backbone="tiny-vit", drop_path=0.4, dim=4, hidden=8, outputs=6)
    method = DINO(DINO.build_encoder(config, 16), config)
    dropped = [
        [m.drop_prob for m in module.modules() if hasattr(m, "drop_prob")]
        for module in (method.encoder, method.teacher)
    ]
    assert dropped[0] == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4])
    assert dropped[1] == [0] * 4
    seen = []
    method.teacher[0].register_forward_hook(lambda _, x, y: seen.append(tuple(x[0].shape)))
    views = [torch.rand(4, 3, size, size) for size in (16, 16, 8, 8, 8)]
    loss = method.loss(views, AT)
    loss.backward()
    assert seen == [(8, 3, 16, 16)]
    assert all(p.grad is None for p in method.teacher.parameters())
    assert not torch.equal(method.teacher(views[0]), method.student(views[0]))  # paths are dropped
    method.eval()
    assert torch.equal(method.teacher(views[0]), method.student(views[0]))


def test_the_teacher_is_what_is_kept(tiny_encoder):
    method = DINO(tiny_encoder(), Config(dim=3, hidden=5, outputs=7))
    assert method.get_submodule(method.kept) is method.teacher[0]
    before = copy.deepcopy(method.teacher[0].state_dict())
    with torch.no_grad():
        method.encoder[0].weight.add_(1)
    method.after_step(Progress(step=0, steps_per_epoch=10, epochs=2))
    moved = method.teacher[0][0].weight - before["0.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.004), rtol=1e-3, atol=0)


def test_crops_are_the_published_ones_at_224(no_encoder):
    method = DINO(no_encoder(4), dataclasses.replace(Config(), dim=3, outputs=7))
    large, small = method.crops(224)
    assert (large.count, large.size, large.scale) == (2, 224, (0.4, 1.0))
    assert (small.count, small.size, small.scale) == (8, 96, (0.05, 0.4))


def test_positions_of_small_crops_are_interpolated_as_in_the_official_code(golden):
    from fastcl.models.vit_dino import resized

    data = golden("dino_posinterp_96")
    for dtype, slack in ((torch.float64, 1e-9), (torch.float32, 1e-6)):
        positions = torch.tensor(data["pos_embed"], dtype=dtype)
        np.testing.assert_allclose(
            resized(positions, 6, 6), data["interpolated_f64"], rtol=0, atol=slack
        )
        assert resized(positions, 14, 14) is positions


def test_vit_takes_crops_of_several_sizes_and_starts_as_the_official_one():
    torch.manual_seed(0)
    vit = models.build("vit-tiny-dino", image_size=64, drop_path=0.1)
    assert [vit(torch.randn(2, 3, size, size)).shape for size in (64, 32)] == [(2, 192)] * 2
    assert vit.blocks[0].attn.num_heads == 3 and len(vit.blocks) == 12
    assert vit.blocks[3].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert vit.pos_embed.shape == (1, 17, 192) and vit.norm.eps == 1e-6
    assert vit.blocks[11].drop_path1.drop_prob == pytest.approx(0.1)


def test_paper_recipes_have_the_published_numbers():
    expected = {
        "backbone": "vit-small-dino", "epochs": 100, "batch_size": 512, "optimizer": "adamw",
        "lr": 0.001, "final_lr": 1e-6, "warmup_epochs": 10.0, "weight_decay": 0.04,
        "final_weight_decay": 0.4, "drop_path": 0.1, "small_crops": 8, "head_layers": 3,
        "hidden": 2048, "dim": 256, "outputs": 65536, "norm_last_layer": True,
        "freeze_last_layer": 1.0, "student_temperature": 0.1, "teacher_temperature": 0.04,
        "teacher_warmup_epochs": 0, "center_momentum": 0.9, "momentum": 0.996, "clip_grad": 3.0,
        "clip": "each", "head_norm": False, "augmentation": "dino",
    }  # fmt: skip
    assert dataclasses.asdict(DINO.recipes["paper"]).items() >= expected.items()
    resnet = DINO.recipes["paper-resnet"]
    assert (resnet.lr, resnet.weight_decay, resnet.final_weight_decay) == (0.06, 1e-4, 1e-4)


def test_collapsed_loss_is_the_log_of_the_outputs(no_encoder):
    method = bare(no_encoder, 11)
    method.teacher = Gives(torch.zeros(6, 11))
    loss = method.loss([torch.zeros(3, 11)] * 2, AT)
    assert loss.item() == pytest.approx(math.log(11)) == method.collapsed_loss()


def test_scalars_are_adapted_by_its_lars():
    assert LARS.dino([("scale", torch.nn.Parameter(torch.ones(())))], 1.0).param_groups[0]["adapt"]
