"""Shared by all tests: golden files, the backends of this machine, and a folder to train on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastcl import _C

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, torch.Tensor]]:
    """golden("name") is the file's arrays as tensors; see each file's `meta` for its source."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz") as arrays:
            return {
                key: torch.from_numpy(np.array(arrays[key]))
                for key in arrays.files
                if arrays[key].dtype.kind in "fiub"
            }

    return load


@pytest.fixture(params=["cpp", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once on each backend of the CPU."""
    if request.param == "cpp" and _C.kernels is None:
        pytest.skip(_C.MISSING)
    monkeypatch.setenv("FASTCL_BACKEND", request.param)
    return request.param


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """A folder of two classes: noise that is bright above, noise that is bright below."""
    from PIL import Image  # here, as the tests of operations do without what training needs

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
    from small_run import QUEUES, SMALL

    def make(method="swav", name="run", extra=""):
        return [
            *f"--method {method} --data folder --data-dir {images} {SMALL}".split(),
            *f"{QUEUES[method]} --output {tmp_path / name} {extra}".split(),
        ]

    return make
