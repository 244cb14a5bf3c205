"""WebDataset shards: samples by their place in tar files, the split by name, what is broken."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastcl import data
from fastcl.data import Loader, TensorSplit, augment
from fastcl.data.shards import ShardSplit, braces


def png(colour=(200, 30, 90), size=(16, 16), kind="PNG"):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def shard(path, files):
    """A tar of {name: content}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def samples(first, last, classes=3, **options):
    """Images `first` … `last` − 1, red by their number, labelled by it too."""
    files = {}
    for i in range(first, last):
        files[f"{i:04}.png"] = png((i, 0, 0), **options)
        files[f"{i:04}.cls"] = str(i % classes).encode()
    return files


def red(split):
    return split.images[:, 0, 0, 0].tolist()


@pytest.fixture
def shards(tmp_path):
    for i in range(3):
        shard(tmp_path / f"train-{i:03}.tar", samples(4 * i, 4 * i + 4))
    shard(tmp_path / "val-000.tar", samples(100, 105))
    return tmp_path


def load(where, **options):
    return data.load("webdataset", data_dir=where, **options)


def test_small_images_of_all_shards_are_in_memory_in_order(shards):
    loaded = load(shards)
    assert isinstance(loaded.train, TensorSplit) and loaded.image_size == 16
    assert red(loaded.train) == list(range(12)) and red(loaded.test) == list(range(100, 105))
    assert loaded.train.labels.tolist() == [i % 3 for i in range(12)]
    assert loaded.test.labels.tolist() == [i % 3 for i in range(100, 105)]
    assert loaded.classes == ("0", "1", "2") and loaded.labelled


def test_shards_by_pattern(shards):
    assert red(load(shards / "train-{000..002}.tar").train) == [*range(9), 10, 11]
    loaded = load(shards / "{train-00?,val-{000..000}}.tar")
    assert len(loaded.train) == 12 and len(loaded.test) == 5
    assert braces("a-{08..11}.{x,y}")[:3] == ["a-08.x", "a-08.y", "a-09.x"]


def test_without_test_shards_every_tenth_image_is_kept_for_testing(tmp_path):
    shard(tmp_path / "a.tar", samples(0, 25))
    loaded = load(tmp_path)
    assert red(loaded.test) == [9, 19]
    assert red(loaded.train) == [i for i in range(25) if i not in (9, 19)]


def test_words_of_folders_above_do_not_count(tmp_path):
    shard(tmp_path / "test" / "data" / "a.tar", samples(0, 10))
    shard(tmp_path / "test" / "data" / "validation" / "b.tar", samples(0, 2))
    loaded = load(tmp_path / "test" / "data")
    assert len(loaded.train) == 10 and len(loaded.test) == 2


def test_large_images_are_read_at_their_place(tmp_path):
    files = samples(0, 12, size=(90, 70), kind="JPEG")
    shard(tmp_path / "train.tar", files)
    shard(tmp_path / "val.tar", files)
    loaded = load(tmp_path)
    assert isinstance(loaded.train, ShardSplit) and loaded.image_size == 224
    assert loaded.train.read(7).shape == (3, 70, 90)
    assert abs(int(loaded.train.read(7)[0, 0, 0]) - 7) < 3
    assert loaded.train.subset(torch.tensor([3, 7])).labels.tolist() == [0, 1]
    assert abs(int(loaded.train.subset(torch.tensor([3, 7])).read(1)[0, 0, 0]) - 7) < 3


def test_a_loader_of_shards_goes_on_where_it_stopped(tmp_path):
    shard(tmp_path / "train.tar", samples(0, 12, size=(70, 70)))
    shard(tmp_path / "val.tar", samples(0, 2, size=(70, 70)))
    recipe = augment.build("moco-v2", image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3)
    options = {"batch_size": 3, "workers": 0}
    whole = list(Loader(load(tmp_path).train, recipe, **options))
    resumed = Loader(load(tmp_path).train, recipe, **options)
    resumed.load_state_dict({"seed": 0, "epoch": 0, "batch": 2})
    for (views, labels, indices), (again, *rest) in zip(whole[2:], resumed, strict=True):
        assert all(map(torch.equal, views, again))
        assert torch.equal(labels, rest[0]) and torch.equal(indices, rest[1])


def test_labels_of_a_json_field_and_chosen_images(tmp_path):
    files = {}
    for i, name in enumerate(["cat", "dog", "cat"] * 4):
        files[f"x/{i}.json"] = json.dumps({"tags": {"animal": name}}).encode()
        files[f"x/{i}.left.png"], files[f"x/{i}.right.png"] = png((1, 0, 0)), png((2, 0, 0))
    shard(tmp_path / "train.tar", files)
    shard(tmp_path / "val.tar", files)
    columns = {"image_column": "right.png", "label_column": "json.tags.animal"}
    loaded = load(tmp_path, **columns)
    assert loaded.classes == ("cat", "dog") and loaded.train.labels.tolist() == [0, 1, 0] * 4
    assert red(loaded.train) == [2] * 12
    assert red(load(tmp_path).train) == [1] * 12 and not load(tmp_path).labelled
    with pytest.raises(ValueError, match=r"no images \(\*\.jpg\) in 1 shards, .*train\.tar first"):
        load(tmp_path, image_column="jpg")
    with pytest.raises(ValueError, match=r"no sample has the label 'json\.tag'"):
        load(tmp_path, label_column="json.tag")


@pytest.mark.parametrize("size", [(16, 16), (80, 80)], ids=["memory", "read"])
def test_broken_images_are_counted_and_the_first_is_named(tmp_path, size):
    files = samples(0, 20, size=size)
    for i in (3, 11):
        files[f"{i:04}.png"] = files[f"{i:04}.png"][:40]
    shard(tmp_path / "train.tar", files)
    shard(tmp_path / "val.tar", samples(0, 2, size=size))
    with pytest.warns(UserWarning, match=r"unreadable image: .*train\.tar: 0003\.png"):
        loaded = load(tmp_path)
        labels = torch.cat([labels for _, labels in loaded.train.batches(7)])
    assert labels.tolist() == [i % 3 for i in range(20) if i not in (3, 11)]
    assert [Path(name).name for name in loaded.unreadable] == [
        f"train.tar: {i:04}.png" for i in (3, 11)
    ]


@pytest.mark.parametrize("size", [(16, 16), (80, 80)], ids=["memory", "read"])
@pytest.mark.filterwarnings("ignore:skipped")
def test_only_broken_images_is_an_error(tmp_path, size):
    broken = {name: content[:40] for name, content in samples(0, 12, size=size).items()}
    shard(tmp_path / "train.tar", broken)
    shard(tmp_path / "val.tar", samples(0, 2, size=size))
    with pytest.raises(ValueError, match=r"none of the 12 images .* first .*train\.tar: 0000\.png"):
        next(load(tmp_path).train.batches(4))


def test_a_shard_cut_off_gives_what_is_before_the_cut(shards):
    whole = (shards / "train-001.tar").read_bytes()
    (shards / "train-001.tar").write_bytes(whole[: 4 * 1024 + 200])
    with pytest.warns(UserWarning, match=r"train-001\.tar is damaged, after \d files"):
        loaded = load(shards)
    assert red(loaded.train) == [*range(4), 4, 5, *range(8, 12)]


def test_wrong_paths_say_what_was_expected(shards, tmp_path):
    for where, message in {
        None: r"needs data_dir: a folder with \.tar files, or their names",
        "https://host/a-{0..3}.tar": "reads local shards only: fetch https:",
        tmp_path / "missing-*.tar": r"finds no \.tar in .*missing-\*\.tar; expected a folder",
        shards / "train-{000..007}.tar": r"there is no shard .*train-003\.tar",
        shards / "val*.tar": "shards to test with only, as .*val-000",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            load(where)
        assert "\n" not in str(error.value)
    (shards / "train-000.tar").write_bytes(b"\x1f\x8b\x08" + bytes(2000))
    with pytest.raises(ValueError, match=r"train-000\.tar is no \.tar file.*; decompress it"):
        load(shards)
    with pytest.raises(ValueError, match="image_column is of data hf and webdataset only"):
        data.load("fashion", image_column="jpg")


def test_what_the_webdataset_package_writes(tmp_path):
    wds = pytest.importorskip("webdataset")
    with wds.ShardWriter(str(tmp_path / "train-%06d.tar"), maxcount=5, verbose=0) as writer:
        for i in range(12):
            image = Image.new("RGB", (16, 16), (i, 0, 0))
            writer.write({"__key__": f"{i:04}", "png": image, "cls": i % 3})
    loaded = load(tmp_path / "train-{000000..000002}.tar")
    assert red(loaded.train) == [i for i in range(12) if i != 9] and red(loaded.test) == [9]
    assert loaded.train.labels.tolist() == [i % 3 for i in range(12) if i != 9]
