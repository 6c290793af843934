# SPDX-License-Identifier: Apache-2.0
"""Runs recipes: skips what is done, resumes what was interrupted, trains and evaluates the rest."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..registry import shown
from ..training import Run, RunError, load_checkpoint, resume, train
from ..training.evaluation import evaluate_run, write_record
from .catalog import Catalog, Plan

__all__ = ["Outcome", "Sweep", "SweepOptions", "differences", "plain"]

# what a run takes from its data and machine where the recipe leaves it open
_OPEN = (
    "model.num_classes", "model.image_size", "model.mean", "model.std", "model.router", "model.gate", "attack.loss",
    "routing.share_epochs",
)  # fmt: skip
# where things lie, what computes them and what is written besides
_PLACE = ("data.folder", "data.workers", "threads", "device", "tensorboard")


@dataclass(frozen=True)
class SweepOptions:
    """out: folder of all runs; download: fetch data into ``data_dir``; the rest goes into every run's config."""

    out: Path
    data_dir: str | None = None
    threads: int | None = None
    device: str = "auto"
    download: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a recipe and seed: ``done``, ``skipped`` (it was done already) or ``failed``."""

    plan: Plan
    seed: int
    state: str
    error: Exception | None = None


@dataclass
class Sweep:
    """Recipes of one scale in one folder: ``out/<scale>/<recipe>/seed<n>`` holds a run and its ``evaluation.json``. A
    recipe that shares another's run has an evaluation alone, or nothing at all where that is shared too.

    Args:
        faults: what one recipe may fail with while the others go on.
        threads: where the options leave them open.
    """

    catalog: Catalog
    scale: str
    options: SweepOptions
    faults: tuple[type[Exception], ...] = (ValueError,)
    threads: int = field(default_factory=torch.get_num_threads)
    _failed: dict[tuple[str, int], Exception] = field(default_factory=dict)

    def folder(self, name: str, seed: int) -> Path:
        return self.options.out / self.scale / name / f"seed{seed}"

    def config(self, plan: Plan, seed: int) -> RunConfig:
        """The plan's with its seed and its places."""
        o, c = self.options, plan.config
        return dataclasses.replace(
            c,
            data=dataclasses.replace(c.data, folder=o.data_dir),
            init=None if c.init is None else str(self.folder(c.init, seed)),
            seed=seed,
            device=o.device,
            threads=o.threads,
        )

    def run(self, plans: Sequence[Plan], seeds: Sequence[int]) -> Iterator[Outcome]:
        """One recipe and seed after the other.

        Raises:
            Interrupted, KeyboardInterrupt: at Ctrl-C; the same sweep goes on from there.
        """
        for plan in plans:
            for seed in seeds:
                yield self._outcome(plan, seed)

    def record(self, plan: Plan, seed: int) -> dict[str, Any] | None:
        """The recipe's evaluation, if it is there.

        Raises:
            RunError: if it was made with other settings.
        """
        path = self.folder(plan.source, seed) / "evaluation.json"
        if not path.is_file():
            return None
        try:
            record = json.loads(path.read_text(errors="replace"))
        except (ValueError, RecursionError) as error:
            raise RunError(f"{path} cannot be read: {error}; remove it to evaluate anew") from error
        if not isinstance(record, dict):
            raise RunError(f"{path}: expected an evaluation, got {shown(record)}; remove it to evaluate anew")
        if "recipe" not in record:  # made by `advmoe evaluate`, as its user liked
            return None
        wanted = self._wanted(plan, seed)
        found = {key: record.get(key) for key in wanted}
        self._require_equal(found, wanted, path.parent)
        return record

    def _outcome(self, plan: Plan, seed: int) -> Outcome:
        try:
            if self.record(plan, seed) is not None:
                return Outcome(plan, seed, "skipped")
            self._trained(self.catalog.plan(plan.run, self.scale), seed)
            with Run(self.folder(plan.source, seed)).locked(new=True):  # another sweep might be at it
                self._evaluate(plan, seed)
        except self.faults as error:
            return Outcome(plan, seed, "failed", error)
        return Outcome(plan, seed, "done")

    def _trained(self, plan: Plan, seed: int) -> None:
        """Sees to it that the run is there and at its end."""
        key = plan.run, seed
        if key in self._failed:
            raise self._failed[key]
        try:
            run, config = Run(self.folder(plan.run, seed)), self.config(plan, seed)
            if run.config_path.exists():
                found = run.config()
                self._require_equal(_flat(found), _flat(config), run.folder)
                if _complete(run, found):
                    return
            if plan.config.init is not None:
                self._trained(self.catalog.plan(plan.config.init, self.scale), seed)
            if run.config_path.exists():
                print(f"resuming {run.folder} with its own threads and device", flush=True)
                resume(run.folder, data_dir=self.options.data_dir)
            else:
                print(f"training {run.folder}", flush=True)
                self._set_threads()
                train(config, run.folder)
        except BrokenPipeError:  # nobody reads what is printed: no fault of the run
            raise
        except self.faults as error:
            self._failed[key] = error
            raise

    def _evaluate(self, plan: Plan, seed: int) -> None:
        e = plan.evaluation
        folder = self.folder(plan.source, seed)
        print(f"evaluating {self.folder(plan.run, seed)} with {e.attack}", flush=True)
        self._set_threads()
        done = evaluate_run(
            self.folder(plan.run, seed), [e.attack], data_dir=self.options.data_dir, limit=e.limit, epsilon=e.epsilon,
            seed=seed, device=self.options.device, progress=True, checks=e.checks,
        )  # fmt: skip
        cost = done.cost
        assert done.config is not None
        outcome = done.result.attacks[e.attack]
        own = {
            **self._wanted(plan, seed),
            "label": self.catalog.label(self.scale),
            "run": plan.run,
            "sa": done.result.sa,
            "ra": outcome.ra,
            "gflops": cost.gflops,
            "pathway_gflops": cost.pathway_gflops,
            "router_gflops": cost.router_gflops,
            "config": plain(done.config),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder / "evaluation.json", {**own, **{k: v for k, v in done.record.items() if k not in own}})

    def _wanted(self, plan: Plan, seed: int) -> dict[str, Any]:
        """What an evaluation's record has to say to be this recipe's."""
        return {
            "recipe": plan.source,
            "scale": self.scale,
            "seed": seed,
            "attack": plan.evaluation.attack,
            "epsilon": plan.evaluation.epsilon,
            "limit": plan.evaluation.limit,
            "config": plain(self.config(plan, seed)),
        }

    def _require_equal(self, found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
        differing = differences(found, wanted)
        if differing:
            raise RunError(
                f"{folder} was made with other settings: {'; '.join(differing)}; choose another --out, or remove it"
            )

    def _set_threads(self) -> None:
        """A resumed run has left its own behind, for the process."""
        torch.set_num_threads(self.options.threads or self.threads)


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The settings that are not what they should be, places and what the data decides aside."""
    found, wanted = _flat(found), _flat(wanted)
    defaults = _flat(RunConfig())  # what was not yet a setting when a record was made
    result = []
    for key in dict.fromkeys([*wanted, *found]):
        name = key.removeprefix("config.")
        there, here = found.get(key, defaults.get(name)), wanted.get(key)
        if name == "init":  # begins with other weights, or does not: the name of the recipe says whose
            there, here = there is not None, here is not None
        if there == here or name in _PLACE or (here is None and name in _OPEN):
            continue
        result.append(f"{name} is {there} there and {here} in the recipe")
    return result


def plain(config: RunConfig) -> dict[str, Any]:
    """As it comes back from a file."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, RunConfig):
        values = plain(values)
    if not isinstance(values, dict):
        return {prefix.removesuffix("."): values}
    return {key: value for name, each in values.items() for key, value in _flat(each, f"{prefix}{name}.").items()}


def _complete(run: Run, config: RunConfig) -> bool:
    return run.checkpoint().exists() and load_checkpoint(run.checkpoint()).get("epoch", -1) >= config.epochs
