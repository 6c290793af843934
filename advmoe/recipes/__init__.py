# SPDX-License-Identifier: Apache-2.0
"""Recipes: the rows of the paper's tables and figures by name. Settings are the YAML files of this folder, the paper's
own numbers the CSV files of ``paper/``."""

from .catalog import SCALES, Catalog, EvaluationSettings, Plan, Recipe
from .command import reproduce
from .results import result_table
from .sweep import Outcome, Sweep, SweepOptions

__all__ = [
    "SCALES",
    "Catalog",
    "EvaluationSettings",
    "Outcome",
    "Plan",
    "Recipe",
    "Sweep",
    "SweepOptions",
    "reproduce",
    "result_table",
]
