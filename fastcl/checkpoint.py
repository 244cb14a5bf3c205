"""Checkpoints that are either the old one or the new one, whatever happens while writing.

The file is written beside its final name, flushed to the disk, and renamed over it; the one that
was there stays as checkpoint.previous.pt. It holds tensors, numbers, strings and containers of
them only: torch.load(..., weights_only=True) reads it.
"""

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Write state to path, atomically; what was there is then in PREVIOUS, beside it.

    The tensors go to the file as they are: no copy of a large bank in memory.
    Raises OSError (a full disk, …) with path as it was.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            _write(state, file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            keep(path, PREVIOUS)
        os.replace(temporary, path)
    except BaseException:  # a full disk, or Ctrl-C
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _write(state: dict[str, Any], file: BinaryIO) -> None:
    """torch.save, raising what the first failed write raised."""
    stream = _Stream(file)
    try:
        torch.save(state, stream)  # type: ignore[arg-type]
    except BaseException as error:
        stream.error = stream.error or error
    if stream.error is not None:
        raise stream.error


class _Stream:
    """A file whose writes fail silently, the first failure kept and nothing written after it.

    torch's writer, in C++, writes once more when it is destroyed: an exception there would end the
    process, and elsewhere becomes a RuntimeError about a zip file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: BaseException | None = None

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                return self.file.write(data)
            except BaseException as error:
                self.error = error
        return len(data)

    def flush(self) -> None:
        """The file is flushed when it is whole."""


def keep(path: Path, name: str) -> None:
    """The file at path under another name beside it as well, replacing what has that name.

    A hard link: checkpoints are replaced and never written into, so that it is as good as a copy.
    A copy where the file system has no links. path is there at every moment. Raises OSError.
    """
    temporary = path.with_name(name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, path.with_name(name))
    temporary.unlink(missing_ok=True)  # rename does nothing to two links of one file


def replace_text(path: Path, text: str) -> None:
    """Write text to path, atomically: a kill leaves what was there. Raises OSError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: Path) -> dict[str, Any]:
    """The state in path, on the CPU. Raises ValueError when it is no checkpoint of this program.

    Its tensors are the file, mapped: what is not used is not read, and a large bank is copied once,
    to where it goes. What is kept for longer than the state should be a copy.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises many kinds on a file that is not its own
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a checkpoint, or a damaged one: {reason}") from None
    if not isinstance(state, dict) or "method" not in state or "values" not in state:
        raise ValueError(f"{path} is not a checkpoint of fastcl.train")
    return state
