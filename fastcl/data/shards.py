"""WebDataset shards: tar files whose neighbouring members of one name are one sample.

    shards-000.tar:   0001.jpg  0001.cls  0002.jpg  0002.cls  …

    --data webdataset --data-dir photos/                              every .tar below it
    --data webdataset --data-dir 'photos/{train,val}-{000..003}.tar'  or * and ?, quoted

A shard whose name, or folder, has the word val, valid, validation or test is for testing; the
others are for training. Without one, every tenth image is kept for testing.

The headers are read once, at the start; after that a sample is its place in a file. So images come
in a random order over all shards, a resumed run goes on bit for bit, and methods with a bank know
each image: what a stream cannot do. Needs local, uncompressed .tar files and no package.
Source of the format: github.com/webdataset/webdataset.
"""

from __future__ import annotations

import glob
import io
import json
import os
import re
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcl.data.folder import EXTENSIONS
from fastcl.data.reading import LARGE, encode, held_out, of_any_size
from fastcl.data.splits import DataSplits, ReadSplit

VALIDATION, TEST = {"val", "valid", "validation"}, {"test"}  # words in names of shards


@dataclass(frozen=True)
class ShardSplit(ReadSplit):
    """Images in tar files: `places` int64 (N, 3) is each one's shard, first byte and bytes."""

    shards: tuple[str, ...]
    names: tuple[str, ...]
    places: Tensor
    labels: Tensor
    image_size: int = LARGE
    unreadable: dict[str, None] = field(default_factory=dict)

    def name_of(self, index: int) -> str:
        return f"{self.shards[int(self.places[index, 0])]}: {self.names[index]}"

    def source(self, index: int) -> io.BytesIO:
        shard, first, size = self.places[index].tolist()
        with open(self.shards[shard], "rb") as file:
            file.seek(first)
            return io.BytesIO(file.read(size))

    def subset(self, indices: Tensor) -> ShardSplit:
        names = tuple(self.names[i] for i in indices.tolist())
        places, labels = self.places[indices], self.labels[indices]
        return replace(self, names=names, places=places, labels=labels)


@dataclass
class Index:
    """What the headers of some shards say: a row for each sample that has an image."""

    shards: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)

    def split(self, labels: Tensor) -> ShardSplit:
        places = torch.tensor(self.places, dtype=torch.int64).view(-1, 3)
        return ShardSplit(tuple(self.shards), tuple(self.names), places, labels)


def load_webdataset(
    data_dir: Path | None,
    download: bool = False,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
) -> DataSplits:
    """`--data webdataset`: local shards.

    image_column   what the image's name ends in, as "left.jpg"; none: the first that is an image
    label_column   what the label's name ends in, as "cls", or "json.label" for a field of a .json;
                   none: "cls"
    Raises ValueError, in one line, where there are no shards or no images in them.
    """
    train_shards, test_shards = find_shards(data_dir)
    columns = image_column, label_column or "cls"
    train, test = (index(shards, *columns) for shards in (train_shards, test_shards))
    for found, shards in ((train, train_shards), (test, test_shards)):
        if shards and not found.names:
            wanted = f"*.{image_column}" if image_column else ", ".join(sorted(EXTENSIONS))
            raise ValueError(f"no images ({wanted}) in {len(shards)} shards, {shards[0]} first")
    if label_column and all(value is None for value in train.labels):
        raise ValueError(f"no sample has the label {label_column!r}, in {train_shards[0]} first")
    labels, classes = encode("data 'webdataset'", train.labels, test.labels)
    splits: tuple[ReadSplit, ReadSplit]
    if test_shards:
        splits = train.split(labels[0]), test.split(labels[1])
    else:
        splits = held_out(train.split(labels[0]))
    return of_any_size("webdataset", *splits, classes)


# ---- which files ---------------------------------------------------------------------------------


def find_shards(data_dir: Path | None) -> tuple[list[str], list[str]]:
    """The shards to train and to test with. Raises ValueError."""
    expected = "a folder with .tar files, or their names as 'photos/{train,val}-{000..003}.tar'"
    if data_dir is None:
        raise ValueError(f"data 'webdataset' needs data_dir: {expected}")
    if "://" in str(data_dir) or re.match(r"\w+:/|pipe:", str(data_dir)):
        raise ValueError(f"data 'webdataset' reads local shards only: fetch {data_dir} first")
    if data_dir.is_dir():
        base, paths = data_dir, sorted(map(str, data_dir.rglob("*.tar")))
    else:
        base = Path(re.split(r"[*?{\[]", str(data_dir))[0] + "x").parent
        paths = [path for pattern in braces(str(data_dir)) for path in matching(pattern)]
    if not paths:
        raise ValueError(f"data 'webdataset' finds no .tar in {data_dir}; expected {expected}")
    words = {path: _words(Path(path).relative_to(base)) for path in paths}
    validation = [path for path in paths if words[path] & VALIDATION]
    test = [path for path in paths if words[path] & TEST]
    train = [path for path in paths if not words[path] & (VALIDATION | TEST)]
    if not train:
        raise ValueError(f"data 'webdataset' finds shards to test with only, as {paths[0]}")
    return train, validation or test


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", str(path).lower()))


def braces(pattern: str) -> list[str]:
    """`a-{00..02}` -> a-00, a-01, a-02 and `{x,y}` -> x, y, as the shell does it."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if span:
        first, last = span.groups()
        parts = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    else:
        parts = found[1].split(",")
    return [whole for part in parts for whole in braces(before + part + after)]


def matching(pattern: str) -> Sequence[str]:
    """The files of a name that may have * and ?. Raises ValueError for one that is not there."""
    if glob.has_magic(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    if not Path(pattern).is_file():
        raise ValueError(f"data 'webdataset': there is no shard {pattern}")
    return [pattern]


# ---- what is in them -----------------------------------------------------------------------------


def index(shards: Sequence[str], image: str | None, label: str) -> Index:
    """A row for every sample with an image."""
    found = Index(shards=list(shards))
    json_field = label.removeprefix("json.") if label.startswith("json.") else ""
    label_end = "json" if json_field else label
    for number, shard in enumerate(shards):
        samples: dict[str, dict[str, Any]] = {}
        for member, content in members(shard, label_end):
            folder, slash, file = member.name.rpartition("/")
            key, _, end = file.partition(".")
            sample = samples.setdefault(folder + slash + key, {})
            if end == label_end and content is not None:
                sample["label"] = _label(content, json_field)
            elif "image" not in sample and _is_image(end, image):
                sample["image"] = member.name
                sample["place"] = (number, member.offset_data, member.size)
        for sample in samples.values():
            if "image" in sample:
                found.names.append(sample["image"])
                found.places.append(sample["place"])
                found.labels.append(sample.get("label"))
    return found


def members(shard: str, label_end: str) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The files of a shard, with the content of those that hold labels.

    Of a shard that is cut off, those before the cut, and a warning. Raises ValueError for another
    kind of file.
    """
    count = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isfile():
                    is_label = member.name.rpartition("/")[2].partition(".")[2] == label_end
                    file = tar.extractfile(member) if is_label else None
                    yield member, None if file is None else file.read()
                    count += 1
        if os.path.getsize(shard) % tarfile.BLOCKSIZE:  # tarfile says nothing of half a header
            raise tarfile.ReadError("it is cut off within a block")
    except (tarfile.TarError, EOFError) as error:
        if not count:
            hint = "; decompress it" if _compressed(shard) else ""
            raise ValueError(f"{shard} is no .tar file that can be read: {error}{hint}") from None
        warnings.warn(f"{shard} is damaged, after {count} files: {error}", stacklevel=2)


def _compressed(shard: str) -> bool:
    with open(shard, "rb") as file:
        return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def _is_image(end: str, wanted: str | None) -> bool:
    return end == wanted if wanted else "." + end.rpartition(".")[2].lower() in EXTENSIONS


def _label(content: bytes, json_field: str) -> int | str | None:
    """A whole number where the text is one, else the text; of a .json its field."""
    text = content.decode("utf-8", "replace").strip()
    if json_field:
        try:
            value = json.loads(text)
            for name in json_field.split("."):
                value = value[name]
        except (ValueError, KeyError, TypeError):
            return None
        return value
    return int(text) if re.fullmatch(r"-?\d+", text) else text
