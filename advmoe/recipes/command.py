# SPDX-License-Identifier: Apache-2.0
"""What ``advmoe reproduce`` does."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from ..data import ARCHIVES, download
from ..training import Interrupted, RunError
from .catalog import Catalog, Plan
from .results import result_table
from .sweep import Sweep, SweepOptions, plain

__all__ = ["reproduce"]

DONE, FAULT, USAGE, RESUMABLE = 0, 1, 2, 3


def reproduce(
    names: Sequence[str],
    scale: str,
    seeds: Sequence[int] | None,
    options: SweepOptions,
    action: str = "run",
    faults: tuple[type[Exception], ...] = (),
) -> int:
    """Runs the recipes below these names, or only says something of them, and returns the command's exit code.

    Args:
        seeds: the scale's own for None.
        action: ``run``, ``list``, ``dry_run`` (the settings) or ``table`` (of what is there).
        faults: what a recipe may fail with, besides ValueError, while the others go on.

    Raises:
        ValueError: for an unknown name, or if there is none and nothing is to be listed.
    """
    catalog = Catalog()
    if not names and action != "list":
        raise ValueError("reproduce: a recipe is needed, such as table1/cifar10/resnet18/advmoe (--list names all)")
    recipes = dict.fromkeys(r for name in names for r in catalog.select(name)) if names else catalog.recipes.values()
    plans = [catalog.plan(recipe.name, scale) for recipe in recipes]
    if action == "list":
        print("\n".join(_listed(plan) for plan in plans))
        return DONE
    seeds = list(dict.fromkeys(catalog.seeds(scale) if seeds is None else seeds))
    sweep = Sweep(catalog, scale, options, (ValueError, *faults))
    if action == "dry_run":
        print("".join(_settings(sweep, plan, seed) for plan in plans for seed in seeds), end="")
        return DONE
    code = DONE
    if action == "run":
        try:
            code = _run(sweep, plans, seeds)
        except (Interrupted, KeyboardInterrupt):
            print(f"interrupted; go on with: {_again(names, scale, seeds, options)}", file=sys.stderr)
            return RESUMABLE
    results, unreadable = [], False
    for plan in plans:
        records: list[dict[str, Any]] = []
        for seed in seeds:
            try:
                record = sweep.record(plan, seed)
            except RunError as error:
                unreadable = True
                if action == "table":  # a run has said so already
                    print(f"{plan.recipe.name}, seed {seed}: left out: {error}", file=sys.stderr)
            else:
                records += [] if record is None else [record]
        results.append((plan, records))
    print(f"\n{result_table(catalog, scale, results)}")
    return USAGE if unreadable and code == DONE else code


def _run(sweep: Sweep, plans: Sequence[Plan], seeds: Sequence[int]) -> int:
    code = DONE
    if sweep.options.download and sweep.options.data_dir is not None:
        names = dict.fromkeys(plan.config.data.name for plan in plans)
        for name in [name for name in names if name in ARCHIVES]:  # a run says what of the others is missing
            download(name, sweep.options.data_dir)
    for number, outcome in enumerate(sweep.run(plans, seeds), start=1):
        line = f"[{number}/{len(plans) * len(seeds)}] {outcome.plan.recipe.name}, seed {outcome.seed}: {outcome.state}"
        if outcome.error is None:
            print(f"{line}{', as done before' if outcome.state == 'skipped' else ''}", flush=True)
            continue
        print(f"{line}: {outcome.error}", file=sys.stderr, flush=True)
        code = FAULT if code == FAULT or not isinstance(outcome.error, ValueError) else USAGE
    return code


def _listed(plan: Plan) -> str:
    same = f"the same as {plan.source}" if plan.source != plan.recipe.name else f"the run of {plan.run}"
    return plan.recipe.name + (f"  # {same}" if plan.run != plan.recipe.name else "")


def _settings(sweep: Sweep, plan: Plan, seed: int) -> str:
    """A YAML document: the run's config.yaml, its place and its evaluation as comments."""
    evaluation = ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(plan.evaluation).items())
    config = yaml.safe_dump(plain(sweep.config(plan, seed)), sort_keys=False)
    return f"---\n# {_listed(plan)}\n# {sweep.folder(plan.run, seed)}\n# evaluation: {evaluation}\n{config}"


def _again(names: Sequence[str], scale: str, seeds: Sequence[int], options: SweepOptions) -> str:
    words = ["advmoe", "reproduce", *names, "--scale", scale, "--seeds", *map(str, seeds), "--out", str(options.out)]
    for name in ("data_dir", "threads"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    words += ["--device", options.device] if options.device != "auto" else []
    return shlex.join(words)
