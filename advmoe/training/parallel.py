# SPDX-License-Identifier: Apache-2.0
"""Training by several processes, as torchrun starts them: each takes a part of every batch, all have the same weights."""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_kernels.collectives import all_reduce
from moe_kernels.sync import synchronize_batch_norms

__all__ = ["ALONE", "ProcessLost", "Reduced", "World", "joined", "lost"]

# what gloo and nccl say when another process is gone
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed out|broken pipe|remote process|socket", re.IGNORECASE)


class ProcessLost(RuntimeError):
    """Another process of the run has ended, and this one cannot go on without it."""


@dataclass(frozen=True)
class World:
    """rank: this process's number of ``size``; norms: the group that BatchNorms reduce in, beside gradients."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    norms: Any = None

    @property
    def first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def part(self, count: int) -> slice:
        """This process's part of so many samples.

        Raises:
            ValueError: if they do not divide.
        """
        each, rest = divmod(count, self.size)
        if rest:
            raise ValueError(f"batch_size: expected a multiple of the {self.size} processes, got {count}")
        return slice(self.rank * each, (self.rank + 1) * each)

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
        total = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return dict(zip(values, total.tolist(), strict=True))

    def told(self, value: Any) -> Any:
        """What the first process has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

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


@contextmanager
def joined(timeout: timedelta = timedelta(minutes=10)) -> Iterator[World]:
    """The processes that torchrun has started, with gloo or, where torch sees CUDA, nccl; alone without it.

    Args:
        timeout: after which a process that does not answer is lost.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or dist.is_initialized():
        yield ALONE
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timeout)
    if dist.get_rank():  # the first reports for all
        logging.getLogger("advmoe").setLevel(logging.ERROR)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), local_rank, dist.new_group(timeout=timeout))
    finally:
        dist.destroy_process_group()


def lost(error: BaseException) -> bool:
    """Whether an error says that another process is gone."""
    return isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))


class _Through(nn.Module):
    """Calls what it is given, so that DistributedDataParallel sees one forward where a step has several."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        return compute()


class Reduced:
    """Gradients of some parameters, averaged over the processes by DistributedDataParallel.

    Each set of parameters that is trained by itself (AdvMoE's routers and its backbone, the phases of a sparse network)
    has a reducer of its own, made when it first trains: it is about those that want a gradient then.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model = model
        self.world = world
        self._reducers: dict[tuple[int, ...], DistributedDataParallel] = {}

    def __call__(self, compute: Callable[[], Any], last: bool = True) -> Any:
        """``compute()``, whose backward averages; ``last=False``: later ones of the same step do."""
        if self.world.size == 1:
            return compute()
        wanted = tuple(id(p) for p in self.model.parameters() if p.requires_grad)
        if wanted not in self._reducers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has another name, 2.11 has not
                self._reducers[wanted] = DistributedDataParallel(
                    _Through(self.model),
                    # what a step leaves out, such as an expert, has no gradient anywhere, or in some processes only
                    find_unused_parameters=True,
                    broadcast_buffers=False,
                )
        reducer = self._reducers[wanted]
        reducer.require_backward_grad_sync = last
        return reducer(compute)
