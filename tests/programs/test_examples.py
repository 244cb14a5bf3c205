"""Every script of examples/ runs on the kernels, and the loss that it prints goes down."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest

from fastcl.compat import FallbackWarning, _common

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "lightly_simclr": ("lightly",),
    "open_clip_clip": ("open_clip", "open_clip_train"),
    "metric_learning_memory": ("pytorch_metric_learning",),
    "sentence_transformers_ranking": ("sentence_transformers",),
    "info_nce_negatives": (),
    "supcontrast_supcon": (),
    "million_row_queue": (),
}


def test_every_example_is_tested_and_named_in_the_readme():
    scripts = {script.stem for script in EXAMPLES.glob("*.py")}
    assert scripts == set(NEEDS)
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)\.py`", readme, re.M)) == scripts


@pytest.mark.parametrize("name", NEEDS)
def test_the_loss_goes_down(name, capsys, monkeypatch):
    for library in NEEDS[name]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    monkeypatch.setattr(sys, "argv", [name])
    _common.say_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    losses = [
        float(x) for x in re.findall(r"^step +\d+ +loss (\S+)$", capsys.readouterr().out, re.M)
    ]
    assert len(losses) >= 8
    assert sum(losses[-3:]) / 3 < 0.9 * losses[0]
