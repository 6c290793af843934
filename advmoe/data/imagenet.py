# SPDX-License-Identifier: Apache-2.0
"""Tiny-ImageNet in its own folder layout, and ImageNet in class folders."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..registry import shown
from .download import ARCHIVES, missing
from .files import FileSplit
from .loader import decoded
from .sets import DATA, DataError, Source, TensorSplit

__all__ = ["CACHE"]

logger = logging.getLogger("advmoe")
CACHE = ".advmoe-decoded-1.npz"  # beside the images; the number changes with what is in it
_IMAGES = (".jpeg", ".jpg", ".png")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RADIUS, STEP = 2 / 255, 1.25 / 255


@DATA.register("tiny_imagenet")
def _tiny_imagenet(folder: Path | None) -> Source:
    """Tiny-ImageNet (64 pixels) as its archive unpacks, with the classes that ``wnids.txt`` names. The test images
    are its validation images, as the labels of its own test images are not published. Decoded once, into a file beside
    the images, where that can be written."""
    name = "tiny_imagenet"
    if folder is None:
        raise missing(name)
    root = _tiny_root(folder)
    wnids = sorted(_lines(root / "wnids.txt"))
    _require_names(name, root / "wnids.txt", wnids)
    if not wnids or len(set(wnids)) < len(wnids):
        raise DataError(f"{name}: {root / 'wnids.txt'} names {'no class' if not wnids else 'a class twice'}")
    number = {wnid: i for i, wnid in enumerate(wnids)}
    train = _split(name, root, [(f"train/{wnid}/images", i) for wnid, i in number.items()], 64)
    annotations = root / "val" / "val_annotations.txt"
    files, labels = [], []
    for line in _lines(annotations):
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in number:
            raise DataError(f"{name}: {annotations}: expected a file and a class of wnids.txt in each line, got {line!r}")
        _require_names(name, annotations, [file])
        files.append(f"val/images/{file}")
        labels.append(number[wnid])
    absent = [file for file in files if not (root / file).is_file()]
    if absent or not files:
        what = f"{absent[0]} and {len(absent) - 1} more are not there" if absent else f"{annotations} names no image"
        raise DataError(f"{name}: {root}: {what}; unpack the archive again")
    test = FileSplit(name, root, np.array(files), torch.tensor(labels), 64)
    pixels, test_pixels = _remembered(root, train, test)
    return Source(
        TensorSplit(pixels, train.labels, padding=4, flip=True), TensorSplit(test_pixels, test.labels),
        len(wnids), 64, RADIUS, STEP,
    )  # fmt: skip


@DATA.register("imagenet")
def _imagenet(folder: Path | None) -> Source:
    """ImageNet (ILSVRC 2012): ``train/<class>/*`` and ``val/<class>/*``; classes are in the order of their names.
    Test images (val) are of each class in turn, so that the first ones are of as many classes. Images are decoded when
    they are needed: the shorter side to 256 pixels, a square of 224 out of it. (AdvMoE's released code makes both sides
    256 first, which distorts.)"""
    name = "imagenet"
    what = "the folder that holds train and val, each with a folder of images for each class"
    if folder is None:
        raise DataError(f"{name}: no folder given; pass --data-dir with {what}")
    absent = [each for each in ("train", "val") if not (folder / each).is_dir()]
    if absent:
        raise DataError(f"{name}: {folder} has no folder {' and no '.join(absent)}; pass --data-dir with {what}")
    classes = sorted(each.name for each in os.scandir(folder / "train") if each.is_dir())
    train, val = (
        _split(name, folder, [(f"{each}/{c}", i) for i, c in enumerate(classes)], 224, resize=256)
        for each in ("train", "val")
    )
    return Source(train, val.select(_in_turn(val.labels)), len(classes), 224, RADIUS, STEP, MEAN, STD)


def _in_turn(labels: Tensor) -> Tensor:
    """Places of labels that are sorted: the first of each class, then the second of each, so that the first images of a
    test set are of as many classes as there can be."""
    counts = labels.bincount()
    within = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels]
    return (within * len(counts) + labels).argsort()


def _tiny_root(folder: Path) -> Path:
    own = ARCHIVES["tiny_imagenet"].folder
    for root in (folder, folder / own, *sorted(folder.glob("tiny-imagenet-*"))):
        if (root / "wnids.txt").is_file() and (root / "train").is_dir():
            return root
    raise missing("tiny_imagenet", f"{folder} has no wnids.txt and train, nor has a {own} in it")


def _require_names(name: str, path: Path, names: list[str]) -> None:
    """That what a text file names are files or folders beside each other, and none elsewhere."""
    for each in names:
        if each in ("", ".", "..") or set(each) & set("/\\\0"):
            raise DataError(
                f"{name}: {path}: expected names without a folder, got {shown(each)}; unpack the archive again"
            )


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"tiny_imagenet: {path} cannot be read ({error}); unpack the archive again") from error


def _split(name: str, root: Path, folders: list[tuple[str, int]], size: int, resize: int | None = None) -> FileSplit:
    """All images of these folders, each with its class."""
    files: list[str] = []
    labels: list[int] = []
    for folder, number in folders:
        try:
            found = sorted(e.name for e in os.scandir(root / folder) if e.name.lower().endswith(_IMAGES) and e.is_file())
        except OSError as error:
            raise DataError(
                f"{name}: {root / folder} cannot be read ({error.strerror}); unpack the archive again"
            ) from error
        if not found:
            raise DataError(f"{name}: {root / folder} has no images ({', '.join(_IMAGES)}); unpack the archive again")
        files += [f"{folder}/{each}" for each in found]
        labels += [number] * len(found)
    if not files:
        raise DataError(f"{name}: {root} has no classes; unpack the archive again")
    return FileSplit(name, root, np.array(files), torch.tensor(labels), size, resize)


def _remembered(root: Path, *splits: FileSplit) -> list[Tensor]:
    """The decoded images of each split ``[n, 3, S, S]``, from the cache if it is of these very files."""
    cache, mark = root / CACHE, _fingerprint(root, splits)
    if cache.is_file():
        try:
            with np.load(cache) as content:
                if content.zip.getinfo("fingerprint.npy").file_size > 1024:
                    raise ValueError("no fingerprint of this cache")
                if str(content["fingerprint"]) == mark:
                    return [_images(content, f"images{i}", split) for i, split in enumerate(splits)]
            logger.info("%s is of other files and is made anew", cache)
        except Exception as error:  # a damaged archive raises nearly anything
            logger.warning("%s cannot be read (%s) and is made anew", cache, error)
    images = [decoded(split).permute(0, 3, 1, 2).contiguous() for split in splits]
    for left in root.glob(f"{CACHE}.*.tmp"):  # by a process that was killed: to write one takes minutes at most
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            arrays: dict[str, Any] = {f"images{i}": x.numpy() for i, x in enumerate(images)}
            np.savez(file, fingerprint=np.array(mark), **arrays)
        temporary.replace(cache)
    except OSError as error:
        logger.info("%s is not kept for the next time: %s", cache, error.strerror)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return images


def _images(content: Any, name: str, split: FileSplit) -> Tensor:
    """Of a cache, if they are as many and as large as the split's; looked at before they are read."""
    shape = (len(split), 3, split.size, split.size)
    if content.zip.getinfo(f"{name}.npy").file_size > math.prod(shape) + 1024:
        raise ValueError(f"{name} is larger than its images")
    array = content[name]
    if array.shape != shape or array.dtype != np.uint8:
        raise ValueError(f"{name}: expected uint8 {shape}, got {array.dtype} {array.shape}")
    return torch.from_numpy(array)


def _fingerprint(root: Path, splits: tuple[FileSplit, ...]) -> str:
    """Of names, sizes, times and classes."""
    digest = hashlib.blake2b(digest_size=16)
    for split in splits:
        for file, label in zip(split.files.tolist(), split.labels.tolist(), strict=True):
            try:
                status = (root / file).stat()
            except OSError as error:
                where = root / file
                raise DataError(
                    f"{split.name}: {where} cannot be read ({error.strerror}); unpack the archive again"
                ) from error
            digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0{label}\n".encode())
    return digest.hexdigest()
