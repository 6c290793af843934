# SPDX-License-Identifier: Apache-2.0
"""The three calls of a routed convolution as implicit GEMMs over channels_last images.

Forward and input gradient are one kernel, :func:`convolution_kernel`: rows are pixels of the result, columns its
channels, and the reduction runs over (tap, channel) in one flattened loop, so that loads are pipelined across taps. The
input gradient runs once for each residue of its pixels modulo the stride, over the taps that meet that residue only:
nothing is multiplied by inserted zeros.

The weight gradient is a GEMM over the pixels of one group's samples, split into segments of a fixed number of samples
(:func:`grad_weight_kernel`); a second kernel adds the segments of each group in order (:func:`reduce_kernel`). No
atomics: the same inputs give the same bits.

Letters: V virtual samples, P, Q output and H, W input size, C, K channels of one slice; BM, BN, BK the tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...geometry import output_size
from ...rows import starts_on
from ..interface import Epilogue
from . import tuning
from .configs import SMALLEST_BLOCK, Problem, TileConfig, block_k, kind, multiprocessors
from .launch import INTERPRETED, BuildError, launch
from .plan import find_tile, make, segments_before, tile_bound

if TYPE_CHECKING:
    from ...geometry import Conv2dGeometry
    from ..interface import Experts

__all__ = ["forward", "grad_input", "grad_weight"]


@triton.jit
def _slice_start(expert, starts, width, WINDOWS: tl.constexpr):
    """First channel of an expert's slice; int64, because a weight of many experts has more than 2**31 elements."""
    if WINDOWS:
        return tl.load(starts + expert).to(tl.int64)
    else:
        return (tl.zeros((), tl.int64) + expert) * width


@triton.jit(do_not_specialize=["groups", "num_out", "num_in"])
def convolution_kernel(
    source,  # [.., source_rows, source_columns, source_channels]: the input; for the input gradient dy
    weight,  # [R_out, R_in / groups, R, S], any strides
    target,  # [V, target_rows, target_columns, target_channels]: the output; dx
    out_expert,  # [V] or None
    in_expert,  # [V] or None
    out_starts,  # [N] or None: a partition
    in_starts,  # [N] or None
    plan,  # offsets [groups + 2], order [V]; not read unless PACKED
    bias,  # [R_out] or None
    gate,  # [V] or None
    scale,  # [w_out] or [R_out], or None
    shift,  # as scale
    residual,  # as target, or None
    image,  # the forward's input, for the gate's gradient; or None
    dots,  # [V, blocks of columns, target_rows * target_columns], float32: <D(dy), image> of each pixel; or None
    samples_per_input,
    groups,  # of the plan
    num_out,
    num_in,
    out_width,  # of a slice of the weight, rows and columns
    in_width,
    source_rows,
    source_columns,
    source_channels,
    target_rows,
    target_columns,
    target_channels,
    tile_rows,  # pixels of one sample (and one residue) are numbered over tile_rows * tile_columns
    tile_columns,
    depth,  # channels of the reduction, of one convolution group
    width,  # channels of the result, of one convolution group
    weight_row,  # the weight's strides: output channel, input channel, tap
    weight_column,
    weight_r,
    weight_s,
    weight_n,  # along the result's channels and along the reduction's
    weight_k,
    weight_group,  # from one convolution group to the next
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    STEP_R: tl.constexpr,  # taps that meet one residue are STEP_R apart
    STEP_S: tl.constexpr,
    GRAD_INPUT: tl.constexpr,
    PACKED: tl.constexpr,  # a tile takes rows of several samples of one group
    PAIRS: tl.constexpr,  # the plan's groups are pairs of experts
    SPLIT: tl.constexpr,  # more than one convolution group
    PER_SLICE: tl.constexpr,  # scale and shift belong to the channels of the whole side
    RELU: tl.constexpr,
    FLAT: tl.constexpr,  # the reduction's blocks straddle taps
    EVEN_N: tl.constexpr,  # BN divides width
    EVEN_K: tl.constexpr,  # BK divides depth
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies the bits of bfloat16 as integers
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    pixels = tile_rows * tile_columns
    blocks_n = tl.cdiv(width, BN)
    if SPLIT:
        columns_n = (target_channels // width) * blocks_n
    else:
        columns_n = blocks_n
    tile = tl.program_id(0) // columns_n
    column = tl.program_id(0) % columns_n
    conv_group = column // blocks_n
    n = (column % blocks_n) * BN + tl.arange(0, BN)
    n_inside = n < width

    # the tile's rows: which sample, which pixel
    if PACKED:
        group, place, first, rows = find_tile(plan, tile, pixels, BM, groups, GROUPS)
        if group > groups:
            return
        row = first + tl.arange(0, BM)
        inside = row < rows
        local = row // pixels
        pixel = row - local * pixels
        sample = tl.load(plan + groups + 2 + place + local, mask=inside, other=0)
        valid = group < groups
        out_e = group
        in_e = group
        if PAIRS:
            out_e = group // num_in
            in_e = group % num_in
        out_e = tl.where(valid, out_e, 0)
        in_e = tl.where(valid, in_e, 0)
    else:
        tiles = tl.cdiv(pixels, BM)
        virtual = tile // tiles
        pixel = (tile - virtual * tiles) * BM + tl.arange(0, BM)
        inside = pixel < pixels
        sample = virtual + tl.zeros_like(pixel)
        valid = virtual >= 0
        if out_expert is not None:
            out_e = tl.load(out_expert + virtual)
            valid = (out_e >= 0) & (out_e < num_out)
            out_e = tl.where(valid, out_e, 0)
        if in_expert is not None:
            in_e = tl.load(in_expert + virtual)
            in_valid = (in_e >= 0) & (in_e < num_in)
            in_e = tl.where(in_valid, in_e, 0)
            valid = valid & in_valid

    # the slice of the weight
    out_start = tl.zeros((), tl.int64)
    if out_expert is not None:
        out_start = _slice_start(out_e, out_starts, out_width, out_starts is not None)
        weight += out_start * weight_row
    if in_expert is not None:
        weight += _slice_start(in_e, in_starts, in_width, in_starts is not None) * weight_column
    if SPLIT:
        weight += conv_group.to(tl.int64) * weight_group

    # the taps, and where they lie in the source
    i = pixel // tile_columns
    j = pixel - i * tile_columns
    if GRAD_INPUT:
        residue = tl.program_id(1)
        residue_h = residue // STRIDE_W
        residue_w = residue % STRIDE_W
        first_r = R + tl.zeros_like(residue)
        for t in tl.static_range(STEP_R):
            first_r = tl.where((t * DILATION_H) % STRIDE_H == residue_h, tl.minimum(first_r, t), first_r)
        first_s = S + tl.zeros_like(residue)
        for t in tl.static_range(STEP_S):
            first_s = tl.where((t * DILATION_W) % STRIDE_W == residue_w, tl.minimum(first_s, t), first_s)
        taps_r = (R - first_r + STEP_R - 1) // STEP_R
        taps_s = (S - first_s + STEP_S - 1) // STEP_S
        first_h = (residue_h + STRIDE_H - PAD_H % STRIDE_H) % STRIDE_H
        first_w = (residue_w + STRIDE_W - PAD_W % STRIDE_W) % STRIDE_W
        h = first_h + i * STRIDE_H
        w = first_w + j * STRIDE_W
        inside = inside & (h < target_rows) & (w < target_columns)
        # exact divisions: of numbers that meet the residue
        source_h = i + (first_h + PAD_H - first_r * DILATION_H) // STRIDE_H
        source_w = j + (first_w + PAD_W - first_s * DILATION_W) // STRIDE_W
        step_h = -(STEP_R * DILATION_H // STRIDE_H)
        step_w = -(STEP_S * DILATION_W // STRIDE_W)
        weight += first_r * weight_r + first_s * weight_s
        origin = sample.to(tl.int64)
    else:
        taps_r = R
        taps_s = S
        h = i
        w = j
        source_h = i * STRIDE_H - PAD_H
        source_w = j * STRIDE_W - PAD_W
        step_h = DILATION_H
        step_w = DILATION_W
        origin = (sample // samples_per_input).to(tl.int64)
    base = origin * (source_rows * source_columns * source_channels)
    if SPLIT:
        base += conv_group * depth
    k = tl.arange(0, BK)
    n_offset = n.to(tl.int64) * weight_n  # a wide slice of a wide weight has more than 2**31 elements
    accumulator = tl.zeros((BM, BN), tl.float32)
    if FLAT:
        for step in range(tl.cdiv(taps_r * taps_s * depth, BK)):
            flat = step * BK + k
            tap = flat // depth
            c = flat - tap * depth
            r = tap // taps_s
            s = tap - r * taps_s
            k_inside = flat < taps_r * taps_s * depth
            y = source_h[:, None] + r[None, :] * step_h
            x = source_w[:, None] + s[None, :] * step_w
            seen = inside[:, None] & k_inside[None, :]
            seen = seen & (y >= 0) & (y < source_rows) & (x >= 0) & (x < source_columns)
            a_offset = base[:, None] + ((y * source_columns + x) * source_channels + c[None, :])
            b_offset = (r * STEP_R * weight_r + s * STEP_S * weight_s + c * weight_k)[:, None] + n_offset[None, :]
            a = tl.load(source + a_offset, mask=seen, other=0.0)  # [BM, BK]
            b = tl.load(weight + b_offset, mask=k_inside[:, None] & n_inside[None, :], other=0.0)  # [BK, BN]
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    else:
        # Which taps of a row lie in the source: a bit each, found once. In the loop a row costs a shift and an addition
        # instead of four comparisons and two products, which would take longer than a small tile's matrix instructions.
        MORE: tl.constexpr = R * S > 32
        bits = tl.zeros((BM,), tl.int64 if MORE else tl.int32)
        for r in tl.static_range((R + STEP_R - 1) // STEP_R):
            for s in tl.static_range((S + STEP_S - 1) // STEP_S):
                y = source_h + r * step_h
                x = source_w + s * step_w
                seen = inside & (y >= 0) & (y < source_rows) & (x >= 0) & (x < source_columns)
                seen = seen & (r < taps_r) & (s < taps_s)
                bits |= seen.to(bits.dtype) << (r * taps_s + s)
        a_pointer = source + (base + (source_h * source_columns + source_w) * source_channels)[:, None] + k[None, :]
        b_pointer = weight + (k.to(tl.int64) * weight_k)[:, None] + n_offset[None, :]
        zero = tl.program_id(0) * 0  # so that what the loop changes is a tensor from the start
        c = zero
        tap = zero
        r = zero
        s = zero
        for step in range(taps_r * taps_s * tl.cdiv(depth, BK)):
            c = tl.multiple_of(c, BK)
            seen = ((bits >> tap) & 1) != 0
            a_offset = (r * step_h * source_columns + s * step_w) * source_channels + c
            b_offset = c.to(tl.int64) * weight_k
            if R > 1:  # of a dimension of size 1 the stride is anything, and would hide how pointers are aligned
                b_offset += r * STEP_R * weight_r
            if S > 1:
                b_offset += s * STEP_S * weight_s
            if EVEN_K:
                a = tl.load(a_pointer + a_offset, mask=seen[:, None], other=0.0)  # [BM, BK]
                if EVEN_N:
                    b = tl.load(b_pointer + b_offset)  # [BK, BN]
                else:
                    b = tl.load(b_pointer + b_offset, mask=n_inside[None, :], other=0.0)
            else:
                k_inside = c + k < depth
                a = tl.load(a_pointer + a_offset, mask=seen[:, None] & k_inside[None, :], other=0.0)
                b = tl.load(b_pointer + b_offset, mask=k_inside[:, None] & n_inside[None, :], other=0.0)
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
            # the next block of channels, or the next tap
            c += BK
            last = c >= depth
            c = tl.where(last, 0, c)
            tap = tl.where(last, tap + 1, tap)
            s = tl.where(last, s + 1, s)
            last = s >= taps_s
            s = tl.where(last, 0, s)
            r = tl.where(last, r + 1, r)

    channel = n
    if SPLIT:
        channel = conv_group * width + n
    pixel_offset = h * target_columns + w
    frame = target_rows * target_columns
    offset = (sample.to(tl.int64) * frame + pixel_offset) * target_channels
    offset = offset[:, None] + channel[None, :]
    written = inside[:, None] & n_inside[None, :]
    if dots is not None:
        at = ((sample // samples_per_input).to(tl.int64) * frame + pixel_offset) * target_channels
        seen_by_forward = tl.load(image + at[:, None] + channel[None, :], mask=written, other=0.0)
        dot = tl.sum(accumulator * seen_by_forward.to(tl.float32), 1)
        dot = tl.where(valid, dot, float("nan"))
        at = (sample.to(tl.int64) * columns_n + column) * frame + pixel_offset
        tl.store(dots + at, dot, mask=inside)
    if bias is not None:
        accumulator += tl.load(bias + out_start + channel, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        accumulator *= tl.load(gate + sample, mask=inside, other=0.0).to(tl.float32)[:, None]
    affine = channel.to(tl.int64)
    if PER_SLICE:
        affine += out_start
    if scale is not None:
        accumulator *= tl.load(scale + affine, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    if shift is not None:
        accumulator += tl.load(shift + affine, mask=n_inside, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        accumulator += tl.load(residual + offset, mask=written, other=0.0).to(tl.float32)
    if RELU:
        accumulator = tl.where(accumulator < 0, 0.0, accumulator)  # NaN stays
    accumulator = tl.where(valid, accumulator, float("nan"))
    tl.store(target + offset, accumulator.to(target.dtype.element_ty), mask=written)


@triton.jit(do_not_specialize=["groups", "segment"])
def grad_weight_kernel(
    grad,  # [V, P, Q, K]
    image,  # [B, H, W, C]
    plan,  # offsets [groups + 2], order [V]
    partial,  # [segments, K, R * S * depth], float32
    samples_per_input,
    groups,
    segment,  # samples of one segment
    blocks,  # programs of one segment
    grad_channels,  # K
    source_channels,  # C
    depth,  # C / conv_groups
    width,  # K / conv_groups
    P: tl.constexpr,  # constants, because rows are divided by them at every step
    Q: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SPLIT: tl.constexpr,
    FLAT: tl.constexpr,  # a block of columns straddles taps
    EVEN_M: tl.constexpr,  # BM divides width
    EVEN_N: tl.constexpr,  # BN divides depth
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,  # the interpreter multiplies the bits of bfloat16 as integers
    GROUPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The weight gradient of one segment of a group's samples: BM output channels, BN (tap, input channel), BK pixels."""
    part = tl.program_id(0) // blocks
    group, place, first, count = find_tile(plan, part, 1, segment, groups, GROUPS)
    if group >= groups:
        return
    blocks_m = tl.cdiv(width, BM)
    block = tl.program_id(0) % blocks
    m_block = block % blocks_m
    rest = block // blocks_m
    all_columns = R * S * depth
    m = m_block * BM + tl.arange(0, BM)
    m_inside = m < width
    if FLAT:
        blocks_n = tl.cdiv(all_columns, BN)
        column = (rest % blocks_n) * BN + tl.arange(0, BN)
        tap = column // depth
        c = column - tap * depth
        n_inside = column < all_columns
    else:
        blocks_c = tl.cdiv(depth, BN)
        blocks_n = R * S * blocks_c
        tap = (rest % blocks_n) // blocks_c
        c = (rest % blocks_c) * BN + tl.arange(0, BN)
        column = tap * depth + c
        n_inside = c < depth
    conv_group = rest // blocks_n
    r = tap // S
    s = tap - r * S
    channel_m = m
    channel_n = c
    if SPLIT:
        channel_m = conv_group * width + m
        channel_n = conv_group * depth + c
    last = tl.minimum(first + segment, count) * (P * Q)
    accumulator = tl.zeros((BM, BN), tl.float32)
    for start in range(first * (P * Q), last, BK):
        row = start + tl.arange(0, BK)
        inside = row < last
        local = row // (P * Q)
        pixel = row - local * (P * Q)
        sample = tl.load(plan + groups + 2 + place + local, mask=inside, other=0)
        i = pixel // Q
        j = pixel - i * Q
        at = (sample.to(tl.int64) * (P * Q) + pixel) * grad_channels
        if EVEN_M:
            dy = tl.load(grad + at[:, None] + channel_m[None, :], mask=inside[:, None], other=0.0)  # [BK, BM]
        else:
            dy = tl.load(grad + at[:, None] + channel_m[None, :], mask=inside[:, None] & m_inside[None, :], other=0.0)
        base = (sample // samples_per_input).to(tl.int64) * (H * W * source_channels)
        y = i * STRIDE_H - PAD_H
        x = j * STRIDE_W - PAD_W
        if FLAT:
            y = y[:, None] + (r * DILATION_H)[None, :]
            x = x[:, None] + (s * DILATION_W)[None, :]
            seen = inside[:, None] & n_inside[None, :]
            seen = seen & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            at = base[:, None] + ((y * W + x) * source_channels + channel_n[None, :])
        else:
            y = y + r * DILATION_H
            x = x + s * DILATION_W
            seen = inside & (y >= 0) & (y < H) & (x >= 0) & (x < W)
            at = (base + (y * W + x) * source_channels)[:, None] + channel_n[None, :]
            if EVEN_N:
                seen = seen[:, None]
            else:
                seen = seen[:, None] & n_inside[None, :]
        shifted = tl.load(image + at, mask=seen, other=0.0)  # [BK, BN]
        if WIDEN:
            dy = dy.to(tl.float32)
            shifted = shifted.to(tl.float32)
        accumulator = tl.dot(tl.trans(dy), shifted, accumulator, input_precision=PRECISION)
    at = (part.to(tl.int64) * grad_channels + channel_m) * all_columns
    written = m_inside[:, None] & n_inside[None, :]
    tl.store(partial + at[:, None] + column[None, :], accumulator, mask=written)


@triton.jit(do_not_specialize=["groups", "segment", "num_in"])
def reduce_kernel(
    partial,  # [segments, K, R * S * depth], float32
    plan,  # offsets [groups + 2]
    out_starts,  # [N] or None
    in_starts,  # [N] or None
    grad_weight,  # [R_out, R_in / groups, R, S], any strides
    groups,
    segment,
    num_in,
    out_width,  # K
    in_width,  # columns of one slice of the weight
    total_rows,  # R_out
    total_columns,  # R_in / conv_groups
    taps,
    taps_s,
    stride_row,
    stride_column,
    stride_r,
    stride_s,
    HAS_OUT: tl.constexpr,
    HAS_IN: tl.constexpr,
    PAIRS: tl.constexpr,
    PARTITION: tl.constexpr,  # the rows are a partition, and so no element is shared by two experts of the output side
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds the segments of every group whose slice covers an element, in their order; zeros where nobody's does."""
    blocks_n = tl.cdiv(taps * total_columns, BN)
    first_row = tl.program_id(0) // blocks_n * BM
    row = first_row + tl.arange(0, BM)
    column = (tl.program_id(0) % blocks_n) * BN + tl.arange(0, BN)  # over (tap, channel of the whole side)
    tap = column // total_columns
    channel = column - tap * total_columns
    row_inside = row < total_rows
    column_inside = tap < taps
    depth = in_width
    accumulator = tl.zeros((BM, BN), tl.float32)
    # of a partition only the groups of these rows' experts
    begin_group = 0
    end_group = groups
    if PARTITION:
        each = 1
        if PAIRS:
            each = num_in
        begin_group = first_row // out_width * each
        end_group = tl.minimum(tl.cdiv(first_row + BM, out_width) * each, groups)
    first = segments_before(plan, begin_group, segment)
    for group in range(begin_group, end_group):
        count = tl.load(plan + group + 1) - tl.load(plan + group)
        segments = tl.cdiv(count, segment)
        out_e = group
        in_e = group
        if PAIRS:
            out_e = group // num_in
            in_e = group % num_in
        k = row
        if HAS_OUT:
            k = row - _slice_start(out_e, out_starts, out_width, out_starts is not None).to(tl.int32)
        c = channel
        if HAS_IN:
            c = channel - _slice_start(in_e, in_starts, in_width, in_starts is not None).to(tl.int32)
        rows_covered = row_inside & (k >= 0) & (k < out_width)
        columns_covered = column_inside & (c >= 0) & (c < depth)
        if tl.max(rows_covered.to(tl.int32), 0) * tl.max(columns_covered.to(tl.int32), 0) * segments > 0:
            covered = rows_covered[:, None] & columns_covered[None, :]
            at = (k * (taps * depth))[:, None] + (tap * depth + c)[None, :]
            for part in range(first, first + segments):
                begin = (tl.zeros((), tl.int64) + part) * out_width * (taps * depth)
                accumulator += tl.load(partial + begin + at, mask=covered, other=0.0)
        first += segments
    r = tap // taps_s
    s = tap - r * taps_s
    at = (row.to(tl.int64) * stride_row)[:, None] + (channel * stride_column + r * stride_r + s * stride_s)[None, :]
    value = accumulator.to(grad_weight.dtype.element_ty)
    tl.store(grad_weight + at, value, mask=row_inside[:, None] & column_inside[None, :])


# --- starting them ------------------------------------------------------------------------------------------------------

_REDUCE_TILE = {"BM": 16, "BN": 128, "num_warps": 4}
_PACK_BELOW = 0.8  # a tile of one sample with a smaller share of rows in use takes rows of several samples instead
_MAX_PACKED_GROUPS = 1023  # with more, finding a tile's group costs more than rows left unused
_MAX_TAP_BITS = 64
_MAX_WORKSPACE = 1 << 26  # bytes of partial weight gradients, where segments of one sample would take more


def forward(
    input: Tensor,  # [B, C, H, W], channels_last
    weight: Tensor,
    experts: Experts,
    g: Conv2dGeometry,
    epilogue: Epilogue,
) -> Tensor:  # [V, K, P, Q], channels_last
    samples = input.shape[0] * g.samples_per_input
    size = [
        output_size(input.shape[2 + a], weight.shape[2 + a], g.stride[a], g.padding[a], g.dilation[a]) for a in (0, 1)
    ]
    target = _empty(input, samples, g.out_width, *size)
    _convolve(input, weight, target, experts, g, epilogue, None, False)
    return target


def grad_input(
    grad: Tensor,  # [V, K, P, Q], channels_last
    weight: Tensor,
    experts: Experts,
    g: Conv2dGeometry,
    size: tuple[int, int],
    gate: Tensor | None = None,  # [V]
    image: Tensor | None = None,  # [B, C, H, W], channels_last: the gate's gradient is wanted too
) -> tuple[Tensor, Tensor | None]:
    """dx of each virtual sample ``[V, C, H, W]``, times its gate, and ``d gate [V]`` float32: the dot product of the
    ungated dx and the input, taken from the accumulators."""
    target = _empty(grad, grad.shape[0], g.in_width, *size)
    dots = _convolve(grad, weight, target, experts, g, Epilogue(gate=gate), image, True)
    return target, None if dots is None else dots.sum((1, 2))


class _Tiling(NamedTuple):
    """How the rows of a forward or an input gradient are numbered."""

    rows: int  # of one sample (and one residue of the stride)
    columns: int
    residues: int
    problem: Problem

    @property
    def pixels(self) -> int:
        return self.rows * self.columns


def _tiling(
    g: Conv2dGeometry, samples: int, size: Sequence[int], taps: Sequence[int], x: Tensor, backward: bool
) -> _Tiling:
    """``size``: rows and columns of the result, per sample."""
    rows, columns, residues = size[0], size[1], 1
    width, depth = g.out_width // g.groups, g.in_width // g.groups * taps[0] * taps[1]
    if backward:
        rows, columns = triton.cdiv(rows, g.stride[0]), triton.cdiv(columns, g.stride[1])
        residues = g.stride[0] * g.stride[1]
        width, depth = g.in_width // g.groups, triton.cdiv(g.out_width // g.groups * taps[0] * taps[1], residues)
    problem = Problem("convolution", kind(x), samples * rows * columns, width, depth, residues * g.groups)
    return _Tiling(rows, columns, residues, problem)


def _packs(tiling: _Tiling, samples: int, config: TileConfig, groups: int) -> bool:
    """Whether tiles take rows of several samples: where those of one sample would leave too many unused."""
    used = tiling.pixels / (triton.cdiv(tiling.pixels, config.block_m) * config.block_m)
    return samples > 1 and used < _PACK_BELOW and groups <= _MAX_PACKED_GROUPS


def _convolve(
    source: Tensor,
    weight: Tensor,
    target: Tensor,
    experts: Experts,
    g: Conv2dGeometry,
    epilogue: Epilogue,
    image: Tensor | None,
    backward: bool,
) -> Tensor | None:
    """Fills ``target``; returns the dot products of each pixel where ``image`` is given."""
    device = source.device
    _refuse_huge(source, target)
    taps = weight.shape[2:]
    samples = target.shape[0]
    tiling = _tiling(g, samples, target.shape[2:], taps, source, backward)
    depth, width = source.shape[1] // g.groups, target.shape[1] // g.groups
    out, inner = _sides(experts, g)
    strides = weight.stride()
    along_n, along_k = (strides[1], strides[0]) if backward else (strides[0], strides[1])
    steps = [g.stride[a] // math.gcd(g.dilation[a], g.stride[a]) if backward else 1 for a in (0, 1)]

    def run(config: TileConfig) -> Tensor | None:
        block, flat = block_k(config, depth)
        flat = flat or taps[0] * taps[1] > _MAX_TAP_BITS
        packed = _packs(tiling, samples, config, max(g.num_out, 1) * max(g.num_in, 1))
        if packed:
            plan, groups, pairs = _plan(experts, g, samples, device)
            tiles = tile_bound(samples, tiling.pixels, config.block_m, groups)
        else:
            plan, groups, pairs = None, 0, False
            tiles = samples * triton.cdiv(tiling.pixels, config.block_m)
        blocks = g.groups * triton.cdiv(width, config.block_n)
        dots = None
        if image is not None:
            dots = torch.empty((samples, blocks, target.shape[2] * target.shape[3]), dtype=torch.float32, device=device)
        affine = epilogue.scale if epilogue.scale is not None else epilogue.shift
        launch(
            convolution_kernel, (tiles * blocks, tiling.residues), device,
            source, weight, target, out, inner, starts_on(g.out_starts, device), starts_on(g.in_starts, device), plan,
            epilogue.bias, epilogue.gate, epilogue.scale, epilogue.shift, epilogue.residual, image, dots,
            g.samples_per_input, groups, g.num_out, g.num_in, g.out_width, g.in_width,
            source.shape[2], source.shape[3], source.shape[1], target.shape[2], target.shape[3], target.shape[1],
            tiling.rows, tiling.columns, depth, width, strides[0], strides[1], strides[2], strides[3], along_n, along_k,
            g.out_width // g.groups * strides[0],
            R=taps[0], S=taps[1], STRIDE_H=g.stride[0], STRIDE_W=g.stride[1], PAD_H=g.padding[0], PAD_W=g.padding[1],
            DILATION_H=g.dilation[0], DILATION_W=g.dilation[1],
            STEP_R=steps[0], STEP_S=steps[1],
            GRAD_INPUT=backward, PACKED=packed, PAIRS=pairs, SPLIT=g.groups > 1,
            PER_SLICE=affine is not None and affine.shape[0] != g.out_width, RELU=epilogue.relu, FLAT=flat,
            EVEN_N=width % config.block_n == 0, EVEN_K=depth % block == 0,
            PRECISION=_precision(tiling.problem.kind), WIDEN=_widen(source), GROUPS=triton.next_power_of_2(groups + 1),
            BM=config.block_m, BN=config.block_n, BK=block, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return dots

    return run(_config(tiling.problem, device, run))


def grad_weight(
    grad: Tensor,  # [V, K, P, Q], channels_last
    image: Tensor,  # [B, C, H, W], channels_last
    experts: Experts,
    g: Conv2dGeometry,
    target: Tensor,  # [R_out, R_in / groups, R, S]: filled
) -> None:
    device = grad.device
    _refuse_huge(grad, image)
    samples, channels, rows, columns = grad.shape
    taps = target.shape[2:]
    depth, width = g.in_width // g.groups, g.out_width // g.groups
    plan, groups, pairs = _plan(experts, g, samples, device)
    out, inner = _sides(experts, g)
    terms = samples * rows * columns
    all_columns = taps[0] * taps[1] * depth
    segment = _segment(
        samples, triton.cdiv(width, 64) * triton.cdiv(all_columns, 64) * g.groups, channels * all_columns, device
    )
    segments = tile_bound(samples, 1, segment, groups)
    partial = torch.empty((segments, channels, all_columns), dtype=torch.float32, device=device)
    flat = depth < SMALLEST_BLOCK  # few channels of an image
    # the segments that a routing in equal parts has; the bound has room for others
    parts = triton.cdiv(samples, segment) * g.groups
    if flat:
        problem = Problem("grad_weight", kind(grad), width, all_columns, terms, parts)
    else:
        problem = Problem("grad_weight", kind(grad), width, depth, terms, parts * taps[0] * taps[1])

    def run(config: TileConfig) -> None:
        columns_n = triton.cdiv(all_columns, config.block_n)
        if not flat:
            columns_n = taps[0] * taps[1] * triton.cdiv(depth, config.block_n)
        blocks = triton.cdiv(width, config.block_m) * columns_n * g.groups
        launch(
            grad_weight_kernel, (segments * blocks,), device,
            grad, image, plan, partial, g.samples_per_input, groups, segment, blocks, channels, image.shape[1], depth,
            width, P=rows, Q=columns, H=image.shape[2], W=image.shape[3], R=taps[0], S=taps[1],
            STRIDE_H=g.stride[0], STRIDE_W=g.stride[1], PAD_H=g.padding[0], PAD_W=g.padding[1],
            DILATION_H=g.dilation[0], DILATION_W=g.dilation[1], SPLIT=g.groups > 1, FLAT=flat,
            EVEN_M=width % config.block_m == 0, EVEN_N=depth % config.block_n == 0,
            PRECISION=_precision(problem.kind), WIDEN=_widen(grad), GROUPS=triton.next_power_of_2(groups + 1),
            BM=config.block_m, BN=config.block_n, BK=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip

    run(_config(problem, device, run))
    total = taps[0] * taps[1] * target.shape[1]
    grid = (triton.cdiv(target.shape[0], _REDUCE_TILE["BM"]) * triton.cdiv(total, _REDUCE_TILE["BN"]),)
    launch(
        reduce_kernel, grid, device,
        partial, plan, starts_on(g.out_starts, device), starts_on(g.in_starts, device), target,
        groups, segment, g.num_in, channels, depth, target.shape[0], target.shape[1], taps[0] * taps[1], taps[1],
        *target.stride(), HAS_OUT=out is not None, HAS_IN=inner is not None, PAIRS=pairs,
        PARTITION=out is not None and not g.out_starts, **_REDUCE_TILE,
    )  # fmt: skip


def _segment(samples: int, tiles: int, elements: int, device: torch.device) -> int:
    """Samples of one segment of a weight gradient: enough segments for the device to be full twice, as few as fit the
    workspace. A function of shapes and the device, so that the same inputs give the same bits."""
    wanted = max(1, min(samples, triton.cdiv(2 * multiprocessors(device), tiles), _MAX_WORKSPACE // (4 * elements)))
    return max(1, triton.cdiv(samples, wanted))


def _plan(experts: Experts, g: Conv2dGeometry, samples: int, device: torch.device) -> tuple[Tensor, int, bool]:
    """The plan, given or made here; its number of groups; and whether they are pairs of experts."""
    groups, pairs = experts.groups(g, samples)
    plan = experts.plan
    if plan is None:
        plan = make(experts, g.num_out, g.num_in if pairs or not g.num_out else 0, samples, device)
    return plan, groups, pairs


def _refuse_huge(*images: Tensor) -> None:
    """Positions inside of one sample are 32-bit numbers."""
    for image in images:
        if image[0:1].numel() >= 2**31:
            raise BuildError(f"one sample has 2**31 elements or more: {tuple(image.shape)}")


def _widen(x: Tensor) -> bool:
    return INTERPRETED and x.dtype == torch.bfloat16


def _precision(kind: str) -> str:
    return "ieee" if kind == "ieee" else "tf32"


def _sides(experts: Experts, g: Conv2dGeometry) -> tuple[Tensor | None, Tensor | None]:
    out = experts.out.contiguous() if g.num_out and experts.out is not None else None
    inner = experts.inner.contiguous() if g.num_in and experts.inner is not None else None
    return out, inner


def _config(problem: Problem, device: torch.device, run: Callable[[TileConfig], object]) -> TileConfig:
    if tuning.active():
        tuning.fastest(problem, device, run)
    return tuning.choose(problem, device)


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
