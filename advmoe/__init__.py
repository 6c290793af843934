# SPDX-License-Identifier: Apache-2.0
"""Adversarially robust mixture-of-experts CNNs on the routed layers of :mod:`moe_kernels`.

Imports point one way: cli → training, evaluation → attacks, objectives → models → moe_kernels.
"""

from moe_kernels import __version__

from .models import create_model, upcycle

__all__ = ["__version__", "create_model", "upcycle"]
