"""`python -m fastcl.train` stopped: Ctrl-C, SIGTERM, a loss that is not finite, a full disk."""

import os
import re
import resource
import signal
import subprocess
import time

import pytest
from small_run import command, environment, interrupt_at, one_line, same_run

from fastcl import checkpoint
from fastcl import train as train_module
from fastcl.interrupt import Interrupt
from fastcl.train import Trainer, main


def test_ctrl_c_stops_soon_and_says_where_the_checkpoint_is(flags, tmp_path):
    process = subprocess.Popen(
        command(flags("moco-v2", extra="--epochs 100000")),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - asked < 15  # a second or two, but the machine may be busy
    assert process.returncode == 130
    line = one_line(err)
    path = tmp_path / "run" / "checkpoint.pt"
    step = checkpoint.load(path)["step"]
    assert step > 0
    assert f"stopped at step {step} of" in line and str(path) in line and "--resume" in line


def test_ctrl_c_during_the_first_evaluation_leaves_a_run_that_can_go_on(
    flags, tmp_path, monkeypatch
):
    assert main(flags("moco-v2", "whole")) == 0

    def interrupted(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    with monkeypatch.context() as context:
        context.setattr(train_module, "knn_accuracy", interrupted)
        assert main(flags("moco-v2", "cut")) == 130
    assert main(["--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_sigterm_saves_like_ctrl_c(flags, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, step=5, number=signal.SIGTERM)
    assert main(flags()) == 143
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 6


def test_a_step_that_takes_too_long_is_cut_and_the_last_checkpoint_kept(
    flags, tmp_path, monkeypatch, capsys
):
    original = Trainer._step

    def endless(self, *batch):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(30)
        original(self, *batch)

    monkeypatch.setattr(Trainer, "_step", endless)
    began = time.monotonic()
    assert main(flags()) == 130
    assert time.monotonic() - began < 25
    line = one_line(capsys.readouterr().err)
    assert "the checkpoint of step 4 is" in line
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] == 4


def test_interrupt_waits_for_the_end_of_a_hold():
    done = []
    with pytest.raises(KeyboardInterrupt), Interrupt() as interrupt:
        with interrupt.hold():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("held")
        done.append("not reached")
    assert done == ["held"] and interrupt.clean
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_non_finite_loss_stops_with_the_step_and_keeps_the_last_finite_checkpoint(
    flags, tmp_path, monkeypatch, capsys
):
    original = Trainer._step

    def patched(self, *batch):
        if self.step == 6:
            batch[0][0][0, 0, 0, 0] = float("nan")
        original(self, *batch)

    monkeypatch.setattr(Trainer, "_step", patched)
    assert main(flags("moco-v2")) == 1
    line = one_line(capsys.readouterr().err)
    assert "the loss of step 7 is nan" in line and "the checkpoint of step 4 is" in line
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert state["step"] == 4
    assert all(t.isfinite().all() for t in state["method"].values() if t.is_floating_point())


def test_divergence_by_learning_rate_stops_before_any_bad_checkpoint(flags, tmp_path, capsys):
    assert main(flags("moco-v2", extra="--lr 1e30")) == 1
    line = one_line(capsys.readouterr().err)
    assert re.search(r"the loss of step \d+ is (nan|inf); no checkpoint was written", line)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_full_disk_keeps_the_previous_checkpoint(flags, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as context:
        interrupt_at(context, step=5)
        assert main(flags()) == 130
    capsys.readouterr()
    folder = tmp_path / "run"
    before = (folder / "checkpoint.pt").read_bytes()
    (folder / "checkpoint.pt.tmp").symlink_to("/dev/full")  # every write: no space left on device
    assert main(["--resume", str(folder)]) == 1
    line = one_line(capsys.readouterr().err)
    assert "No space left on device" in line and "the checkpoint of step 6 is" in line
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 6


def test_file_size_limit_through_the_command_line(flags, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    done = subprocess.run(
        command(flags("moco-v2")),
        env=environment(),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    line = one_line(done.stderr)
    assert "cannot write to" in line and "File too large" in line
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_save_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"method": {}, "values": {}, "step": 1})

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(path, {"method": {}, "values": {}, "step": 2})
    assert checkpoint.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
