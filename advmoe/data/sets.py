# SPDX-License-Identifier: Apache-2.0
"""The data sets: ``digits`` (in scikit-learn, nothing to download) and ``cifar10`` (the official Python batches)."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..registry import Registry
from .batches import stream_generator

__all__ = ["DataError", "DataSet", "Split", "list_data", "load"]


class DataError(ValueError):
    """A data set is missing or damaged; the message says which file, what is wrong and what to do."""


@dataclass(frozen=True)
class Split:
    """images uint8 ``[n, 3, H, W]``, labels int64 ``[n]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Samples by index: images float32 in [0, 1], channels_last, and labels."""
        images = self.images[index].contiguous(memory_format=torch.channels_last)
        return images.float().div_(255), self.labels[index]

    def first(self, limit: int | None) -> Split:
        """The first ``limit`` images; all for None.

        Raises:
            ValueError: if ``limit`` is below 1.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        return self if limit is None else Split(self.images[:limit], self.labels[:limit])


@dataclass(frozen=True)
class DataSet:
    """Three splits, and what training on them usually takes.

    ``validation`` is held out of the training set by the seed. ``epsilon`` and ``step_size`` are the attack's radius and
    training step that go with the data, in units of the pixel range; ``flip``: mirrored images keep their class.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epsilon: float
    step_size: float
    flip: bool
    padding: int  # of the random crop, in pixels


@dataclass(frozen=True)
class _Source:
    """A data set as read, before it is split."""

    train: Split
    test: Split
    num_classes: int
    epsilon: float
    step_size: float
    flip: bool
    padding: int


_SETS: Registry[Callable[[Path | None], _Source]] = Registry("data")


def list_data() -> list[str]:
    return _SETS.names()


def load(
    name: str,
    data_dir: str | Path | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    validation: int = 500,
    seed: int = 0,
) -> DataSet:
    """Reads a data set and sets ``validation`` images of the training set aside (at most a tenth of it).

    Args:
        data_dir: where the files are; not used by ``digits``.
        train_limit, test_limit: use that many images only; the training images are drawn by the seed.
        validation: size of the held-out split.
        seed: of the split.

    Raises:
        ValueError: for an unknown name, or a size that does not fit.
        DataError: if files are missing or damaged.
    """
    source = _SETS[name](None if data_dir is None else Path(data_dir))
    for label, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
        if limit is not None and limit < 1:
            raise ValueError(f"{label}: expected at least 1, got {limit}")
    if validation < 0:
        raise ValueError(f"validation: expected at least 0, got {validation}")
    total = len(source.train)
    order = torch.randperm(total, generator=stream_generator(seed, "split"))
    held_out = min(validation, total // 10)
    available = total - held_out
    if train_limit is not None and train_limit > available:
        raise ValueError(
            f"train_limit: {name} has {available} training images beside {held_out} for validation, got {train_limit}"
        )
    # sorted: memory is then read forwards, and the order of training comes from the batches' own permutations
    train = order[held_out : held_out + (train_limit or available)].sort().values
    images = source.train.images[train]
    mean, std = _mean_and_std(images)
    return DataSet(
        name=name,
        train=Split(images, source.train.labels[train]),
        validation=Split(source.train.images[order[:held_out]], source.train.labels[order[:held_out]]),
        test=source.test.first(test_limit),
        num_classes=source.num_classes,
        image_size=images.shape[-1],
        mean=mean,
        std=std,
        epsilon=source.epsilon,
        step_size=source.step_size,
        flip=source.flip,
        padding=source.padding,
    )


def _mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Of each channel, of pixels in [0, 1], to four digits; a thousand images at a time, as all would be four times the
    data set's memory in floats."""
    total = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for part in images.split(1000):
        pixels = part.double()
        total += torch.stack([pixels.sum((0, 2, 3)), pixels.square_().sum((0, 2, 3))])
    count = images.numel() // images.shape[1]
    mean = total[0] / count
    std = ((total[1] - count * mean.square()) / max(count - 1, 1)).sqrt()
    return tuple(round(v, 4) for v in (mean / 255).tolist()), tuple(round(v, 4) for v in (std / 255).tolist())


@_SETS.register("digits")
def _digits(folder: Path | None) -> _Source:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels, grey in three channels; every fifth is a test image.

    The classes are well apart, so that the radius 8/255 would be no test: epsilon is 0.15.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(np.round(bunch.images * (255 / 16)).astype(np.uint8))[:, None].repeat(1, 3, 1, 1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    is_test = torch.arange(len(labels)) % 5 == 0
    train, test = (Split(images[mask], labels[mask]) for mask in (~is_test, is_test))
    return _Source(train, test, 10, epsilon=0.15, step_size=0.1, flip=False, padding=1)


@_SETS.register("cifar10")
def _cifar10(folder: Path | None) -> _Source:
    """The official Python batches (Krizhevsky 2009) in the folder itself or in its cifar-10-batches-py."""
    what = "the CIFAR-10 python version (cifar-10-python.tar.gz of its web page), unpacked"
    if folder is None:
        raise DataError(f"cifar10: no folder given; pass --data-dir with {what}")
    if (folder / "cifar-10-batches-py").is_dir():
        folder = folder / "cifar-10-batches-py"
    names = [f"data_batch_{i}" for i in range(1, 6)]
    missing = [name for name in [*names, "test_batch"] if not (folder / name).is_file()]
    if missing:
        raise DataError(f"cifar10: {folder} has no {', '.join(missing)}; pass --data-dir with {what}")
    parts = [_cifar_batch(folder / name) for name in names]
    train = Split(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))
    return _Source(train, _cifar_batch(folder / "test_batch"), 10, 8 / 255, 5 / 255, flip=True, padding=4)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits numpy arrays and plain containers: a batch file has no business to name anything else."""

    _ALLOWED = frozenset(
        (module, name)
        for module in ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
        for name in ("_reconstruct", "ndarray", "dtype", "scalar")
    ) | {("_codecs", "encode")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"it wants {module}.{name}, which no batch of images needs")
        return super().find_class(module, name)


def _cifar_batch(path: Path) -> Split:
    fix = "unpack the archive again"
    try:
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"cifar10: {path} cannot be read ({type(error).__name__}: {error}); {fix}") from error
    if not isinstance(content, dict) or b"data" not in content or b"labels" not in content:
        raise DataError(f"cifar10: {path} has no images and labels; {fix}")
    data, labels = content[b"data"], content[b"labels"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 32 * 32:
        raise DataError(f"cifar10: {path} holds no uint8 array [n, 3072]; {fix}")
    if len(labels) != len(data) or not all(isinstance(v, int) and 0 <= v < 10 for v in labels):
        raise DataError(f"cifar10: {path} has not one label in 0 .. 9 for each of its {len(data)} images; {fix}")
    return Split(torch.from_numpy(data.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels, dtype=torch.int64))
