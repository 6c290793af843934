# SPDX-License-Identifier: Apache-2.0
"""The result table: ours beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from ..evaluation import SUSPECT
from ..tables import table
from .catalog import Catalog, Plan

__all__ = ["result_table"]

_BLIND = 0.01  # share of images without any gradient from which on an attack's RA is remarked upon


def result_table(catalog: Catalog, scale: str, results: Sequence[tuple[Plan, Sequence[dict[str, Any]]]]) -> str:
    """Plans and their records, one for each seed that is there; with what has to be known to read it."""
    rows, notes, unchecked = [], [], []
    settings: dict[tuple[int, str], None] = {}  # an ordered set
    for plan, records in results:
        paper = catalog.paper(plan.recipe)
        column = "ra_autoattack" if plan.evaluation.attack == "autoattack" else "ra_pgd50"
        gflops = f"{statistics.mean(r['gflops'] for r in records):.4f}" if records else "-"
        rows.append(
            [
                plan.recipe.name,
                str(len(records)),
                _mean([r["sa"] for r in records]),
                _mean([r["ra"] for r in records]) + (" !" if any(r.get("suspect") for r in records) else ""),
                gflops,
                _printed(paper.get("sa"), paper.get("sa_std")),
                _printed(paper.get(column), paper.get("ra_std")),
                _printed(paper.get("gflops")),
            ]
        )
        for record in records:
            settings[record["images"], record["attacks"][record["attack"]]["description"]] = None
            if record.get("suspect"):
                notes.append(f"! {plan.recipe.name}, seed {record['seed']}: {SUSPECT} ({', '.join(record['suspect'])})")
            if not record.get("checks"):
                unchecked.append(f"{plan.recipe.name}, seed {record['seed']}")
            blind = record["attacks"][record["attack"]]["zero_gradient"]
            if blind is not None and blind >= _BLIND:
                notes.append(
                    f"{plan.recipe.name}, seed {record['seed']}: {blind:.1%} of the attacked images gave no gradient"
                )
    header = ["recipe", "n", "SA %", "RA %", "GFLOPs", "paper SA %", "paper RA %", "paper GFLOPs"]
    tables = dict.fromkeys(plan.recipe.table for plan, _ in results)
    titles = [catalog.title(name) for name in tables]
    lines = ["; ".join(titles), "", table(header, rows), "", catalog.label(scale)]
    lines += [f"RA: {description}; on {images} test images" for images, description in settings]
    lines.append(
        "n seeds, mean and, from two on, ± their standard deviation; GFLOPs an image, pathway and routers, a "
        "multiply-accumulate as 1; the paper's as printed, where some cannot be right (advmoe/recipes/paper/README.md)"
    )
    lines += [note for name in tables if (note := catalog.note(name)) is not None]
    if unchecked:
        others = f" and {len(unchecked) - 1} more" if len(unchecked) > 1 else ""
        notes.append(f"not looked at for gradient masking: {unchecked[0]}{others}")
    return "\n".join(lines + notes)


def _mean(shares: Sequence[float]) -> str:
    if not shares:
        return "-"
    mean = f"{100 * statistics.mean(shares):.2f}"
    return mean if len(shares) < 2 else f"{mean} ± {100 * statistics.stdev(shares):.2f}"


def _printed(value: str | None, deviation: str | None = None) -> str:
    """The paper's digits; its CSV leaves zeros before points out."""
    if not value:
        return "-"
    parts = [f"0{part}" if part.startswith(".") else part for part in (value, deviation) if part]
    return " ± ".join(parts)
