# SPDX-License-Identifier: Apache-2.0
"""The routing plan, made on the device: the samples in the order of their groups, and where each group begins.

A group is what shares one slice of the weight on both sides. A plan is one int32 tensor ``[G + 2 + V]``: ``offsets``
``[G + 2]`` and ``order`` ``[V]``. Group G holds the samples whose expert index is out of range; they come last.

A kernel's tiles of R rows are numbered group by group. How many there are depends on the routing, but there are never
more than ``ceil(V * rows_per_sample / R) + G + 1``, which the host knows: that many programs start, each finds its group
from the offsets (:func:`find_tile`), and those past the end leave at once. Nothing is read back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

if TYPE_CHECKING:
    from ..interface import Experts

__all__ = ["find_tile", "make", "segments_before", "tile_bound"]

_BLOCKS = (128, 1024)  # samples of one program
_CHUNK = 16  # groups looked at together


@triton.jit
def _group(out_expert, in_expert, sample, inside, num_out, num_in, HAS_OUT: tl.constexpr, HAS_IN: tl.constexpr):
    """The group of each sample; ``G = max(num_out, 1) * max(num_in, 1)`` where an index is out of range."""
    group = tl.zeros_like(sample)
    valid = inside
    count = 1
    if HAS_OUT:
        expert = tl.load(out_expert + sample, mask=inside, other=0)
        valid &= (expert >= 0) & (expert < num_out)
        group = expert.to(tl.int32)
        count = num_out
    if HAS_IN:
        expert = tl.load(in_expert + sample, mask=inside, other=0)
        valid &= (expert >= 0) & (expert < num_in)
        group = group * num_in + expert.to(tl.int32)
        count = count * num_in
    return tl.where(valid, group, count)


@triton.jit
def count_kernel(
    out_expert,  # [V] or None
    in_expert,  # [V] or None
    histogram,  # [blocks, G + 1]
    samples,
    num_out,
    num_in,
    groups,
    HAS_OUT: tl.constexpr,
    HAS_IN: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """How many samples of each group a block of samples has."""
    block = tl.program_id(0)
    sample = block * BLOCK + tl.arange(0, BLOCK)
    inside = sample < samples
    group = _group(out_expert, in_expert, sample, inside, num_out, num_in, HAS_OUT, HAS_IN)
    for first in range(0, groups + 1, CHUNK):
        g = first + tl.arange(0, CHUNK)
        member = ((group[:, None] == g[None, :]) & inside[:, None]).to(tl.int32)  # [BLOCK, CHUNK]
        tl.store(histogram + block * (groups + 1) + g, tl.sum(member, 0), mask=g <= groups)


@triton.jit
def plan_kernel(
    out_expert,  # [V] or None
    in_expert,  # [V] or None
    histogram,  # [blocks, G + 1]; not read where there is one block
    plan,  # [G + 2 + V]
    samples,
    num_out,
    num_in,
    groups,
    blocks,
    HAS_OUT: tl.constexpr,
    HAS_IN: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Offsets and order; stable, so that the same routing has the same plan. Each block places its own samples."""
    block = tl.program_id(0)
    sample = block * BLOCK + tl.arange(0, BLOCK)
    inside = sample < samples
    group = _group(out_expert, in_expert, sample, inside, num_out, num_in, HAS_OUT, HAS_IN)
    position = tl.zeros_like(sample)
    base = 0
    for first in range(0, groups + 1, CHUNK):
        g = first + tl.arange(0, CHUNK)
        member = ((group[:, None] == g[None, :]) & inside[:, None]).to(tl.int32)  # [BLOCK, CHUNK]
        before = tl.zeros_like(g)  # of the group, in earlier blocks
        if ONE_BLOCK:
            count = tl.sum(member, 0)
        else:
            count = tl.zeros_like(g)
            for other in range(blocks):
                here = tl.load(histogram + other * (groups + 1) + g, mask=g <= groups, other=0)
                before += tl.where(other < block, here, 0)
                count += here
        begin = base + tl.cumsum(count, 0) - count
        rank = tl.cumsum(member, 0) - 1
        position += tl.sum(member * (begin[None, :] + before[None, :] + rank), 1)
        if block == 0:
            tl.store(plan + g, begin, mask=g <= groups)
        base += tl.sum(count, 0)
    if block == 0:
        tl.store(plan + groups + 1, samples)
    tl.store(plan + groups + 2 + position, sample, mask=inside)


@triton.jit
def find_tile(offsets, tile, rows_per_sample, tile_rows, groups, GROUPS: tl.constexpr):
    """Where tile number ``tile`` lies: its group, the group's first place in the order, its first row and the end of the
    group's rows. A group above ``groups`` says that the tile is past the end. ``GROUPS``: a power of two above
    ``groups``."""
    AT_ONCE: tl.constexpr = GROUPS if GROUPS < 1024 else 1024
    group = tile * 0
    first_tile = tile * 0
    place = tile * 0
    samples = tile * 0
    before = tile * 0
    for first in range(0, GROUPS, AT_ONCE):
        g = first + tl.arange(0, AT_ONCE)
        begin = tl.load(offsets + g, mask=g <= groups, other=0)
        end = tl.load(offsets + g + 1, mask=g <= groups, other=0)
        tiles = tl.cdiv((end - begin) * rows_per_sample, tile_rows)
        last = before + tl.cumsum(tiles, 0)
        here = (last > tile) & (last - tiles <= tile)
        # the padding above ``groups`` has no tiles: it is counted only by a tile past the end
        group += tl.sum((last <= tile).to(tl.int32), 0)
        first_tile += tl.sum(tl.where(here, last - tiles, 0), 0)
        place += tl.sum(tl.where(here, begin, 0), 0)
        samples += tl.sum(tl.where(here, end - begin, 0), 0)
        before += tl.sum(tiles, 0)
    return group, place, (tile - first_tile) * tile_rows, samples * rows_per_sample


@triton.jit
def segments_before(offsets, group, segment):
    """How many segments of ``segment`` samples the groups before ``group`` have."""
    total = tl.zeros((), tl.int32)
    for first in range(0, group, 256):
        g = first + tl.arange(0, 256)
        before = g < group
        count = tl.load(offsets + g + 1, mask=before, other=0) - tl.load(offsets + g, mask=before, other=0)
        total += tl.sum(tl.cdiv(count, segment), 0)
    return total


def make(experts: Experts, num_out: int, num_in: int, samples: int, device: torch.device) -> Tensor:
    """The plan of one choice (``num_in`` 0 where the input side follows the output side's choice) or of two. One kernel
    up to 1024 samples, two beyond."""
    count = max(num_out, 1) * max(num_in, 1)
    plan = torch.empty(count + 2 + samples, dtype=torch.int32, device=device)
    block = _BLOCKS[0] if samples <= _BLOCKS[0] else _BLOCKS[1]
    blocks = max(1, triton.cdiv(samples, block))
    out = experts.out.contiguous() if num_out and experts.out is not None else None
    inner = experts.inner.contiguous() if num_in and experts.inner is not None else None
    sides = {"HAS_OUT": out is not None, "HAS_IN": inner is not None}
    sizes = {"BLOCK": block, "CHUNK": _CHUNK, "num_warps": 8 if block > 128 else 4}
    histogram = plan
    if blocks > 1:
        histogram = torch.empty((blocks, count + 1), dtype=torch.int32, device=device)
        launch(count_kernel, (blocks,), device, out, inner, histogram, samples, num_out, num_in, count, **sides, **sizes)
    launch(
        plan_kernel, (blocks,), device, out, inner, histogram, plan, samples, num_out, num_in, count, blocks, **sides,
        ONE_BLOCK=blocks == 1, **sizes,
    )  # fmt: skip
    return plan


def tile_bound(samples: int, rows_per_sample: int, tile_rows: int, count: int) -> int:
    """No routing needs more tiles: each group, that of the invalid samples too, has at most one that is not full."""
    return triton.cdiv(samples * rows_per_sample, tile_rows) + min(count + 1, samples)
