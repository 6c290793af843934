# SPDX-License-Identifier: Apache-2.0
"""Evaluation: standard and robust accuracy, what an attack does to the routing, and whether a figure can be believed."""

from .checks import SUSPECT, Check, Curve, Scrutiny, scrutinize, sign_test, suspect
from .measure import AttackOutcome, Evaluation, Measured, evaluate, measure, wilson

__all__ = [
    "SUSPECT",
    "AttackOutcome",
    "Check",
    "Curve",
    "Evaluation",
    "Measured",
    "Scrutiny",
    "evaluate",
    "measure",
    "scrutinize",
    "sign_test",
    "suspect",
    "wilson",
]
