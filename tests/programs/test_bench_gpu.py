"""`python -m bench` on a CUDA device, as far as it goes without one."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from bench_setting import ONE, one_thread, tiny  # noqa: F401
from torch.nn.functional import cross_entropy, logsigmoid, normalize

from bench import machine, measure
from bench.calls import make_inputs
from bench.measure import Runner
from bench.workloads import WORKLOADS, providers_of


def test_on_a_gpu_triton_times_the_call(monkeypatch) -> None:
    testing = pytest.importorskip("triton.testing")
    calls: list[str] = []

    def do_bench(step, *, warmup, rep, return_mode):  # milliseconds
        step()
        assert return_mode == "median" and warmup > 0 and rep > 0
        return 2.5

    monkeypatch.setattr(testing, "do_bench", do_bench)
    assert machine.seconds(lambda: calls.append("a"), 7, "cuda:0") == 2.5e-3
    assert calls == ["a"]
    assert machine.best_rate(lambda: None, 5e9, "cuda") == 5e9 / 2.5e-3
    runner = Runner({"provider": "fastcl"}, dict, slow=False)
    settings = dataclasses.replace(ONE, device="cuda", seconds=1)
    assert measure.take_turns([runner], settings) == [[2.5e-3] * 3]


GPU_PEERS = [(w.name, p) for w in WORKLOADS.values() for p in w.peers if w.peers[p].device]


def test_gpu_peers_are_no_rows_of_a_cpu() -> None:
    assert {peer for _, peer in GPU_PEERS} == {"memeff", "inf-cl", "siglip-kernel", "liger-kernel"}
    for name, peer in GPU_PEERS:
        assert peer not in providers_of(WORKLOADS[name], "cpu")
        assert peer in providers_of(WORKLOADS[name], "cuda:1")


@pytest.mark.parametrize(("name", "peer"), GPU_PEERS)
def test_gpu_peers_are_called_by_their_documentation(name: str, peer: str, monkeypatch) -> None:
    """Their documented functions in plain PyTorch stand in for them: what we pass must be right."""

    def pair(x):
        return torch.arange(len(x))

    class CLIP:  # memeff: normalises; stable=True would rescale the gradients
        def __init__(self, temperature, normalized_inputs=False, stable=True):
            assert not stable and not normalized_inputs
            self.temperature = temperature

        def __call__(self, x, y):
            s = normalize(x, dim=1) @ normalize(y, dim=1).T / self.temperature
            return (cross_entropy(s, pair(s)) + cross_entropy(s.T, pair(s))) / 2

    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):  # a loss for each row
        assert q.shape[1] % head_dim == 0
        return cross_entropy(scale * q @ k.T, pair(q), reduction="none")

    def fused_siglip_loss(img, txt, log_temperature, bias):  # normalised features
        s = log_temperature.exp() * img @ txt.T + bias
        return -logsigmoid((2 * torch.eye(len(s)) - 1) * s).sum() / len(s)

    class Linear:  # liger: cross entropy of input @ weight.T
        def __call__(self, lin_weight, _input, target):
            return cross_entropy(_input @ lin_weight.T, target)

    fakes = {
        "memeff": {"MemoryEfficientCLIPLoss": CLIP},
        "inf_cl": {"cal_flash_loss": cal_flash_loss},
        "siglip_kernel": {"fused_siglip_loss": fused_siglip_loss},
        "liger_kernel": {},
        "liger_kernel.transformers": {"LigerFusedLinearCrossEntropyLoss": Linear},
    }
    for module, names in fakes.items():
        fake = types.ModuleType(module)
        fake.__dict__.update(names)
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(machine, "version", lambda p: "1")
    workload, sizes = WORKLOADS[name], tiny(name)
    result = measure.begin(workload, sizes, peer, ONE)
    assert measure.checked(workload, sizes, result, make_inputs(workload, sizes, ONE), ONE)
    assert result["errors"].keys() >= {"value", "image", "text"}
