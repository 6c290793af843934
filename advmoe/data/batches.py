# SPDX-License-Identifier: Apache-2.0
"""Shuffled batches whose position is two numbers."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Batches", "stream_generator"]


def stream_generator(*key: int | str) -> torch.Generator:
    """A generator seeded by a key, such as (seed, "attack", step).

    Each random thing of a run has a stream of its own, a pure function of the seed and of where the run is: to resume,
    nothing but the position has to be stored, and one more draw in one place changes no other.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Batches:
    """An endless sequence of index batches, shuffled anew each epoch; the last, smaller batch of an epoch is dropped.

    Two of them with different names are independent, as AdvMoE's two levels want.

    Raises:
        ValueError: if there are fewer samples than a batch has.
    """

    def __init__(self, count: int, batch_size: int, seed: int, name: str) -> None:
        if count < batch_size:
            raise ValueError(f"batch_size: expected at most the {count} training images, got {batch_size}")
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.name = name
        self.epoch = 0
        self.index = 0
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Batches an epoch."""
        return self.count // self.batch_size

    def next(self) -> tuple[Tensor, torch.Generator]:
        """The next batch's indices ``[batch_size]``, and a generator for its augmentation."""
        position = self.epoch, self.index
        self.advance()
        return self.indices(*position), stream_generator(*self.key(*position))

    def indices(self, epoch: int, index: int) -> Tensor:
        """The samples ``[batch_size]`` of a place."""
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(self.count, generator=stream_generator(self.seed, self.name, epoch))
            self._order = (epoch, order)
        start = index * self.batch_size
        return self._order[1][start : start + self.batch_size]

    def key(self, epoch: int, index: int) -> tuple[int | str, ...]:
        """Of the generator that draws how a place's images are moved and mirrored."""
        return self.seed, self.name, epoch, index

    def positions(self) -> Iterator[tuple[int, int]]:
        """The places from here on, without end; going through them moves nothing."""
        first = self.index
        for epoch in itertools.count(self.epoch):
            for index in range(first, len(self)):
                yield epoch, index
            first = 0

    def advance(self) -> None:
        self.index += 1
        if self.index == len(self):
            self.epoch, self.index = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        place = state["epoch"], state["index"]
        if not all(type(each) is int and each >= 0 for each in place) or place[1] >= len(self):
            raise ValueError(f"batches: expected an epoch and a batch of its {len(self)}, got {place}")
        self.epoch, self.index = place
