"""--precision, --channels-last, --compile: the same training, computed in another way."""

import functools
import logging

import pytest
import torch
from small_run import interrupt_at, rows, same_run

from fastcl import checkpoint, compiled
from fastcl.train import Trainer, main

FEW = "--epochs 1 --log-every 1 --eval-every 0"
pytestmark = pytest.mark.filterwarnings("ignore:queue_size")


@pytest.fixture
def losses(flags, tmp_path):
    """The losses of a run of four steps."""

    def run(name, extra, method="simclr-v1"):
        assert main(flags(method, name, f"{FEW} {extra}")) == 0
        return [row["loss"] for row in rows(tmp_path / name) if "loss" in row]

    return run


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile up to machine code, which takes a minute; or whatever the backend does."""

    def choose(backend="aot_eager"):
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)  # pytest asks

    return choose


# AdamW's first steps are the gradient's sign, so that rounding shows after a step: hence slack.
@pytest.mark.parametrize("method", ["simclr-v1", "moco-v3", "dino", "swav"])
def test_precisions_follow_each_other(method, losses):
    full, brain = losses("fp32", "", method), losses("bf16", "--precision bf16", method)
    half = losses("fp16", "--precision fp16", method)
    assert brain != full and brain == pytest.approx(full, rel=0.03)
    # Its first steps may be left out, until the scale of the loss suits the gradients.
    assert half[0] != full[0] and half[0] == pytest.approx(full[0], rel=0.002)


def test_fp16_leaves_out_a_step_whose_gradients_overflow(flags, tmp_path, monkeypatch):
    scales, seen, step = [2.0**4, 2.0**60, 2.0**4, 2.0**4], [], Trainer._step

    def watched(self, views, indices):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scales[self.step])
        before = {n: p.detach().clone() for n, p in self.method.named_parameters()}
        step(self, views, indices)
        moved = any(not torch.equal(p, before[n]) for n, p in self.method.named_parameters())
        seen.append((moved, self.scaler.get_scale()))

    monkeypatch.setattr(Trainer, "_step", watched)
    assert main(flags("simclr-v1", extra=f"{FEW} --precision fp16 --schedule cosine")) == 0
    assert seen == [(True, 2.0**4), (False, 2.0**59), (True, 2.0**4), (True, 2.0**4)]
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert state["scaler"]["scale"] == 2.0**4


@pytest.mark.parametrize("method", ["moco-v2", "cmc", "cpc", "dino"])
def test_channels_last_is_the_same_run(method, losses, tmp_path, monkeypatch):
    layouts, step = [], Trainer._step

    def watched(self, views, indices):
        weight = max(self.method.encoders()[0].parameters(), key=lambda p: (p.ndim, p.shape[1:2]))
        layouts.append(weight.is_contiguous(memory_format=torch.channels_last))
        step(self, views, indices)

    with monkeypatch.context() as context:
        context.setattr(Trainer, "_step", watched)
        last = losses("last", "--channels-last", method)
    assert layouts == [True] * 4
    assert last == pytest.approx(losses("first", "", method), rel=0.01)
    states = [checkpoint.load(tmp_path / n / "checkpoint.pt") for n in ("first", "last")]
    assert states[0]["method"].keys() == states[1]["method"].keys()


@pytest.mark.parametrize("method", ["simclr-v1", "moco-v1", "cpc"])
def test_compile_is_the_same_run(method, losses, compiler, tmp_path, monkeypatch):
    counted, compile_ = [], compiled.compile_

    def watched(module):
        compile_(module)
        counted.append(module)

    monkeypatch.setattr("fastcl.train.compile_", watched)
    compiler()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    ours = losses("compiled", "--compile", method)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert len(counted) == (2 if method == "moco-v1" else 1)  # queries' and keys'
    assert ours == pytest.approx(losses("plain", "", method), rel=0.01)
    states = [checkpoint.load(tmp_path / n / "checkpoint.pt") for n in ("compiled", "plain")]
    assert states[0]["method"].keys() == states[1]["method"].keys()


@pytest.mark.parametrize("first", ["--compile", "--precision bf16"])
def test_few_rows_at_a_time_go_with(first, losses, compiler):
    extra = "--encoder-norm gn"  # rows do not see each other, and chunks change nothing
    compiler()
    expected = losses("whole", f"{extra} {first}", "byol-v2")
    assert losses("few", f"{extra} {first} --micro-batch 6", "byol-v2") == pytest.approx(
        expected, rel=0.005
    )


def test_careful_initialisation_is_not_compiled_in(losses, compiler):
    extra = "--encoder-norm none --careful-init"
    compiler()
    ours = losses("compiled", f"{extra} --compile", "byol-v2")
    assert ours == pytest.approx(losses("plain", extra, "byol-v2"), rel=0.01)


def test_a_compiler_that_fails_is_one_line(flags, compiler, capsys):
    def broken(*_):
        raise RuntimeError("no working C++ compiler")

    compiler(broken)
    assert main(flags("simclr-v1", extra="--compile")) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "torch.compile cannot compile the encoder here: " in line
    assert "no working C++ compiler" in line and line.endswith("go on without --compile")


def test_all_together_resume_bit_for_bit(flags, tmp_path, monkeypatch, compiler):
    extra = "--precision fp16 --channels-last --compile --micro-batch 8"
    # Half precision is slow where a processor lacks it; a step that takes over a second is cut.
    extra += " --batch-size 8 --epochs 1 --checkpoint-steps 4"
    for name, step in (("whole", 0), ("cut", 6)):
        compiler()
        with monkeypatch.context() as context:
            if step:
                interrupt_at(context, step)
            assert main(flags("simclr-v1", name, extra)) == (130 if step else 0)
    assert main(["--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")
