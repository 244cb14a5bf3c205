"""`python -m fastcl.train`: what it writes, how it goes on, and what it watches."""

import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from small_run import environment, interrupt_at, rows, same_run

from fastcl import checkpoint
from fastcl.config import parse
from fastcl.interrupt import Interrupt
from fastcl.methods import METHODS
from fastcl.progress import Metrics, collapse_signs, effective_rank, feature_std
from fastcl.train import Trainer, main

# ---- a whole run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_run_writes_config_metrics_and_checkpoint(method, flags, tmp_path, capsys):
    assert main(flags(method)) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.pt",
        "checkpoint.previous.pt",
        "checkpoint.pt",
        "config.yaml",
        "metrics.jsonl",
    ]
    evaluations = [row for row in rows(folder) if "knn_top1" in row]
    assert [row["step"] for row in evaluations] == [0, 4, 8, 12]
    assert all(0 <= row["knn_top1"] <= 1 for row in evaluations)
    steps = [row for row in rows(folder) if "loss" in row]
    assert [row["step"] for row in steps] == [2, 4, 6, 8, 10, 12]
    assert [row["epoch"] for row in steps] == [0.5, 1, 1.5, 2, 2.5, 3]
    for row in steps:
        assert np.isfinite([row["loss"], row["feature_std"], row["images_per_second"]]).all()
        assert 1 <= row["effective_rank"] <= 16
    expected = METHODS[method].recipes["quick"]
    if method in ("byol", "byol-v2", "moco-v3", "dino"):
        momenta = [row["momentum"] for row in steps]
        assert expected.momentum < momenta[0] < momenta[-1] < 1
    elif method in ("instdisc", "cmc", "simclr-v2"):  # the banks', or an option's
        assert {row["momentum"] for row in steps} == {None}
    else:
        assert {row["momentum"] for row in steps} == {getattr(expected, "momentum", None)}
    numbers_line = (
        r"kNN accuracy: trained encoder ([\d.]+)%, untrained encoder ([\d.]+)%, "
        r"raw pixels ([\d.]+)%"
    )
    shown = re.search(numbers_line, out)
    first, last = evaluations[0], evaluations[-1]
    numbers = (last["knn_top1"], first["knn_top1"], first["knn_top1_raw_pixels"])
    assert tuple(map(float, shown.groups())) == pytest.approx([100 * x for x in numbers], abs=0.05)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 12
    assert state["values"]["method"] == method


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_exact(method, flags, tmp_path, monkeypatch):
    assert main(flags(method, "whole")) == 0
    with monkeypatch.context() as context:
        interrupt_at(context, step=6)  # in the middle of an epoch and of a row of metrics
        assert main(flags(method, "cut")) == 130
    assert checkpoint.load(tmp_path / "cut" / "checkpoint.pt")["step"] == 7
    assert main(["--resume", str(tmp_path / "cut")]) == 0
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_after_a_kill_repeats_what_came_after_the_checkpoint(flags, tmp_path):
    assert main(flags("moco-v2", "whole")) == 0
    kill = (
        "import os, sys, fastcl.train as t\n"
        "step = t.Trainer._step\n"
        "def killed(self, *batch):\n"
        "    step(self, *batch)\n"
        "    if self.step == 7: os.kill(os.getpid(), 9)\n"
        "t.Trainer._step = killed\n"
        "t.main(sys.argv[1:])\n"
    )
    arguments = [sys.executable, "-c", kill, *flags("moco-v2", "cut")]
    same_threads = environment() | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(arguments, env=same_threads, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "cut"
    assert checkpoint.load(folder / "checkpoint.pt")["step"] == 4
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # a row that was being written
    assert max(row["step"] for row in rows_that_parse(folder)) == 6
    assert main(["--resume", str(folder)]) == 0
    same_run(tmp_path / "whole", folder)


def rows_that_parse(folder):
    return [json.loads(row) for row in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]


def test_a_run_is_a_function_of_its_seed_and_not_of_the_workers(flags, tmp_path):
    main(flags("moco-v1", "first"))
    main(flags("moco-v1", "second", "--workers 2"))
    a, b = (rows(tmp_path / name) for name in ("first", "second"))
    assert [row.get("loss") for row in a] == [row.get("loss") for row in b]
    main(flags("moco-v1", "third", "--seed 1"))
    assert [row.get("loss") for row in a] != [row.get("loss") for row in rows(tmp_path / "third")]


def test_bf16_follows_fp32(flags, tmp_path):
    first = {}
    for precision in ("fp32", "bf16"):
        extra = f"--epochs 1 --log-every 1 --eval-every 0 --precision {precision}"
        main(flags("simclr-v1", precision, extra))
        first[precision] = next(row["loss"] for row in rows(tmp_path / precision) if "loss" in row)
    assert first["fp32"] != first["bf16"]
    assert first["fp32"] == pytest.approx(first["bf16"], rel=0.01)


# ---- the monitor ---------------------------------------------------------------------------------


def test_feature_std_and_effective_rank_of_known_embeddings():
    torch.manual_seed(0)
    same = torch.ones(20, 16) / 4
    assert feature_std(same) == pytest.approx(0, abs=1e-7)
    assert effective_rank(same) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.eye(16)) == pytest.approx(16, rel=1e-5)
    assert effective_rank(torch.eye(16)[:5].repeat(3, 1)) == pytest.approx(5, rel=1e-5)
    spread = torch.nn.functional.normalize(torch.randn(4000, 16), dim=1)
    assert feature_std(spread) == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize(("method", "head"), [("swav", " --no-centred-head"), ("simclr-v1", "")])
def test_collapse_is_noted(method, head, flags):
    with Interrupt() as interrupt:
        trainer = Trainer(parse(flags(method, extra="--lr 1e-9" + head)), interrupt)
    with torch.no_grad():
        last = trainer.method.head[-1]
        last.weight.zero_()
        last.bias.fill_(1.0)
        if method == "swav":
            trainer.method.prototypes.weight.fill_(1.0)
    trainer._clock()
    for views, _, indices in trainer.loader:
        trainer._step(views, indices)
    trainer._log()
    sits, same, few = collapse_signs(trainer.last)
    assert "the loss sits at" in sits and "hardly differ" in same and "rank of 1.00" in few


def test_a_healthy_run_is_not_called_collapsed(flags, capsys):
    assert main(flags("moco-v2", extra="--epochs 1")) == 0
    assert "note:" not in capsys.readouterr().out


def test_metrics_drop_what_a_resumed_run_writes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path)
    for step in (1, 2, 3):
        metrics.write(step=step, loss=float("nan"))
    assert json.loads(path.read_text().splitlines()[0]) == {"step": 1, "loss": None}
    path.write_text(path.read_text() + '{"step": 4')
    Metrics(path, resume_at=2).write(step=3, loss=0.5)
    assert [json.loads(row)["step"] for row in path.read_text().splitlines()] == [1, 2, 3]
