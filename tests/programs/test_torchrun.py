"""`torchrun -m fastcl.train` on two processes: one run, whoever is stopped or killed in it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_run import rows, same_run

from fastcl.checkpoint import load

WORLD = 2
# fastcl.train, which at its end also writes what every process has then.
CHECKED = """
import sys
import torch
from fastcl import train

class Trainer(train.Trainer):
    def _summary(self):
        states = self.processes.of_each(self.method.state_dict())
        if self.processes.first:
            torch.save(states, self.folder / "states.pt")
        super()._summary()

train.Trainer = Trainer
sys.exit(train.main())
"""


class Launched:
    """torchrun on a script or module with these flags; its output goes to files."""

    def __init__(self, folder: Path, name: str, arguments: list[str]) -> None:
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD)]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *arguments],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=err,
            )

    def wait(self) -> int:
        return self.process.wait(timeout=120)

    def lines(self) -> list[str]:
        """What fastcl.train said when it ended."""
        text = self.err.read_text().splitlines()
        return [line for line in text if line.startswith("fastcl.train:")]

    def processes(self) -> list[int]:
        """The pids of the ranks, as far as they have begun."""
        children = f"/proc/{self.process.pid}/task/{self.process.pid}/children"
        return [int(pid) for pid in Path(children).read_text().split()]


def after_step(folder: Path, step: int) -> None:
    """Waits until metrics.jsonl has a row of that step, or a later one."""
    until = time.monotonic() + 100
    while time.monotonic() < until:
        written = rows(folder) if (folder / "metrics.jsonl").exists() else []
        if written and written[-1]["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError("it does not train")


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """A run to its end, and one that was stopped, resumed, bereft of a process and resumed."""
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "checked.py"
    script.write_text(CHECKED)
    flags = f"--method moco-v2 --data folder --data-dir {images} --backbone tiny-resnet"
    flags += " --queue-size 24 --bn-splits 2 --batch-size 15 --epochs 4 --log-every 1"
    flags += " --eval-every 0 --workers 0 --no-report --no-tensorboard"

    def launch(name: str, arguments: str) -> Launched:
        return Launched(folder, name, [str(script), *arguments.split()])

    whole = launch("whole", f"{flags} --output {folder}/whole")
    cut = launch("stopped", f"{flags} --output {folder}/cut")
    after_step(folder / "cut", 2)
    cut.process.send_signal(signal.SIGTERM)
    ended = {"whole": (whole, whole.wait()), "stopped": (cut, cut.wait())}
    step = load(folder / "cut" / "checkpoint.pt")["step"]

    cut = launch("bereft", f"--resume {folder}/cut")
    after_step(folder / "cut", step + 4)  # a checkpoint later
    os.kill(cut.processes()[1], signal.SIGKILL)
    ended["bereft"] = cut, cut.wait()

    cut = launch("resumed", f"--resume {folder}/cut")
    ended["resumed"] = cut, cut.wait()
    return folder, ended


def test_one_process_writes_and_speaks(runs) -> None:  # type: ignore[no-untyped-def]
    folder, ended = runs
    launched, code = ended["whole"]
    assert code == 0, launched.err.read_text()
    assert [row["step"] for row in rows(folder / "whole") if "loss" in row] == list(range(1, 17))
    said = launched.out.read_text().splitlines()
    assert len(said) == len(set(said))
    assert sum(line.startswith("kNN accuracy") for line in said) == 1


def test_all_processes_end_with_the_same_weights_queue_and_statistics(runs) -> None:  # type: ignore[no-untyped-def]
    first, second = torch.load(runs[0] / "whole" / "states.pt")
    assert first.keys() == second.keys() and "queue.features" in first
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_sigterm_to_torchrun_leaves_a_checkpoint_of_that_step(runs) -> None:  # type: ignore[no-untyped-def]
    launched, code = runs[1]["stopped"]
    assert code != 0
    (line,) = launched.lines()
    assert line.startswith("fastcl.train: stopped at step ")
    assert f"torchrun --nproc-per-node {WORLD} -m fastcl.train --resume" in line


def test_a_dead_process_is_named_in_one_line(runs) -> None:  # type: ignore[no-untyped-def]
    launched, code = runs[1]["bereft"]
    assert code != 0
    (line,) = launched.lines()
    assert line.startswith("fastcl.train: rank 1 of 2 (process ")
    assert " died; the checkpoint of step " in line


def test_resumed_on_as_many_processes_it_is_the_run_that_was_never_stopped(runs) -> None:  # type: ignore[no-untyped-def]
    launched, code = runs[1]["resumed"]
    assert code == 0, launched.err.read_text()
    same_run(runs[0] / "whole", runs[0] / "cut")
