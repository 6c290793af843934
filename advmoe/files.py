# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all, and are there still when the machine goes down."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .registry import shown

__all__ = ["WriteError", "add_line", "write_text", "write_whole"]

_ADVICE = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "the quota is used up: make room, or have it raised",
    errno.EFBIG: "the process or the file system allows no larger file (ulimit -f)",
    errno.EROFS: "make the folder writable",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
}
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # Windows has none
# what folders of some network file systems answer to fsync
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)


class WriteError(OSError):
    """A file could not be written; the message names it and what to do. What was there under its name is as it was; where
    only the folder could not be synchronised, the new file is there and may be lost in a power cut.

    Args:
        then: what else to do, once it can be written.
    """

    def __init__(self, path: Path, error: OSError, then: str = "") -> None:
        super().__init__(error.errno, error.strerror or str(error), str(path))
        self.then = then

    def __str__(self) -> str:
        advice = _ADVICE.get(self.errno or 0, "")
        name = shown(self.filename) if self.errno == errno.ENAMETOOLONG else self.filename
        return "; ".join(each for each in (f"{name} cannot be written: {self.strerror}", advice, self.then) if each)


def open_own(name: str, flags: int) -> int:
    """For ``open``'s ``opener``: a file of that folder, not one elsewhere that a link there names."""
    return os.open(name, flags | NO_LINK, 0o666)


def write_whole(path: Path, write: Callable[[Any], None], suffix: str = ".tmp") -> None:
    """Lets ``write`` fill a file, whole or not at all: under a temporary name, which becomes ``path`` once the content is
    on the disk, and is gone if something fails. Then the folder is synchronised too, or its new name might be lost.

    Args:
        suffix: of the temporary name.

    Raises:
        WriteError: if that fails.
    """
    temporary = path.with_name(path.name + suffix)
    try:
        temporary.unlink(missing_ok=True)  # what a killed process left, or somebody planted
        with open(temporary, "xb", opener=open_own) as file:
            noting = _Noting(file)
            try:
                write(noting)
            except RuntimeError as error:  # torch.save makes one of its own of what a write raises
                raise noting.error or error from None
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(path, error) from error
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole, or not at all.

    Raises:
        WriteError: if that fails.
    """
    write_whole(path, lambda file: file.write(text.encode()))


def add_line(path: Path, line: str) -> None:
    """Appends a line, whole or not at all.

    Raises:
        WriteError: if that fails.
    """
    new = not path.exists()
    try:
        with open(path, "ab", buffering=0, opener=open_own) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                rest = f"{line}\n".encode()
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except BaseException:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise
        if new:
            _sync_folder(path.parent)
    except OSError as error:
        raise WriteError(path, error) from error


class _Noting:
    """Passes writes on and keeps what they raise."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except BaseException as error:
            self.error = error
            raise

    def flush(self) -> None:
        """What fails here shows when the whole is flushed."""


def _sync_folder(folder: Path) -> None:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
