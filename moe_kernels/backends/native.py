# SPDX-License-Identifier: Apache-2.0
"""The native module, or why it cannot be imported."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch  # first: it brings the OpenMP runtime that the native module's symbols resolve to

if TYPE_CHECKING:
    from ..geometry import Conv2dGeometry

__all__ = ["DTYPE", "conv2d_shape", "module", "pointer", "unavailable"]

try:
    from .. import _C  # type: ignore[attr-defined]

    module: Any = _C
    _import_error: str | None = None
except ImportError as error:
    module = None
    _import_error = str(error)

DTYPE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # as moe::DType


def unavailable() -> str | None:
    """None, or why there is no native module and what to do."""
    if _import_error is None:
        return None
    where = Path(__file__).parents[2]
    hint = "build it with `pip install -e .`, which needs a C++17 compiler"
    if (where / "setup.py").exists():
        hint = (
            f"this is the source tree {where}, which hides an installed package and is not built itself: "
            "`pip install -e .` builds it in place; or run from another folder"
        )
    return f"the native module moe_kernels._C cannot be imported ({_import_error}); {hint}"


def pointer(value: torch.Tensor | None) -> int:
    """Where a tensor's elements are; 0 for None."""
    return 0 if value is None else value.data_ptr()


def conv2d_shape(
    samples: int, g: Conv2dGeometry, channels: int, height: int, width: int, rows: int, columns: int, kh: int, kw: int
) -> tuple[int, ...]:
    """As moe::Conv2dShape."""
    return (
        samples, g.samples_per_input, channels, height, width, g.out_width, rows, columns, kh, kw,
        g.stride[0], g.stride[1], g.padding[0], g.padding[1], g.dilation[0], g.dilation[1], g.groups,
    )  # fmt: skip
