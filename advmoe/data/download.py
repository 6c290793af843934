# SPDX-License-Identifier: Apache-2.0
"""Fetches the archives of data sets that may be fetched, checks them and unpacks them."""

from __future__ import annotations

import hashlib
import http.client
import logging
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .sets import DataError

__all__ = ["ARCHIVES", "Archive", "download", "missing"]

logger = logging.getLogger("advmoe")
TIMEOUT = 60  # seconds without a byte
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Archive:
    """title: what it is called; folder: what it unpacks to; md5: as its publishers print it, or as torchvision has it;
    content: what there is in the folder."""

    title: str
    url: str
    folder: str
    md5: str
    content: tuple[str, ...]


_KRIZHEVSKY = "https://www.cs.toronto.edu/~kriz"
ARCHIVES = {
    "cifar10": Archive(
        "the CIFAR-10 python version",
        f"{_KRIZHEVSKY}/cifar-10-python.tar.gz",
        "cifar-10-batches-py",
        "c58f30108f718f92721af3b95e74349a",
        (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"),
    ),
    "cifar100": Archive(
        "the CIFAR-100 python version",
        f"{_KRIZHEVSKY}/cifar-100-python.tar.gz",
        "cifar-100-python",
        "eb9058c3a382ffc7106e4002c42a8d85",
        ("train", "test"),
    ),
    "tiny_imagenet": Archive(
        "Tiny-ImageNet",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        "tiny-imagenet-200",
        "90528d7ca1a48142e341f4ef8d21d0de",
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
    if not archive.url.endswith(".zip") and not hasattr(tarfile, "data_filter"):
        raise DataError(
            f"{name}: this Python cannot unpack {archive.url} safely (3.10.12, 3.11.4 and later can); fetch and unpack "
            f"it yourself, and pass --data-dir with the folder that holds {archive.folder}"
        )
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
    digest = hashlib.md5(usedforsecurity=False)
    with file.open("wb") as out:
        for chunk in _received(name, archive, file.name):
            out.write(chunk)
            digest.update(chunk)
    if digest.hexdigest() != archive.md5:
        raise DataError(
            f"{name}: what {archive.url} gave has the MD5 checksum {digest.hexdigest()}, expected {archive.md5}; try "
            "again, or get it elsewhere"
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
                packed.extractall(content)  # leaves out what would lie outside
        else:
            with tarfile.open(file) as packed_tar:
                packed_tar.extractall(content, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{name}: {file.name} cannot be unpacked ({type(error).__name__}: {error})") from error
    if not (content / archive.folder).is_dir():
        raise DataError(f"{name}: {file.name} has no folder {archive.folder}")
