"""SimCLR v2: its selective kernels, memory and distillation."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

import fastcl.functional as F
from fastcl.methods.base import Progress
from fastcl.methods.simclr_v2 import Config, SimCLRV2, distillation_loss, memory_loss
from fastcl.models.selective import MeanPool, SelectiveKernels, SelectiveResNet, truncated_init_

AT = Progress(step=0, steps_per_epoch=10, epochs=1)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)


def close(found, truth, atol):
    np.testing.assert_allclose(np.asarray(found.detach()), truth, rtol=0, atol=atol)


@DTYPES
def test_selective_kernels_are_the_official_ones(golden, dtype):
    data = golden("simclrv2_sk_b3_h6_c5_f8_s1")
    layer = SelectiveKernels(5, 8, int(data["param_stride"]), float(data["param_sk_ratio"]))
    layer = layer.to(dtype).train()
    parameters = list(layer.parameters())  # in the official order
    assert len(parameters) == 7
    for i, parameter in enumerate(parameters):
        value = torch.tensor(data[f"tv{i}"], dtype=dtype)
        parameter.data = value.permute(3, 2, 0, 1) if value.ndim == 4 else value
    x, dy = (torch.tensor(data[k], dtype=dtype).permute(0, 3, 1, 2) for k in ("x", "dy"))
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    y, grad = y.permute(0, 2, 3, 1), x.grad.permute(0, 2, 3, 1)
    close(y, data["f64_out"], 1e-8 if dtype == torch.float64 else 1e-4)
    # Official gradients are float32 only, and batch norm of three vectors magnifies their errors.
    close(grad, data["grad_x"], 1e-3 * np.abs(data["grad_x"]).max())
    for i, parameter in enumerate(parameters):
        g = parameter.grad.permute(2, 3, 1, 0) if parameter.ndim == 4 else parameter.grad
        truth = data[f"grad_tv{i}"]
        close(g, truth, 1e-3 * np.abs(truth).max())


@DTYPES
def test_memory_is_the_formula(golden, dtype):
    data = golden("simclrv2_memory_f64only_n6_d40_m50")
    z, keys, queue = (torch.tensor(data[k], dtype=dtype) for k in ("h_q", "h_k", "buffer"))
    z.requires_grad_()
    keys = nn.functional.normalize(keys, dim=1)
    loss = memory_loss(z, keys, queue, float(data["param_T"]))
    loss.backward()
    exact = dtype == torch.float64
    np.testing.assert_allclose(loss.item(), data["f64_loss"], rtol=1e-7 if exact else 2e-6)
    np.testing.assert_allclose(loss.item(), 2 * data["f64_loss_mean_rows"], rtol=2e-6)
    truth = data["f64_grad_h_q"]
    close(z.grad, truth, (1e-7 if exact else 1e-5) * np.abs(truth).max())
    close(keys, data["f64_keys"], 1e-6)


@DTYPES
@pytest.mark.parametrize("name", ["b10_c37_t1", "b9_c10_t2"])
def test_distillation_is_the_official_one(golden, name, dtype):
    data = golden(f"simclrv2_distill_{name}")
    student, teacher = (torch.tensor(data[k], dtype=dtype) for k in ("student", "teacher"))
    student.requires_grad_(), teacher.requires_grad_()
    temperature = float(data["param_T"])
    loss = distillation_loss(student, teacher, temperature=temperature, scale_by_tau2=True)
    loss.backward()
    exact = dtype == torch.float64
    np.testing.assert_allclose(loss.item(), data["f64_loss"], rtol=1e-9 if exact else 5e-7)
    truth = data["f64_grad_student"]
    close(student.grad, truth, (1e-9 if exact else 1e-6) * np.abs(truth).max())
    assert teacher.grad is None
    paper = distillation_loss(student, teacher, temperature=temperature)
    np.testing.assert_allclose(paper.item(), data["f64_loss_paper"], rtol=1e-9 if exact else 5e-7)


def test_distillation_mixes_in_labels():
    student, teacher = torch.randn(2, 5, 4)
    labels = torch.tensor([0, 1, 2, 3, 0])
    soft = distillation_loss(student, teacher)
    hard = nn.functional.cross_entropy(student, labels)
    mixed = distillation_loss(student, teacher, labels=labels, alpha=0.3)
    torch.testing.assert_close(mixed, 0.3 * soft + 0.7 * hard)
    with pytest.raises(ValueError, match="needs labels"):
        distillation_loss(student, teacher, alpha=0.5)
    with pytest.raises(ValueError, match="alpha must be"):
        distillation_loss(student, teacher, alpha=2)


def test_memory_without_a_queue_and_a_lag_is_nt_xent():
    z = torch.randn(12, 7, dtype=torch.float64)
    keys = nn.functional.normalize(z, dim=1)
    found = memory_loss(z, keys, keys[:0], 0.3)
    torch.testing.assert_close(found, 2 * F.nt_xent(*z.chunk(2), temperature=0.3))


def test_keys_enter_the_queue_after_they_were_used(tiny_encoder):
    method = SimCLRV2(tiny_encoder(), Config(dim=4, memory=True, queue_size=20, momentum=0.5))
    views = [torch.rand(8, 3, 8, 8) for _ in range(2)]
    queue = method.queue.features.clone()
    loss = method.loss(views, AT)
    loss.backward()
    assert torch.equal(method.queue.features, queue)
    method.after_backward(AT)
    assert torch.equal(method.queue.features[:16], method.keys)
    assert torch.equal(method.queue.features[16:], queue[16:])
    assert all(p.grad is None for p in method.key_encoder.parameters())


def test_fine_tuning_starts_in_the_middle_of_the_head(tiny_encoder):
    method = SimCLRV2(tiny_encoder(), Config(dim=4)).eval()
    images = torch.rand(5, 3, 8, 8)
    h = method.encoder(images)
    torch.testing.assert_close(method.fine_tuned_part(0)(images), h)
    first = method.head[1](method.head[0](h)).relu()
    torch.testing.assert_close(method.fine_tuned_part(1)(images), first)
    torch.testing.assert_close(method.fine_tuned_part(3)(images), method.head(h))
    with pytest.raises(ValueError, match=r"layer must be in 0 … 3; got 4"):
        method.fine_tuned_part(4)


def test_head_has_three_layers_and_no_shift_at_the_end(no_encoder):
    head = SimCLRV2(no_encoder(24), Config(dim=16)).head
    shapes = [tuple(m.weight.shape) for m in head if isinstance(m, nn.Linear)]
    assert shapes == [(24, 24), (24, 24), (16, 24)]
    assert all(m.bias is None for m in head if isinstance(m, nn.Linear))
    assert isinstance(head[-1], nn.BatchNorm1d) and not head[-1].bias.requires_grad


@pytest.mark.parametrize("sk_ratio, size", [(0.0625, 96), (0.0625, 32), (0.0, 96)])
def test_networks_of_any_width(sk_ratio, size):
    net = SelectiveResNet((1, 1, 1, 1), width=1, sk_ratio=sk_ratio, image_size=size)
    assert net(torch.rand(2, 3, size, size)).shape == (2, 2048) and net.feature_dim == 2048
    strides = [m.stride[0] for m in net.stem.modules() if isinstance(m, nn.Conv2d)]
    assert strides == ([1] if size == 32 else [2, 1, 1] if sk_ratio else [2])
    assert all(
        torch.equal(b.last[1].weight, torch.zeros_like(b.last[1].weight)) for b in net.blocks
    )


def test_resnet_50_has_the_published_number_of_parameters():
    with torch.device("meta"):
        plain = SelectiveResNet((3, 4, 6, 3), sk_ratio=0.0)
        selective = SelectiveResNet((3, 4, 6, 3), sk_ratio=0.0625)
    count = [sum(p.numel() for p in net.parameters()) for net in (plain, selective)]
    assert count[0] == 23_508_032  # torchvision's resnet50 without its classifier
    assert 34e6 < count[1] < 36e6  # the paper's 35 M with a classifier


def test_means_of_four_repeat_the_border_at_stride_one():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    expected = [[2.0, 3.0, 3.5], [3.5, 4.5, 5.0]]
    assert MeanPool(1)(x)[0, 0].tolist() == expected
    assert MeanPool(2)(x)[0, 0].tolist() == [[2.0, 1.75]]


def test_convolutions_start_with_variance_one_over_fan_in():
    conv = nn.Conv2d(64, 256, 3)
    truncated_init_(conv)
    std = conv.weight.std().item()
    assert std == pytest.approx(math.sqrt(1 / 576), rel=0.02)
    assert conv.weight.abs().max() <= 2 * math.sqrt(1 / 576) / 0.8796 * 1.001


def test_wide_is_for_resnets():
    with pytest.raises(ValueError, match="selective kernels and width are for resnet50"):
        SimCLRV2.build_encoder(Config(backbone="tiny-resnet", width=2), 32)


def test_paper_recipe_has_the_published_numbers():
    expected = {
        "backbone": "resnet50", "epochs": 800, "batch_size": 4096, "optimizer": "lars-simclr",
        "lr": 6.4, "weight_decay": 1e-4, "warmup_epochs": 40.0, "dim": 128, "temperature": 0.1,
        "head_layers": 3, "memory": False, "queue_size": 65536, "momentum": 0.999,
        "augmentation": "simclr-v2", "zero_init_residual": True,
    }  # fmt: skip
    assert dataclasses.asdict(SimCLRV2.recipes["paper"]).items() >= expected.items()
