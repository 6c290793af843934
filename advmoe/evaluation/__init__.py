# SPDX-License-Identifier: Apache-2.0
"""Evaluation: standard and robust accuracy, and what an attack does to the routing."""

from .measure import AttackOutcome, Evaluation, evaluate

__all__ = ["AttackOutcome", "Evaluation", "evaluate"]
