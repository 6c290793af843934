# SPDX-License-Identifier: Apache-2.0
"""Makes the step again that has stopped a run, and says whether it fails in the same way."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig, read_room
from ..registry import shown
from .engine import Trainer, load_data, restore, without_sources
from .faults import Attempt, attempt
from .runs import Run, RunError, load_checkpoint, require_kinds, require_own_code

__all__ = ["Replay", "replay"]


@dataclass(frozen=True)
class Replay:
    """fault: what the run kept; now: the step as it went this time; differences: what is not as it was."""

    fault: dict[str, Any]
    now: Attempt
    differences: list[str]

    @property
    def reproduced(self) -> bool:
        return not self.differences


def replay(folder: str | Path, data_dir: str | None = None) -> Replay:
    """Makes the one step that has stopped the run, from the state before it; nothing is written.

    Args:
        data_dir: where the data is now, if not where it was.

    Raises:
        RunError: if no step is kept there, or if it cannot be read. ValueError for data that are not there.
    """
    run = Run(folder)
    if not run.fault_path.is_file():
        raise RunError(f"{run.fault_path}: there is no such file: the run kept no step that had failed")
    fault = load_checkpoint(run.fault_path)
    for name, (what, fits) in _KEPT.items():
        if name not in fault or not fits(fault[name]):
            raise RunError(f"{run.fault_path}: {name}: expected {what}, got {shown(fault.get(name))}")
    config = read_room(RunConfig, fault["config"], f"{run.fault_path}: config")
    state, threads = fault["state"], fault["threads"]
    require_kinds(state, run.fault_path)
    if data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, folder=data_dir))
    require_own_code(without_sources(config), run.fault_path)
    torch.set_num_threads(threads)
    trainer = Trainer(without_sources(config), run, load_data(config), quiet=True)
    try:
        restore(trainer, copy.deepcopy(state), run.fault_path)
        now = attempt(trainer, state)
    finally:
        for batches in trainer.batches:
            batches.close()
    return Replay(fault, now, list(_differences(fault, now, trainer.device.type)))


def _text(value: Any) -> bool:
    """A line or more that a terminal may be shown."""
    return isinstance(value, str) and all(c.isprintable() or c == "\n" for c in value)


def _numbers(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64 and value.dim() == 1


_KEPT: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "config": ("a mapping", lambda v: isinstance(v, dict)),
    "state": ("a checkpoint", lambda v: isinstance(v, dict) and "epoch" in v and "step" in v),
    "threads": ("a number from 1 to 1024", lambda v: type(v) is int and 1 <= v <= 1024),
    "processes": ("a number", lambda v: type(v) is int),
    "message": ("text", _text),
    "error": ("text", _text),
    "where": ("text or none", lambda v: v is None or _text(v)),
    "device": ("text", _text),
    "torch": ("text", _text),
    "indices": ("lists of numbers", lambda v: isinstance(v, list) and all(map(_numbers, v))),
}


def _differences(fault: dict[str, Any], now: Attempt, device: str) -> list[str]:
    found = []
    error, where = type(now.error).__name__ if now.error else None, fault["where"]
    if error is None:
        found.append("the step went through, with a finite loss and finite gradients")
    elif error != fault["error"]:
        found.append(f"it ended with another error: {now.error} ({error}, and {fault['error']} then)")
    if error is not None and where is not None and now.where != where:
        found.append(f"the first value that is not finite is in another place: {now.where}, and {where} then")
    if not found:
        return []
    # what may have made the difference
    if not all(torch.equal(a, b) for a, b in zip(now.indices, fault["indices"], strict=True)):
        found.append("the batch has other images: the data's order is another")
    elif fault["digests"] and now.digests != fault["digests"]:
        found.append("the images of these numbers are others than they were")
    if device != fault["device"]:
        found.append(f"it runs on {device}, and did on {fault['device']}")
    if torch.__version__ != fault["torch"]:
        found.append(f"torch is {torch.__version__}, and was {fault['torch']}")
    if fault["processes"] > 1:
        found.append(f"it was made by {fault['processes']} processes")
    return found
