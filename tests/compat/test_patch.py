"""fastcl.compat.patch: what is swapped, and that it is undone."""

from __future__ import annotations

import importlib
import importlib.metadata
import subprocess
import sys

import pytest

import fastcl.compat
from fastcl.compat import PATCHABLE, _patch, patch

LIBRARIES = [name for name in PATCHABLE if importlib.util.find_spec(name)]


def places(name: str) -> dict[str, int]:
    """Every attribute of the library's loaded modules, by identity."""
    return {
        f"{module}.{attribute}": id(value)
        for module in list(sys.modules)
        if module == PATCHABLE[name].package or module.startswith(PATCHABLE[name].package + ".")
        for attribute, value in vars(sys.modules[module]).items()
        if isinstance(value, type) or callable(value)
    }


@pytest.mark.parametrize("name", LIBRARIES)
def test_patch_swaps_every_place_and_undoes_it(name):
    compat = importlib.import_module(f"fastcl.compat.{name}")
    originals = {place: _patch.original(place) for place in PATCHABLE[name].objects}
    before = places(name)
    with patch(name) as done:
        for place, theirs in originals.items():
            module, _, attribute = place.partition(":")
            assert getattr(sys.modules[module], attribute) is getattr(compat, attribute)
            assert _patch.original(place) is theirs
        held = {id(theirs) for theirs in originals.values()}
        assert not held & set(places(name).values()), "a module still holds the library's own"
        assert len(done.names) >= len(originals)
    assert places(name) == before


@pytest.mark.skipif("lightly" not in LIBRARIES, reason="lightly is not installed")
def test_patch_reaches_what_users_import():
    import lightly.loss
    import lightly.models.modules.memory_bank

    theirs = lightly.loss.NTXentLoss
    done = patch("lightly")
    try:
        from lightly.loss import NTXentLoss

        assert NTXentLoss is fastcl.compat.lightly.NTXentLoss
        assert lightly.loss.directclr_loss.NTXentLoss is NTXentLoss
        assert "lightly.loss.NTXentLoss" in repr(done)
    finally:
        done.undo()
    assert lightly.loss.NTXentLoss is theirs
    done.undo()  # once more changes nothing
    assert lightly.loss.NTXentLoss is theirs


@pytest.mark.skipif("lightly" not in LIBRARIES, reason="lightly is not installed")
def test_patch_within_a_patch_changes_nothing():
    import lightly.loss

    theirs = lightly.loss.DINOLoss
    with patch("lightly"):
        with patch("lightly") as inner:
            assert inner.names == []
        assert lightly.loss.DINOLoss is fastcl.compat.lightly.DINOLoss
    assert lightly.loss.DINOLoss is theirs


@pytest.mark.skipif("lightly" not in LIBRARIES, reason="lightly is not installed")
def test_patch_is_undone_after_an_exception_and_in_modules_imported_meanwhile():
    import lightly.loss

    theirs = lightly.loss.NTXentLoss
    with pytest.raises(KeyError):
        with patch("lightly"):
            importlib.reload(lightly.loss.directclr_loss)
            assert lightly.loss.directclr_loss.NTXentLoss is not theirs
            raise KeyError
    assert lightly.loss.directclr_loss.NTXentLoss is theirs


def test_patch_of_an_unknown_library():
    with pytest.raises(ValueError, match="unknown library 'lightning'; have lightly, open_clip"):
        patch("lightning")


def test_patch_of_a_missing_library(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(
        ImportError, match=r"open_clip is not installed \(pip install open_clip_torch\)"
    ):
        patch("open_clip")


@pytest.mark.skipif("info_nce" not in LIBRARIES, reason="info_nce is not installed")
def test_patch_of_an_unknown_version_changes_nothing(monkeypatch):
    versions = {"info-nce-pytorch": "0.1.4", "open_clip_torch": "4.0.0"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    import info_nce

    theirs = info_nce.InfoNCE
    with pytest.raises(RuntimeError, match=r"open_clip 4\.0\.0 is not a version .* below 3\.4"):
        patch("info_nce", "open_clip")
    assert info_nce.InfoNCE is theirs


@pytest.mark.parametrize(
    "text, version",
    [("1.6.0", (1, 6, 0)), ("1.7.0rc1", (1, 7, 0)), ("2.9.0.dev3", (2, 9, 0)), ("3.3+cpu", (3, 3))],
)
def test_version_numbers(monkeypatch, text, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: text)
    assert _patch.installed_version("lightly") == version


def test_importing_compat_imports_no_library():
    modules = ", ".join(f"fastcl.compat.{name}" for name in [*PATCHABLE, "supcontrast", "official"])
    program = (
        f"import sys, {modules}\n"
        f"assert not {{m.partition('.')[0] for m in sys.modules}} & set({list(PATCHABLE)})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
