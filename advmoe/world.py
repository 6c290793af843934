# SPDX-License-Identifier: Apache-2.0
"""The processes that work together, as torchrun starts them, and what each of them takes and knows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.collectives import all_reduce
from moe_kernels.sync import synchronize_batch_norms

__all__ = ["ALONE", "ProcessLost", "World", "lost"]

# what gloo and nccl say when another process is gone
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed out|broken pipe|remote process|socket", re.IGNORECASE)


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


class ProcessLost(RuntimeError):
    """Another process of the run has ended, and this one cannot go on without it."""


@dataclass(frozen=True)
class World:
    """rank: this process's number of ``size``; norms: the group that BatchNorms reduce in, beside gradients."""

    rank: int = 0
    size: int = 1
    norms: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def part(self, count: int, parts: int = 1) -> Tensor:
        """This process's places among so many samples: its share of each of ``parts`` parts, one after the other.

        Raises:
            ValueError: if they do not divide.
        """
        if count % self.size:
            raise ValueError(f"batch_size: expected a multiple of the {self.size} processes, got {count}")
        if count % (self.size * parts):
            raise ValueError(
                f"accumulate: expected a divisor of the {count // self.size} images of each process, got {parts}"
            )
        return torch.arange(count).view(parts, self.size, -1)[:, self.rank].flatten()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether it is so in any process; all of them must ask."""
        if self.size == 1:
            return flag
        value = torch.tensor(float(flag), device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def summed(self, values: dict[str, float], device: torch.device) -> dict[str, float]:
        """Over all processes; each must have the same keys."""
        if self.size == 1 or not values:
            return values
        total = self.total(torch.tensor(list(values.values()), dtype=torch.float64, device=device))
        return dict(zip(values, total.tolist(), strict=True))

    def total(self, counts: Tensor) -> Tensor:
        """Summed over all processes; all of them must ask."""
        if self.size > 1:
            dist.all_reduce(counts)
        return counts

    def told(self, value: Any = None) -> Any:
        """What the first process has; the others wait for it.

        Raises:
            ProcessLost: if it has ended.
        """
        if self.size == 1:
            return value
        box = [value]
        with self._said("the first"):
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def each(self, value: Any) -> list[Any]:
        """What every process has, in their order; all of them must ask.

        Raises:
            ProcessLost: if one has ended.
        """
        values = [value] * self.size
        if self.size > 1:
            with self._said("another"):
                dist.all_gather_object(values, value)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """In place: of each entry the largest that any process has; all of them must ask.

        Raises:
            ProcessLost: if one has ended.
        """
        if self.size > 1:
            with self._said("another"):
                dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    @contextmanager
    def leading(self) -> Iterator[None]:
        """The first process does it before the others: it may leave something for them."""
        if not self.first:
            self.told()
        yield
        if self.first:
            self.told()

    @contextmanager
    def _said(self, who: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not lost(error):
                raise
            raise ProcessLost(f"{who} of the {self.size} processes has ended") from error

    def gathered(self, rows: Tensor) -> Tensor:
        """``[n, ...]`` of each process to ``[size * n, ...]`` in their order, with gradients; all have as many rows."""
        if self.size == 1:
            return rows
        around = (self.rank * len(rows), (self.size - 1 - self.rank) * len(rows))
        return all_reduce(F.pad(rows, (*[0] * (2 * rows.dim() - 2), *around)), self.norms)

    def prepare(self, model: nn.Module) -> None:
        """Makes the model one of several: its BatchNorms see the batches of all."""
        if self.size > 1:
            synchronize_batch_norms(model, self.norms)


ALONE = World()
