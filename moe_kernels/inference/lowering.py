# SPDX-License-Identifier: Apache-2.0
"""Runs of a graph's nodes as programs of the C++ kernels (csrc/cpu/program.h): what each node becomes, where its result
lies, and how memory is used again.

Images lie channels last. A vector is an image of one pixel, so that flattening one changes nothing. What is concatenated
is written where it will be read. An affine map and a ReLU that no convolution could take behind it go before what reads
the result: a prologue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from .. import ops
from ..backends import choose as choose_backend
from ..backends import native
from ..geometry import Conv2dGeometry
from ..routing import choose
from .capture import Captured, arguments, is_size, tensor_of
from .folding import NORMS, Affine, affine_of, as_fused, is_mean_of_pixels

__all__ = ["DTYPES", "Program", "Unsupported", "lower", "why_not"]

_aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64)
_ALIGNMENT = 64  # bytes
_NOWHERE = -1
# As moe::cpu::LayerOp.
_NAMES = (
    "mean", "norm", "linear", "argmax", "softmax", "gather", "copy", "add", "gate", "max-pool", "average pool", "flatten",
)  # fmt: skip
(
    _MEAN, _GROUP_NORM, _LINEAR, _ARGMAX, _SOFTMAX, _GATHER, _COPY, _ADD, _SCALE_ROWS, _MAX_POOL, _AVERAGE_POOL, _FLATTEN,
) = range(len(_NAMES))  # fmt: skip
# Outputs from which on a linear layer is a 1x1 convolution.
_WIDE_LINEAR = 32
_VIEWS = {
    _aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten.squeeze.dim, _aten.squeeze.dims,
    _aten.unsqueeze.default, _aten.permute.default, _aten.transpose.int, _aten.view_as.default, _aten.squeeze.default,
    _aten.expand.default,
}  # fmt: skip


class Unsupported(Exception):
    """Why a node has no native form."""


@dataclass(eq=False)
class Buffer:
    """Memory of one value for each sample; ``parent``: a range of another's channels instead of its own."""

    bytes: int
    channels: int = 0
    parent: tuple[Buffer, int] | None = None
    alone: bool = False  # it must not become a range of another
    first: int = 1 << 60  # steps in which it is in use
    last: int = -1
    offset: int = _NOWHERE

    def root(self) -> tuple[Buffer, int]:
        """The buffer whose memory it is, and its first channel there."""
        buffer, channel = self, 0
        while buffer.parent is not None:
            channel += buffer.parent[1]
            buffer = buffer.parent[0]
        return buffer, channel


@dataclass(eq=False)
class Prologue:
    """``relu(scale * x + shift)``; with ``expert`` a row of ``[N, C]`` for each sample."""

    scale: Tensor | None = None
    shift: Tensor | None = None
    expert: Buffer | None = None
    relu: bool = False


_NO_PROLOGUE = Prologue()


@dataclass(eq=False)
class Value:
    """A node's result: pixels of a buffer, and what is done to them when they are read; or, of ``index``, int64."""

    buffer: Buffer
    channels: int = 1
    height: int = 1
    width: int = 1
    prologue: Prologue = _NO_PROLOGUE
    index: bool = False
    choices: int = 0  # an index is below it; 0: it comes from outside, and only convolutions look at it

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


class Step(NamedTuple):
    """A call of the native program's method, once places are known."""

    name: str
    node: torch.fx.Node
    reads: tuple[Buffer, ...]
    writes: Buffer | None
    record: Callable[[Any], None]


@dataclass
class Program:
    """A native program, and what it reads and gives."""

    native: Any
    inputs: list[torch.fx.Node]
    outputs: list[torch.fx.Node]
    shapes: list[tuple[tuple[int, ...], torch.dtype]]  # of the outputs, without the batch
    keep: list[Tensor]  # what the program's pointers point to
    steps: list[tuple[str, torch.fx.Node]]  # what each does, and for which node

    def run(
        self, inputs: Sequence[Tensor], layout: torch.memory_format, seconds: list[float] | None = None
    ) -> list[Tensor]:
        """The values of ``outputs`` for those of ``inputs``, ``[B, ...]`` each as they were traced.

        Images among the results are in the memory format ``layout``. ``seconds`` gets the time of each step, summed
        over the threads where each takes a part of the batch."""
        batch = inputs[0].shape[0]
        inputs = [x.resolve_neg() for x in inputs]
        for node, x in zip(self.inputs, inputs, strict=True):  # the native code reads memory as what was traced
            traced = tensor_of(node)
            assert traced is not None
            if x.dtype != traced.dtype or x.shape[1:] != traced.shape[1:] or x.shape[0] != batch:
                expected = f"{[batch, *traced.shape[1:]]} of {traced.dtype}"
                raise RuntimeError(f"{node.name}: expected {expected}, got {list(x.shape)} of {x.dtype}")
        given = [(x.data_ptr(), _strides(x)) for x in inputs]
        results = []
        for shape, dtype in self.shapes:
            memory_format = layout if len(shape) == 3 else torch.contiguous_format
            results.append(torch.empty((batch, *shape), dtype=dtype, memory_format=memory_format))
        arguments = batch, given, [(y.data_ptr(), _strides(y)) for y in results], torch.get_num_threads()
        if seconds is None:
            self.native.run(*arguments)
        else:
            seconds[:] = self.native.profile(*arguments)
        return results


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of samples, channels, rows and columns; a vector's numbers are channels, wherever they lie."""
    stride = x.stride()
    long = [s for s, size in zip(stride[1:], x.shape[1:], strict=True) if size != 1]
    return stride if len(long) > 1 else (stride[0], long[0] if long else 0, 0, 0)


def per_sample(node: Any) -> tuple[int, ...]:
    """The sizes behind the batch.

    Raises:
        Unsupported: if it is no tensor whose first size is the batch and whose others are numbers.
    """
    value = tensor_of(node)
    if value is None:
        raise Unsupported("not a tensor")
    if not value.dim() or not isinstance(value.shape[0], torch.SymInt) or not str(value.shape[0]).isidentifier():
        raise Unsupported("its first dimension is not the batch")
    if any(not isinstance(s, int) for s in value.shape[1:]):
        raise Unsupported("a size depends on the batch")
    return tuple(value.shape[1:])


def _image(node: Any) -> tuple[int, int, int]:
    """Channels, rows and columns of an image or a vector, of which the native kernels know."""
    shape = per_sample(node)
    long = [s for s in shape if s != 1]
    if len(shape) == 3 and len(long) > 1:
        return shape
    if len(long) > 1:
        raise Unsupported(f"neither an image nor a vector: {list(shape)} a sample")
    return (long[0] if long else 1), 1, 1


def _require_channels_first(node: Any) -> None:
    """Where channels count, they are the first of the sizes: ``[B, 1, L]`` is a vector of L numbers, and of one channel.

    Raises:
        Unsupported: if they are not.
    """
    shape = per_sample(node)
    channels, *pixels = _image(node)
    if shape != (channels, *pixels) and any(s != 1 for s in shape[1:]):
        raise Unsupported(f"a vector along another dimension than the channels: {list(shape)} a sample")


def _is_vector(shape: tuple[int, ...]) -> bool:
    return sum(s != 1 for s in shape) <= 1


@dataclass
class _Lowering:
    """One program in the making."""

    captured: Captured
    dtype: torch.dtype
    values: dict[Any, Value] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    keep: list[Tensor] = field(default_factory=list)
    node: Any = None  # that is being lowered

    # --- values -------------------------------------------------------------------------------------------------------

    def buffer(self, channels: int, pixels: int) -> Buffer:
        return Buffer(channels * pixels * self.dtype.itemsize, channels)

    def index_buffer(self) -> Buffer:
        return Buffer(8, 1)

    def image(self, node: torch.fx.Node) -> Value:
        channels, height, width = _image(node)
        value = Value(self.buffer(channels, height * width), channels, height, width)
        self.values[node] = value
        return value

    def plain(self, node: Any) -> Value:
        """With nothing left to be done to it when it is read."""
        value = self.values[node]
        if value.prologue is _NO_PROLOGUE:
            return value
        made = Value(self.buffer(value.channels, value.pixels), *value.size)
        self.layer(_COPY, value, made)
        self.values[node] = made
        return made

    def numbers(self, node: Any) -> Value:
        """One number a sample, side by side."""
        value = self.plain(node)
        if value.size != (1, 1, 1):
            raise Unsupported("a gate that is not one number a sample")
        if value.buffer.parent is not None:
            copied = Value(self.buffer(1, 1))
            self.layer(_COPY, value, copied)
            value = self.values[node] = copied
        value.buffer.alone = True
        return value

    def pointer(self, tensor: Tensor | None) -> int:
        """Of a copy in the program's dtype that lives as long as the program."""
        if tensor is None:
            return 0
        tensor = tensor.detach().to(self.dtype).contiguous().resolve_neg()
        self.keep.append(tensor)
        return tensor.data_ptr()

    # --- steps --------------------------------------------------------------------------------------------------------

    def add(self, name: str, reads: Sequence[Value | Buffer | None], writes: Value | Buffer | None, record: Any) -> None:
        buffers: list[Buffer] = []
        for read in reads:
            if isinstance(read, Value):
                buffers += [read.buffer, *([read.prologue.expert] if read.prologue.expert is not None else [])]
            elif read is not None:
                buffers.append(read)
        written = writes.buffer if isinstance(writes, Value) else writes
        self.steps.append(Step(name, self.node, tuple(buffers), written, record))

    def prologue(self, value: Value) -> Callable[[], tuple[int, int, int, int, bool]]:
        p = value.prologue
        scale, shift = self.pointer(p.scale), self.pointer(p.shift)
        return lambda: (scale, shift, _offset(p.expert), value.channels, p.relu)

    def layer(
        self,
        op: int,
        source: Value,
        result: Value | Buffer,
        *,
        other: Value | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        index: Buffer | None = None,
        groups: int = 1,
        kernel: tuple[int, int] = (1, 1),
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        at_channel: int = 0,
        eps: float = 0.0,
        count_padding: bool = False,
        relu: bool = False,
    ) -> None:
        before = self.prologue(source)
        weights = self.pointer(weight), self.pointer(bias)
        numbers = (groups, *kernel, *stride, *padding, at_channel)
        chosen = result if isinstance(result, Buffer) else index

        def record(program: Any) -> None:
            to = _place(result) if isinstance(result, Value) else _NO_PLACE
            program.layer(
                op,
                _place(source),
                _place(other),
                to,
                *weights,
                _offset(chosen),
                numbers,
                eps,
                count_padding,
                relu,
                before(),
            )

        self.add(_NAMES[op], [source, other, index], result, record)

    def pool(
        self,
        op: int,
        x: Any,
        node: torch.fx.Node,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        count_padding: bool = False,
    ) -> None:
        sizes = {"kernel": kernel, "stride": stride, "padding": padding}
        self.layer(op, self.values[x], self.image(node), **sizes, count_padding=count_padding)  # type: ignore[arg-type]

    def convolution(
        self,
        node: torch.fx.Node,
        source: Value,
        result: Value,
        weight: Tensor,
        g: Conv2dGeometry,
        sides: Sequence[tuple[Buffer | None, int, list[int]]],  # out, in: expert, number of slices, starts
        residual: Value | None,
        gate: Value | None,
        bias: int,
        scale: int = 0,
        shift: int = 0,
        per_slice: bool = False,
        relu: bool = False,
    ) -> None:
        packed = choose_backend(weight.device).pack(weight.to(self.dtype), g, False)
        if packed is None:
            raise Unsupported("its packed weights would take more than eight times the weights' memory")
        self.keep.append(packed)
        shape = native.conv2d_shape(1, g, *source.size, result.height, result.width, *weight.shape[2:])
        before = self.prologue(source)

        def record(program: Any) -> None:
            program.conv(
                _place(source), _place(result), _place(residual), shape, *((_offset(s[0]), *s[1:]) for s in sides),
                packed.data_ptr(), bias, _offset(None if gate is None else gate.buffer), scale, shift, per_slice, relu,
                before(),
            )  # fmt: skip

        self.add("convolution", [source, residual, gate, sides[0][0], sides[1][0]], result, record)


_NO_PLACE = (_NOWHERE, 0, 1, 1, 0, 0)


def _offset(buffer: Buffer | None) -> int:
    return _NOWHERE if buffer is None else buffer.root()[0].offset


def _place(value: Value | None) -> tuple[int, ...]:
    if value is None:
        return _NO_PLACE
    root, channel = value.buffer.root()
    return root.offset, channel, value.height, value.width, value.channels, root.channels


# --- what each operator becomes -----------------------------------------------------------------------------------------

_Handler = Callable[[_Lowering, torch.fx.Node], None]


def _conv(low: _Lowering, node: torch.fx.Node) -> None:
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


def _experts(low: _Lowering, node: Any) -> Buffer | None:
    return None if node is None else low.values[node].buffer


def _linear(low: _Lowering, node: torch.fx.Node) -> None:
    x, *given = arguments(node)
    weight, bias = map(low.captured.constant, given)
    if weight is None or (given[1] is not None and bias is None):
        raise Unsupported("its weights are computed")
    if per_sample(x)[-1:] != (weight.shape[1],) or any(s != 1 for s in per_sample(x)[:-1]):
        raise Unsupported("a linear layer of more than a vector")
    if weight.shape[0] < _WIDE_LINEAR:
        low.layer(_LINEAR, low.plain(x), low.image(node), weight=weight, bias=bias)
        return
    g = Conv2dGeometry((), (), 0, 0, weight.shape[0], weight.shape[1], (1, 1), (0, 0), (1, 1), 1)
    whole: list[tuple[Buffer | None, int, list[int]]] = [(None, 0, []), (None, 0, [])]
    weight4d = weight[:, :, None, None]
    low.convolution(node, low.values[x], low.image(node), weight4d, g, whole, None, None, low.pointer(bias))


def _affine(low: _Lowering, node: torch.fx.Node) -> None:
    affine = affine_of(node, low.captured)
    if affine is None:
        raise Unsupported("by the batch's own statistics")
    _read_through(low, node.args[0], node, affine)


def _read_through(low: _Lowering, source: Any, node: torch.fx.Node, affine: Affine) -> None:
    """An affine map of ``source``, done by whoever reads it."""
    channels = _image(node)[0]
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
    if p.relu or (p is not _NO_PROLOGUE and (p.expert is not None or expert is not None)):
        value = low.plain(source)
    elif p is not _NO_PROLOGUE:
        shift = shift if p.shift is None else shift + scale * p.shift
        scale = scale if p.scale is None else scale * p.scale
    low.values[node] = Value(value.buffer, *value.size, prologue=Prologue(scale, shift, expert))


def _relu(low: _Lowering, node: torch.fx.Node) -> None:
    value = low.values[node.args[0]]
    p = value.prologue
    low.values[node] = Value(value.buffer, *value.size, prologue=Prologue(p.scale, p.shift, p.expert, True))


def _by_constant(low: _Lowering, node: torch.fx.Node) -> None:
    """Addition, subtraction, multiplication or division of an image and a constant for each channel."""
    a, b, *rest = arguments(node)
    if node.target is _aten.rsub.Scalar:
        a, b = b, a
    channels = _image(node)[0]
    first = isinstance(a, torch.fx.Node) and low.captured.constant(a) is None
    source, other = (a, b) if first else (b, a)
    if per_sample(source) != per_sample(node):
        raise Unsupported("a constant of more numbers than the value")
    _require_channels_first(node)
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


def _two_values(low: _Lowering, node: torch.fx.Node) -> bool:
    return all(isinstance(n, torch.fx.Node) and low.captured.constant(n) is None for n in arguments(node)[:2])


def _sum(low: _Lowering, node: torch.fx.Node) -> None:
    if not _two_values(low, node):
        return _by_constant(low, node)
    a, b, alpha = arguments(node)
    if alpha != 1 or per_sample(a) != per_sample(b):
        raise Unsupported("a sum of different shapes, or with a factor")
    low.layer(_ADD, low.values[a], low.image(node), other=low.plain(b))
    return None


def _product(low: _Lowering, node: torch.fx.Node) -> None:
    if not _two_values(low, node):
        return _by_constant(low, node)
    a, b = arguments(node)
    if all(s == 1 for s in per_sample(a)):
        a, b = b, a
    if any(s != 1 for s in per_sample(b)) or len(per_sample(b)) not in (len(per_sample(a)), 0):
        raise Unsupported("a product of two images")
    low.layer(_SCALE_ROWS, low.values[a], low.image(node), other=low.plain(b))
    return None


def _mean(low: _Lowering, node: torch.fx.Node) -> None:
    if not is_mean_of_pixels(node):
        raise Unsupported("a mean over other dimensions than an image's pixels")
    low.layer(_MEAN, low.values[node.args[0]], low.image(node))


def _layer_norm(low: _Lowering, node: torch.fx.Node) -> None:
    x, shape, *given, eps, _ = arguments(node)
    if len(shape) != 1 or len(per_sample(node)) != 1:
        raise Unsupported("a LayerNorm of several dimensions")
    _norm(low, node, x, 1, given, eps)


def _group_norm(low: _Lowering, node: torch.fx.Node) -> None:
    x, groups, *given, eps, _ = arguments(node)
    _norm(low, node, x, groups, given, eps)


def _norm(low: _Lowering, node: torch.fx.Node, x: Any, groups: int, given: Sequence[Any], eps: float) -> None:
    weight, bias = map(low.captured.constant, given)
    low.layer(_GROUP_NORM, low.plain(x), low.image(node), weight=weight, bias=bias, groups=groups, eps=eps)


def _choice(low: _Lowering, node: torch.fx.Node) -> None:
    chosen = low.index_buffer()
    low.layer(_ARGMAX, low.plain(node.args[0]), chosen)
    low.values[node] = Value(chosen, index=True, choices=_image(node.args[0])[0])


def _softmax(low: _Lowering, node: torch.fx.Node) -> None:
    x, dim, dtype = arguments(node)
    if len(per_sample(node)) != 1 or dim not in (1, -1) or dtype is not None:
        raise Unsupported("a softmax over another dimension than a vector's")
    low.layer(_SOFTMAX, low.plain(x), low.image(node))


def _gather(low: _Lowering, node: torch.fx.Node) -> None:
    x, dim, index, _ = arguments(node)
    chosen = low.values[index]
    if dim not in (1, -1) or per_sample(node) != (1,) or not 0 < chosen.choices <= _image(x)[0]:
        raise Unsupported("it gathers something else than one number of each vector")
    low.layer(_GATHER, low.plain(x), low.image(node), index=chosen.buffer)


def _view(low: _Lowering, node: torch.fx.Node) -> None:
    source = node.args[0]
    before, after = per_sample(source), per_sample(node)
    value = low.values[source]
    if math.prod(before) != math.prod(after):
        raise Unsupported("it repeats a value")
    if _is_vector(before) and _is_vector(after):
        low.values[node] = value
        return
    if node.target in (_aten.permute.default, _aten.transpose.int, _aten.expand.default) or len(after) != 1:
        raise Unsupported("it changes an image's shape")
    low.layer(_FLATTEN, value, low.image(node))


def _cat(low: _Lowering, node: torch.fx.Node) -> None:
    parts, dim = arguments(node)
    if dim not in (1, -len(per_sample(node))):
        raise Unsupported("it concatenates something else than channels")
    sizes = [_image(part)[1:] for part in parts]
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
            low.layer(_COPY, value, piece)
        channel += value.channels


def _max_pool(low: _Lowering, node: torch.fx.Node) -> None:
    x, kernel, stride, padding, dilation, ceil = arguments(node)
    if ceil or _pair(dilation) != (1, 1):
        raise Unsupported("a max-pool with dilation or ceil_mode")
    low.pool(_MAX_POOL, x, node, _pair(kernel), _pair(stride or kernel), _pair(padding))


def _average_pool(low: _Lowering, node: torch.fx.Node) -> None:
    x, kernel, stride, padding, ceil, count_padding, divisor = arguments(node)
    if ceil or divisor is not None:
        raise Unsupported("an average pool with ceil_mode or a divisor of its own")
    low.pool(_AVERAGE_POOL, x, node, _pair(kernel), _pair(stride or kernel), _pair(padding), count_padding)


def _adaptive_pool(low: _Lowering, node: torch.fx.Node) -> None:
    x = node.args[0]
    _, height, width = _image(node)
    value = low.values[x]
    if value.height % height or value.width % width:
        raise Unsupported("an adaptive pool whose windows differ in size")
    kernel = value.height // height, value.width // width
    low.pool(_MEAN if (height, width) == (1, 1) else _AVERAGE_POOL, x, node, kernel, kernel, (0, 0))


def _slice(low: _Lowering, node: torch.fx.Node) -> None:
    """Every step-th row or column."""
    x, dim, start, end, step = arguments(node)
    sizes = per_sample(x)
    if len(sizes) != 3 or dim not in (2, 3) or start or (end is not None and end < sizes[dim - 1]):
        raise Unsupported("a slice of something else than every so manieth row or column")
    low.layer(_COPY, low.values[x], low.image(node), stride=(step, 1) if dim == 2 else (1, step))


def _pad(low: _Lowering, node: torch.fx.Node) -> None:
    """Channels of zeros before and behind."""
    x, widths, *rest = arguments(node)
    if len(widths) != 6 or any(widths[:4]) or min(widths) < 0 or any(r not in ("constant", 0, None) for r in rest):
        raise Unsupported("padding of something else than channels with zeros")
    low.layer(_COPY, low.values[x], low.image(node), at_channel=widths[4])


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


_HANDLERS: dict[Any, _Handler] = {
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
    **dict.fromkeys(_VIEWS, _view),
}


# Those that look at numbers one by one, or check their sizes themselves.
_ANY_LAYOUT = {*_VIEWS, ops.conv2d_fused, _aten.linear.default, _aten.relu.default, _aten.add.Tensor, _aten.mul.Tensor}


def why_not(node: torch.fx.Node, captured: Captured, dtype: torch.dtype) -> str | None:
    """None if a node has a native form, else why it has none. Looks at the node alone, with inputs of any origin."""
    try:
        low = _Lowering(captured, dtype)
        for source in node.all_input_nodes:
            if _is_value(source, captured):
                _read(low, source)
        handler = _HANDLERS.get(node.target)
        if handler is None:
            many = node.target is _aten.conv2d.default
            raise Unsupported("many groups, or weights that are computed" if many else "no native kernel")
        result = tensor_of(node)
        if result is None or (result.dtype != dtype and node.target not in (choose, *_VIEWS)):
            got = "no tensor" if result is None else str(result.dtype)
            raise Unsupported(f"gives {got}, the model computes in {dtype}")
        if node.target not in _ANY_LAYOUT:
            for value in (*(n for n in node.all_input_nodes if n in low.values), node):
                _require_channels_first(value)
        handler(low, node)
    except Unsupported as reason:
        return str(reason)
    return None


def _choices_of(node: Any) -> int:
    """How many there were to choose from, of a router's choice; 0 for other indices."""
    while node.target in _VIEWS:
        node = node.args[0]
    return _image(node.args[0])[0] if node.target is choose else 0


def _is_value(node: torch.fx.Node, captured: Captured) -> bool:
    """Neither a constant nor a size."""
    return captured.constant(node) is None and not is_size(node)


def _read(low: _Lowering, node: torch.fx.Node) -> None:
    """A value from outside."""
    tensor = tensor_of(node)
    if tensor is not None and tensor.dtype == torch.int64 and all(s == 1 for s in per_sample(node)):
        low.values[node] = Value(low.index_buffer(), index=True, choices=_choices_of(node))
        return
    low.image(node)
    if tensor is None or tensor.dtype != low.dtype:
        raise Unsupported(
            f"reads {tensor.dtype if tensor is not None else 'no tensor'}, the model computes in {low.dtype}"
        )


def lower(
    captured: Captured, nodes: Sequence[torch.fx.Node], outputs: Sequence[torch.fx.Node], dtype: torch.dtype, chunk: int
) -> Program:
    """The nodes, for each of which :func:`why_not` is None, as one program.

    Args:
        outputs: those of the nodes whose values are wanted.
        chunk: samples that go through the network together at most, where there are many.

    Raises:
        Unsupported: if what each node can be alone they cannot be together.
    """
    low = _Lowering(captured, dtype)
    own = set(nodes)
    inputs: list[torch.fx.Node] = []
    for node in nodes:
        low.node = node
        for source in node.all_input_nodes:
            if source not in own and source not in low.values and _is_value(source, captured):
                _load(low, source, len(inputs))
                inputs.append(source)
        _HANDLERS[node.target](low, node)
    for i, node in enumerate(outputs):
        low.node = node
        _store(low, node, i)
    program = native.module.Program(native.DTYPE[dtype], _plan_memory(low.steps), chunk)
    for step in low.steps:
        step.record(program)
    shapes = [(per_sample(n), tensor_of(n).dtype) for n in outputs]  # type: ignore[union-attr]
    return Program(program, inputs, list(outputs), shapes, low.keep, [(s.name, s.node) for s in low.steps])


def _load(low: _Lowering, node: torch.fx.Node, number: int) -> None:
    _read(low, node)
    value = low.values[node]
    if value.index:
        low.add("load", [], value, lambda program: program.load_index(number, _offset(value.buffer)))
        return
    low.add("load", [], value, lambda program: program.load(number, _place(value), (0, 0, _NOWHERE, 0, False)))


def _store(low: _Lowering, node: torch.fx.Node, number: int) -> None:
    value = low.values[node]
    if value.index:
        low.add("store", [value], None, lambda program: program.store_index(number, _offset(value.buffer)))
        return
    before = low.prologue(value)
    low.add("store", [value], None, lambda program: program.store(number, _place(value), before()))


def _plan_memory(steps: Sequence[Step]) -> int:
    """Gives each buffer its offset, so that those in use at the same time do not overlap: the bytes of one sample."""
    buffers: dict[int, Buffer] = {}
    for i, step in enumerate(steps):
        for buffer in (*step.reads, *([step.writes] if step.writes is not None else [])):
            root, _ = buffer.root()
            root.first, root.last = min(root.first, i), max(root.last, i)
            buffers[id(root)] = root
    placed: list[Buffer] = []
    total = 0
    # the largest first, each as low as it fits between those that live with it
    for buffer in sorted(buffers.values(), key=lambda b: (-b.bytes, b.first)):
        offset = 0
        for other in sorted(
            (p for p in placed if p.first <= buffer.last and buffer.first <= p.last), key=lambda p: p.offset
        ):
            if offset + _aligned(buffer.bytes) <= other.offset:
                break
            offset = max(offset, other.offset + _aligned(other.bytes))
        buffer.offset = offset
        placed.append(buffer)
        total = max(total, offset + _aligned(buffer.bytes))
    return total


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
