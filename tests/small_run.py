"""The smallest training runs that the tests share, and what they look at in them."""

import json
import os
import signal
import sys

import torch

from fastcl import checkpoint
from fastcl.train import Trainer

# The smallest run: 64 images of 16 pixels, 4 steps an epoch. What it shows: test_report.py.
SMALL = "--backbone tiny-resnet --batch-size 16 --epochs 3 --log-every 2 --eval-every 1 --workers 0"
SMALL += " --no-report --no-tensorboard"
QUEUES = {
    "moco-v1": "--queue-size 24 --bn-splits 2",
    "moco-v2": "--queue-size 24 --bn-splits 2",
    "simclr-v1": "",
    "swav": "--prototypes 12 --hidden 16 --small-crops 2 --queue-size 32 --queue-start-epoch 1",
    "instdisc": "",
    "invaspread": "",
    "byol": "--dim 16 --hidden 8",
    "simsiam": "--dim 16 --hidden 8",
    "moco-v3": "--dim 16 --hidden 8",
    "cmc": "",
    "cpc": "--image-size 16 --patch 8 --stride 2 --window 8",
    "byol-v2": "--dim 16 --hidden 32",
    "simclr-v2": "",
    "dino": "--dim 16 --hidden 8 --outputs 12 --small-crops 2",
}


def command(arguments):
    return [sys.executable, "-m", "fastcl.train", *arguments]


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def rows(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()]


def same_run(first, second):
    """Equal metrics (but for the clock) and bit-equal checkpoints."""
    for a, b in zip(rows(first), rows(second), strict=True):
        a.pop("images_per_second", None)
        b.pop("images_per_second", None)
        assert a == b
    a, b = (checkpoint.load(folder / "checkpoint.pt") for folder in (first, second))
    a["values"].pop("output")
    b["values"].pop("output")
    same_state(a, b, "")


def same_state(a, b, path):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same_state(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same_state(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def one_line(text):
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


def interrupt_at(monkeypatch, step, number=signal.SIGINT):
    """Ctrl-C in the middle of that step."""
    original = Trainer._step

    def patched(self, *batch):
        if self.step == step:
            os.kill(os.getpid(), number)
        original(self, *batch)

    monkeypatch.setattr(Trainer, "_step", patched)
