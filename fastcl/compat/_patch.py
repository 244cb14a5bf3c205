"""Swapping a library's classes for ours in place, and back.

A library names a class in several modules: where it is defined, where it is re-exported, and where
its own code imports it. A patch replaces all of these, found by identity, and puts back what it
replaced. Names that a user's module has already imported stay what they are.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
from types import TracebackType
from typing import Any, NamedTuple

Version = tuple[int, ...]


class Library(NamedTuple):
    """A library that can be patched, and the versions whose semantics fastcl.compat follows."""

    distribution: str
    first: Version
    below: Version
    objects: tuple[str, ...]  # module:name, as it is called in fastcl.compat too

    @property
    def package(self) -> str:
        return self.objects[0].partition(":")[0].partition(".")[0]


PATCHABLE = {
    "lightly": Library(
        "lightly", (1, 5), (1, 7), (
            "lightly.loss.ntx_ent_loss:NTXentLoss",
            "lightly.loss.swav_loss:SwaVLoss",
            "lightly.loss.swav_loss:sinkhorn",
            "lightly.loss.dino_loss:DINOLoss",
            "lightly.loss.dcl_loss:DCLLoss",
            "lightly.loss.dcl_loss:DCLWLoss",
            "lightly.loss.negative_cosine_similarity:NegativeCosineSimilarity",
            "lightly.models.modules.memory_bank:MemoryBankModule",
            "lightly.models.utils:update_momentum",
        ),
    ),
    "open_clip": Library(
        "open_clip_torch", (3,), (3, 4), ("open_clip.loss:ClipLoss", "open_clip.loss:SigLipLoss"),
    ),
    "pytorch_metric_learning": Library(
        "pytorch-metric-learning", (2, 9), (2, 10), (
            "pytorch_metric_learning.losses.ntxent_loss:NTXentLoss",
            "pytorch_metric_learning.losses.supcon_loss:SupConLoss",
            "pytorch_metric_learning.losses.cross_batch_memory:CrossBatchMemory",
        ),
    ),
    "sentence_transformers": Library(
        "sentence-transformers", (6, 2), (7,), (
            "sentence_transformers.sentence_transformer.losses.multiple_negatives_ranking"
            ":MultipleNegativesRankingLoss",
            "sentence_transformers.sentence_transformer.losses.cached_multiple_negatives_ranking"
            ":CachedMultipleNegativesRankingLoss",
        ),
    ),
    "info_nce": Library(
        "info-nce-pytorch", (0, 1), (0, 2), ("info_nce:InfoNCE", "info_nce:info_nce"),
    ),
}  # fmt: skip

_originals: dict[Any, Any] = {}  # ours -> the library's, while a patch is on


class Patch:
    """What `patch` did: a context manager that undoes it, or call undo()."""

    def __init__(self) -> None:
        self.replaced: list[tuple[Library, Any, Any]] = []  # library, theirs, ours
        self.names: list[str] = []  # every place where a name was replaced

    def undo(self) -> None:
        """Put the library's own objects back, in every module that holds ours."""
        for library, theirs, ours in reversed(self.replaced):
            _swap(library, ours, theirs)
            _originals.pop(ours, None)
        self.replaced.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        return f"<fastcl.compat patch: {', '.join(self.names) or 'nothing new'}>"


def patch(*libraries: str) -> Patch:
    """Swap the classes of these libraries for fastcl's, everywhere inside the libraries.

        fastcl.compat.patch("lightly", "open_clip")     until .undo() of what it returns
        with fastcl.compat.patch("lightly"): ...        for the block

    Patching what is patched already changes nothing, nor does undoing that.
    Raises ValueError for an unknown name, ImportError when a library is not installed, RuntimeError
    when its version is not one that fastcl.compat follows; then nothing has changed.
    """
    for name in libraries:
        check_installed(name)
    done = Patch()
    try:
        for name in libraries:
            ours = importlib.import_module(f"fastcl.compat.{name}")
            for place in PATCHABLE[name].objects:
                _replace(done, PATCHABLE[name], place, ours)
    except BaseException:
        done.undo()
        raise
    return done


def _replace(done: Patch, library: Library, place: str, ours: Any) -> None:
    module, _, name = place.partition(":")
    theirs, replacement = original(place), getattr(ours, name)
    if getattr(sys.modules[module], name) is replacement:
        return
    done.replaced.append((library, theirs, replacement))
    _originals[replacement] = theirs
    done.names += _swap(library, theirs, replacement)


def _swap(library: Library, old: Any, new: Any) -> list[str]:
    """Replace `old` by `new` wherever a loaded module of the library holds it."""
    places = []
    for name, module in list(sys.modules.items()):
        if name != library.package and not name.startswith(library.package + "."):
            continue
        # vars(), not dir() and getattr: a lazy module would import more.
        for attribute, value in list(vars(module).items()) if module is not None else ():
            if value is old:
                setattr(module, attribute, new)
                places.append(f"{name}.{attribute}")
    return places


def original(place: str) -> Any:
    """The library's own object at "module:name", also while it is patched."""
    module, _, name = place.partition(":")
    found = getattr(importlib.import_module(module), name)
    return _originals.get(found, found)


def check_installed(name: str) -> None:
    """Raises what `patch` raises."""
    if name not in PATCHABLE:
        raise ValueError(f"compat.patch: unknown library {name!r}; have {', '.join(PATCHABLE)}.")
    library = PATCHABLE[name]
    version = installed_version(name)
    if version is None:
        raise ImportError(
            f"compat.patch: {name} is not installed (pip install {library.distribution}).",
            name=library.package,
        )
    if not library.first <= version < library.below:
        raise RuntimeError(
            f"compat.patch: {name} {dotted(version)} is not a version that fastcl.compat follows: "
            f"{dotted(library.first)} or newer, below {dotted(library.below)}."
        )


def installed_version(name: str) -> Version | None:
    """The version of a library, without importing it; None when it is not installed."""
    library = PATCHABLE[name]
    try:
        text = importlib.metadata.version(library.distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
        if digits != part:  # 0rc1, 0.dev3: ends the release number
            break
    return tuple(numbers)


def dotted(version: Version) -> str:
    return ".".join(map(str, version))
