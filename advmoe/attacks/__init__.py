# SPDX-License-Identifier: Apache-2.0
"""Attacks: what finds adversarial images."""

from .pgd import PGD, AttackResult, NonFiniteGradientError, SharedGenerator, from_name

__all__ = ["PGD", "AttackResult", "NonFiniteGradientError", "SharedGenerator", "from_name"]
