"""Data sets: the embedded one byte for byte, folders, and one clear line for a bad path."""

import hashlib
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastcl import data
from fastcl.data import FolderSplit, TensorSplit, fashion, make_fashion
from fastcl.evaluate import pixel_knn_accuracy


def picture(path, size=(32, 32), colour=(200, 30, 90)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, 3 + 2 training and 1 + 1 test images."""
    for name, count in (("cat", 3), ("dog", 2)):
        for i in range(count):
            picture(tmp_path / "train" / name / f"{i}.png", colour=(i, 100, len(name)))
        picture(tmp_path / "test" / name / "0.png")
    return tmp_path


# The embedded data


def test_fashion_is_the_same_bytes_everywhere():
    loaded = data.load("fashion")
    assert len(loaded.train) == 10_000 and len(loaded.test) == 2_000
    assert loaded.train.images.shape[1:] == (3, 32, 32) and loaded.image_size == 32
    assert len(loaded.classes) == 10 and loaded.train.labels.bincount().min() > 900
    digest = hashlib.sha256(loaded.train.images.numpy().tobytes())
    digest.update(loaded.test.images.numpy().tobytes())
    assert digest.hexdigest() == DIGEST


def test_fashion_loads_in_a_second_of_processor_time():
    start = time.process_time()
    data.load("fashion")
    assert time.process_time() - start < 1.5


def test_fashion_is_small_and_carries_its_licence():
    assert fashion.ARCHIVE.stat().st_size < 7_000_000
    assert "Zalando" in fashion.ARCHIVE.with_name("fashion.LICENSE").read_text()


def test_fashion_cannot_be_solved_by_its_pixels():
    assert 0.2 < pixel_knn_accuracy(data.load("fashion")) <= 0.40


def test_fashion_mean_and_std_are_the_datas():
    loaded = data.load("fashion")
    pixels = loaded.train.images.float().div(255).transpose(0, 1).flatten(1)
    torch.testing.assert_close(pixels.mean(1), torch.tensor(loaded.mean), atol=0.01, rtol=0)
    torch.testing.assert_close(pixels.std(1), torch.tensor(loaded.std), atol=0.01, rtol=0)


def test_make_fashion_reads_the_published_files(tmp_path, monkeypatch):
    import gzip

    rng = np.random.default_rng(0)
    for name, count in (("train", 5), ("t10k", 3)):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        head = bytes((0, 0, 8, 3, 0, 0, 0, count, 0, 0, 0, 28, 0, 0, 0, 28))
        file = tmp_path / f"{name}-images-idx3-ubyte.gz"
        file.write_bytes(gzip.compress(head + images.tobytes()))
        head = bytes((0, 0, 8, 1, 0, 0, 0, count))
        file = tmp_path / f"{name}-labels-idx1-ubyte.gz"
        file.write_bytes(gzip.compress(head + labels.tobytes()))
    target = tmp_path / "made.npz"
    monkeypatch.setattr("sys.argv", ["make_fashion", str(tmp_path), "--output", str(target)])
    make_fashion.main()
    with np.load(target) as made:
        assert made["train_images"].shape == (5, 28, 28)
        assert (made["test_images"] == images).all() and (made["test_labels"] == labels).all()


# Folders


def test_small_folder_is_held_in_memory(folder):
    loaded = data.load("folder", data_dir=folder)
    assert isinstance(loaded.train, TensorSplit) and loaded.image_size == 32
    assert loaded.classes == ("cat", "dog")
    assert loaded.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert loaded.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1]  # sorted by name
    assert loaded.test.images.shape == (2, 3, 32, 32)


def test_large_folder_is_decoded_when_asked(folder):
    picture(folder / "train" / "dog" / "large.jpg", (300, 200))
    loaded = data.load("folder", data_dir=folder)
    assert isinstance(loaded.train, FolderSplit) and loaded.image_size == 224
    ((images, labels),) = loaded.train.batches(10)
    assert images.shape == (6, 3, 224, 224) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert loaded.train.read(5).shape == (3, 200, 300)


def test_val_is_as_good_as_test(folder):
    (folder / "test").rename(folder / "val")
    assert len(data.load("folder", data_dir=folder).test) == 2
    assert data.load("imagenet", data_dir=folder).image_size == 224


def test_small_images_of_several_sizes_are_fitted(folder):
    picture(folder / "train" / "cat" / "wide.png", (48, 20))
    loaded = data.load("folder", data_dir=folder)
    assert loaded.train.images.shape == (6, 3, 48, 48)


@pytest.mark.parametrize("large", [False, True])
def test_unreadable_images_are_left_out_and_reported(folder, large):
    broken = folder / "train" / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:50])
    (folder / "train" / "cat" / "notes.txt").write_text("not an image, and not taken for one")
    if large:
        picture(folder / "train" / "dog" / "large.jpg", (300, 200))
    with pytest.warns(UserWarning, match=r"unreadable image: .*1\.png"):
        split = data.load("folder", data_dir=folder).train
        labels = torch.cat([labels for _, labels in split.batches(4)])
    assert labels.tolist() == [0, 0, 1, 1] + [1] * large


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_a_wrong_path_says_what_was_expected(name, tmp_path):
    with pytest.raises(ValueError, match=r"needs data_dir, a folder with train/<class>/…") as error:
        data.load(name)
    assert one_line(error)
    with pytest.raises(ValueError, match=r"missing is no folder.*train/<class>/…") as error:
        data.load(name, data_dir=tmp_path / "missing")
    assert one_line(error)
    (tmp_path / "training").mkdir()
    with pytest.raises(ValueError, match=r"expects train/<class>/….*there is training") as error:
        data.load(name, data_dir=tmp_path)
    assert one_line(error)


def test_a_missing_or_empty_class_is_named(folder, tmp_path):
    (folder / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"must have the same classes.*bird") as error:
        data.load("folder", data_dir=folder)
    assert one_line(error)
    (folder / "test" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"train/bird has no images \(\.bmp.*\.webp\)") as error:
        data.load("folder", data_dir=folder)
    assert one_line(error)


def test_a_train_folder_without_classes(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    with pytest.raises(ValueError, match=r"train has no class folders; expected .*<class>"):
        data.load("folder", data_dir=tmp_path)


# torchvision's, whose files test_standard.py reads


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_missing_files_say_where_they_belong(name, tmp_path):
    with pytest.raises(ValueError, match=f"data '{name}' needs data_dir"):
        data.load(name)
    with pytest.raises(ValueError, match=rf"data '{name}' expects .*--download") as error:
        data.load(name, data_dir=tmp_path)
    assert one_line(error)


def test_corrupt_files_are_one_line(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match=r"data 'cifar10' in .*corrupted") as error:
        data.load("cifar10", data_dir=tmp_path)
    assert one_line(error)


def test_unknown_data_is_listed():
    with pytest.raises(ValueError, match=r"unknown data 'mnist'.*fashion.*imagenet"):
        data.load("mnist")


def test_importing_data_does_not_import_torchvision():
    import subprocess
    import sys

    code = (
        "import sys, fastcl.data, fastcl.models, fastcl.evaluate;"
        "assert not {'torchvision', 'timm', 'PIL', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


DIGEST = "73ada41a3c1f2bae2b0eb7e3e7cd77a53c952a5d308d6965b27480724fb63b49"
