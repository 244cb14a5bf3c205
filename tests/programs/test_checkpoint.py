"""checkpoint.pt and its other names: whatever happens, one of them is whole, and we say which."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from fastcl import checkpoint, evaluate
from fastcl.progress import read_rows
from fastcl.train import Trainer, main

LINKS, RENAMES = "link", "replace"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of 16-pixel noise, brighter above or below."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 128, (16, 16, 3))
                pixels[8 * label : 8 * label + 8] += 20
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def flags(images, tmp_path):
    """A run of 4 epochs of 4 steps into tmp_path/NAME."""

    def make(name="run", extra=""):
        small = "--backbone tiny-resnet --dim 16 --batch-size 8 --epochs 4 --log-every 2"
        rest = f"--workers 0 --no-report --no-tensorboard --output {tmp_path / name}"
        return (
            f"--method simclr-v1 {small} --data folder --data-dir {images} {rest} {extra}".split()
        )

    return make


def state(step, size=1000):
    return {"method": {"w": torch.full((size,), float(step))}, "values": {}, "step": step}


def step_of(path):
    """The step of a checkpoint whose tensors are of that step too."""
    found = checkpoint.load(path)
    assert (found["method"]["w"] == found["step"]).all()
    return found["step"]


def one_line(text):
    (line,) = text.strip().splitlines()
    return line


# ---- files ---------------------------------------------------------------------------------------


def test_the_one_before_stays(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for step in range(3):
        checkpoint.save(path, state(step))
        assert step_of(path) == step
        assert not step or step_of(tmp_path / "checkpoint.previous.pt") == step - 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]


def test_killed_at_random_moments_it_is_always_whole(tmp_path):
    """A child that saves without end is killed, thirty times. It is too small to need threads."""
    path, moments = tmp_path / "checkpoint.pt", random.Random(0)
    checkpoint.save(path, state(0, 20_000))
    last = 0
    for _ in range(30):
        child = os.fork()
        if child == 0:
            for step in range(last + 1, 1 << 30):
                checkpoint.save(path, state(step, 20_000))
        time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert step_of(path) >= last
        last = step_of(path)
        if last:
            assert step_of(tmp_path / "checkpoint.previous.pt") in (last - 1, last)
    assert last > 0


@pytest.mark.parametrize(("call", "time"), [(LINKS, 1), (RENAMES, 1), (RENAMES, 2), (RENAMES, 3)])
@pytest.mark.parametrize("after", [False, True])
def test_cut_at_every_system_call_it_is_whole(call, time, after, tmp_path, monkeypatch):
    """As if the machine stopped just before or after the n-th link or rename of two saves."""
    path, calls = tmp_path / "checkpoint.pt", Counter()
    checkpoint.save(path, state(1))
    checkpoint.save(path, state(2))
    real = getattr(os, call)

    def cut(*arguments):
        calls[call] += 1
        if calls[call] == time and not after:
            raise KeyboardInterrupt
        real(*arguments)
        if calls[call] == time and after:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(os, call, cut)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(path, state(3))
            checkpoint.save(path, state(4))
    step = step_of(path)
    assert step in (2, 3)
    assert step_of(tmp_path / "checkpoint.previous.pt") in (step - 1, step)
    checkpoint.save(path, state(5))  # what was left lying about is in nobody's way
    assert step_of(path) == 5 and step_of(tmp_path / "checkpoint.previous.pt") == step


def test_file_systems_without_links_get_copies(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "checkpoint.pt"
    for step in (1, 2):
        checkpoint.save(path, state(step))
    checkpoint.keep(path, "best.pt")
    checkpoint.keep(path, "best.pt")
    path.write_bytes(b"")
    assert step_of(tmp_path / "best.pt") == 2
    assert step_of(tmp_path / "checkpoint.previous.pt") == 1
    assert len(list(tmp_path.iterdir())) == 3


def test_a_name_is_kept_again_without_remains(tmp_path):
    path = tmp_path / "checkpoint.pt"
    for step in (1, 1, 2):
        checkpoint.save(path, state(step))
        checkpoint.keep(path, "best.pt")
        checkpoint.keep(path, "best.pt")
        assert step_of(tmp_path / "best.pt") == step
    assert not list(tmp_path.glob("*.tmp"))


# ---- what a run keeps ----------------------------------------------------------------------------


def test_keep_every_and_best(flags, tmp_path, monkeypatch):
    accuracies = iter([0.9, 0.3, 0.5, 0.5, 0.4])  # untrained, then after each epoch
    monkeypatch.setattr("fastcl.train.knn_accuracy", lambda *_, **__: next(accuracies))
    assert main(flags(extra="--eval-every 1 --keep-every 2 --checkpoint-every 3")) == 0
    folder = tmp_path / "run"
    steps = {p.name: checkpoint.load(p)["step"] for p in folder.glob("*.pt")}
    assert steps == {
        "checkpoint.pt": 16,
        "checkpoint.previous.pt": 12,
        "checkpoint-epoch2.pt": 8,
        "checkpoint-epoch4.pt": 16,
        "best.pt": 8,  # the first of two equal ones; not the untrained encoder
    }
    assert evaluate.main(["--checkpoint", str(folder / "best.pt")]) == 0


def test_resume_makes_the_copies_that_a_kill_prevented(flags, tmp_path, monkeypatch):
    folder, keep = tmp_path / "run", checkpoint.keep

    def killed(path, name):
        if name == "checkpoint-epoch1.pt":
            raise SystemExit(9)
        keep(path, name)

    with monkeypatch.context() as context:
        context.setattr(checkpoint, "keep", killed)
        with pytest.raises(SystemExit):
            main(flags(extra="--keep-every 1"))
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 4
    assert not (folder / "checkpoint-epoch1.pt").exists()
    assert main(["--resume", str(folder)]) == 0
    for epoch in (1, 2, 3, 4):
        path = folder / f"checkpoint-epoch{epoch}.pt"
        assert checkpoint.load(path)["step"] == 4 * epoch


# ---- damaged and foreign files -------------------------------------------------------------------


@pytest.fixture
def stopped(flags, tmp_path, monkeypatch):
    """A run stopped after 2 of 4 epochs: checkpoints of steps 8 and 4."""
    original = Trainer._step

    def step(self, *batch):
        if self.step == 8:
            raise KeyboardInterrupt
        original(self, *batch)

    with monkeypatch.context() as context:
        context.setattr(Trainer, "_step", step)
        assert main(flags()) == 130
    folder = tmp_path / "run"
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 8
    return folder


DAMAGE = {
    "half": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "a byte short": lambda whole: whole[:-1],
    "text": lambda whole: b"no checkpoint",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_resume_on_a_damaged_checkpoint_names_the_one_before(damage, stopped, capsys):
    path = stopped / "checkpoint.pt"
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    capsys.readouterr()
    before = {p.name: p.read_bytes() for p in stopped.iterdir()}
    assert main(["--resume", str(stopped)]) == 2
    line = one_line(capsys.readouterr().err)
    assert f"cannot resume: {path} is not a checkpoint, or a damaged one" in line
    previous = stopped / "checkpoint.previous.pt"
    assert f"checkpoint.previous.pt is whole, of step 4: go on with --resume {previous}" in line
    assert {p.name: p.read_bytes() for p in stopped.iterdir()} == before


def test_the_advice_leads_to_the_run_that_was_never_stopped(flags, stopped, tmp_path):
    assert main(flags("whole")) == 0
    path = stopped / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert main(["--resume", str(stopped / "checkpoint.previous.pt")]) == 0
    ours, whole = (checkpoint.load(p / "checkpoint.pt") for p in (stopped, tmp_path / "whole"))
    assert ours["step"] == whole["step"] == 16
    assert all(torch.equal(ours["method"][k], v) for k, v in whole["method"].items())
    assert [row.get("loss") for row in read_rows(stopped / "metrics.jsonl")] == [
        row.get("loss") for row in read_rows(tmp_path / "whole" / "metrics.jsonl")
    ]
    assert checkpoint.load(stopped / "checkpoint.previous.pt")["step"] == 12


def test_the_previous_one_is_never_given_up_for_a_damaged_one(stopped, monkeypatch):
    """Stopped right after --resume took it up: checkpoint.pt is whole again."""
    path = stopped / "checkpoint.pt"
    path.write_bytes(b"")

    def stop(self):
        raise SystemExit

    monkeypatch.setattr(Trainer, "fit", stop)
    with pytest.raises(SystemExit):
        main(["--resume", str(stopped / "checkpoint.previous.pt")])
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        assert checkpoint.load(stopped / name)["step"] == 4


@pytest.mark.parametrize("foreign", [{"a": 1}, {"method": {}}, [1, 2], torch.ones(3)])
def test_a_foreign_file_gets_one_line(foreign, stopped, tmp_path, capsys):
    other = tmp_path / "elsewhere" / "model.pt"
    other.parent.mkdir()
    torch.save(foreign, other)
    capsys.readouterr()
    assert main(["--resume", str(other)]) == 2
    line = one_line(capsys.readouterr().err)
    assert line.endswith(f"cannot resume: {other} is not a checkpoint of fastcl.train")
    assert list(other.parent.iterdir()) == [other]


def test_a_pickle_that_runs_code_is_not_run(tmp_path, capsys):
    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "attacked"),))

    path = tmp_path / "checkpoint.pt"
    torch.save({"method": {}, "values": {}, "step": Attack()}, path)
    assert main(["--resume", str(path)]) == 2
    assert "is not a checkpoint" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "attacked").exists()


def test_a_lost_checkpoint_names_what_is_left(stopped, capsys):
    (stopped / "checkpoint.pt").unlink()
    capsys.readouterr()
    assert main(["--resume", str(stopped)]) == 2
    line = one_line(capsys.readouterr().err)
    assert "nothing to resume" in line and "checkpoint.previous.pt is whole, of step 4" in line


def test_no_advice_where_nothing_is_whole(stopped, capsys):
    for path in stopped.glob("*.pt"):
        path.write_bytes(b"")
    capsys.readouterr()
    assert main(["--resume", str(stopped)]) == 2
    assert "whole" not in one_line(capsys.readouterr().err)


INTERRUPTED = """
import sys
from pathlib import Path
import torch
from fastcl import checkpoint

def at_the_end(frame, event, argument):
    code = frame.f_code
    if code.co_name == "__exit__" and code.co_filename == torch.serialization.__file__:
        sys.settrace(None)
        raise KeyboardInterrupt

sys.settrace(at_the_end)
try:
    checkpoint.save(Path(sys.argv[1]), {"a": torch.ones(1000)})
except KeyboardInterrupt:
    pass
sys.exit(7)
"""


def test_ctrl_c_before_the_last_write_does_not_abort(tmp_path):
    """torch's writer then writes when it is destroyed: an exception there ends the process."""
    program = [sys.executable, "-c", INTERRUPTED, str(tmp_path / checkpoint.NAME)]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert list(tmp_path.iterdir()) == []
