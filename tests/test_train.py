"""`python -m fastcl.train`: what it writes, how it goes on, and what it says when it cannot."""

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastcl import checkpoint
from fastcl import train as train_module
from fastcl.config import Run, parse
from fastcl.interrupt import Interrupt
from fastcl.methods import METHODS
from fastcl.progress import Metrics, collapse_signs, effective_rank, feature_std
from fastcl.train import Trainer, main

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


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of two classes: noise that is bright above, noise that is bright below."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 8)):
        for label in range(2):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, 128, (16, 16, 3))
                pixels[8 * label : 8 * label + 8] += 127
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def flags(images, tmp_path):
    """The arguments of a small run of a method into tmp_path/NAME."""

    def make(method="swav", name="run", extra=""):
        return [
            *f"--method {method} --data folder --data-dir {images} {SMALL}".split(),
            *f"{QUEUES[method]} --output {tmp_path / name} {extra}".split(),
        ]

    return make


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


# ---- how it stops --------------------------------------------------------------------------------


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


# ---- wrong usage ---------------------------------------------------------------------------------

WRONG = {
    "method": ("--method swaw", ["unknown method 'swaw'", "did you mean swav?", *METHODS]),
    "data": ("--data cifar11", ["unknown data 'cifar11'", "cifar10", "fashion", "folder"]),
    "recipe": ("--recipe fast", ["unknown recipe 'fast'", "quick", "paper"]),
    "flag": ("--learning-rate 1", ["unknown flag '--learning-rate'", "--lr", "--epochs"]),
    "near flag": ("--epoch 1", ["unknown flag '--epoch'", "did you mean --epochs?"]),
    "backbone": ("--backbone resnet51", ["unknown backbone 'resnet51'", "resnet50", "tiny-resnet"]),
    "optimizer": ("--optimizer adm", ["unknown optimizer 'adm'", "sgd", "larc"]),
    "augmentation": ("--augmentation none", ["unknown augmentation 'none'", "moco-v2"]),
    "stray word": ("swav", ["unknown argument 'swav'"]),
    "number": ("--lr fast", ["--lr must be a number; got 'fast'"]),
    "whole number": ("--epochs 1.5", ["--epochs must be a whole number; got '1.5'"]),
    "no value": ("--lr", ["--lr", "expected one argument"]),
    "zero epochs": ("--epochs 0", ["--epochs must be at least 1; got 0"]),
    "temperature": ("--temperature 0", ["--temperature must be above 0; got 0"]),
    "nan": ("--temperature nan", ["--temperature must be above 0; got nan"]),
    "pair": ("--crop-scale 0.5", ["--crop-scale takes 2 values; got 1"]),
    "device": ("--device cuda:99", ["--device cuda:99 cannot be used here"]),
    "precision": ("--precision fp8", ["unknown precision 'fp8'", "bf16"]),
    "no folder": ("--data folder --data-dir /no/such", ["/no/such", "train/<class>"]),
    "no data dir": ("--data folder", ["data_dir", "train/<class>"]),
    "batch": ("--batch-size 20000", ["batch_size 20000", "10000 images"]),
    "no config": ("--config /no/such.yaml", ["cannot read --config /no/such.yaml"]),
    "no run": ("--resume /no/such", ["nothing to resume", "/no/such"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch, capsys):
    arguments, expected = WRONG[case]
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    line = one_line(captured.err)
    assert captured.out == ""
    for text in expected:
        assert text in line, line
    assert list(tmp_path.iterdir()) == []  # nothing was begun


def test_exit_code_of_the_command_line():
    done = subprocess.run(
        command(["--method", "swaw"]), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "Methods: " in one_line(done.stderr)


def test_help_shows_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--method", "moco-v2", "--recipe", "paper", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    names = {"the run", "speed and memory", "what it writes, and how often"}
    names |= {"encoder and views", "optimisation"}
    groups = dict(re.findall(r"^(\w[^\n]*):\n((?: .*\n|\n(?= ))+)", text, re.MULTILINE))
    assert names | {"the method, moco-v2"} < groups.keys()
    expected = METHODS["moco-v2"].recipes["paper"]
    for group, flag, default in (
        ("the run", "--data STR", "fashion"),
        ("speed and memory", "--workers INT", 1),
        ("what it writes, and how often", "--report, --no-report", "on"),
        ("what it writes, and how often", "--keep-every INT", 0),
        ("optimisation", "--lr FLOAT", expected.lr),
        ("encoder and views", "--crop-scale [N ...]", "0.2 1.0"),
        ("the method, moco-v2", "--queue-size INT", 65536),
        ("the method, moco-v2", "--temperature FLOAT", 0.2),
    ):
        after = groups[group].split(f"  {flag} ")[1].split("\n  --")[0]
        assert " ".join(after.split()).endswith(f"[{default}]"), (flag, after)
    flags = re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)
    fields = {f.name for f in dataclasses.fields(Run)} | {
        f.name for f in dataclasses.fields(expected)
    }
    assert sorted(flags) == sorted(
        ["--config", "--resume", "--print-config", *("--" + f.replace("_", "-") for f in fields)]
    )


def test_printed_config_gives_the_same_values_back(tmp_path, capsys):
    arguments = "--method moco-v1 --recipe paper --temperature 0.3 --milestones 5 7 --no-blur"
    assert main([*arguments.split(), "--print-config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "config.yaml").write_text(text)
    again = parse(["--config", str(tmp_path / "config.yaml")])
    assert again.run.method == "moco-v1"
    assert again.config == parse(arguments.split()).config
    assert again.config.temperature == 0.3 and again.config.milestones == (5, 7)
    assert again.config.weight_decay == 1e-4  # YAML reads 1e-04 as text


def test_config_file_is_below_the_flags_and_above_the_recipe(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("method: simclr-v1\nlr: 3\nbatch-size: 32\n")
    request = parse(["--config", str(path), "--lr", "0.5"])
    assert (request.run.method, request.config.lr, request.config.batch_size) == (
        "simclr-v1",
        0.5,
        32,
    )
    path.write_text("method: simclr-v1\ntemperatur: 3\n")
    assert main(["--config", str(path)]) == 2
    line = one_line(capsys.readouterr().err)
    assert "unknown field 'temperatur'; did you mean temperature?" in line


def test_another_runs_checkpoint_is_not_overwritten(flags, tmp_path, capsys):
    assert main(flags("simclr-v1", extra="--epochs 1")) == 0
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert main(flags("simclr-v1", extra="--epochs 1")) == 2
    assert "holds a run already" in one_line(capsys.readouterr().err)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_default_output_takes_a_free_number(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = flags("simclr-v1", extra="--epochs 1 --eval-every 0")
    at = arguments.index("--output")
    del arguments[at : at + 2]
    assert main(arguments) == 0
    assert main(arguments) == 0
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert folders == ["simclr-v1-folder", "simclr-v1-folder-2"]
    assert main(["--resume", "--method", "simclr-v1", "--epochs", "2"]) == 0  # the latest
    assert checkpoint.load(tmp_path / "runs" / folders[1] / "checkpoint.pt")["step"] == 8


def test_resume_with_another_model_says_so(flags, tmp_path, capsys):
    assert main(flags("simclr-v1", extra="--epochs 1")) == 0
    capsys.readouterr()
    assert main(["--resume", str(tmp_path / "run"), "--dim", "64"]) == 2
    assert "is of another model than these flags ask for" in one_line(capsys.readouterr().err)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert main(["--resume", str(tmp_path / "run")]) == 2
    assert "is not a checkpoint" in one_line(capsys.readouterr().err)


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
