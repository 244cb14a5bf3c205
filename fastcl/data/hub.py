"""Tables of the Hugging Face `datasets` library, from disk or from the Hub.

    --data hf --data-dir photos/               what save_to_disk wrote, or a folder of parquet files
    --data hf --data-dir NAMESPACE/NAME        from the Hub's cache; --download fetches it
    --data hf --data-dir NAMESPACE/NAME:CONFIG

Testing is with the split validation (or valid, val, dev), else with test, whichever has labels;
without either every tenth image is kept for it. Needs pip install 'fastcl[hf]'.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcl.data.reading import LARGE, encode, held_out, of_any_size
from fastcl.data.splits import DataSplits, ReadSplit

TESTING = ("validation", "valid", "val", "dev", "test")  # the first that has labels
LABELS = ("label", "labels", "fine_label", "class", "target")  # the first that there is
FILES = ("binary", "large_binary", "string", "large_string")  # columns that may be image files


@dataclass(frozen=True)
class TableSplit(ReadSplit):
    """Rows of a table, each with an image: the encoded file itself, or its path."""

    name: str
    table: Any  # datasets.Dataset of one column
    column: str
    rows: Tensor  # (N,) int64: which of them
    labels: Tensor
    image_size: int = LARGE
    unreadable: dict[str, None] = field(default_factory=dict)

    def name_of(self, index: int) -> str:
        row = int(self.rows[index])
        value = self.table[row][self.column]
        path = value.get("path") if isinstance(value, Mapping) else None
        return f"{self.name}, row {row}" + (f" ({path})" if path else "")

    def source(self, index: int) -> str | io.BytesIO:
        value = self.table[int(self.rows[index])][self.column]
        if isinstance(value, Mapping):
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise OSError("no image in this row")
        return io.BytesIO(value) if isinstance(value, bytes) else str(value)

    def subset(self, indices: Tensor) -> TableSplit:
        return replace(self, rows=self.rows[indices], labels=self.labels[indices])


def load_hf(
    data_dir: Path | None,
    download: bool = False,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
) -> DataSplits:
    """`--data hf`.

    image_column   none: the first column of images
    label_column   none: the first of label, labels, fine_label, class, target, else no labels
    Raises ValueError, in one line, where the library, the data or a column is missing.
    """
    tables = open_tables(data_dir, download)
    train = tables.get("train")
    if train is None:
        raise ValueError(f"data 'hf' in {data_dir} has no split train; there is {_list(tables)}")
    image = _image_column(train, image_column)
    label = _label_column(train, label_column)
    tests = {name: tables[name] for name in TESTING if name in tables}
    splits: list[ReadSplit] = []
    classes: tuple[str, ...] = ()
    for name, test in tests.items() or [("", None)]:
        both = [train] if test is None else [train, test]
        labels, classes = _labels(both, label)
        splits = [
            _split(f"{data_dir} {of}", table, image, numbers)
            for of, table, numbers in zip(("train", name), both, labels)
        ]
        if len(both) == 1:
            splits = list(held_out(splits[0]))
        elif bool((labels[1] >= 0).any()):
            break
    return of_any_size("hf", splits[0], splits[1], classes)


# ---- the library ---------------------------------------------------------------------------------


def open_tables(data_dir: Path | None, download: bool) -> dict[str, Any]:
    """Split name -> table. Raises ValueError."""
    if data_dir is None:
        raise ValueError(
            "data 'hf' needs data_dir: what save_to_disk wrote, a folder of parquet files, "
            "or a name on the Hub"
        )
    try:
        import datasets
    except ImportError:
        raise ValueError("data 'hf' needs datasets: pip install 'fastcl[hf]'") from None
    try:
        if any((data_dir / name).is_file() for name in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(data_dir))
        elif data_dir.exists():
            found = datasets.load_dataset(str(data_dir))
        else:
            name, _, config = str(data_dir).partition(":")
            with _offline(datasets, not download):
                found = datasets.load_dataset(name, config or None)
    except Exception as error:  # of a dozen classes: the Hub's, arrow's, the file system's
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        hint = "" if download or data_dir.exists() else "; --download fetches it from the Hub"
        raise ValueError(f"data 'hf' cannot open {data_dir}: {reason}{hint}") from None
    return dict(found) if isinstance(found, Mapping) else {"train": found}


@contextmanager
def _offline(datasets: Any, offline: bool) -> Iterator[None]:
    """While this is open the library looks into its cache only, as with HF_HUB_OFFLINE=1."""
    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before


# ---- its columns ---------------------------------------------------------------------------------


def _list(names: Any) -> str:
    return ", ".join(names) or "nothing"


def _image_column(table: Any, wanted: str | None) -> str:
    """The column of images: Image, or the bytes or paths of image files."""
    import datasets

    if wanted is not None:
        if wanted not in table.features:
            raise ValueError(f"no column {wanted!r}; there is {_list(table.column_names)}")
        kind = table.features[wanted]
        if isinstance(kind, datasets.Image) or getattr(kind, "dtype", "") in FILES:
            return wanted
        raise ValueError(f"column {wanted!r} holds no image files but {kind}")
    for name, kind in table.features.items():
        if isinstance(kind, datasets.Image):
            return str(name)
    raise ValueError(
        f"no column of images; name one with --image-column: {_list(table.column_names)}"
    )


def _label_column(table: Any, wanted: str | None) -> str | None:
    if wanted is not None and wanted not in table.features:
        raise ValueError(f"no column {wanted!r}; there is {_list(table.column_names)}")
    return wanted or next((name for name in LABELS if name in table.features), None)


def _labels(tables: list[Any], column: str | None) -> tuple[list[Tensor], tuple[str, ...]]:
    """Each table's class numbers (N,), and class names: a ClassLabel's own, in its order."""
    if column is None:
        return [torch.full((len(table),), -1) for table in tables], ()
    values = [
        list(table.select_columns([column])[:][column])
        if column in table.column_names
        else [None] * len(table)
        for table in tables
    ]
    names = getattr(tables[0].features[column], "names", None)
    if names is None:
        return encode(f"column {column!r}", *values)
    numbers = [[-1 if value is None else value for value in column] for column in values]
    return [torch.tensor(column, dtype=torch.int64) for column in numbers], tuple(names)


def _split(name: str, table: Any, column: str, labels: Tensor) -> TableSplit:
    """The rows of a table, with images as files: decoding them is ours, which skips broken ones."""
    import datasets

    table = table.select_columns([column]).with_format(None)
    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    return TableSplit(name, table, column, torch.arange(len(table)), labels)
