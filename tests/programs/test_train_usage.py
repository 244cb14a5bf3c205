"""`python -m fastcl.train`, its command line: wrong usage, help, config files, run folders."""

import dataclasses
import re
import subprocess

import pytest
from small_run import command, environment, one_line

from fastcl import checkpoint
from fastcl.config import Run, parse
from fastcl.methods import METHODS
from fastcl.train import main

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
