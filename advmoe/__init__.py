# SPDX-License-Identifier: Apache-2.0
"""Adversarially robust mixture-of-experts CNNs on the routed layers of :mod:`moe_kernels`.

Imports point one way: cli → training, evaluation → attacks, objectives → models → moe_kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_kernels import __version__

    from .models import create_model, upcycle

__all__ = ["__version__", "create_model", "upcycle"]


def __getattr__(name: str) -> Any:
    """Loads torch when something is asked for, so that the command can set what torch reads when it is loaded."""
    if name == "__version__":
        from moe_kernels import __version__

        return __version__
    if name in __all__:
        from . import models

        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
