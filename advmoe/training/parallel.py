# SPDX-License-Identifier: Apache-2.0
"""Training by several processes, as torchrun starts them: each takes a part of every batch, all have the same weights."""

from __future__ import annotations

import logging
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from moe_kernels.collectives import all_reduce
from moe_kernels.sync import synchronize_batch_norms

__all__ = ["ALONE", "ProcessLost", "Reduced", "World", "joined", "lost", "resume_command", "sigterm_interrupts"]

# what gloo and nccl say when another process is gone
_LOST = re.compile(r"gloo|nccl|connection (closed|reset)|timed out|broken pipe|remote process|socket", re.IGNORECASE)


# The others wait while the first validates or downloads. That a process is gone shows at once: its connections close, and
# torchrun ends the rest.
_PATIENCE = timedelta(days=1)


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
        try:
            dist.broadcast_object_list(box, src=0)
        except RuntimeError as error:
            if not lost(error):
                raise
            raise ProcessLost(f"the first of the {self.size} processes has ended") from error
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
def joined(device: str = "auto") -> Iterator[World]:
    """The processes that torchrun has started, with gloo or, on CUDA devices, nccl; alone without it.

    Args:
        device: what they train on, as a run's config has it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    own = not dist.is_initialized()
    if own:
        cuda = torch.cuda.is_available() and not device.startswith("cpu")
        if cuda:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if cuda else "gloo", timeout=_PATIENCE)
    logger = logging.getLogger("advmoe")
    level = logger.level
    if dist.get_rank():  # the first reports for all
        logger.setLevel(logging.ERROR)
    try:
        with sigterm_interrupts():
            yield World(dist.get_rank(), dist.get_world_size(), dist.new_group(timeout=_PATIENCE))
    finally:
        logger.setLevel(level)
        if own:
            dist.destroy_process_group()


@contextmanager
def sigterm_interrupts(several: bool = True) -> Iterator[None]:
    """Takes SIGTERM, by which schedulers end a process, for a Ctrl-C.

    Args:
        several: torchrun ends its processes so when one is lost. Behind an error it is ignored: the process ends by
            itself, and says why first.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    try:
        if before is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread: whoever runs us handles signals
        before = signal.SIG_IGN
    if before is signal.SIG_IGN:
        yield
        return
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if several else before)
        raise
    signal.signal(signal.SIGTERM, before)


def resume_command(folder: object) -> str:
    """What goes on with a run in as many processes as there are now."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return f"{'advmoe' if alone else 'torchrun … -m advmoe'} train --resume {folder}"


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
