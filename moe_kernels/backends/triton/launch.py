# SPDX-License-Identifier: Apache-2.0
"""Starting a Triton kernel: on its tensors' device, and telling a kernel that cannot be built from one that failed."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
import triton

__all__ = ["INTERPRETED", "OPTIONS", "BuildError", "Launch", "launch", "record"]

# Decided when the kernels are decorated, at their import: TRITON_INTERPRET=1 runs them in numpy, on CPU tensors too.
INTERPRETED: bool = triton.knobs.runtime.interpret


class BuildError(RuntimeError):
    """Triton cannot build a kernel for this device; the cause is its ``__cause__``."""


class Launch(NamedTuple):
    """A launch that was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


# Products and sums may be fused: said because Triton's default is about to change.
OPTIONS = {"enable_fp_fusion": True}
_recorded: list[list[Launch]] = []


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Inside, launches are written down and not made: what a call would start, with tensors of any device."""
    launches: list[Launch] = []
    _recorded.append(launches)
    try:
        yield launches
    finally:
        _recorded.pop()


def launch(kernel: Any, grid: Sequence[int], device: torch.device, *args: Any, **meta: Any) -> None:
    """``kernel[grid](*args, **meta)`` on ``device``, torch's current stream of it; nothing for an empty grid.

    Raises:
        BuildError: if the kernel cannot be compiled or does not fit the device.
    """
    if 0 in grid:
        return
    if _recorded:
        _recorded[-1].append(Launch(kernel, tuple(grid), args, meta))
    elif INTERPRETED:
        meta = {name: value for name, value in meta.items() if name not in ("num_warps", "num_stages")}
        kernel[tuple(grid)](*args, **meta)
    elif device.index is None or device.index == torch.cuda.current_device():
        _run(kernel, grid, args, meta)
    else:
        with torch.cuda.device(device):
            _run(kernel, grid, args, meta)


def _run(kernel: Any, grid: Sequence[int], args: Sequence[Any], meta: dict[str, Any]) -> None:
    key = (kernel.__name__, *sorted(meta.items()), *(a.dtype for a in args if isinstance(a, torch.Tensor)))
    if key in _failed:
        raise BuildError(_failed[key])
    try:
        kernel[tuple(grid)](*args, **meta, **OPTIONS)
    except RuntimeError as error:
        # A launch that failed says so in these words, and must not be taken for a kernel that cannot be built.
        if str(error).startswith("Triton Error [CUDA]") and "kernel image" not in str(error):
            raise
        _fail(key, error)
    except (triton.TritonError, subprocess.SubprocessError, OSError) as error:  # the last two: its C compiler, its cache
        _fail(key, error)


# What could not be built, so that it is not tried again at every call.
_failed: dict[Any, str] = {}


def _fail(key: tuple[Any, ...], error: Exception) -> NoReturn:
    _failed[key] = f"{key[0]}: {_first_line(error)}"
    raise BuildError(_failed[key]) from error


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[-1]}"
