"""Data sets, their random views, and the loader that trains on them.

data = load("fashion")                                           DataSplits
recipe = augment.build("moco-v2", image_size=data.image_size, mean=data.mean, std=data.std)
for views, labels, indices in Loader(data.pretrain, recipe, batch_size=256): …
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

from fastcl.data import fashion
from fastcl.data.folder import load_folder, load_imagenet
from fastcl.data.hub import load_hf
from fastcl.data.loader import Loader
from fastcl.data.shards import load_webdataset
from fastcl.data.splits import DataSplits, FolderSplit, Split, TensorSplit
from fastcl.data.standard import load_cifar10, load_cifar100, load_stl10

__all__ = ["DATASETS", "DataSplits", "FolderSplit", "Loader", "Split", "TensorSplit", "load"]

DATASETS: dict[str, Callable[..., DataSplits]] = {
    "fashion": fashion.load,
    "cifar10": load_cifar10,
    "cifar100": load_cifar100,
    "stl10": load_stl10,
    "folder": load_folder,
    "imagenet": load_imagenet,
    "hf": load_hf,
    "webdataset": load_webdataset,
}
WITH_COLUMNS = ("hf", "webdataset")


def load(
    name: str,
    *,
    data_dir: str | PathLike[str] | None = None,
    download: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
) -> DataSplits:
    """The data set of that name.

    data_dir       where its files are; the embedded fashion needs none
    download       let torchvision fetch cifar10, cifar100 or stl10 into data_dir, datasets a table
    image_column, label_column   of hf and webdataset: where in a sample image and label are
    Raises ValueError, in one line, for an unknown name (with the list), for files that are not
    where they must be, and where none of them is an image that can be read.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data {name!r}. Data: {', '.join(DATASETS)}")
    columns = {"image_column": image_column, "label_column": label_column}
    columns = {key: value for key, value in columns.items() if value is not None}
    if columns and name not in WITH_COLUMNS:
        raise ValueError(f"{next(iter(columns))} is of data {' and '.join(WITH_COLUMNS)} only")
    return DATASETS[name](None if data_dir is None else Path(data_dir), download, **columns)
