"""`python -m bench byol-bn`: what a row holds, and that a collapse is called one."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench is not in the installed package

from bench import byol_bn
from bench.__main__ import main
from fastcl.methods.byol_v2 import BYOLV2, PLACEMENTS, Config
from fastcl.models.norms import Affine

BATCH_NORMS = nn.BatchNorm1d | nn.BatchNorm2d


@pytest.mark.parametrize("name", PLACEMENTS)
def test_batch_norm_sits_where_the_name_says(name) -> None:
    encoder, projector, predictor, careful = PLACEMENTS[name]
    config = Config(
        backbone="tiny-resnet",
        hidden=32,
        dim=16,
        encoder_norm=encoder,
        projector_norm=projector,
        predictor_norm=predictor,
        careful_init=careful,
    )
    method = BYOLV2(BYOLV2.build_encoder(config, 24), config)
    where = name.partition(";")[0].replace("everywhere", "encoder, projector, predictor")
    for part in ("encoder", "projector", "predictor"):
        modules = list(method.get_submodule(part).modules())
        assert any(isinstance(m, BATCH_NORMS) for m in modules) == (part in where)
        assert any(isinstance(m, Affine) for m in modules) == careful


def test_each_placement_is_trained_with_its_norms(tmp_path, monkeypatch, capsys) -> None:
    """Real trainings are bench methods' to test; this is what they are asked, and what is said."""
    asked = {}

    def train(folder, name, arguments, minutes):
        asked[name] = dict(zip(arguments[::2], arguments[1::2]))
        collapsed, idle = name == "nowhere", name == "encoder"
        return {
            "status": "ok",
            "note": "the embeddings have collapsed: they hardly differ" if collapsed else "",
            "trained": 0.1 if collapsed else 0.2 if idle else 0.5,
            "untrained": 0.2,
            "feature_std": 1e-5,
            "effective_rank": 1.25,
            "loss": 0.5,
        }

    monkeypatch.setattr(byol_bn, "train", train)
    names = ["everywhere", "encoder", "nowhere", "nowhere; GN + WS"]
    assert main(["byol-bn", *names, "--epochs", "2", "--output", str(tmp_path / "out")]) == 0
    assert list(asked) == names
    assert all(given["--epochs"] == "2" for given in asked.values())
    for part in ("--encoder-norm", "--projector-norm", "--predictor-norm"):
        assert [asked[name][part] for name in names if name != "encoder"] == ["bn", "none", "gn+ws"]
    record = json.loads((tmp_path / "out" / "byol-bn.json").read_text())
    assert [row["collapsed"] for row in record["rows"]] == [False, False, True, False]
    table = (tmp_path / "out" / "byol-bn.md").read_text()
    assert "| nowhere | – | – | – | 10.0% | 20.0% | 0.0000 | 1.2 | 0.500 | collapsed |" in table
    assert (
        "| encoder | BN | – | – | 20.0% | 20.0% | 0.0000 | 1.2 | 0.500 | learned nothing |" in table
    )
    assert "nowhere: the embeddings have collapsed" in capsys.readouterr().out


def test_a_row_is_what_the_training_wrote(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    random = np.random.default_rng(0)
    for split, label, i in product(("train", "test"), "ab", range(20)):
        folder = tmp_path / "images" / split / label
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    tiny = f"--data folder --data-dir {tmp_path / 'images'} --batch-size 16 --hidden 32 --dim 16"
    flags = f"{tiny} --log-every 2 --workers 0".split()
    output = tmp_path / "out"
    given = ["byol-bn", "nowhere; GN + WS", "--epochs", "1", "--output", str(output)]
    assert main([*given, "--", *flags]) == 0
    (row,) = json.loads((output / "byol-bn.json").read_text())["rows"]
    lines = (output / "nowhere-GN-WS" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    assert (row["untrained"], row["trained"]) == (metrics[0]["knn_top1"], metrics[-1]["knn_top1"])
    assert row["feature_std"] == metrics[-2]["feature_std"] and not row["collapsed"]
    config = (output / "nowhere-GN-WS" / "config.yaml").read_text()
    assert config.count('_norm: "gn+ws"') == 3 and "careful_init: false" in config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["everywere"], "did you mean everywhere?"),
        (["--epochs", "0"], "--epochs must be at least 1; got 0."),
        (["--output", "/dev/null/x"], "cannot write to --output /dev/null/x: Not a directory."),
    ],
)
def test_wrong_usage_is_one_line(given, said, capsys) -> None:
    assert main(["byol-bn", *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("python -m bench byol-bn: ") and said in line
