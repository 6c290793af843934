# SPDX-License-Identifier: Apache-2.0
"""What each operator of a folded graph becomes in a program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx

from .. import ops
from ..geometry import Conv2dGeometry
from ..routing import choose
from .capture import arguments
from .folding import NORMS, Affine, affine_of, as_fused, is_mean_of_pixels
from .recording import (
    ADD,
    ARGMAX,
    AVERAGE_POOL,
    COPY,
    FLATTEN,
    GATHER,
    GROUP_NORM,
    LINEAR,
    MAX_POOL,
    MEAN,
    NO_PROLOGUE,
    SCALE_ROWS,
    SOFTMAX,
    Buffer,
    Prologue,
    Recording,
    Unsupported,
    Value,
    image_size,
    is_vector,
    per_sample,
    require_channels_first,
)

__all__ = ["ANY_LAYOUT", "HANDLERS", "VIEWS"]

_aten = torch.ops.aten
# Outputs from which on a linear layer is a 1x1 convolution.
_WIDE_LINEAR = 32
VIEWS = {
    _aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten.squeeze.dim, _aten.squeeze.dims,
    _aten.unsqueeze.default, _aten.permute.default, _aten.transpose.int, _aten.view_as.default, _aten.squeeze.default,
    _aten.expand.default,
}  # fmt: skip


_Handler = Callable[[Recording, torch.fx.Node], None]


def _conv(low: Recording, node: torch.fx.Node) -> None:
    conv = as_fused(node)
    assert conv is not None
    e, g = conv.epilogue, conv.geometry
    weight = low.captured.constant(conv.weight)
    given = e.bias, e.scale, e.shift
    constants = [low.captured.constant(n) for n in given]
    if weight is None or any(n is not None and c is None for n, c in zip(given, constants, strict=True)):
        raise Unsupported("its weights are computed")
    if g.samples_per_input != 1:
        raise Unsupported("several experts a sample")
    source, result = low.values[conv.input], low.image(node)
    if (source.size, result.size) != (per_sample(conv.input), per_sample(node)):
        raise Unsupported("images of one row or column")
    sides = [
        (_experts(low, conv.out_expert), g.num_out, list(g.out_starts)),
        (_experts(low, conv.in_expert), g.num_in, list(g.in_starts)),
    ]
    gate = None if e.gate is None else low.numbers(e.gate)
    residual = None if e.residual is None else low.plain(e.residual)
    bias, scale, shift = (low.pointer(c) for c in constants)
    affine = constants[1] if constants[1] is not None else constants[2]
    per_slice = affine is not None and affine.shape[0] != g.out_width
    low.convolution(node, source, result, weight, g, sides, residual, gate, bias, scale, shift, per_slice, bool(e.relu))


def _experts(low: Recording, node: Any) -> Buffer | None:
    return None if node is None else low.values[node].buffer


def _linear(low: Recording, node: torch.fx.Node) -> None:
    x, *given = arguments(node)
    weight, bias = map(low.captured.constant, given)
    if weight is None or (given[1] is not None and bias is None):
        raise Unsupported("its weights are computed")
    if per_sample(x)[-1:] != (weight.shape[1],) or any(s != 1 for s in per_sample(x)[:-1]):
        raise Unsupported("a linear layer of more than a vector")
    if weight.shape[0] < _WIDE_LINEAR:
        low.layer(LINEAR, low.plain(x), low.image(node), weight=weight, bias=bias)
        return
    g = Conv2dGeometry((), (), 0, 0, weight.shape[0], weight.shape[1], (1, 1), (0, 0), (1, 1), 1)
    whole: list[tuple[Buffer | None, int, list[int]]] = [(None, 0, []), (None, 0, [])]
    weight4d = weight[:, :, None, None]
    low.convolution(node, low.values[x], low.image(node), weight4d, g, whole, None, None, low.pointer(bias))


def _affine(low: Recording, node: torch.fx.Node) -> None:
    affine = affine_of(node, low.captured)
    if affine is None:
        raise Unsupported("by the batch's own statistics")
    _read_through(low, node.args[0], node, affine)


def _read_through(low: Recording, source: Any, node: torch.fx.Node, affine: Affine) -> None:
    """An affine map of ``source``, done by whoever reads it."""
    channels = image_size(node)[0]
    scale, shift, expert = affine.scale, affine.shift, None
    if affine.expert is not None:
        chosen = low.values[affine.expert]
        if not 0 < chosen.choices <= affine.num_experts:
            raise Unsupported("a choice that comes from outside")
        expert = chosen.buffer
        starts = affine.starts or [e * channels for e in range(affine.num_experts)]
        scale, shift = (torch.stack([t[s : s + channels] for s in starts]) for t in (scale, shift))
    value = low.values[source]
    p = value.prologue
    if p.relu or (p is not NO_PROLOGUE and (p.expert is not None or expert is not None)):
        value = low.plain(source)
    elif p is not NO_PROLOGUE:
        shift = shift if p.shift is None else shift + scale * p.shift
        scale = scale if p.scale is None else scale * p.scale
    low.values[node] = Value(value.buffer, *value.size, prologue=Prologue(scale, shift, expert))


def _relu(low: Recording, node: torch.fx.Node) -> None:
    value = low.values[node.args[0]]
    p = value.prologue
    low.values[node] = Value(value.buffer, *value.size, prologue=Prologue(p.scale, p.shift, p.expert, True))


def _by_constant(low: Recording, node: torch.fx.Node) -> None:
    """Addition, subtraction, multiplication or division of an image and a constant for each channel."""
    a, b, *rest = arguments(node)
    if node.target is _aten.rsub.Scalar:
        a, b = b, a
    channels = image_size(node)[0]
    first = isinstance(a, torch.fx.Node) and low.captured.constant(a) is None
    source, other = (a, b) if first else (b, a)
    if per_sample(source) != per_sample(node):
        raise Unsupported("a constant of more numbers than the value")
    require_channels_first(node)
    number = low.captured.constant(other)
    if rest not in ([], [1]) or (number is None and not isinstance(other, (int, float))):
        raise Unsupported("neither of two values is a constant")
    value = torch.tensor(float(other), dtype=torch.float64) if number is None else number.double()
    rank = len(per_sample(node)) + 1
    spread = value.reshape([1] * (rank - value.dim()) + list(value.shape))
    if rank < 2 or any(size != 1 for i, size in enumerate(spread.shape) if i != 1):
        raise Unsupported("a constant that is not one for each channel")
    constant = spread.flatten().expand(channels)
    one, zero = torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    if node.target is _aten.add.Tensor:
        affine = Affine(one, constant)
    elif node.target in (_aten.sub.Tensor, _aten.rsub.Scalar):
        affine = Affine(one, -constant) if first else Affine(-one, constant)
    elif node.target is _aten.mul.Tensor:
        affine = Affine(constant, zero)
    elif first:
        affine = Affine(1 / constant, zero)
    else:
        raise Unsupported("a constant divided by a value")
    _read_through(low, source, node, affine)


def _two_values(low: Recording, node: torch.fx.Node) -> bool:
    return all(isinstance(n, torch.fx.Node) and low.captured.constant(n) is None for n in arguments(node)[:2])


def _sum(low: Recording, node: torch.fx.Node) -> None:
    if not _two_values(low, node):
        return _by_constant(low, node)
    a, b, alpha = arguments(node)
    if alpha != 1 or per_sample(a) != per_sample(b):
        raise Unsupported("a sum of different shapes, or with a factor")
    low.layer(ADD, low.values[a], low.image(node), other=low.plain(b))
    return None


def _product(low: Recording, node: torch.fx.Node) -> None:
    if not _two_values(low, node):
        return _by_constant(low, node)
    a, b = arguments(node)
    if all(s == 1 for s in per_sample(a)):
        a, b = b, a
    if any(s != 1 for s in per_sample(b)) or len(per_sample(b)) not in (len(per_sample(a)), 0):
        raise Unsupported("a product of two images")
    low.layer(SCALE_ROWS, low.values[a], low.image(node), other=low.plain(b))
    return None


def _mean(low: Recording, node: torch.fx.Node) -> None:
    if not is_mean_of_pixels(node):
        raise Unsupported("a mean over other dimensions than an image's pixels")
    low.layer(MEAN, low.values[node.args[0]], low.image(node))


def _layer_norm(low: Recording, node: torch.fx.Node) -> None:
    x, shape, *given, eps, _ = arguments(node)
    if len(shape) != 1 or len(per_sample(node)) != 1:
        raise Unsupported("a LayerNorm of several dimensions")
    _norm(low, node, x, 1, given, eps)


def _group_norm(low: Recording, node: torch.fx.Node) -> None:
    x, groups, *given, eps, _ = arguments(node)
    _norm(low, node, x, groups, given, eps)


def _norm(low: Recording, node: torch.fx.Node, x: Any, groups: int, given: Sequence[Any], eps: float) -> None:
    weight, bias = map(low.captured.constant, given)
    low.layer(GROUP_NORM, low.plain(x), low.image(node), weight=weight, bias=bias, groups=groups, eps=eps)


def _choice(low: Recording, node: torch.fx.Node) -> None:
    chosen = low.index_buffer()
    low.layer(ARGMAX, low.plain(node.args[0]), chosen)
    low.values[node] = Value(chosen, index=True, choices=image_size(node.args[0])[0])


def _softmax(low: Recording, node: torch.fx.Node) -> None:
    x, dim, dtype = arguments(node)
    if len(per_sample(node)) != 1 or dim not in (1, -1) or dtype is not None:
        raise Unsupported("a softmax over another dimension than a vector's")
    low.layer(SOFTMAX, low.plain(x), low.image(node))


def _gather(low: Recording, node: torch.fx.Node) -> None:
    x, dim, index, _ = arguments(node)
    chosen = low.values[index]
    if dim not in (1, -1) or per_sample(node) != (1,) or not 0 < chosen.choices <= image_size(x)[0]:
        raise Unsupported("it gathers something else than one number of each vector")
    low.layer(GATHER, low.plain(x), low.image(node), index=chosen.buffer)


def _view(low: Recording, node: torch.fx.Node) -> None:
    source = node.args[0]
    before, after = per_sample(source), per_sample(node)
    value = low.values[source]
    if math.prod(before) != math.prod(after):
        raise Unsupported("it repeats a value")
    if is_vector(before) and is_vector(after):
        low.values[node] = value
        return
    if node.target in (_aten.permute.default, _aten.transpose.int, _aten.expand.default) or len(after) != 1:
        raise Unsupported("it changes an image's shape")
    low.layer(FLATTEN, value, low.image(node))


def _cat(low: Recording, node: torch.fx.Node) -> None:
    parts, dim = arguments(node)
    if dim not in (1, -len(per_sample(node))):
        raise Unsupported("it concatenates something else than channels")
    sizes = [image_size(part)[1:] for part in parts]
    if any(size != sizes[0] for size in sizes):
        raise Unsupported("it concatenates images of different sizes")
    values = [low.plain(part) for part in parts]
    result = low.image(node)
    channel = 0
    for value in values:
        buffer = value.buffer
        if buffer.parent is None and not buffer.alone and buffer.channels == value.channels:
            buffer.parent = result.buffer, channel  # it is written there in the first place
        else:
            piece = Value(Buffer(0, value.channels, (result.buffer, channel)), *value.size)
            low.layer(COPY, value, piece)
        channel += value.channels


def _max_pool(low: Recording, node: torch.fx.Node) -> None:
    x, kernel, stride, padding, dilation, ceil = arguments(node)
    if ceil or _pair(dilation) != (1, 1):
        raise Unsupported("a max-pool with dilation or ceil_mode")
    low.pool(MAX_POOL, x, node, _pair(kernel), _pair(stride or kernel), _pair(padding))


def _average_pool(low: Recording, node: torch.fx.Node) -> None:
    x, kernel, stride, padding, ceil, count_padding, divisor = arguments(node)
    if ceil or divisor is not None:
        raise Unsupported("an average pool with ceil_mode or a divisor of its own")
    low.pool(AVERAGE_POOL, x, node, _pair(kernel), _pair(stride or kernel), _pair(padding), count_padding)


def _adaptive_pool(low: Recording, node: torch.fx.Node) -> None:
    x = node.args[0]
    _, height, width = image_size(node)
    value = low.values[x]
    if value.height % height or value.width % width:
        raise Unsupported("an adaptive pool whose windows differ in size")
    kernel = value.height // height, value.width // width
    low.pool(MEAN if (height, width) == (1, 1) else AVERAGE_POOL, x, node, kernel, kernel, (0, 0))


def _slice(low: Recording, node: torch.fx.Node) -> None:
    """Every step-th row or column."""
    x, dim, start, end, step = arguments(node)
    sizes = per_sample(x)
    if len(sizes) != 3 or dim not in (2, 3) or start or (end is not None and end < sizes[dim - 1]):
        raise Unsupported("a slice of something else than every so manieth row or column")
    low.layer(COPY, low.values[x], low.image(node), stride=(step, 1) if dim == 2 else (1, step))


def _pad(low: Recording, node: torch.fx.Node) -> None:
    """Channels of zeros before and behind."""
    x, widths, *rest = arguments(node)
    if len(widths) != 6 or any(widths[:4]) or min(widths) < 0 or any(r not in ("constant", 0, None) for r in rest):
        raise Unsupported("padding of something else than channels with zeros")
    low.layer(COPY, low.values[x], low.image(node), at_channel=widths[4])


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


HANDLERS: dict[Any, _Handler] = {
    ops.conv2d_fused: _conv,
    choose: _choice,
    _aten.linear.default: _linear,
    _aten.relu.default: _relu,
    _aten.add.Tensor: _sum,
    _aten.sub.Tensor: _by_constant,
    _aten.rsub.Scalar: _by_constant,
    _aten.mul.Tensor: _product,
    _aten.div.Tensor: _by_constant,
    _aten.mean.dim: _mean,
    _aten.layer_norm.default: _layer_norm,
    _aten.group_norm.default: _group_norm,
    _aten.softmax.int: _softmax,
    _aten.gather.default: _gather,
    _aten.cat.default: _cat,
    _aten.max_pool2d.default: _max_pool,
    _aten.avg_pool2d.default: _average_pool,
    _aten.adaptive_avg_pool2d.default: _adaptive_pool,
    _aten.slice.Tensor: _slice,
    _aten.pad.default: _pad,
    _aten.constant_pad_nd.default: _pad,
    **dict.fromkeys(NORMS, _affine),
    **dict.fromkeys(VIEWS, _view),
}


# Those that look at numbers one by one, or check their sizes themselves.
ANY_LAYOUT = {*VIEWS, ops.conv2d_fused, _aten.linear.default, _aten.relu.default, _aten.add.Tensor, _aten.mul.Tensor}
