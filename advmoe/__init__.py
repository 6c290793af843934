# SPDX-License-Identifier: Apache-2.0
"""Adversarially robust mixture-of-experts CNNs on the routed layers of :mod:`moe_kernels`.

Imports point one way: cli → training, evaluation → attacks, objectives → models → moe_kernels.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_kernels import __version__

    from .models import create_model, upcycle

__all__ = ["__version__", "create_model", "upcycle"]


def __getattr__(name: str) -> Any:
    """Loads torch when something is asked for, so that the command can set what torch reads when it is loaded."""
    if name == "__version__":
        value: Any = importlib.import_module("moe_kernels").__version__
    elif name in __all__:
        value = getattr(importlib.import_module(".models", __name__), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
