"""Runs that are stopped at random moments, by SIGKILL and SIGTERM, and a full disk.

Each goes on to the metrics and the weights, bit for bit, of the run that was never stopped.
"""

import os
import random
import shutil
import signal
import sys
import time
from multiprocessing import forkserver, get_context, set_start_method

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import QUEUES, SMALL, same_run

from fastcl import checkpoint
from fastcl.methods import METHODS
from fastcl.progress import read_rows
from fastcl.train import Trainer, main

STEPS = 12  # three epochs of four; checkpoints after steps 3, 4, 6, 8, 9 and 12
FLAGS = f"{SMALL} --workers 2 --log-every 1 --eval-every 2 --checkpoint-steps 3"


@pytest.fixture(scope="module", autouse=True)
def server():
    """Processes are forked, in no time, from one that has imported what they will."""
    forkserver._forkserver._stop()  # what other tests have started has not
    forkserver.set_forkserver_preload(
        ["fastcl.train", "torch._dynamo", "torchvision.transforms.v2.functional"]
    )
    yield
    forkserver._forkserver._stop()


def start(arguments):
    """A process that trains."""
    process = get_context("forkserver").Process(target=train, args=(arguments,))
    process.start()
    return process


def train(arguments):
    set_start_method("fork", force=True)  # of workers, as in a run from the command line
    torch.set_num_threads(1)
    sys.exit(main(arguments))


def to_the_end(arguments):
    process = start(arguments)
    process.join(120)
    assert process.exitcode == 0


def stop(arguments, folder, step, number):
    """Start it and send it a signal at a random moment of the step after that one.

    Returns the exit code; 0 where the run had come to its end before.
    """
    process = start(arguments)
    before = time.monotonic()
    while process.is_alive() and logged(folder) < step:
        assert time.monotonic() < before + 120
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.03))
    os.kill(process.pid, number)
    process.join(120)
    return process.exitcode


def logged(folder):
    """The last step in metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return max((row["step"] for row in read_rows(path)), default=0) if path.exists() else 0


def saved(folder):
    path = folder / "checkpoint.pt"
    return checkpoint.load(path)["step"] if path.exists() else 0


def stopped_twice(flags, folder):
    """Killed, then terminated, where it can be seen to have been in the middle of its work."""
    for _ in range(5):  # a busy machine may look away until a run is over
        shutil.rmtree(folder, ignore_errors=True)
        if stop(flags, folder, random.randint(1, 6), signal.SIGKILL) != -signal.SIGKILL:
            continue
        killed_at, kept = logged(folder), saved(folder)
        assert kept <= killed_at
        again = ["--resume", str(folder)] if kept else flags
        step = random.randint(min(killed_at + 1, STEPS - 1), STEPS - 1)
        if stop(again, folder, step, signal.SIGTERM) != 143:
            continue
        assert kept <= saved(folder) == logged(folder)  # SIGTERM loses nothing
        return
    pytest.fail("could not be stopped in time")


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_terminated_it_goes_on_bit_for_bit(method, images, tmp_path):
    flags = f"--method {method} --data folder --data-dir {images} {FLAGS} {QUEUES[method]}".split()
    to_the_end([*flags, "--output", str(tmp_path / "whole")])
    stopped_twice([*flags, "--output", str(tmp_path / "cut")], tmp_path / "cut")
    to_the_end(["--resume", str(tmp_path / "cut")])
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_killed_while_processes_decode_files_it_goes_on_bit_for_bit(tmp_path):
    noise = np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 2)):
        folder = tmp_path / split / "class0"
        folder.mkdir(parents=True)
        for i in range(count):
            pixels = noise.integers(0, 256, (72, 80, 3), dtype=np.uint8)  # too large for memory
            Image.fromarray(pixels).save(folder / f"{i}.png")
    flags = f"--method moco-v2 --data folder --data-dir {tmp_path} {FLAGS} {QUEUES['moco-v2']}"
    flags = f"{flags} --image-size 16 --batch-size 5 --bn-splits 1 --eval-every 0".split()
    to_the_end([*flags, "--output", str(tmp_path / "whole")])
    stopped_twice([*flags, "--output", str(tmp_path / "cut")], tmp_path / "cut")
    to_the_end(["--resume", str(tmp_path / "cut")])
    same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_disk_that_fills_in_the_middle_ends_the_run_and_goes_on_bit_for_bit(
    images,
    tmp_path,
    monkeypatch,
    capsys,
):
    flags = f"--method moco-v2 --data folder --data-dir {images} {FLAGS} {QUEUES['moco-v2']}"
    flags = f"{flags} --workers 0".split()
    assert main([*flags, "--output", str(tmp_path / "whole")]) == 0
    folder, step = tmp_path / "cut", Trainer._step

    def fills(self, *batch):
        if self.step == 7:  # every write from here on: no space left on device
            (folder / "checkpoint.pt.tmp").symlink_to("/dev/full")
        step(self, *batch)

    with monkeypatch.context() as context:
        context.setattr(Trainer, "_step", fills)
        assert main([*flags, "--output", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "the checkpoint of step 6 is" in error
    assert logged(folder) == 8 and saved(folder) == 6
    assert main(["--resume", str(folder)]) == 0
    same_run(tmp_path / "whole", folder)


def test_a_kill_while_resuming_loses_no_row(images, tmp_path, monkeypatch):
    """metrics.jsonl is cut to the checkpoint's step by replacing it, never by emptying it first."""
    flags = f"--method simclr-v1 --data folder --data-dir {images} {FLAGS} --workers 0".split()
    assert main([*flags, "--output", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "metrics.jsonl"
    before = path.read_text()

    def cut(*_):
        raise SystemExit(9)

    for call in ("fsync", "replace"):
        with monkeypatch.context() as context:
            context.setattr(os, call, cut)
            with pytest.raises(SystemExit):
                main(["--resume", str(tmp_path / "run")])
        assert path.read_text() == before
