# SPDX-License-Identifier: Apache-2.0
"""Per-channel values of a layer as rows of each sample's slice, and back; sums over the choices of one input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["gather_rows", "scatter_rows", "sum_choices"]


def gather_rows(value: Tensor, expert: Tensor | None, count: int, starts: Sequence[int], width: int) -> Tensor:
    """``value [total]`` to ``[V, width]``: each sample's slice; ``[1, width]`` where the side is whole (count 0).

    Empty ``starts`` mean a partition. By index_select, whose derivative index_add sums in one order on the CPU; that of
    indexing with a tensor does not, with many threads.
    """
    if not count or expert is None:
        return value[None]
    if not starts:
        return value.view(count, width).index_select(0, expert)
    return value.index_select(0, _channels(value, starts, width)).view(count, width).index_select(0, expert)


def scatter_rows(
    rows: Tensor, expert: Tensor | None, count: int, starts: Sequence[int], width: int, total: int
) -> Tensor:
    """``rows [V, width]`` summed into ``[total]`` channels: the transpose of :func:`gather_rows`."""
    if not count or expert is None:
        return rows.sum(0)
    slices = rows.new_zeros(count, width).index_add(0, expert, rows).view(-1)
    return slices if not starts else rows.new_zeros(total).index_add(0, _channels(rows, starts, width), slices)


def sum_choices(y: Tensor, k: int) -> Tensor:
    """``[B * k, ...]`` to ``[B, ...]``, summed over the k choices in order, in float32 at least."""
    if k == 1:
        return y
    parts = y.to(torch.promote_types(y.dtype, torch.float32)).unflatten(0, (y.shape[0] // k, k)).unbind(1)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.to(y.dtype)


def _channels(like: Tensor, starts: Sequence[int], width: int) -> Tensor:
    """The channels of all slices, one after the other, ``[N * width]``."""
    first = torch.tensor(starts, dtype=torch.int64, device=like.device)
    return (first[:, None] + torch.arange(width, device=like.device)).view(-1)
