# SPDX-License-Identifier: Apache-2.0
"""One process at a time in a run folder: a lock that the operating system lets go of with the process."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from .files import NO_LINK

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked"]

logger = logging.getLogger("advmoe")
_held: set[int] = set()  # descriptors


def _close_in_child() -> None:
    """A fork's copy would hold the lock on when this process is killed."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds this file meanwhile, which is made, and removed in the end. One that a killed process has left behind is no
    obstacle: the lock is not the file, but the system's. Where the file system gives no locks, the log says so.

    Raises:
        BlockingIOError: if somebody else holds it; its ``strerror`` says who.
        OSError: if the file cannot be made.
    """
    descriptor = _acquired(path)
    _held.add(descriptor)
    try:
        with contextlib.suppress(OSError):  # who it is, for others' messages; a full disk is no reason to stop here
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        if descriptor in _held:  # not in a fork that has closed it
            _held.discard(descriptor)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # first: whoever opened it meanwhile sees that it is gone
            os.close(descriptor)


def _acquired(path: Path) -> int:
    while True:
        # a link in someone else's folder could name any file
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | NO_LINK, 0o644)
        try:
            try:
                _lock(descriptor)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    who = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
                    raise BlockingIOError(errno.EWOULDBLOCK, who, str(path)) from error
                logger.warning(
                    "%s: this file system gives no locks (%s): see to it yourself that no other process works there",
                    path.parent, error.strerror,
                )  # fmt: skip
                return descriptor
            with contextlib.suppress(FileNotFoundError):
                now = path.lstat()
                mine = os.fstat(descriptor)
                if (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has just removed it


def _lock(descriptor: int) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
