# SPDX-License-Identifier: Apache-2.0
"""Batches made ahead of time by other processes, in an order that does not depend on them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .batches import Batches, stream_generator
from .files import FileSplit
from .sets import DataError, Split

__all__ = ["BatchStream", "batches_in_order", "decoded"]

Request = tuple[Tensor, tuple[int | str, ...] | None]
_AHEAD = 4  # batches that each process makes ahead


class BatchStream:
    """A split's batches in an order, from where the order is; the order moves when a batch is taken, not when it is made.

    Args:
        order: whose position is the stream's.
        augment: move and mirror the images, as a function of the batch's place in the order.
        workers: processes that make batches ahead; 0: each is made when it is asked for.
        pin: in page-locked memory, from which a GPU copies while it computes.
        part: of each batch, where several processes share it.
    """

    def __init__(
        self,
        split: Split,
        order: Batches,
        augment: bool,
        workers: int = 0,
        pin: bool = False,
        part: Tensor | slice = slice(None),
    ) -> None:
        self.split, self.order, self.augment = split, order, augment
        self.workers, self.pin, self.part = workers, pin, part
        self._batches: Iterator[tuple[Tensor, Tensor]] | None = None

    def next(self) -> tuple[Tensor, Tensor]:
        """Images float32 ``[B, 3, S, S]`` in [0, 1] and labels.

        Raises:
            DataError: if a file is damaged.
        """
        if self._batches is None:
            self._batches = _made(self.split, self._requests(), self.workers, self.pin, self.part)
        try:
            batch = next(self._batches)
        except DataError:
            self.close()  # nothing comes behind it
            raise
        self.order.advance()
        return batch

    def _requests(self) -> Iterator[Request]:
        for epoch, index in self.order.positions():
            yield self.order.indices(epoch, index), self.order.key(epoch, index) if self.augment else None

    def state_dict(self) -> dict[str, int]:
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to another place; what was made ahead is dropped."""
        self.order.load_state_dict(state)
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        self._batches = None


def batches_in_order(
    split: Split, batch_size: int, workers: int | None = None, pin: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """All samples as they are, one batch after the other; the last may be smaller.

    Args:
        workers: processes that make batches ahead; the split's own choice by default.

    Raises:
        DataError: if a file is damaged.
    """
    parts = torch.arange(len(split)).split(batch_size) if len(split) else ()  # of no samples torch makes one part
    return _made(split, ((part, None) for part in parts), split.workers if workers is None else workers, pin)


def decoded(split: FileSplit, workers: int | None = None) -> Tensor:
    """All images, uint8 ``[n, S, S, 3]``.

    Raises:
        DataError: if a file is damaged.
    """
    parts = torch.arange(len(split)).split(256)
    workers = split.workers if workers is None else workers
    out = torch.empty((len(split), split.size, split.size, 3), dtype=torch.uint8)
    made = _each(split.pixels, parts, workers if len(parts) > 4 else 0, False)
    bar = tqdm(zip(parts, made, strict=True), total=len(parts), desc=f"decode {split.name}", disable=None, leave=False)
    for part, pixels in bar:
        out[part[0] : part[0] + len(part)] = pixels
    return out


def _made(
    split: Split, requests: Iterable[Request], workers: int, pin: bool, part: Tensor | slice = slice(None)
) -> Iterator[tuple[Tensor, Tensor]]:
    def make(request: Request) -> tuple[Tensor, Tensor]:
        index, key = request
        return split.batch(index, None if key is None else stream_generator(*key), part)

    return _each(make, requests, workers, pin)


class _Made(Dataset):
    """What a function makes of the requests that a DataLoader's sampler gives it."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __getitem__(self, request: Any) -> Any:
        try:
            return self.function(request)
        except DataError as error:  # raised in a worker it would come with the worker's traceback as its message
            return error


def _each(function: Callable[[Any], Any], requests: Iterable[Any], workers: int, pin: bool) -> Iterator[Any]:
    """What ``function`` makes of each request, in their order."""
    loader = DataLoader(
        _Made(function),
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        pin_memory=pin,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # of seeds for its processes, which need none; torch's own is the run's
        multiprocessing_context="fork" if workers else None,  # the function need not be pickled
    )
    for made in loader:
        if isinstance(made, DataError):
            raise made
        yield made


def _leave_signals(worker: int) -> None:
    """The process that trains decides what Ctrl-C ends, and SIGTERM, which a scheduler sends to all of them. A second one
    ends the worker: so the process that trains does, where it does not end otherwise."""

    def first(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, first)
