# SPDX-License-Identifier: Apache-2.0
"""Evaluates what a run has left: its model, its data, its radius, and a record of the outcome."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..attacks import PGD, AutoAttack, from_name
from ..config import RunConfig
from ..data import DataSet, load
from ..evaluation import Evaluation, Scrutiny, evaluate, scrutinize, suspect
from ..files import write_text
from ..models import DualModel
from ..profiling import Latency, Profile, measure_latency, profile
from ..sparse import compact, masked_convolutions
from ..world import ALONE, World
from .engine import device_of
from .runs import RunError, load_model

__all__ = ["EvaluatedRun", "Opened", "evaluate_dual", "evaluate_run", "open_source", "write_record"]


@dataclass(frozen=True)
class Opened:
    """A model with the data and radius that go with it.

    Args:
        config: None for a model that is not a run's.
        checkpoint: ``best``, ``last`` or the name of the file.
        folder: the run's; None for a model that is not a run's.
        own: whether the data are the run's own.
    """

    model: nn.Module
    config: RunConfig | None
    data: DataSet
    epsilon: float
    checkpoint: str
    folder: Path | None
    own: bool

    def path(self, stem: str, suffix: str = "") -> Path | None:
        """Where something of this name belongs: ``<stem><suffix>`` in the run's folder, ``<stem>-last`` for another
        checkpoint than the best, ``<stem>-<data>`` for another data set than the run's."""
        if self.folder is None:
            return None
        parts = [stem, *([] if self.checkpoint == "best" else [self.checkpoint]), *([] if self.own else [self.data.name])]
        return self.folder / f"{'-'.join(parts)}{suffix}"


def open_source(
    source: str | Path,
    checkpoint: str = "best",
    data: str | None = None,
    data_dir: str | None = None,
    test_limit: int | None = None,
    epsilon: float | None = None,
    read: Callable[..., DataSet] = load,
) -> Opened:
    """A run folder, a checkpoint or ``module:function``, with its data; what is None is the run's own, and the radius
    that of the data where these are others.

    Args:
        read: what reads data: :func:`advmoe.data.load`, or one that keeps them.

    Raises:
        ValueError: if there is no such run or data (RunError, DataError among them).
    """
    model, config = load_model(source, checkpoint)
    name = data or (config.data.name if config else None)
    if name is None:
        raise RunError("--data is needed for a model that is not a run's")
    own = config is not None and name == config.data.name
    if config is not None and own:
        data_dir = data_dir or config.data.folder
        epsilon = config.attack.epsilon if epsilon is None else epsilon
    if config is not None and test_limit is None:
        test_limit = config.data.test_limit
    images = read(name, data_dir, test_limit=test_limit)
    path, folder = Path(source), None
    if path.exists():
        folder = path if path.is_dir() else path.parent
        checkpoint = checkpoint if path.is_dir() else path.stem
    return Opened(model, config, images, images.epsilon if epsilon is None else epsilon, checkpoint, folder, own)


@dataclass(frozen=True)
class EvaluatedRun:
    """
    Args:
        config: None for a model that is not a run's.
        record: what ``evaluation.json`` says.
        path: where that belongs (:meth:`Opened.path`): ``evaluation.json`` in the run's folder; None for a model that is
            not a run's.
    """

    model: nn.Module
    config: RunConfig | None
    data: DataSet
    result: Evaluation
    scrutiny: Scrutiny | None
    cost: Profile
    latency: list[Latency]
    record: dict[str, Any]
    path: Path | None


def evaluate_dual(
    standard: str | Path,
    robust: str | Path,
    alphas: Sequence[float],
    attacks: Sequence[str],
    on: str = "logits",
    checkpoint: str = "best",
    data_dir: str | None = None,
    limit: int | None = None,
    epsilon: float | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "auto",
    progress: bool = False,
    autoattack_limit: int | None = None,
) -> Iterator[tuple[float, dict[str, Any], Evaluation]]:
    """The Dual-Model of two trained runs: for one alpha after the other a record of it and its evaluation, in which every
    attack is made anew on the Dual-Model as it then is.

    Args:
        standard, robust: run folders or checkpoints of one data set, whose test images and radius (the robust one's) are
            taken.
        limit: the first so many test images; ``autoattack_limit``: of these, for AutoAttack.

    Raises:
        ValueError: if there is no such run or attack, if the two are of other data, or for an alpha outside of [0, 1].
    """
    ours, theirs = (open_source(source, checkpoint, data_dir=data_dir) for source in (standard, robust))
    if ours.data.name != theirs.data.name:
        raise ValueError(f"dual: expected two runs of one data set, got {ours.data.name} and {theirs.data.name}")
    epsilon = theirs.epsilon if epsilon is None else epsilon
    chosen = {attack: from_name(attack, epsilon) for attack in attacks}
    shorter = {n: autoattack_limit for n, a in chosen.items() if isinstance(a, AutoAttack) and autoattack_limit}
    models = [DualModel(ours.model, theirs.model, alpha, on).to(device_of(device)).eval() for alpha in alphas]
    test = theirs.data.test.first(limit)
    for model in models:
        torch.manual_seed(seed)
        result = evaluate(model, test, chosen, batch_size, seed=seed, progress=progress, limits=shorter)
        record = {
            "standard": str(standard),
            "robust": str(robust),
            "checkpoint": checkpoint,
            "on": on,
            "data": theirs.data.name,
            "seed": seed,
            "epsilon": epsilon,
            "torch": torch.__version__,
            "alpha": model.alpha,
            **result.as_dict(),
        }
        yield model.alpha, record, result


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
    autoattack_limit: int | None = None,
    checks: int = 0,
    latency: Sequence[int] = (),
    state: Path | None = None,
    world: World = ALONE,
) -> EvaluatedRun:
    """Evaluates a run folder, a checkpoint or ``module:function`` on the test images.

    Args:
        attacks: names for :func:`advmoe.attacks.from_name`.
        data, data_dir, test_limit, epsilon: the run's own by default, the radius of other data being the data's.
        limit: the first so many test images.
        seed: of the attacks, and of routers that draw: torch's generator is seeded by it.
        autoattack_limit: for AutoAttack fewer images.
        checks: images on which the figure is looked at with suspicion (:func:`advmoe.evaluation.scrutinize`), by the PGD
            on the prediction of most steps, or PGD-50 if there is none of ten or more; 0: not at all.
        latency: batch sizes to time a forward with.
        state: a folder, of what has no run folder, for the file that AutoAttack leaves at work and goes on from.
        world: processes that share the work (:func:`advmoe.evaluation.evaluate`); the first alone times forwards.

    Raises:
        ValueError: if there is no such run, data or attack (RunError, DataError among them).
        NonFiniteGradientError: as :func:`advmoe.evaluation.evaluate`.
    """
    radius_given = epsilon is not None
    with world.leading():
        opened = open_source(source, checkpoint, data, data_dir, test_limit, epsilon)
    model, images, epsilon = opened.model.to(device_of(device)), opened.data, opened.epsilon
    chosen = {attack: from_name(attack, epsilon) for attack in attacks}
    shorter = (
        {} if autoattack_limit is None else {n: autoattack_limit for n, a in chosen.items() if isinstance(a, AutoAttack)}
    )
    test = images.test.first(limit)
    norms = {attack.norm for attack in chosen.values()}
    if len(norms) > 1:
        raise ValueError("attack: expected attacks of one norm, since they share the radius; got L-infinity and L2")
    if "l2" in norms and not radius_given:
        raise ValueError("epsilon: expected one with attacks in L2; the run's and the data's are of L-infinity")
    torch.manual_seed(seed)
    result = evaluate(
        model, test, chosen, batch_size, seed=seed, progress=progress, limits=shorter, state=opened.folder or state,
        world=world,
    )  # fmt: skip
    scrutiny = None
    if checks:
        norm = next(iter(norms), "linf")
        plain = [a for a in chosen.values() if isinstance(a, PGD) and a.against == "prediction" and a.steps >= 10]
        base = max(plain, key=lambda a: a.steps, default=PGD(epsilon, epsilon / 4, 50, norm=norm))
        scrutiny = scrutinize(model, test, base, checks, batch_size, seed, progress, world)
    # a sparse network costs what is left of it
    whole = compact(model, images.image_size) if masked_convolutions(model) else model
    cost = profile(whole, images.image_size)
    timed = latency if world.first else ()
    times = [measure_latency([whole], images.image_size, size, repeats=20)[0] for size in timed]
    record = {
        "checkpoint": opened.checkpoint,
        "data": images.name,
        "seed": seed,
        "epsilon": epsilon,
        "gflops": cost.gflops,
        "pathway_gflops": cost.pathway_gflops,
        "router_gflops": cost.router_gflops,
        "params": cost.params,
        "latency": [dataclasses.asdict(each) for each in times],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        **result.as_dict(),
        "checks": [dataclasses.asdict(each) for each in scrutiny.checks] if scrutiny else [],
        "curve": dataclasses.asdict(scrutiny.curve) if scrutiny else None,
        "suspect": suspect(scrutiny.checks) if scrutiny else [],
    }
    path = opened.path("evaluation", ".json")
    return EvaluatedRun(model, opened.config, images, result, scrutiny, cost, times, record, path)
