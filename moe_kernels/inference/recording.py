# SPDX-License-Identifier: Apache-2.0
"""A program in the making (csrc/cpu/program.h): where each value lies, the calls of the C++ kernels, and how memory is
used again.

Images lie channels last. A vector is an image of one pixel, so that flattening one changes nothing. What is concatenated
is written where it will be read. An affine map and a ReLU that no convolution could take behind it go before what reads
the result: a prologue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from ..backends import choose as choose_backend
from ..backends import native
from ..geometry import Conv2dGeometry
from .capture import Captured, tensor_of

__all__ = [
    "ADD",
    "ARGMAX",
    "AVERAGE_POOL",
    "COPY",
    "FLATTEN",
    "GATHER",
    "GROUP_NORM",
    "LINEAR",
    "MAX_POOL",
    "MEAN",
    "NO_PROLOGUE",
    "SCALE_ROWS",
    "SOFTMAX",
    "Buffer",
    "Program",
    "Prologue",
    "Recording",
    "Unsupported",
    "Value",
    "image_size",
    "is_vector",
    "offset_of",
    "per_sample",
    "place_of",
    "plan_late",
    "plan_memory",
    "require_channels_first",
]

_ALIGNMENT = 64  # bytes
_NOWHERE = -1
# As moe::cpu::LayerOp.
_NAMES = (
    "mean", "norm", "linear", "argmax", "softmax", "gather", "copy", "add", "gate", "max-pool", "average pool", "flatten",
)  # fmt: skip
(
    MEAN, GROUP_NORM, LINEAR, ARGMAX, SOFTMAX, GATHER, COPY, ADD, SCALE_ROWS, MAX_POOL, AVERAGE_POOL, FLATTEN,
) = range(len(_NAMES))  # fmt: skip


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


NO_PROLOGUE = Prologue()


@dataclass(eq=False)
class Value:
    """A node's result: pixels of a buffer, and what is done to them when they are read; or, of ``index``, int64."""

    buffer: Buffer
    channels: int = 1
    height: int = 1
    width: int = 1
    prologue: Prologue = NO_PROLOGUE
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
    weights: int = 0  # bytes of all experts' weights, of which a batch may read each


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


def image_size(node: Any) -> tuple[int, int, int]:
    """Channels, rows and columns of an image or a vector, of which the native kernels know."""
    shape = per_sample(node)
    long = [s for s in shape if s != 1]
    if len(shape) == 3 and len(long) > 1:
        return shape
    if len(long) > 1:
        raise Unsupported(f"neither an image nor a vector: {list(shape)} a sample")
    return (long[0] if long else 1), 1, 1


def require_channels_first(node: Any) -> None:
    """Where channels count, they are the first of the sizes: ``[B, 1, L]`` is a vector of L numbers, and of one channel.

    Raises:
        Unsupported: if they are not.
    """
    shape = per_sample(node)
    channels, *pixels = image_size(node)
    if shape != (channels, *pixels) and any(s != 1 for s in shape[1:]):
        raise Unsupported(f"a vector along another dimension than the channels: {list(shape)} a sample")


def is_vector(shape: tuple[int, ...]) -> bool:
    return sum(s != 1 for s in shape) <= 1


@dataclass
class Recording:
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
        channels, height, width = image_size(node)
        value = Value(self.buffer(channels, height * width), channels, height, width)
        self.values[node] = value
        return value

    def plain(self, node: Any) -> Value:
        """With nothing left to be done to it when it is read."""
        value = self.values[node]
        if value.prologue is NO_PROLOGUE:
            return value
        made = Value(self.buffer(value.channels, value.pixels), *value.size)
        self.layer(COPY, value, made)
        self.values[node] = made
        return made

    def numbers(self, node: Any) -> Value:
        """One number a sample, side by side."""
        value = self.plain(node)
        if value.size != (1, 1, 1):
            raise Unsupported("a gate that is not one number a sample")
        if value.buffer.parent is not None:
            copied = Value(self.buffer(1, 1))
            self.layer(COPY, value, copied)
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

    def add(
        self,
        name: str,
        reads: Sequence[Value | Buffer | None],
        writes: Value | Buffer | None,
        record: Any,
        weights: int = 0,
    ) -> None:
        buffers: list[Buffer] = []
        for read in reads:
            if isinstance(read, Value):
                buffers += [read.buffer, *([read.prologue.expert] if read.prologue.expert is not None else [])]
            elif read is not None:
                buffers.append(read)
        written = writes.buffer if isinstance(writes, Value) else writes
        self.steps.append(Step(name, self.node, tuple(buffers), written, record, weights))

    def prologue(self, value: Value) -> Callable[[], tuple[int, int, int, int, int, bool]]:
        p = value.prologue
        scale, shift = self.pointer(p.scale), self.pointer(p.shift)
        rows = min((t.numel() // value.channels for t in (p.scale, p.shift) if t is not None), default=0)
        return lambda: (scale, shift, offset_of(p.expert), value.channels, rows, p.relu)

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
    ) -> None:
        before = self.prologue(source)
        weights = self.pointer(weight), self.pointer(bias)
        numbers = (groups, *kernel, *stride, *padding, at_channel)
        chosen = result if isinstance(result, Buffer) else index

        def record(program: Any) -> None:
            to = place_of(result) if isinstance(result, Value) else _NO_PLACE
            program.layer(
                op,
                place_of(source),
                place_of(other),
                to,
                *weights,
                offset_of(chosen),
                numbers,
                eps,
                count_padding,
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
        if node not in self.captured.packed:  # asked whether it can be, and then to be, a step
            backend = choose_backend(weight.device)
            self.captured.packed[node] = backend.pack(weight.to(self.dtype), g, source.size[1:], False)
        packed = self.captured.packed[node]
        if packed is None:
            raise Unsupported("its packed weights would take more than eight times the weights' memory")
        self.keep.append(packed)
        shape = native.conv2d_shape(1, g, *source.size, result.height, result.width, *weight.shape[2:])
        before = self.prologue(source)

        def record(program: Any) -> None:
            program.conv(
                place_of(source), place_of(result), place_of(residual), shape,
                *((offset_of(s[0]), *s[1:]) for s in sides),
                packed.data_ptr(), bias, offset_of(None if gate is None else gate.buffer), scale, shift, per_slice, relu,
                before(),
            )  # fmt: skip

        weights = packed.nbytes if any(count > 0 for _, count, _ in sides) else 0
        self.add("convolution", [source, residual, gate, sides[0][0], sides[1][0]], result, record, weights)


_NO_PLACE = (_NOWHERE, 0, 1, 1, 0, 0)


def offset_of(buffer: Buffer | None) -> int:
    return _NOWHERE if buffer is None else buffer.root()[0].offset


def place_of(value: Value | None) -> tuple[int, ...]:
    if value is None:
        return _NO_PLACE
    root, channel = value.buffer.root()
    return root.offset, channel, value.height, value.width, value.channels, root.channels


def plan_memory(steps: Sequence[Step]) -> int:
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


# Weights of all experts from which on reading them takes longer than the sums of a few images each; and how many images
# then go through the rest of the network together.
HEAVY, LATE_CHUNK = 8 << 20, 64


def plan_late(steps: Sequence[Step]) -> tuple[int, int, int, list[tuple[int, int]]]:
    """As moe::cpu::Late, of steps whose memory is planned: what follows from the first heavy one on."""
    first = next((i for i, step in enumerate(steps) if step.weights >= HEAVY), None)
    if not first:
        return -1, 0, 0, []
    used = {b.root()[0] for step in steps for b in (*step.reads, step.writes) if b is not None}
    late = [b for b in used if b.last >= first]
    live = sorted((b.offset, b.bytes) for b in late if b.first < first)
    return first, LATE_CHUNK, max(b.offset + _aligned(b.bytes) for b in late), live


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
