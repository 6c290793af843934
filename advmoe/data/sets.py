# SPDX-License-Identifier: Apache-2.0
"""What a data set is: splits of images, how each goes into training, and the registry that reads them by name."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..registry import Registry
from .augment import augment
from .batches import stream_generator

__all__ = ["DATA", "DataError", "DataSet", "Source", "Split", "TensorSplit", "list_data", "load"]


class DataError(ValueError):
    """A data set is missing or damaged; the message says which file, what is wrong and what to do."""


class Split(ABC):
    """Images with labels int64 ``[n]``, in memory or in files."""

    labels: Tensor
    workers = 0  # processes that make batches ahead of time, where nobody says how many

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batch(
        self, index: Tensor, generator: torch.Generator | None = None, part: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """Samples by index: images float32 ``[B, 3, S, S]`` in [0, 1], channels_last, and labels.

        Args:
            generator: draws how each image is moved and mirrored; None: as they are.
            part: give these of the index alone; the generator draws for all.
        """

    @abstractmethod
    def select(self, index: Tensor | slice) -> Split:
        """The samples of this index, as a split."""

    def augmented(self, shift: int | None, cutout: int, fill: tuple[float, ...], jitter: float = 0.0) -> Split:
        """The split of which a drawn image is moved by up to ``shift`` pixels (None: as it is), has its colours changed
        by a :func:`color_jitter` of strength ``jitter`` and a square of ``cutout`` pixels' side filled.

        Raises:
            ValueError: if it is one that does not do so.
        """
        if shift is None and not cutout and not jitter:
            return self
        name = "cutout" if cutout else "shift" if shift is not None else "color_jitter"
        raise ValueError(
            f"{name}: of images in memory; {type(self).__name__} reads files, of which a random square is cut"
        )

    def first(self, limit: int | None) -> Split:
        """The first ``limit`` images; all for None.

        Raises:
            ValueError: if ``limit`` is below 1.
        """
        if limit is not None and limit < 1:
            raise ValueError(f"limit: expected at least 1, got {limit}")
        return self if limit is None else self.select(slice(limit))


@dataclass(frozen=True)
class TensorSplit(Split):
    """images uint8 ``[n, 3, S, S]``, labels int64 ``[n]``; ``padding``: of the random crop, in pixels; ``flip``: mirrored
    images keep their class; ``cutout``: side of the square that becomes ``fill``; ``jitter``: strength of the change of
    colours (:func:`advmoe.data.augment`)."""

    images: Tensor
    labels: Tensor
    padding: int = 0
    flip: bool = False
    cutout: int = 0
    fill: tuple[float, ...] = (0.0, 0.0, 0.0)
    jitter: float = 0.0

    def batch(
        self, index: Tensor, generator: torch.Generator | None = None, part: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        images = self.images[index[part]].contiguous(memory_format=torch.channels_last).float().div_(255)
        if generator is not None:
            images = augment(
                images, generator, self.padding, self.flip, part, len(index), self.cutout, self.fill, self.jitter
            )
        return images, self.labels[index[part]]

    def select(self, index: Tensor | slice) -> TensorSplit:
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])

    def augmented(self, shift: int | None, cutout: int, fill: tuple[float, ...], jitter: float = 0.0) -> TensorSplit:
        if cutout > self.images.shape[-1]:
            raise ValueError(f"cutout: expected at most the images' {self.images.shape[-1]} pixels, got {cutout}")
        padding = self.padding if shift is None else shift
        return dataclasses.replace(self, padding=padding, cutout=cutout, fill=fill, jitter=jitter)


@dataclass(frozen=True)
class DataSet:
    """Three splits, and what training on them usually takes.

    ``validation`` is held out of the training set by the seed. ``epsilon`` and ``step_size`` are the attack's radius and
    training step that go with the data, in units of the pixel range; ``mean`` and ``std`` of each channel.
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


@dataclass(frozen=True)
class Source:
    """A data set as read, before it is split. ``mean`` and ``std``: where they are not to be taken from the images."""

    train: Split
    test: Split
    num_classes: int
    image_size: int
    epsilon: float
    step_size: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


DATA: Registry[Callable[[Path | None], Source]] = Registry("data")


def list_data() -> list[str]:
    return DATA.names()


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
    source = DATA[name](None if data_dir is None else Path(data_dir))
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
    train = source.train.select(order[held_out : held_out + (train_limit or available)].sort().values)
    mean, std = source.mean, source.std
    if mean is None or std is None:
        if not isinstance(train, TensorSplit):
            raise ValueError(f"data: {name} is not in memory, and says no mean and std")
        mean, std = _mean_and_std(train.images)
    return DataSet(
        name=name,
        train=train,
        validation=source.train.select(order[:held_out]),
        test=source.test.first(test_limit),
        num_classes=source.num_classes,
        image_size=source.image_size,
        mean=mean,
        std=std,
        epsilon=source.epsilon,
        step_size=source.step_size,
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
