# SPDX-License-Identifier: Apache-2.0
"""The geometry of a routed convolution as a value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .slices import ExpertSlices

__all__ = ["Conv2dGeometry", "output_size", "pair"]


class Conv2dGeometry(NamedTuple):
    """Everything about a routed convolution that does not depend on the batch; the trailing arguments of the operators.

    ``out_starts`` and ``in_starts`` are the first channels of the slices; empty stands for a partition (slice e starts at
    e * width), so that N weights cost nothing per expert. ``num_out`` and ``num_in`` are 0 where that side is whole.
    ``in_width`` counts the channels that come in, over all groups. ``samples_per_input`` is k: virtual sample v reads
    input v // k.
    """

    out_starts: Sequence[int]
    in_starts: Sequence[int]
    num_out: int
    num_in: int
    out_width: int
    in_width: int
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int
    samples_per_input: int = 1

    @classmethod
    def of(
        cls,
        out_slices: ExpertSlices,
        in_slices: ExpertSlices,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
    ) -> Conv2dGeometry:
        out_whole, in_whole = out_slices.is_whole, in_slices.is_whole
        return cls(
            () if out_whole or out_slices.is_partition else out_slices.starts,
            () if in_whole or in_slices.is_partition else in_slices.starts,
            0 if out_whole else out_slices.num_experts,
            0 if in_whole else in_slices.num_experts,
            out_slices.width,
            in_slices.width,
            stride,
            padding,
            dilation,
            groups,
        )


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output rows (or columns) of a convolution."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """An int, or two of them, as nn.Conv2d takes kernel_size, stride, padding and dilation."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, int) for v in value):
        return value[0], value[1]
    raise TypeError(f"{name}: expected an integer or a pair of integers, got {value!r}")
