# SPDX-License-Identifier: Apache-2.0
"""A run's metrics as TensorBoard's scalars, in the folder ``tensorboard`` of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Board", "require", "writing"]

# of metrics.jsonl; a loss goes by its name's end, and what is missing here (epoch, seconds, expert_usage) is no curve
_GROUPS = {
    "train_sa": "accuracy",
    "train_ra": "accuracy",
    "validation_sa": "accuracy",
    "validation_ra": "accuracy",
    "zero_gradient": "attack",
    "flip_rate": "routing",
    "images_per_second": "speed",
}


def require() -> type[SummaryWriter]:
    """The writer's class.

    Raises:
        ValueError: if the package tensorboard cannot be imported.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"tensorboard: expected the package tensorboard 1.15 or later, got {error}; pip install tensorboard"
        ) from error
    return SummaryWriter


class Board:
    """Points of each epoch; the epoch's number, from 1 on, is their step."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    def add(self, line: Mapping[str, Any], rates: Mapping[str, float]) -> None:
        """The epoch's line of metrics.jsonl, and the learning rate of each optimizer in its last step."""
        for tag, value in (*_scalars(line), *((f"learning_rate/{name}", rate) for name, rate in rates.items())):
            self._writer.add_scalar(tag, value, line["epoch"])
        self._writer.flush()  # whoever watches sees it now, and a process that is killed leaves it


@contextmanager
def writing(folder: Path, done: int) -> Iterator[Board]:
    """A board for the epochs behind the first ``done``. Points of later ones that are there already, written behind the
    checkpoint that the run is resumed from, are hidden."""
    with require()(str(folder), purge_step=done + 1) as writer:
        yield Board(writer)


def _scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if name == "router_entropy":
            yield from ((f"{name}/{layer}", entropy) for layer, entropy in value.items())
        elif value is not None and (name in _GROUPS or name.endswith("loss")):
            yield f"{_GROUPS.get(name, 'loss')}/{name}", value
