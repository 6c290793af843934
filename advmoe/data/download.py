# SPDX-License-Identifier: Apache-2.0
"""Fetches the archives of data sets that may be fetched, checks them and unpacks them."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import logging
import shutil
import stat
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from .sets import DataError

__all__ = ["ARCHIVES", "Archive", "download", "missing"]

logger = logging.getLogger("advmoe")
TIMEOUT = 60  # seconds without a byte
_CHUNK = 1 << 20
_LARGEST, _MOST = 1 << 30, 200_000  # bytes and members of an archive; Tiny-ImageNet has 0.25 GB and 120,609


@dataclass(frozen=True)
class Archive:
    """title: what it is called; folder: what it unpacks to; sha256: of the archive that its publishers' MD5 is of;
    content: what there is in the folder."""

    title: str
    url: str
    folder: str
    sha256: str
    content: tuple[str, ...]


_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz"
ARCHIVES = {
    "cifar10": Archive(
        "the CIFAR-10 python version",
        f"{_KRIZHEVSKY}/cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
    ),
    "cifar100": Archive(
        "the CIFAR-100 python version",
        f"{_KRIZHEVSKY}/cifar-100-python.tar.gz",
        "cifar-100-python",
        "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
        ("train", "test"),
    ),
    "tiny_imagenet": Archive(
        "Tiny-ImageNet",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "tiny-imagenet-200",
        "6198c8ae015e2b3e007c7841da39ec069199b9aa3bfa943a462022fe5e43c821",
        ("wnids.txt", "train", "val"),
    ),
}


def missing(name: str, what: str = "no folder given") -> DataError:
    """Of a data set that may be fetched, whose files are not there."""
    archive = ARCHIVES[name]
    file = archive.url.rpartition("/")[2]
    return DataError(
        f"{name}: {what}; pass --data-dir with {archive.title} ({file} of its web page), unpacked, or fetch it there "
        "with --download"
    )


def download(name: str, folder: str | Path) -> Path:
    """Fetches a data set into ``folder``, where nothing is done if it is there already.

    The archive is checked against its checksum before it is unpacked, and appears under its name when it is whole; what
    was begun is removed on any fault.

    Returns:
        the data's own folder.

    Raises:
        ValueError: for a data set that cannot be fetched.
        DataError: if there is no network, or what came is not what was expected; the message says what to do.
    """
    folder = Path(folder)
    if name not in ARCHIVES:
        raise ValueError(f"download: only {', '.join(ARCHIVES)} can be fetched, got {name!r}")
    archive = ARCHIVES[name]
    for target in (folder, folder / archive.folder):
        if all((target / each).exists() for each in archive.content):
            logger.info("%s is there already", target)
            return target
    if target.exists():
        absent = next(each for each in archive.content if not (target / each).exists())
        raise DataError(f"{name}: {target} is there and has no {absent}; remove it to fetch it anew")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
            file = Path(temporary) / archive.url.rpartition("/")[2]
            _fetch(name, archive, file)
            _unpack(name, archive, file, Path(temporary) / "content")
            (Path(temporary) / "content" / archive.folder).replace(target)
    except OSError as error:
        raise DataError(f"{name}: {folder} cannot be written: {error.strerror or error}") from error
    logger.info("%s: %s", name, target)
    return target


def _fetch(name: str, archive: Archive, file: Path) -> None:
    digest = hashlib.sha256()
    size = 0
    with file.open("wb") as out:
        for chunk in _received(name, archive, file.name):
            size += len(chunk)
            if size > _LARGEST:
                raise DataError(f"{name}: {archive.url} gives more than {_LARGEST} bytes; get it elsewhere")
            out.write(chunk)
            digest.update(chunk)
    if digest.hexdigest() != archive.sha256:
        raise DataError(
            f"{name}: what {archive.url} gave has the SHA-256 checksum {digest.hexdigest()}, expected {archive.sha256}; "
            "try again, or get it elsewhere"
        )


def _received(name: str, archive: Archive, title: str) -> Iterator[bytes]:
    """What comes over the network; a fault of the disk, which is its caller's, is none of the network's."""
    try:
        with urllib.request.urlopen(archive.url, timeout=TIMEOUT) as answer:
            length = answer.headers.get("Content-Length")
            total = int(length) if length and length.isdecimal() else None
            with tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=None, leave=False) as bar:
                while chunk := answer.read(_CHUNK):
                    yield chunk
                    bar.update(len(chunk))
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"{name}: {archive.url} cannot be fetched ({reason}); without a network, get {archive.title} elsewhere, "
            f"unpack it, and pass --data-dir with the folder that holds {archive.folder}"
        ) from error


def _unpack(name: str, archive: Archive, file: Path, content: Path) -> None:
    try:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as packed:
                _extract(((m.filename, m.is_dir(), m.file_size, _opener(packed, m)) for m in packed.infolist()), content)
        else:
            _require_small(file)
            with tarfile.open(file, "r:gz") as packed_tar:
                _extract(_members(packed_tar), content)
    except _DAMAGED as error:
        raise DataError(f"{name}: {file.name} cannot be unpacked ({type(error).__name__}: {error})") from error
    if not (content / archive.folder).is_dir():
        raise DataError(f"{name}: {file.name} has no folder {archive.folder}")


# a password is a RuntimeError, as is a way of packing that is not known
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError, ValueError, RuntimeError)

Member = tuple[str, bool, int, Callable[[], IO[bytes]]]  # name, whether it is a folder, bytes, and what opens it


def _opener(packed: zipfile.ZipFile, member: zipfile.ZipInfo) -> Callable[[], IO[bytes]]:
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError(f"{member.filename} is neither a file nor a folder")
    return lambda: packed.open(member)


def _members(packed: tarfile.TarFile) -> Iterator[Member]:
    for member in packed:
        if not member.isdir() and (not member.isreg() or member.issparse()):  # links and devices
            raise ValueError(f"{member.name} is neither a file nor a folder")

        def opened(member: tarfile.TarInfo = member) -> IO[bytes]:
            stream = packed.extractfile(member)
            assert stream is not None
            return stream

        yield member.name, member.isdir(), member.size, opened


def _require_small(file: Path) -> None:
    """Headers of a tar may be of any size, and are read whole."""
    with gzip.open(file) as stream:
        size = 0
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            if size > _LARGEST:
                raise ValueError(f"it unpacks to more than {_LARGEST} bytes")


def _extract(members: Iterable[Member], content: Path) -> None:
    """Files and folders alone, each below ``content`` and of a name of its own, with no more bytes than they say.

    Raises:
        ValueError: for anything else.
    """
    total = 0
    for count, (name, folder, size, opened) in enumerate(members):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or set(name) & {"\\", "\0"}:
            raise ValueError(f"{name!r} would lie outside of its folder")
        total += size
        if total > _LARGEST or count >= _MOST:
            raise ValueError(f"it unpacks to more than {_LARGEST} bytes or {_MOST} files")
        target = content / path
        if folder:
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            raise ValueError(f"{name} is in it twice")
        with opened() as source, target.open("xb") as out:
            shutil.copyfileobj(source, out, _CHUNK)
