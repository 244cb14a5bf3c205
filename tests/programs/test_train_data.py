"""`python -m fastcl.train` on data as it is: without labels, in part broken; and a run again from
its own config.yaml."""

import io
import json
import tarfile

import pytest
import torch
import yaml
from PIL import Image

from fastcl import checkpoint, evaluate
from fastcl.train import main

SMALL = "--method simclr-v1 --backbone tiny-resnet --batch-size 8 --epochs 2 --log-every 2"
SMALL += " --image-size 16 --eval-every 1 --no-tensorboard --data webdataset"


def shards(folder, size, broken=(), labels=False, count=20):
    """A tar of noise, of which every tenth image is for testing."""
    folder.mkdir()
    with tarfile.open(folder / "all.tar", "w") as tar:
        for i in range(count):
            file = io.BytesIO()
            noise = torch.randint(0, 256, (size, size, 3), dtype=torch.uint8)
            Image.fromarray(noise.numpy()).save(file, "PNG")
            content = file.getvalue()[: 60 if i in broken else None]
            files = {f"{i:03}.png": content} | ({f"{i:03}.cls": b"%d" % (i % 2)} if labels else {})
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


def run(data, output, *more):
    return main([*SMALL.split(), "--data-dir", str(data), "--output", str(output), *more])


def rows(folder):
    """metrics.jsonl without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "images_per_second"} for x in lines]


@pytest.mark.parametrize(
    "size, flag", [(16, "--report"), (72, "--no-report")], ids=["memory", "read"]
)
def test_images_without_labels_and_broken_ones_train(tmp_path, capsys, size, flag):
    torch.manual_seed(0)
    data = shards(tmp_path / "data", size, broken=(2, 7))
    with pytest.warns(UserWarning, match=r"skipped an unreadable image: .*all\.tar: 002\.png"):
        assert run(data, tmp_path / "run", "--workers", "1", flag) == 0
    told = capsys.readouterr().out
    assert f"note: skipped 2 unreadable images, the first {data}/all.tar: 002.png" in told
    assert "kNN accuracy: none, as the images have no labels" in told
    losses = [row["loss"] for row in rows(tmp_path / "run") if "loss" in row]
    assert len(losses) == 2 and all(map(torch.isfinite, torch.tensor(losses)))
    if flag == "--report":  # without labels too
        assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert evaluate.main(["--checkpoint", str(tmp_path / "run")]) == 2
    assert "data 'webdataset' has no labels to evaluate with" in capsys.readouterr().err


@pytest.mark.parametrize("size", [16, 72], ids=["memory", "read"])
@pytest.mark.filterwarnings("ignore:skipped")
def test_only_broken_images_stop_at_once(tmp_path, capsys, size):
    data = shards(tmp_path / "data", size, broken=range(20))
    assert run(data, tmp_path / "run") == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "error: none of the 18 images can be read, the first" in told
    assert "all.tar: 000.png" in told


def test_a_run_is_repeated_by_its_config_yaml(tmp_path):
    torch.manual_seed(0)
    data = shards(tmp_path / "data", 16, labels=True)
    odd = "--seed 5 --lr 3e-4 --temperature 0.3 --precision bf16 --no-report --milestones 1"
    odd += " --workers 0 --jitter 0.25 --image-column png --weight-decay 0.01"
    assert run(data, tmp_path / "first", *odd.split()) == 0
    file = tmp_path / "first" / "config.yaml"
    assert main(["--config", str(file), "--output", str(tmp_path / "again")]) == 0
    assert rows(tmp_path / "first") == rows(tmp_path / "again")
    assert any("knn_top1" in row for row in rows(tmp_path / "first"))
    one, two = (checkpoint.load(tmp_path / name / checkpoint.NAME) for name in ("first", "again"))
    for name, value in one["method"].items():
        assert torch.equal(value, two["method"][name]), name
    values = [
        yaml.safe_load((tmp_path / x / "config.yaml").read_text()) for x in ("first", "again")
    ]
    assert {k for k in values[0] if values[0][k] != values[1][k]} == {"output"}
    # And a value that is not the file's makes another run: the comparison above can fail.
    other = ["--config", str(file), "--output", str(tmp_path / "other"), "--temperature", "0.4"]
    assert main(other) == 0
    assert rows(tmp_path / "first") != rows(tmp_path / "other")


def test_a_table_trains_by_its_columns(tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install 'fastcl[hf]'")
    datasets.disable_progress_bars()
    image = Image.new("RGB", (16, 16))
    columns = {"photo": [image] * 20, "kind": ["cat", "dog"] * 10}
    features = datasets.Features({"photo": datasets.Image(), "kind": datasets.Value("string")})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "table"))
    flags = ["--data", "hf", "--label-column", "kind", "--image-column", "photo", "--no-report"]
    assert run(tmp_path / "table", tmp_path / "run", *flags) == 0
    assert any("knn_top1" in row for row in rows(tmp_path / "run"))
