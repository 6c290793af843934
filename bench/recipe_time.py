# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.recipe_time``: how long recipes take on this machine, without running them whole.

An epoch of each phase is trained (AT (Sparse) has three, a MoE whose experts are first shared two) and the result is
evaluated as the recipe says; a row's time is each phase's epoch times their number, and the evaluation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from advmoe.config import RunConfig
from advmoe.recipes import SCALES, Catalog, EvaluationSettings, Plan, Sweep, SweepOptions
from advmoe.tables import table
from advmoe.training import train
from advmoe.training.engine import load_data, resolve
from advmoe.training.evaluation import evaluate_run

from .machine import describe


@dataclass(frozen=True)
class RowTime:
    """Seconds. ``around``: what an epoch takes besides its steps: validation, checkpoints, and its share of the start,
    which a longer run has only once; ``epochs``: of each phase."""

    recipe: str
    epochs: tuple[int, ...]
    phases: tuple[float, ...]
    around: float
    evaluation: float

    @property
    def total(self) -> float:
        return sum(n * (s + self.around) for n, s in zip(self.epochs, self.phases, strict=True)) + self.evaluation


def shortened(config: RunConfig) -> tuple[RunConfig, tuple[int, ...]]:
    """The resolved config with one epoch for each phase, and how many epochs each phase has in it."""
    m, shared = config.method, config.routing.share_epochs or 0
    before: tuple[int, ...] = (m.pretrain_epochs, m.mask_epochs) if m.name == "at_sparse" else (shared,)
    epochs = tuple(n for n in (*before, config.epochs - sum(before)) if n)
    method = dataclasses.replace(m, pretrain_epochs=min(m.pretrain_epochs, 1), mask_epochs=min(m.mask_epochs, 1))
    routing = dataclasses.replace(config.routing, share_epochs=min(shared, 1))
    return dataclasses.replace(config, method=method, routing=routing, epochs=len(epochs)), epochs


def in_order(catalog: Catalog, names: Sequence[str], scale: str) -> list[Plan]:
    """These recipes, each behind the one whose weights it begins with."""
    plans: dict[str, Plan] = {}

    def add(name: str) -> None:
        plan = catalog.plan(name, scale)
        if name not in plans:
            if plan.config.init is not None:
                add(plan.config.init)
            plans[name] = plan

    for name in names:
        add(name)
    return list(plans.values())


def measure(name: str, config: RunConfig, evaluation: EvaluationSettings, folder: Path) -> RowTime:
    short, epochs = shortened(resolve(config, load_data(config)))
    start = time.perf_counter()
    run = train(short, folder, quiet=True)
    trained = time.perf_counter()
    e = evaluation
    evaluate_run(folder, [e.attack], limit=e.limit, epsilon=e.epsilon, seed=config.seed, checks=e.checks)
    evaluated = time.perf_counter() - trained
    phases = tuple(line["seconds"] for line in run.metrics())
    around = (trained - start - sum(phases)) / len(phases)
    return RowTime(name, epochs, phases, around, evaluated)


def row(t: RowTime) -> list[str]:
    phases = ", ".join(f"{n} x {s:.0f} s" for n, s in zip(t.epochs, t.phases, strict=True))
    return [t.recipe, phases, f"{t.around:.0f} s", f"{t.evaluation:.0f} s", f"{t.total / 60:.0f} min"]


def keep(file: Path, t: RowTime, scale: str, machine: dict[str, Any]) -> None:
    record = json.loads(file.read_text()) if file.exists() else {}
    record[t.recipe] = {**dataclasses.asdict(t), "scale": scale, "machine": machine}
    file.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "recipe", nargs="+", help="as of advmoe reproduce; one that begins with another's weights is timed behind that"
    )
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="a file of times: read, these added, and written")
    o = parser.parse_args()
    catalog = Catalog()
    recipes = [recipe for name in o.recipe for recipe in catalog.select(name)]
    times: list[RowTime] = []
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    machine = describe()
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(catalog, o.scale, SweepOptions(Path(folder), o.data_dir, o.threads))
        for plan in in_order(catalog, [recipe.name for recipe in recipes], o.scale):
            name = plan.recipe.name
            times.append(measure(name, sweep.config(plan, 0), plan.evaluation, sweep.folder(name, 0)))
            print(" | ".join(row(times[-1])), flush=True)
            if o.json is not None:
                keep(o.json, times[-1], o.scale, machine)
    print("\n" + table(["recipe", "epochs", "around each", "evaluation", "row"], [row(t) for t in times]))
    print(f"\n{o.scale} scale, {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")


if __name__ == "__main__":
    main()
