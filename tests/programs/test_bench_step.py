"""`python -m bench step`: what it counts as what, and how little of a step the loss is."""

import json
import time

import pytest
import torch
from small_run import QUEUES, SMALL

import fastcl.functional as F
from bench import step
from bench.__main__ import main as bench

CPU = "--clock cpu --threads 1"  # what other processes do does not count


@pytest.fixture
def rows(tmp_path):
    """The rows that a command line writes, by method."""
    threads = torch.get_num_threads()

    def run(text):
        own, _, rest = text.partition(" -- ")
        file = tmp_path / "step.json"
        assert bench([*f"step {own} --json {file} --".split(), *rest.split()]) == 0
        record = json.loads(file.read_text())
        return {row["method"]: row for row in record["rows"]}

    yield run
    torch.set_num_threads(threads)


def test_loss_is_less_than_a_twentieth_of_a_quick_step(rows, capsys):
    found = rows(f"simclr-v1 moco-v2 --steps 4 {CPU}")
    for row in found.values():
        assert 0 < row["seconds"]["loss"] < 0.05 * row["step"]
    assert "the loss takes at most" in capsys.readouterr().out


class Slow(torch.autograd.Function):
    """The identity, in 30 ms forward and 50 ms backward."""

    @staticmethod
    def forward(ctx, x):
        time.sleep(0.03)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(0.05)
        return grad


def test_each_part_is_counted_where_it_belongs(rows, images, monkeypatch):
    nt_xent, push = F.nt_xent, F.queue_push_

    def slow_push(*arguments):
        time.sleep(0.1)
        push(*arguments)

    monkeypatch.setattr(F, "nt_xent", lambda a, b, **k: nt_xent(Slow.apply(a), b, **k))
    monkeypatch.setattr(F, "queue_push_", slow_push)
    names = (F.nt_xent, F.queue_push_)
    for method, part, seconds in (("simclr-v1", "loss", 0.08), ("moco-v2", "updates", 0.1)):
        flags = f"{SMALL} {QUEUES[method]}".split("--workers")[0]
        found = rows(f"{method} --steps 3 -- --data folder --data-dir {images} {flags}")[method]
        assert found["seconds"][part] == max(found["seconds"].values()) > seconds
        assert found["step"] == pytest.approx(sum(found["seconds"].values()), rel=0.5)
        assert (found["seconds"]["momentum"] > 0) == (method == "moco-v2")
        assert found["images_per_second"] == pytest.approx(16 / found["step"])
        assert min(found["seconds"][p] for p in ("augmentation", "networks", "optimizer")) > 0
    assert names == (F.nt_xent, F.queue_push_)  # what was watched is as it was


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("swaw", "unknown method 'swaw'; did you mean swav?"),
        ("swav --steps 0", "--steps and --threads must be at least 1"),
        ("swav -- --lr cheap", "--lr must be a number; got 'cheap'"),
        ("swav -- --batch-size 20000", "batch_size 20000 is more than the 10000 images"),
    ],
)
def test_wrong_usage_is_one_line(arguments, said, capsys):
    own, _, rest = arguments.partition(" -- ")
    assert step.main([*own.split(), "--", *rest.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
