"""Tables of the datasets library: columns found or named, split by name, what is broken."""

import io

import pytest
import torch
from PIL import Image

from fastcl import data
from fastcl.data import TensorSplit
from fastcl.data.hub import TableSplit

datasets = pytest.importorskip("datasets", reason="pip install 'fastcl[hf]'")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()


def png(red, size=16):
    file = io.BytesIO()
    Image.new("RGB", (size, size), (red, 0, 0)).save(file, "PNG")
    return file.getvalue()


def table(numbers, size=16, image="image", label="label", kind=None, broken=()):
    """Rows whose image is red by their number, and whose label is that modulo 3."""
    images = [{"bytes": png(i, size)[: 40 if i in broken else None], "path": None} for i in numbers]
    kind = kind or datasets.ClassLabel(names=["a", "b", "c"])
    labels = [i % 3 for i in numbers]
    features = datasets.Features({image: datasets.Image(), label: kind})
    return datasets.Dataset.from_dict({image: images, label: labels}, features=features)


def saved(tmp_path, **tables):
    path = tmp_path / "saved"
    datasets.DatasetDict(tables).save_to_disk(str(path))
    return path


def load(where, **options):
    return data.load("hf", data_dir=where, **options)


def red(split):
    return split.images[:, 0, 0, 0].tolist()


def test_what_save_to_disk_wrote(tmp_path):
    loaded = load(saved(tmp_path, train=table(range(12)), test=table(range(50, 54))))
    assert isinstance(loaded.train, TensorSplit) and loaded.image_size == 16
    assert red(loaded.train) == list(range(12)) and red(loaded.test) == list(range(50, 54))
    assert loaded.train.labels.tolist() == [i % 3 for i in range(12)]
    assert loaded.classes == ("a", "b", "c")


def test_parquet_files_in_a_folder(tmp_path):
    for name, numbers in (("train", range(12)), ("validation", range(50, 54))):
        table(numbers).to_parquet(str(tmp_path / "files" / f"{name}-00000.parquet"))
    loaded = load(tmp_path / "files")
    assert red(loaded.train) == list(range(12)) and red(loaded.test) == list(range(50, 54))
    assert loaded.test.labels.tolist() == [i % 3 for i in range(50, 54)]


def test_a_single_table_keeps_every_tenth_row_for_testing(tmp_path):
    table(range(20)).save_to_disk(str(tmp_path / "one"))
    loaded = load(tmp_path / "one")
    assert red(loaded.test) == [9, 19] and len(loaded.train) == 18


def test_the_split_to_test_with_is_one_with_labels(tmp_path):
    hidden = table(range(5)).map(lambda row: {"label": -1})
    tables = {"train": table(range(12)), "validation": hidden, "test": table(range(60, 63))}
    assert red(load(saved(tmp_path, **tables)).test) == [60, 61, 62]


def test_large_images_are_read_when_asked(tmp_path):
    where = saved(tmp_path, train=table(range(12), 80), test=table(range(4), 80))
    loaded = load(where)
    assert isinstance(loaded.train, TableSplit) and loaded.image_size == 224
    part = loaded.train.subset(torch.tensor([2, 7]))
    assert part.read(1).shape == (3, 80, 80) and part.read(1)[0, 0, 0] == 7
    assert part.labels.tolist() == [2, 1] and part.name_of(1) == f"{where} train, row 7"


def test_columns_by_name(tmp_path):
    text = datasets.Value("int64")
    rows = table(range(12), image="photo", label="kind", kind=text).add_column("n", list(range(12)))
    where = saved(tmp_path, train=rows, test=rows)
    assert not load(where).labelled
    named = load(where, image_column="photo", label_column="kind")
    assert named.classes == ("0", "1", "2") and named.labelled
    for columns, message in (
        ({"image_column": "image"}, "no column 'image'; there is photo, kind, n"),
        ({"label_column": "label"}, "no column 'label'; there is photo, kind, n"),
        ({"image_column": "n"}, "column 'n' holds no image files"),
        ({"label_column": "photo"}, "labels must be whole numbers or text"),
    ):
        with pytest.raises(ValueError, match=message):
            load(where, **columns)
    without = saved(tmp_path / "2", train=rows.remove_columns("photo"))
    with pytest.raises(ValueError, match="no column of images; name one with --image-column"):
        load(without)


@pytest.mark.parametrize("size", [16, 80], ids=["memory", "read"])
def test_broken_images_are_counted_and_the_first_is_named(tmp_path, size):
    where = saved(tmp_path, train=table(range(12), size, broken=(4, 8)), test=table(range(3), size))
    with pytest.warns(UserWarning, match=r"unreadable image: .* train, row 4"):
        loaded = load(where)
        labels = torch.cat([labels for _, labels in loaded.train.batches(5)])
    assert labels.tolist() == [i % 3 for i in range(12) if i not in (4, 8)]
    assert list(loaded.unreadable) == [f"{where} train, row {i}" for i in (4, 8)]
    everything = saved(tmp_path / "all", train=table(range(12), size, broken=range(12)))
    with pytest.raises(ValueError, match=r"none of the 1\d images can be read"):
        with pytest.warns(UserWarning, match="skipped") as warned:
            list(load(everything).train.batches(4))
    counts = [str(w.message).split(",")[0] for w in warned]
    assert len(counts) == 2 and counts[1].startswith("skipped 10 unreadable images")


def test_what_cannot_be_opened_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    for where, message in {
        None: "needs data_dir",
        "nobody/nothing-of-this-name": "cannot open .*; --download fetches it from the Hub",
        tmp_path / "empty": "cannot open .*empty: ",
        saved(tmp_path, validation=table(range(3))): "no split train; there is validation",
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            load(where)
        assert "\n" not in str(error.value)
