# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a GPU leave to others: said once, never silently."""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from . import reference

__all__ = ["REFERENCE", "left_to_reference", "uses_tf32", "warn_once"]

REFERENCE = reference.ReferenceBackend()


@functools.cache
def warn_once(backend: str, message: str) -> None:
    warnings.warn(f"moe_kernels, backend {backend}: {message}", RuntimeWarning, stacklevel=6)


def left_to_reference(backend: str, x: Tensor) -> bool:
    """Whether the reference loop computes instead of the kernels; warns once where it does."""
    if x.dtype != torch.float64:
        return False
    warn_once(
        backend,
        "float64 runs in the slow reference loop, which synchronises with the device; the kernels have no float64",
    )
    return True


def uses_tf32(x: Tensor) -> bool:
    """Whether float32 may be rounded to tf32: the switch that nn.Conv2d obeys, ``torch.backends.cudnn``'s."""
    # not allow_tf32, which raises where the newer switches were used
    return x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
