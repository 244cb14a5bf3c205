"""MoCo v2 against five optimizer steps of the official builder with its MLP head."""

import dataclasses

import numpy as np
import pytest
import torch

from fastcl.methods.base import Progress
from fastcl.methods.moco_v2 import Config, MoCoV2

AT = Progress(step=0, steps_per_epoch=10, epochs=1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_five_steps_follow_the_official_code(golden, no_encoder, dtype):
    data = golden("mocov2_mlp_b6_in20_d16_k24")
    config = Config(
        dim=16,
        queue_size=24,
        momentum=float(data["param_m"]),
        temperature=float(data["param_T"]),
        bn_splits=1,
    )
    method = MoCoV2(no_encoder(20), config).to(dtype)
    names = {"W0": "0.weight", "b0": "0.bias", "W1": "2.weight", "b1": "2.bias"}
    start = {names[key]: torch.tensor(data[f"init_{key}"], dtype=dtype) for key in names}
    method.head.load_state_dict(start)
    method.key_encoder[1].load_state_dict(start)
    method.queue.features.copy_(torch.tensor(data["queue_before"]))
    optimizer = torch.optim.SGD(
        method.head.parameters(),
        lr=float(data["param_lr"]),
        momentum=float(data["param_sgd_momentum"]),
        weight_decay=float(data["param_weight_decay"]),
    )
    rtol = 1e-7 if dtype == torch.float64 else 3e-6

    def same(tensor, key):
        truth = data[key]
        np.testing.assert_allclose(
            tensor.detach().numpy(), truth, rtol=0, atol=rtol * np.abs(truth).max(), err_msg=key
        )

    for step in range(1, 6):
        views = [torch.tensor(data[f"s{step}_im_{x}"], dtype=dtype) for x in "qk"]
        optimizer.zero_grad()
        loss = method.loss(views, AT)
        loss.backward()
        method.after_backward(AT)
        np.testing.assert_allclose(loss.item(), data[f"s{step}_f64_loss"], rtol=rtol)
        for key, name in names.items():
            same(method.head.get_parameter(name).grad, f"s{step}_f64_grad_{key}")
        optimizer.step()
        method.after_step(AT)
        assert method.queue.pointer.item() == data[f"s{step}_ptr_after"]
    for key, name in names.items():
        same(method.head.get_parameter(name), f"s5_f64_q_after_{key}")
        same(method.key_encoder[1].get_parameter(name), f"s5_f64_k_after_{key}")
    np.testing.assert_allclose(
        method.queue.features.numpy(), data["f64_queue_after"], rtol=0, atol=1e-6
    )


def test_paper_recipe_has_the_published_numbers():
    expected = {
        "backbone": "resnet50", "epochs": 200, "batch_size": 256, "optimizer": "sgd", "lr": 0.03,
        "weight_decay": 1e-4, "schedule": "cosine", "warmup_epochs": 0.0, "queue_size": 65536,
        "momentum": 0.999, "temperature": 0.2, "augmentation": "moco-v2",
    }  # fmt: skip
    assert dataclasses.asdict(MoCoV2.recipes["paper"]).items() >= expected.items()
