# SPDX-License-Identifier: Apache-2.0
"""What a BatchNorm of each expert's own is made of: statistics and sums over the samples of a slice, and the affine map.

Statistics and sums read the images once: a segment is a few samples of one group of the plan; its sums are taken in
float32 about its own first value, so that a large mean costs no digits, and the segments of all groups that cover a
channel are merged in their order (Chan, Golub, LeVeque: Updating formulae and a pairwise algorithm for computing sample
variances, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rows import starts_on
from .configs import multiprocessors
from .launch import launch
from .plan import find_tile, segments_before, tile_bound

__all__ = ["affine", "moments", "sums"]

_ROWS, _CHANNELS = 32, 64
_MERGED = 32  # channels of one program of merge_kernel


@triton.jit(do_not_specialize=["groups", "segment"])
def accumulate_kernel(
    x,  # [V, P, Q, C]
    other,  # [V, P, Q, C]: dy; not read for MOMENTS
    mean,  # [total], float32; not read for MOMENTS
    starts,  # [N] or None: a partition
    plan,  # offsets [groups + 2], order [V]
    partial,  # [segments, 2, C], float32
    groups,
    segment,
    pixels,
    channels,
    MOMENTS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Of one segment: mean and sum of squared deviations (MOMENTS), or the sums of dy and of dy * (x - mean)."""
    group, place, first, count = find_tile(plan, tl.program_id(0), 1, segment, groups, GROUPS)
    if group >= groups:
        return
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    c_inside = c < channels
    begin = first * pixels
    end = tl.minimum(first + segment, count) * pixels
    if MOMENTS:
        opening = tl.load(plan + groups + 2 + place + first).to(tl.int64)
        about = tl.load(x + opening * pixels * channels + c, mask=c_inside, other=0.0).to(tl.float32)
    else:
        if starts is not None:
            start = tl.load(starts + group)
        else:
            start = group * channels
        about = tl.load(mean + start + c, mask=c_inside, other=0.0)
    one = tl.zeros((ROWS, CHANNELS), tl.float32)
    two = tl.zeros((ROWS, CHANNELS), tl.float32)
    for top in range(begin, end, ROWS):
        row = top + tl.arange(0, ROWS)
        inside = row < end
        local = row // pixels
        sample = tl.load(plan + groups + 2 + place + local, mask=inside, other=0).to(tl.int64)
        at = ((sample * pixels + (row - local * pixels)) * channels)[:, None] + c[None, :]
        seen = inside[:, None] & c_inside[None, :]
        deviation = tl.load(x + at, mask=seen, other=0.0).to(tl.float32) - about[None, :]
        deviation = tl.where(seen, deviation, 0.0)
        if MOMENTS:
            one += deviation
            two += deviation * deviation
        else:
            dy = tl.load(other + at, mask=seen, other=0.0).to(tl.float32)
            one += dy
            two += dy * deviation
    first_sum = tl.sum(one, 0)
    second_sum = tl.sum(two, 0)
    if MOMENTS:
        number = (end - begin).to(tl.float32)
        second_sum = second_sum - first_sum * first_sum / number
        first_sum = about + first_sum / number
    at = partial + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(at, first_sum, mask=c_inside)
    tl.store(at + channels, second_sum, mask=c_inside)


@triton.jit(do_not_specialize=["groups", "segment"])
def merge_kernel(
    partial,  # [segments, 2, C], float32
    starts,  # [N] or None
    plan,  # offsets [groups + 2]
    one,  # [total], float32: mean, or the sum of dy
    two,  # [total], float32: variance (biased), or the sum of dy * (x - mean)
    counts,  # [total], float32: values of a channel; MOMENTS
    groups,
    segment,
    pixels,
    channels,
    total,
    MOMENTS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Merges, for each channel of the whole side, the segments of every group whose slice covers it, in order."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    number = tl.zeros((CHANNELS,), tl.float32)
    a = tl.zeros((CHANNELS,), tl.float32)
    b = tl.zeros((CHANNELS,), tl.float32)
    begin_group = 0
    end_group = groups
    if starts is None:  # of a partition only the experts of these channels
        begin_group = tl.program_id(0) * CHANNELS // channels
        end_group = tl.minimum(tl.cdiv((tl.program_id(0) + 1) * CHANNELS, channels), groups)
    first = segments_before(plan, begin_group, segment)
    for group in range(begin_group, end_group):
        count = tl.load(plan + group + 1) - tl.load(plan + group)
        segments = tl.cdiv(count, segment)
        if starts is not None:
            c = channel - tl.load(starts + group).to(tl.int32)
        else:
            c = channel - group * channels
        covered = (c >= 0) & (c < channels) & (channel < total)
        for part in range(segments):
            at = partial + (tl.zeros((), tl.int64) + first + part) * 2 * channels + c
            a_part = tl.load(at, mask=covered, other=0.0)
            b_part = tl.load(at + channels, mask=covered, other=0.0)
            if MOMENTS:
                size = (tl.minimum(segment, count - part * segment) * pixels).to(tl.float32)
                merged = number + tl.where(covered, size, 0.0)
                share = tl.where(covered, size / tl.maximum(merged, 1.0), 0.0)
                delta = a_part - a
                b += tl.where(covered, b_part + delta * delta * number * share, 0.0)
                a += delta * share
                number = merged
            else:
                a += a_part
                b += b_part
        first += segments
    inside = channel < total
    if MOMENTS:
        b = b / tl.maximum(number, 1.0)
        tl.store(counts + channel, number, mask=inside)
    tl.store(one + channel, a, mask=inside)
    tl.store(two + channel, b, mask=inside)


@triton.jit
def affine_kernel(
    x,  # [V, P, Q, C]
    other,  # as x, or None
    target,  # as x
    expert,  # [V]
    starts,  # [N] or None
    scale,  # [total], float32
    mean,  # [total], float32
    shift,  # [total], float32, or None
    other_scale,  # [total], float32; with other
    number,  # N
    pixels,
    channels,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """``scale * (x - mean) + shift + other_scale * other`` with the values of each sample's slice."""
    tiles = tl.cdiv(pixels, ROWS)
    sample = tl.program_id(0) // tiles
    row = (tl.program_id(0) - sample * tiles) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    c_inside = c < channels
    e = tl.load(expert + sample)
    valid = (e >= 0) & (e < number)
    e = tl.where(valid, e, 0)
    if starts is not None:
        channel = tl.load(starts + e) + c
    else:
        channel = e * channels + c
    at = ((sample.to(tl.int64) * pixels + row) * channels)[:, None] + c[None, :]
    inside = (row < pixels)[:, None] & c_inside[None, :]
    deviation = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    deviation -= tl.load(mean + channel, mask=c_inside, other=0.0)[None, :]
    y = deviation * tl.load(scale + channel, mask=c_inside, other=0.0)[None, :]
    if shift is not None:
        y += tl.load(shift + channel, mask=c_inside, other=0.0)[None, :]
    if other is not None:
        dy = tl.load(other + at, mask=inside, other=0.0).to(tl.float32)
        y += dy * tl.load(other_scale + channel, mask=c_inside, other=0.0)[None, :]
    y = tl.where(valid, y, float("nan"))
    tl.store(target + at, y.to(target.dtype.element_ty), mask=inside)


def moments(x: Tensor, plan: Tensor, starts: Sequence[int], total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of values of each channel of the whole side, float32 ``[total]``."""
    one, two, counts = (torch.empty(total, dtype=torch.float32, device=x.device) for _ in range(3))
    _accumulate(x, None, None, plan, starts, one, two, counts)
    return one, two, counts


def sums(x: Tensor, grad: Tensor, mean: Tensor, plan: Tensor, starts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The sums of dy and of dy * (x - mean) over each channel of the whole side, float32 ``[total]``."""
    one, two = torch.empty_like(mean), torch.empty_like(mean)
    _accumulate(x, grad, mean, plan, starts, one, two, None)
    return one, two


def _accumulate(
    x: Tensor,  # [V, C, P, Q], channels_last
    grad: Tensor | None,
    mean: Tensor | None,
    plan: Tensor,
    starts: Sequence[int],
    one: Tensor,
    two: Tensor,
    counts: Tensor | None,
) -> None:
    samples, channels, rows, columns = x.shape
    pixels, device = rows * columns, x.device
    groups = plan.shape[0] - samples - 2
    blocks = triton.cdiv(channels, _CHANNELS)
    # enough segments for the device to be full twice; few enough for the merge to be short
    wanted = max(1, min(samples, triton.cdiv(2 * multiprocessors(device), blocks)))
    segment = max(1, triton.cdiv(samples, wanted))
    segments = tile_bound(samples, 1, segment, groups)
    partial = torch.empty((segments, 2, channels), dtype=torch.float32, device=device)
    where = starts_on(starts, device)
    launch(
        accumulate_kernel, (segments, blocks), device, x, grad, mean, where, plan, partial, groups, segment, pixels,
        channels, MOMENTS=grad is None, GROUPS=triton.next_power_of_2(groups + 1), ROWS=_ROWS, CHANNELS=_CHANNELS,
        num_warps=4,
    )  # fmt: skip
    total = one.shape[0]
    launch(
        merge_kernel, (triton.cdiv(total, _MERGED),), device, partial, where, plan, one, two, counts, groups, segment,
        pixels, channels, total, MOMENTS=grad is None, CHANNELS=_MERGED, num_warps=1,
    )  # fmt: skip


def affine(
    x: Tensor,  # [V, C, P, Q], channels_last
    expert: Tensor,  # [V]
    number: int,
    starts: Sequence[int],
    scale: Tensor,
    mean: Tensor,
    shift: Tensor | None,
    grad: Tensor | None = None,  # as x
    grad_scale: Tensor | None = None,
) -> Tensor:
    """``scale * (x - mean) + shift + grad_scale * grad`` with the values, float32 ``[total]``, of each sample's slice."""
    samples, channels, rows, columns = x.shape
    pixels = rows * columns
    target = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    tile = min(_ROWS, triton.next_power_of_2(pixels))
    grid = (samples * triton.cdiv(pixels, tile), triton.cdiv(channels, _CHANNELS))
    launch(
        affine_kernel, grid, x.device, x, grad, target, expert.contiguous(), starts_on(starts, x.device), scale, mean,
        shift, grad_scale, number, pixels, channels, ROWS=tile, CHANNELS=_CHANNELS, num_warps=4,
    )  # fmt: skip
    return target
