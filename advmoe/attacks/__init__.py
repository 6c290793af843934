# SPDX-License-Identifier: Apache-2.0
"""Attacks: what finds adversarial images."""

from .pgd import PGD, AttackResult, NonFiniteGradientError, from_name

__all__ = ["PGD", "AttackResult", "NonFiniteGradientError", "from_name"]
