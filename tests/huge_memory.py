"""What test_memory.py runs: bytes that a step and a checkpoint need beside a huge queue or bank.

    python tests/huge_memory.py ROWS FOLDER

Prints a line of JSON for each of CASES.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.memory import reset_peak, status_bytes
from fastcl import checkpoint
from fastcl.methods import METHODS, Method, Progress

CASES = (
    ("instdisc", {"loss": "nce", "negatives": 4096}),
    ("instdisc", {"bank_dtype": "bf16", "proximal": 1.0}),
    ("cmc", {"bank_dtype": "fp16", "colours": "lab"}),
    ("moco-v2", {}),
    ("moco-v2", {"queue_dtype": "bf16"}),
    ("simclr-v2", {"queue_dtype": "bf16", "memory": True}),
)


def make(name: str, options: dict, rows: int) -> Method:
    """A method whose bank or queue has so many rows."""
    config = replace(METHODS[name].recipes["quick"], dim=128, **options)
    if hasattr(config, "queue_size"):
        config = replace(config, queue_size=rows)
    torch.manual_seed(0)
    method = METHODS[name](METHODS[name].build_encoder(config, 24), config).train()
    method.set_images(10 * rows if hasattr(config, "queue_size") else rows)
    return method


def step(method: Method) -> None:
    views = [torch.randn(8, 3, 24, 24) for _ in range(2)]
    at = Progress(0, 10, 10, torch.arange(8))
    method.loss(views, at).backward()
    method.after_backward(at)


def grows(work: Callable[[], object]) -> tuple[int, object]:
    """The bytes that work adds to what is resident, at its peak; and what it returns."""
    assert reset_peak()
    before = status_bytes("VmRSS")
    result = work()
    return status_bytes("VmHWM") - before, result


def main(rows: int, folder: Path) -> None:
    torch.set_num_threads(1)
    for name, options in CASES:
        step(make(name, options, 64))  # imports and what libraries keep
        construction, method = grows(lambda: make(name, options, rows))  # noqa: B023
        held = sum(x.numel() * x.element_size() for x in method.state_dict().values())
        training, _ = grows(lambda: step(method))  # noqa: B023
        found = {"construction": construction - held, "step": training}
        if not options.keys() & {"bank_dtype", "queue_dtype"}:
            state = {"method": method.state_dict()}
            path = folder / "x.pt"
            state |= {"values": {}}
            found["checkpoint"], _ = grows(lambda: checkpoint.save(path, state))  # noqa: B023
            before = status_bytes("RssAnon")  # the file's own pages are the system's to take back
            saved = checkpoint.load(path)
            method.load_state_dict(saved["method"])
            found["restoring"] = status_bytes("RssAnon") - before
            del saved
        print(json.dumps({"name": name, "options": options, "held": held, **found}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
