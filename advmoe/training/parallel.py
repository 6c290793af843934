# SPDX-License-Identifier: Apache-2.0
"""Training by several processes, as torchrun starts them: each takes a part of every batch, all have the same weights."""

from __future__ import annotations

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..world import ALONE, ProcessLost, World, lost

__all__ = [
    "ALONE", "ProcessLost", "Reduced", "World", "joined", "lost", "restarted", "resume_command", "sigterm_interrupts",
]  # fmt: skip

# The others wait while the first validates or downloads. That a process is gone shows at once: its connections close, and
# torchrun ends the rest.
_PATIENCE = timedelta(days=1)


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
        store, rank, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
        # behind a restart torchrun's store may still have the addresses of processes that are gone (its default, a static
        # rendezvous, keeps it): new ones would wait for those
        store = dist.PrefixStore(f"restart {_restarts()}", store)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
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


def restarted() -> bool:
    """Whether torchrun has started these processes anew with their command, after one was lost (``--max-restarts``)."""
    return _restarts() > 0


def _restarts() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def resume_command(folder: object) -> str:
    """What goes on with a run in as many processes as there are now."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return f"{'advmoe' if alone else 'torchrun … -m advmoe'} train --resume {folder}"


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
