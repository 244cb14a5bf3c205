"""Images in folders, one folder a class:

    data_dir/train/<class>/*.jpg    and    data_dir/test/<class>/*.jpg or data_dir/val/<class>/*.jpg

the layout of torchvision's ImageFolder and of ImageNet. Small images are decoded once and kept in
memory.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from fastcl.data.reading import LARGE, of_any_size
from fastcl.data.splits import IMAGENET_MEAN, IMAGENET_STD, DataSplits, FolderSplit

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}


def load_folder(data_dir: Path | None, download: bool = False) -> DataSplits:
    """`--data folder`. Images of at most 64 pixels keep their size; larger ones are used at 224."""
    return of_any_size("folder", *_scan("folder", data_dir, ("test", "val")))


def load_imagenet(data_dir: Path | None, download: bool = False) -> DataSplits:
    """`--data imagenet`: train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, used at 224 pixels."""
    train, test, classes = _scan("imagenet", data_dir, ("val", "test"))
    return DataSplits("imagenet", train, test, classes, LARGE, IMAGENET_MEAN, IMAGENET_STD)


def _scan(
    name: str, data_dir: Path | None, test_names: tuple[str, str]
) -> tuple[FolderSplit, FolderSplit, tuple[str, ...]]:
    """The two splits under data_dir and their classes, or a ValueError that says what is wrong."""
    layout = f"train/<class>/… and {'|'.join(test_names)}/<class>/…"
    if data_dir is None:
        raise ValueError(f"data {name!r} needs data_dir, a folder with {layout}")
    if not data_dir.is_dir():
        raise ValueError(f"data_dir {data_dir} is no folder; data {name!r} expects {layout} in it")
    found = [folder for folder in test_names if (data_dir / folder).is_dir()]
    if not (data_dir / "train").is_dir() or not found:
        have = _some(sorted(path.name for path in data_dir.iterdir())) or "nothing"
        raise ValueError(f"data {name!r} expects {layout} in {data_dir}; there is {have}")
    train_root, test_root = data_dir / "train", data_dir / found[0]
    classes, test_classes = _classes(train_root), _classes(test_root)
    if classes != test_classes:
        differing = _some(sorted(set(classes) ^ set(test_classes)))
        raise ValueError(
            f"{train_root} and {test_root} must have the same classes; in one: {differing}"
        )
    return _files(train_root, classes), _files(test_root, classes), classes


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f", … ({len(names)} in all)" if len(names) > 5 else "")


def _classes(root: Path) -> tuple[str, ...]:
    classes = tuple(sorted(path.name for path in root.iterdir() if path.is_dir()))
    if not classes:
        raise ValueError(f"{root} has no class folders; expected {root}/<class>/<image files>")
    return classes


def _files(root: Path, classes: tuple[str, ...]) -> FolderSplit:
    """Every image file below root/<class>, sorted; the label is the class's place in `classes`."""
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = sorted(
            os.path.join(folder, file)
            for folder, _, files in os.walk(root / name)
            for file in files
            if os.path.splitext(file)[1].lower() in EXTENSIONS
        )
        if not images:
            kinds = ", ".join(sorted(EXTENSIONS))
            raise ValueError(f"{root / name} has no images ({kinds})")
        paths += images
        labels += [label] * len(images)
    return FolderSplit(tuple(paths), torch.tensor(labels), LARGE)
