"""A user's code passes mypy --strict against the package's own annotations, and a wrong one fails.

In a checkout the package is found beside tests/; of an installed wheel, mypy reads py.typed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

RIGHT = """\
import torch
from torch import Tensor

import fastcl
import fastcl.functional as F
from fastcl import losses, nn
from fastcl.compat import patch

z0, z1 = torch.randn(8, 4), torch.randn(8, 4)
loss: Tensor = F.nt_xent(z0, z1, temperature=0.2)
rows: Tensor = F.info_nce(z0, z1, torch.randn(100, 4), reduction="none")
module: torch.nn.Module = losses.ClipLoss(logit_scale=torch.tensor(10.0))
queue = nn.FeatureQueue(16, 4)
queue.push(z0)
features: Tensor = queue.features
backend, why = fastcl.backend_of(z0)
name: str = backend
with patch("info_nce") as done:
    places: list[str] = done.names
"""

WRONG = """\
import torch

import fastcl.functional as F

F.nt_xent(torch.randn(8, 4), torch.randn(8, 4), temperatur=0.2)
F.info_nce(torch.randn(8, 4), "keys")
number: int = F.sinkhorn(torch.randn(8, 4))
"""


def test_annotations_are_what_a_user_sees(tmp_path: Path) -> None:
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed: pip install 'fastcl[dev]'")
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    command = [sys.executable, "-m", "mypy", "right.py", "wrong.py"]
    environment = {**os.environ}
    if (ROOT / "fastcl").is_dir():  # with its settings, strict too, as its cache saves a minute
        settings = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache"]
        command += map(str, settings)
        environment["MYPYPATH"] = str(ROOT)
    else:
        command.append("--strict")
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = [line for line in ran.stdout.splitlines() if ": error: " in line]
    assert [line.rpartition("[")[2] for line in said] == ["call-arg]", "arg-type]", "assignment]"]
    assert all(line.startswith("wrong.py:") for line in said), ran.stdout
