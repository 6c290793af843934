# SPDX-License-Identifier: Apache-2.0
"""Evaluates what a run has left: its model, its data, its radius, and a record of the outcome."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks import from_name
from ..config import RunConfig, write_text
from ..data import DataSet, load
from ..evaluation import Evaluation, evaluate
from ..profiling import Profile, profile
from ..sparse import compact, masked_convolutions
from .engine import device_of
from .runs import RunError, load_model

__all__ = ["EvaluatedRun", "evaluate_run", "write_record"]


@dataclass(frozen=True)
class EvaluatedRun:
    """
    Args:
        config: None for a model that is not a run's.
        record: what ``evaluation.json`` says.
        path: where that belongs: ``evaluation.json`` in the run's folder, ``evaluation-last.json`` for another
            checkpoint than the best, ``evaluation-<data>.json`` for another data set than the run's; None for a model
            that is not a run's.
    """

    model: nn.Module
    config: RunConfig | None
    data: DataSet
    result: Evaluation
    cost: Profile
    record: dict[str, Any]
    path: Path | None


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes an evaluation's file."""
    write_text(path, json.dumps(record, indent=1) + "\n")


def evaluate_run(
    source: str | Path,
    attacks: Sequence[str],
    checkpoint: str = "best",
    data: str | None = None,
    data_dir: str | None = None,
    test_limit: int | None = None,
    limit: int | None = None,
    epsilon: float | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
) -> EvaluatedRun:
    """Evaluates a run folder, a checkpoint or ``module:function`` on the test images.

    Args:
        attacks: names for :func:`advmoe.attacks.from_name`.
        data, data_dir, test_limit, epsilon: the run's own by default, the radius of other data being the data's.
        limit: the first so many test images.
        seed: of the attacks, and of routers that draw: torch's generator is seeded by it.

    Raises:
        ValueError: if there is no such run, data or attack (RunError, DataError among them).
        NonFiniteGradientError: as :func:`advmoe.evaluation.evaluate`.
    """
    model, config = load_model(source, checkpoint)
    name = data or (config.data.name if config else None)
    if name is None:
        raise RunError("evaluate: --data is needed for a model that is not a run's")
    own = config is not None and name == config.data.name
    if config is not None and own:
        data_dir = data_dir or config.data.folder
        epsilon = config.attack.epsilon if epsilon is None else epsilon
    if config is not None and test_limit is None:
        test_limit = config.data.test_limit
    images = load(name, data_dir, test_limit=test_limit)
    epsilon = images.epsilon if epsilon is None else epsilon
    model = model.to(device_of(device))
    chosen = {attack: from_name(attack, epsilon) for attack in attacks}
    torch.manual_seed(seed)
    result = evaluate(model, images.test.first(limit), chosen, batch_size, seed=seed, progress=progress)
    # a sparse network costs what is left of it
    whole = compact(model, images.image_size) if masked_convolutions(model) else model
    cost = profile(whole, images.image_size)
    path = None
    if Path(source).exists():
        folder = Path(source) if Path(source).is_dir() else Path(source).parent
        checkpoint = checkpoint if Path(source).is_dir() else Path(source).stem
        parts = ["evaluation", *([] if checkpoint == "best" else [checkpoint]), *([] if own else [name])]
        path = folder / f"{'-'.join(parts)}.json"
    record = {
        "checkpoint": checkpoint,
        "data": name,
        "seed": seed,
        "epsilon": epsilon,
        "gflops": cost.gflops,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        **result.as_dict(),
    }
    return EvaluatedRun(model, config, images, result, cost, record, path)
