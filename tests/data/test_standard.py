"""CIFAR-10, CIFAR-100 and STL-10: small files in their own formats, which torchvision checks.

Its sums are of the published files; here its table of them has the sums of what is written, so that
its check runs as it is, and a file that was changed afterwards does not pass it.
"""

import hashlib
import pickle

import numpy as np
import pytest
import torch
import torchvision

from fastcl import checkpoint, data
from fastcl.train import main

CIFAR = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
    "cifar100": ("cifar-100-python", ["train"], "test"),
}
LABELS = {"cifar10": "labels", "cifar100": "fine_labels"}
NAMES = {"cifar10": ("batches.meta", "label_names"), "cifar100": ("meta", "fine_label_names")}
EACH = 6  # images of a file


def known(dataset, monkeypatch, folder, **lists):
    """Lets torchvision take these files for the published ones, by their sums."""

    def entry(file):
        return [file, hashlib.md5((folder / file).read_bytes()).hexdigest()]

    for name, files in lists.items():
        monkeypatch.setattr(dataset, name, [entry(file) for file in files])
    return entry


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """cifar("cifar100") writes its files; returns what is in each of them."""

    def write(name):
        inside, train, test = CIFAR[name]
        folder, random = tmp_path / inside, np.random.default_rng(0)
        folder.mkdir()
        classes = int(name.removeprefix("cifar"))
        batches = {
            file: {
                "data": random.integers(0, 256, (EACH, 3072), dtype=np.uint8),
                LABELS[name]: random.integers(0, classes, EACH).tolist(),
                "coarse_labels": [19] * EACH,  # CIFAR-100's other labels, which are not taken
            }
            for file in [*train, test]
        }
        meta, key = NAMES[name]
        names = {key: [f"class {i}" for i in range(classes)], "coarse_label_names": ["a", "b"]}
        for file, content in (batches | {meta: names}).items():
            (folder / file).write_bytes(pickle.dumps(content))
        dataset = getattr(torchvision.datasets, name.upper())
        entry = known(dataset, monkeypatch, folder, train_list=train, test_list=[test])
        monkeypatch.setattr(dataset, "meta", {"filename": meta, "key": key, "md5": entry(meta)[1]})
        return batches

    return write


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    """Writes STL-10's files; returns the images of each of its three parts (N, 3, 96, 96)."""
    folder, random = tmp_path / "stl10_binary", np.random.default_rng(0)
    folder.mkdir()
    parts = {
        name: random.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        for name, count in (("train", 10), ("test", 4), ("unlabeled", 6))
    }
    for name, images in parts.items():  # column by column
        (folder / f"{name}_X.bin").write_bytes(images.transpose(0, 1, 3, 2).tobytes())
        if name != "unlabeled":  # from 1
            (folder / f"{name}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(len(images))))
    (folder / "class_names.txt").write_text("".join(f"class {i}\n" for i in range(10)))
    known(
        *(torchvision.datasets.STL10, monkeypatch, folder),
        train_list=["train_X.bin", "train_y.bin", "unlabeled_X.bin"],
        test_list=["test_X.bin", "test_y.bin"],
    )
    return parts


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_is_read_from_its_files(name, cifar, tmp_path):
    batches, (_, train, test) = cifar(name), CIFAR[name]
    loaded = data.load(name, data_dir=tmp_path)
    for split, files in ((loaded.train, train), (loaded.test, [test])):
        images = np.concatenate([batches[file]["data"] for file in files])
        assert (split.images.numpy() == images.reshape(-1, 3, 32, 32)).all()
        assert split.labels.tolist() == [x for file in files for x in batches[file][LABELS[name]]]
    assert loaded.classes == tuple(f"class {i}" for i in range(int(name[5:])))
    assert loaded.image_size == 32 and loaded.pretrain is loaded.train


def test_stl10_pretrains_on_its_unlabelled_images_too(stl10, tmp_path):
    loaded = data.load("stl10", data_dir=tmp_path)
    assert (loaded.train.images.numpy() == stl10["train"]).all()
    assert (loaded.test.images.numpy() == stl10["test"]).all()
    assert loaded.train.labels.tolist() == list(range(10))
    assert loaded.test.labels.tolist() == [0, 1, 2, 3]
    whole = np.concatenate([stl10["train"], stl10["unlabeled"]])
    assert (loaded.pretrain.images.numpy() == whole).all()
    assert loaded.pretrain.labels.tolist() == [*range(10), *[-1] * 6]
    assert loaded.classes == tuple(f"class {i}" for i in range(10)) and loaded.image_size == 96


@pytest.mark.parametrize("name", ["cifar100", "stl10"])
def test_a_changed_file_is_one_line(name, request, tmp_path, capsys):
    if name == "stl10":
        request.getfixturevalue("stl10")
        file = tmp_path / "stl10_binary" / "unlabeled_X.bin"
    else:
        request.getfixturevalue("cifar")(name)
        file = tmp_path / CIFAR[name][0] / "train"
    data.load(name, data_dir=tmp_path)
    file.write_bytes(file.read_bytes()[:-1])
    output = tmp_path / "run"
    flags = f"--data {name} --data-dir {tmp_path} --output {output} --batch-size 4"
    assert main(flags.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"fastcl.train: error: data '{name}' in {tmp_path}: Dataset not found or"
    )
    assert not output.exists()


@pytest.mark.parametrize("name, steps", [("cifar10", 5), ("cifar100", 1), ("stl10", 2)])
def test_it_trains(name, steps, request, tmp_path, capsys):
    if name == "stl10":
        request.getfixturevalue("stl10")
    else:
        request.getfixturevalue("cifar")(name)
    output = tmp_path / "run"
    flags = f"--method simclr-v1 --data {name} --data-dir {tmp_path} --output {output} --epochs 1"
    flags += " --backbone tiny-resnet --image-size 16 --batch-size 6 --workers 0"
    assert main([*flags.split(), "--no-report", "--no-tensorboard"]) == 0
    assert "kNN accuracy: trained encoder " in capsys.readouterr().out
    state = checkpoint.load(output / checkpoint.NAME)
    assert state["step"] == steps
    assert all(torch.isfinite(x).all() for x in state["method"].values())
