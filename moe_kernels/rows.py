# SPDX-License-Identifier: Apache-2.0
"""Per-channel values of a layer as rows of each sample's slice, and back; sums over the choices of one input."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["gather_rows", "keep_starts", "scatter_rows", "starts_on", "sum_choices"]


def gather_rows(value: Tensor, expert: Tensor | None, count: int, starts: Sequence[int], width: int) -> Tensor:
    """``value [total]`` to ``[V, width]``: each sample's slice; ``[1, width]`` where the side is whole (count 0).

    Empty ``starts`` mean a partition. On the CPU by index_select, whose derivative index_add sums in one order there;
    that of indexing with a tensor does not, with many threads.
    """
    if not count or expert is None:
        return value[None]
    slices = value.view(count, width) if not starts else _of_slices(value, starts, width).view(count, width)
    if value.device.type == "cpu":
        if torch.compiler.is_compiling():
            return slices.index_select(0, expert)
        with contextlib.suppress(IndexError):  # of a GPU's kernels that run on the CPU: the others have refused it
            return slices.index_select(0, expert)
    # Elsewhere an index out of range would end the process: it takes a row of NaN. And the derivative of indexing adds in
    # one order there, which index_add does not.
    beyond = slices.new_full((1, width), math.nan)
    return torch.cat([slices, beyond])[_in_range(expert, count)]


def scatter_rows(
    rows: Tensor, expert: Tensor | None, count: int, starts: Sequence[int], width: int, total: int
) -> Tensor:
    """``rows [V, width]`` summed into ``[total]`` channels: the transpose of :func:`gather_rows`."""
    if not count or expert is None:
        return rows.sum(0)
    if rows.device.type == "cpu":
        slices = rows.new_zeros(count, width).index_add(0, expert, rows).view(-1)
        return slices if not starts else rows.new_zeros(total).index_add(0, _channels(rows, starts, width), slices)
    slices = rows.new_zeros(count + 1, width).index_put((_in_range(expert, count),), rows, accumulate=True)[:count]
    if not starts:
        return slices.reshape(-1)
    channels = _channels(rows, starts, width)
    return rows.new_zeros(total).index_put((channels,), slices.reshape(-1), accumulate=True)


def sum_choices(y: Tensor, k: int) -> Tensor:
    """``[B * k, ...]`` to ``[B, ...]``, summed over the k choices in order, in float32 at least."""
    if k == 1:
        return y
    parts = y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(0, (y.shape[0] // k, k)).unbind(1)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(y.dtype)


def _of_slices(value: Tensor, starts: Sequence[int], width: int) -> Tensor:
    channels = _channels(value, starts, width)
    return value.index_select(0, channels) if value.device.type == "cpu" else value[channels]


def _in_range(expert: Tensor, count: int) -> Tensor:
    """``expert``, and ``count`` in place of an index out of range."""
    return torch.where((expert < 0) | (expert >= count), count, expert)


def _channels(like: Tensor, starts: Sequence[int], width: int) -> Tensor:
    """The channels of all slices, one after the other, ``[N * width]``."""
    first = starts_on(starts, like.device)
    assert first is not None
    return (first[:, None] + torch.arange(width, device=like.device)).view(-1)


# With the event after which every stream may read them; None once it has passed.
_starts: dict[tuple[tuple[int, ...], torch.device], tuple[Tensor, torch.cuda.Event | None]] = {}


def starts_on(starts: Sequence[int], device: torch.device) -> Tensor | None:
    """The first channels of the slices as int64 ``[N]`` on ``device``; None for a partition.

    Kept for the process where that is safe. On CUDA they are filled in by kernels: a copy from the host would
    synchronise, and could not be captured.
    """
    if not starts:
        return None
    if device.type != "cuda":
        return torch.tensor(starts, dtype=torch.int64, device=device)
    if torch.compiler.is_compiling():
        return _filled(starts, device)
    key = (tuple(starts), device)
    if key in _starts:
        value, ready = _starts[key]
        # torch synchronises before a capture, in which an event from outside must not be waited for
        if ready is not None and not torch.cuda.is_current_stream_capturing():
            if ready.query():
                _starts[key] = value, None
            else:
                torch.cuda.current_stream(device).wait_event(ready)
        return value
    value = _filled(starts, device)
    # memory of a graph that is being captured belongs to it, and holds nothing before its first replay
    if type(value) is Tensor and not torch.cuda.is_current_stream_capturing():
        _starts[key] = value, torch.cuda.current_stream(device).record_event()
    return value


def keep_starts(starts: Sequence[int], device: torch.device) -> None:
    """Makes them while a graph is traced, so that they do not end up in memory that belongs to a CUDA graph of it."""
    if starts and device.type == "cuda" and torch.cuda.is_available():
        with _disable_current_modes():
            starts_on(starts, device)


def _filled(starts: Sequence[int], device: torch.device) -> Tensor:
    return torch.cat([torch.full((1,), start, dtype=torch.int64, device=device) for start in starts])
