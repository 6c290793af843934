# SPDX-License-Identifier: Apache-2.0
"""Attacks: what finds adversarial images."""

from .autoattack import AutoAttack, AutoAttackResult
from .balls import Ball, SharedGenerator
from .names import NAMES, Attack, from_name
from .pgd import PGD, AttackResult, NonFiniteGradientError
from .routing import AGAINST

__all__ = [
    "AGAINST",
    "NAMES",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "AutoAttackResult",
    "Ball",
    "NonFiniteGradientError",
    "SharedGenerator",
    "from_name",
]
