# SPDX-License-Identifier: Apache-2.0
"""A network as a list of steps, each of which knows its norm, its intervals and its derivative's intervals."""

from __future__ import annotations

import abc
import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.node import map_arg

from ..models.vit import VisionTransformer
from .norms import SLACK, convolution_norm, dense_norm, power_iteration

__all__ = [
    "Add",
    "Affine",
    "Average",
    "Cat",
    "Conv",
    "Dense",
    "MaxPool",
    "Network",
    "Node",
    "Relu",
    "Scale",
    "Step",
    "Unary",
]

_aten = torch.ops.aten
_ROUNDING = 2.0**-40  # of a sum of up to 2**13 products of float64, against the sum of their sizes
_EXACT = 1 << 18  # entries of a matrix whose norm is taken as it is


class Step(abc.ABC):
    """What happens to one tensor ``[n, *shape]`` or several.

    Interval arithmetic is of pairs ``(low, high)``; ``pull`` takes bounds of the gradient behind the step to bounds of
    that before it.
    """

    @abc.abstractmethod
    def __call__(self, *x: Tensor) -> Tensor: ...

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Of the output, where the input lies between ``low`` and ``high``; for steps that grow with their input."""
        return self(low), self(high)


class Unary(Step):
    """A step of one input."""

    @abc.abstractmethod
    def norm(self, norm: str, estimate: bool, shape: tuple[int, ...]) -> float:
        """The Lipschitz constant for an input of this shape, in one norm on both sides: an upper bound, or,
        in L2, an estimate."""

    @abc.abstractmethod
    def pull(self, low: Tensor, high: Tensor, seen: tuple[Tensor, Tensor] | None, shape: tuple[int, ...]) -> Any:
        """Bounds ``[n * m, *shape]`` of the gradient before the step from those behind it.

        Args:
            seen: bounds ``[n, *shape]`` of the step's input; None: any.
        """

    @abc.abstractmethod
    def turn(self, g: Tensor, seen: tuple[Tensor, Tensor], at: Tensor) -> tuple[Tensor, Tensor | None]:
        """One gradient ``[n * m, *shape]`` that may be before the step for the one ``g`` behind it, and by what any other
        may differ: by no more than its norm, in L1 and, times the step's own norm, in L2; None: there is no other.

        Args:
            at: a value of the step's input, ``[n, *shape]``.
        """


class Affine(Unary):
    """``A x + b``. ``size(x)`` is ``|A| x``; ``back(g, shape)`` is the transpose's, ``back_size`` that of ``|A|``."""

    bias: Tensor | None

    @abc.abstractmethod
    def size(self, x: Tensor) -> Tensor: ...

    @abc.abstractmethod
    def linear(self, x: Tensor) -> Tensor:
        """``A x``."""

    def __call__(self, *x: Tensor) -> Tensor:
        y = self.linear(x[0])
        return y if self.bias is None else y + self.bias

    def lengths(self, shape: tuple[int, ...]) -> Tensor | None:
        """The L2 norm of each row of A, ``[*output]``; None where it is not known better than by A's own norm."""
        return None

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        middle, half = (low + high) / 2, (high - low) / 2
        y, around = self(middle), self.size(half + _ROUNDING * middle.abs())
        if self.bias is not None:
            around = around + _ROUNDING * self.bias.abs()
        return y - around, y + around

    def pull(self, low: Tensor, high: Tensor, seen: tuple[Tensor, Tensor] | None, shape: tuple[int, ...]) -> Any:
        middle, half = (low + high) / 2, (high - low) / 2
        y, around = self.back(middle, shape), self.back_size(half + _ROUNDING * middle.abs(), shape)
        return y - around, y + around

    def turn(self, g: Tensor, seen: tuple[Tensor, Tensor], at: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.back(g, tuple(at.shape[1:])), None

    def back(self, g: Tensor, shape: tuple[int, ...]) -> Tensor:
        return _transposed(self.linear, g, shape)

    def back_size(self, g: Tensor, shape: tuple[int, ...]) -> Tensor:
        return _transposed(self.size, g, shape)

    def norm(self, norm: str, estimate: bool, shape: tuple[int, ...]) -> float:
        if norm == "linf":  # the greatest row sum of |A|
            return SLACK * float(self.size(torch.ones((1, *shape), dtype=torch.float64)).max())
        if estimate:
            return power_iteration(self.linear, lambda y: self.back(y, shape), shape)
        return self.length_bound(shape)

    @abc.abstractmethod
    def length_bound(self, shape: tuple[int, ...]) -> float:
        """An upper bound of A's L2 norm."""


def _transposed(step: Any, g: Tensor, shape: tuple[int, ...], at: Tensor | None = None) -> Tensor:
    with torch.enable_grad():
        x = (torch.zeros((len(g), *shape), dtype=g.dtype) if at is None else at.detach()).requires_grad_()
        return torch.autograd.grad(step(x), x, g)[0]


@dataclass(frozen=True)
class Conv(Affine):
    """weight ``[O, I / groups, kh, kw]``; bias: of any shape that fits the output's."""

    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def linear(self, x: Tensor) -> Tensor:
        return self._conv(x, self.weight)

    def size(self, x: Tensor) -> Tensor:
        return self._conv(x, self.weight.abs())

    def lengths(self, shape: tuple[int, ...]) -> Tensor:
        return self._conv(torch.ones((1, *shape), dtype=torch.float64), self.weight**2)[0].sqrt()

    def length_bound(self, shape: tuple[int, ...]) -> float:
        bound = convolution_norm(self.weight, (shape[1], shape[2]), self.stride, self.dilation, self.groups)
        inputs = math.prod(shape)
        outputs = self.linear(torch.zeros((1, *shape), dtype=torch.float64)).numel()
        if inputs * outputs <= _EXACT:
            rows = self.linear(torch.eye(inputs, dtype=torch.float64).reshape(inputs, *shape))
            bound = min(bound, dense_norm(rows.flatten(1)))
        return bound


@dataclass(frozen=True)
class Dense(Affine):
    """weight ``[O, I]``, bias ``[O]``; of the last dimension."""

    weight: Tensor
    bias: Tensor | None

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def size(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.abs())

    def lengths(self, shape: tuple[int, ...]) -> Tensor:
        return self.weight.norm(dim=1)

    def length_bound(self, shape: tuple[int, ...]) -> float:
        return dense_norm(self.weight)


@dataclass(frozen=True)
class Scale(Affine):
    """``scale * x + bias``, of shapes that fit the input's: BatchNorm in eval mode, normalisation."""

    scale: Tensor
    bias: Tensor | None

    def linear(self, x: Tensor) -> Tensor:
        return self.scale * x

    def size(self, x: Tensor) -> Tensor:
        return self.scale.abs() * x

    def lengths(self, shape: tuple[int, ...]) -> Tensor:
        return self.scale.abs().expand(shape)

    def length_bound(self, shape: tuple[int, ...]) -> float:
        return SLACK * float(self.scale.abs().max())

    def per_channel(self) -> bool:
        return all(t is None or (t.dim() in (0, 3) and t.shape[1:].numel() == 1) for t in (self.scale, self.bias))


@dataclass(frozen=True)
class Average(Affine):
    """Means over windows or dimensions: linear, with no negative entry; in L2 by ``sqrt(row sum * column sum)``."""

    function: Any
    bias: None = None

    def linear(self, x: Tensor) -> Tensor:
        return self.function(x)

    def size(self, x: Tensor) -> Tensor:
        return self.function(x)

    def length_bound(self, shape: tuple[int, ...]) -> float:
        rows = self.linear(torch.ones((1, *shape), dtype=torch.float64))
        columns = self.back(torch.ones_like(rows), shape)
        return SLACK * math.sqrt(float(rows.max()) * float(columns.max()))


class Reshape(Affine):
    """The same numbers in another shape."""

    bias = None

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def linear(self, x: Tensor) -> Tensor:
        return x.reshape(-1, *self.shape)

    def size(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self(low), self(high)

    def norm(self, norm: str, estimate: bool, shape: tuple[int, ...]) -> float:
        return 1.0

    def length_bound(self, shape: tuple[int, ...]) -> float:
        return 1.0

    def pull(self, low: Tensor, high: Tensor, seen: tuple[Tensor, Tensor] | None, shape: tuple[int, ...]) -> Any:
        return low.reshape(-1, *shape), high.reshape(-1, *shape)


class Relu(Unary):
    def __call__(self, *x: Tensor) -> Tensor:
        return x[0].clamp_min(0)

    def norm(self, norm: str, estimate: bool, shape: tuple[int, ...]) -> float:
        return 1.0

    def pull(self, low: Tensor, high: Tensor, seen: tuple[Tensor, Tensor] | None, shape: tuple[int, ...]) -> Any:
        """The derivative is 1 where the input is positive throughout, 0 where it is nowhere, else between them."""
        if seen is None:
            return low.clamp_max(0), high.clamp_min(0)
        times = len(low) // len(seen[0])
        on, off = (each.repeat_interleave(times, 0) for each in (seen[0] >= 0, seen[1] <= 0))
        low, high = torch.where(on, low, low.clamp_max(0)), torch.where(on, high, high.clamp_min(0))
        return low.masked_fill(off, 0), high.masked_fill(off, 0)

    def turn(self, g: Tensor, seen: tuple[Tensor, Tensor], at: Tensor) -> tuple[Tensor, Tensor | None]:
        """A derivative that is not known is taken for a half."""
        half = (((seen[0] >= 0).double() + (seen[1] > 0)) / 2).repeat_interleave(len(g) // len(at), 0)
        return g * half, g * (half == 0.5) / 2


@dataclass(frozen=True)
class MaxPool(Unary):
    """The greatest of each window."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def __call__(self, *x: Tensor) -> Tensor:
        return F.max_pool2d(x[0], self.kernel, self.stride, self.padding, self.dilation)

    def norm(self, norm: str, estimate: bool, shape: tuple[int, ...]) -> float:
        """In L2 the root of how many windows share a pixel: each may take it."""
        if norm == "linf":
            return 1.0
        windows = self._windows(torch.ones((1, *shape), dtype=torch.float64), 0.0)
        return math.sqrt(float(self._fold(torch.ones_like(windows), shape).max()))

    def _windows(self, x: Tensor, filled: float) -> Tensor:
        """``[n, C, kh * kw, L]``."""
        (ph, pw), channels = self.padding, x.shape[1]
        x = F.pad(x, (pw, pw, ph, ph), value=filled)
        return F.unfold(x, self.kernel, self.dilation, 0, self.stride).unflatten(1, (channels, -1))

    def _fold(self, windows: Tensor, shape: tuple[int, ...]) -> Tensor:
        (ph, pw), (_, h, w) = self.padding, shape
        size = (h + 2 * ph, w + 2 * pw)
        y = F.fold(windows.flatten(1, 2), size, self.kernel, self.dilation, 0, self.stride)
        return y[:, :, ph : ph + h, pw : pw + w]

    def pull(self, low: Tensor, high: Tensor, seen: tuple[Tensor, Tensor] | None, shape: tuple[int, ...]) -> Any:
        """A pixel that cannot be a window's greatest gets nothing of it; one that must be, all; others something."""
        flat_low, flat_high = low.flatten(2)[:, :, None], high.flatten(2)[:, :, None]  # [n * m, C, 1, L]
        some_low, some_high = flat_low.clamp_max(0), flat_high.clamp_min(0)
        if seen is None:
            like = math.prod(self.kernel)
            parts = some_low.expand(-1, -1, like, -1), some_high.expand(-1, -1, like, -1)
        else:
            least, most = (self._windows(each, -math.inf) for each in seen)
            may = (most >= least.amax(2, keepdim=True)) & (most > -math.inf)
            must = may & (may.sum(2, keepdim=True) == 1)
            times = len(low) // len(may)
            may, must = may.repeat_interleave(times, 0), must.repeat_interleave(times, 0)
            parts = (
                torch.where(must, flat_low, some_low) * may,
                torch.where(must, flat_high, some_high) * may,
            )
        return self._fold(parts[0], shape), self._fold(parts[1], shape)

    def turn(self, g: Tensor, seen: tuple[Tensor, Tensor], at: Tensor) -> tuple[Tensor, Tensor | None]:
        """To the greatest at ``at``; a window that may choose otherwise takes it from there and gives it elsewhere."""
        times = len(g) // len(at)
        found = _transposed(self, g, tuple(at.shape[1:]), at.repeat_interleave(times, 0))
        least, most = (self._windows(each, -math.inf) for each in seen)
        several = (((most >= least.amax(2, keepdim=True)) & (most > -math.inf)).sum(2) > 1).reshape(len(at), *g.shape[1:])
        return found, 2 * g * several.repeat_interleave(times, 0)


class Add(Step):
    """``a + b``."""

    def __call__(self, *x: Tensor) -> Tensor:
        return x[0] + x[1]


@dataclass(frozen=True)
class Cat(Step):
    """Side by side along ``dim`` of ``[n, …]``."""

    dim: int

    def __call__(self, *x: Tensor) -> Tensor:
        return torch.cat(x, self.dim)


@dataclass(frozen=True)
class Node:
    """A step, the numbers of what it reads (0 is the network's input, i what the i-th node gives), and its output's shape
    without the batch."""

    step: Step
    reads: tuple[int, ...]
    shape: tuple[int, ...]
    name: str


@dataclass(frozen=True)
class Network:
    """What ``forward(x [n, *shape]) -> scores [n, C]`` computes in eval mode, in float64; the last node gives it.

    BatchNorms and other scales are folded into the convolution or linear layer beside them.
    """

    shape: tuple[int, ...]
    nodes: tuple[Node, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, network: nn.Module, shape: tuple[int, ...]) -> Network:
        """A module's, traced by torch.export.

        Raises:
            ValueError: for a layer that is not among those of convolutional networks, named; for a vision transformer; if
                the module cannot be traced, or gives no scores ``[n, C]``.
        """
        if any(isinstance(module, VisionTransformer) for module in network.modules()):
            raise ValueError("network: a vision transformer; dot-product self-attention is not Lipschitz over all inputs")
        network = copy.deepcopy(network).to("cpu", torch.float64).eval()
        try:
            program = torch.export.export(network, (torch.zeros((2, *shape), dtype=torch.float64),))
        except Exception as error:  # torch's errors of tracing have no common class
            raise ValueError(f"network: torch.export cannot trace it: {str(error).splitlines()[0]}") from error
        return _Builder(program, shape).network()

    def shape_of(self, index: int) -> tuple[int, ...]:
        return self.nodes[index - 1].shape if index else self.shape

    @property
    def operations(self) -> int:
        """Multiply-accumulates of the convolutions and linear layers for one input."""
        layers = [(node.shape, node.step.weight) for node in self.nodes if isinstance(node.step, Conv | Dense)]
        return sum(math.prod(shape) * weight[0].numel() for shape, weight in layers)

    def values(self, x: Tensor) -> list[Tensor]:
        """Of every node, behind the input's own."""
        found = [x]
        for node in self.nodes:
            found.append(node.step(*(found[i] for i in node.reads)))
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """Scores ``[n, C]`` of ``x [n, *shape]``."""
        return self.values(x.double())[-1]


class _Builder:
    """Nodes out of an exported program."""

    def __init__(self, program: torch.export.ExportedProgram, shape: tuple[int, ...]) -> None:
        self.program, self.shape = program, shape
        self.nodes: list[Node] = []
        self.made: dict[torch.fx.Node, int] = {}  # what depends on the input
        self.constants: dict[torch.fx.Node, Any] = {}

    def network(self) -> Network:
        signature = self.program.graph_signature
        named = {**self.program.state_dict, **self.program.constants}
        held = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        held |= signature.inputs_to_lifted_tensor_constants
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in held:
                    self.constants[node] = named[held[node.name]].detach()
                else:
                    self.made[node] = 0
            elif node.op == "output":
                return self._done(node)
            elif any(isinstance(each, torch.fx.Node) and each in self.made for each in node.all_input_nodes):
                self.made[node] = self._step(node)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.constants[n])
                self.constants[node] = node.target(*args, **kwargs)
        raise AssertionError("a graph without an output")

    def _done(self, output: torch.fx.Node) -> Network:
        results: Any = output.args[0]
        if not isinstance(results, Sequence) or len(results) != 1 or results[0] not in self.made:
            raise ValueError("network: expected one output that depends on the input")
        last = self.made[results[0]]
        network = Network(self.shape, tuple(self.nodes[:last]))
        if len(network.shape_of(last)) != 1:
            raise ValueError(f"network: expected scores [n, C], got [n, {', '.join(map(str, network.shape_of(last)))}]")
        return network

    def _step(self, node: torch.fx.Node) -> int:
        """The number of what the node gives."""
        schema = node.target._schema  # type: ignore[union-attr]
        given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
        a = {each.name: given.get(each.name, each.default_value) for each in schema.arguments}
        a = {name: self.constants.get(v, v) if isinstance(v, torch.fx.Node) else v for name, v in a.items()}
        if schema.name.endswith("_") and len(self._source(node).users) > 1:
            raise self._unknown(node, "written in place where others read it")
        kind = schema.name.removeprefix("aten::").removesuffix("_")
        if kind not in _MAKERS or not schema.name.startswith("aten::"):
            raise self._unknown(node)
        return _MAKERS[kind](self, node, a)

    def _source(self, node: torch.fx.Node) -> torch.fx.Node:
        """What a node reads, or what that is a view of."""
        source = node.all_input_nodes[0]
        while len(source.users) == 1 and source.op == "call_function" and source.target in _VIEWS:
            source = source.all_input_nodes[0]
        return source

    def _unknown(self, node: torch.fx.Node, why: str = "") -> ValueError:
        stack = node.meta.get("nn_module_stack") or {}
        where, kind = list(stack.values())[-1] if stack else ("", "")
        layer = f"{kind.rsplit('.', 1)[-1]} {where!r}: " if kind else ""
        return ValueError(f"network: no bound is known of {layer}{node.target}{f', {why}' if why else ''}")

    def _add_node(self, node: torch.fx.Node, step: Step, *reads: Any) -> int:
        value = node.meta["val"]
        entry = Node(step, tuple(self.made[each] for each in reads), tuple(value.shape[1:]), node.name)
        if len(reads) == 1 and 0 < self.made[reads[0]] == len(self.nodes) and self._alone(reads[0]):
            last = self.nodes[-1]
            joined = _joined(last.step, step, last.shape)
            if joined is not None:
                self.nodes[-1] = dataclasses.replace(entry, step=joined, reads=last.reads)
                return len(self.nodes)
        self.nodes.append(entry)
        return len(self.nodes)

    def _alone(self, node: torch.fx.Node) -> bool:
        """Whether one node alone reads this one, and all that are the same to us."""
        while len(node.users) == 1:
            source = node.all_input_nodes[0]
            if self.made.get(source) != self.made[node]:
                return True
            node = source
        return False

    def _same(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        return self.made[node.all_input_nodes[0]]

    def _dropout(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        if a["train"]:
            raise self._unknown(node, "in training mode")
        return self._same(node, a)

    def _to(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        if node.meta["val"].dtype != torch.float64:
            raise self._unknown(node, "which leaves float64")
        return self._same(node, a)

    def _conv2d(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        weight, bias, padding = a["weight"], a["bias"], a["padding"]
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None):
            raise self._unknown(node, "whose weight depends on the input")
        dilation = _pair(a["dilation"])
        if padding == "same":
            spans = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(span % 2 for span in spans):
                raise self._unknown(node, "padded on one side")
            padding = [span // 2 for span in spans]
        elif padding == "valid":
            padding = [0, 0]
        bias = None if bias is None else bias[:, None, None]
        step = Conv(weight, bias, _pair(a["stride"]), _pair(padding), dilation, a["groups"])
        return self._add_node(node, step, node.args[0])

    def _linear(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        if not isinstance(a["weight"], Tensor) or not isinstance(a["bias"], Tensor | None):
            raise self._unknown(node, "whose weight depends on the input")
        return self._add_node(node, Dense(a["weight"], a["bias"]), node.args[0])

    def _batch_norm(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        mean, var, weight, bias = (a[name] for name in ("running_mean", "running_var", "weight", "bias"))
        if a["training"] or mean is None or var is None:
            raise self._unknown(node, "by the batch's own statistics")
        scale = (var + a["eps"]).rsqrt()
        scale = scale if weight is None else scale * weight
        shift = -mean * scale if bias is None else bias - mean * scale
        form = (-1, *(1,) * (node.meta["val"].dim() - 2))
        return self._add_node(node, Scale(scale.reshape(form), shift.reshape(form)), node.args[0])

    def _relu(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        return self._add_node(node, Relu(), node.args[0])

    def _max_pool2d(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        if a["ceil_mode"]:
            raise self._unknown(node, "with ceil_mode")
        kernel = _pair(a["kernel_size"])
        stride = _pair(a["stride"]) if a["stride"] else kernel
        return self._add_node(node, MaxPool(kernel, stride, _pair(a["padding"]), _pair(a["dilation"])), node.args[0])

    def _averaged(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        """Means, by the operator itself; of no dimension of the batch."""
        first = next(iter(a))
        rest = {name: value for name, value in a.items() if name != first}
        target: Any = node.target
        return self._add_node(node, Average(lambda x: target(x, **rest)), node.args[0])

    def _mean(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        rank = node.args[0].meta["val"].dim()  # type: ignore[union-attr]
        if not a.get("dim") or any(d % rank == 0 for d in a["dim"]):
            raise self._unknown(node, "over the batch")
        return self._averaged(node, a)

    def _reshaped(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        if node.meta["val"].shape[0] != 2:  # the example's batch
            raise self._unknown(node, "over the batch")
        return self._add_node(node, Reshape(tuple(node.meta["val"].shape[1:])), node.args[0])

    def _cat(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        tensors: Any = node.args[0]
        dim = a["dim"] % node.meta["val"].dim()
        if not dim or any(each not in self.made for each in tensors):
            raise self._unknown(node, "with a constant, or over the batch")
        return self._add_node(node, Cat(dim), *tensors)

    def _add(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        return self._sum(node, a, 1.0)

    def _sub(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        return self._sum(node, a, -1.0)

    def _sum(self, node: torch.fx.Node, a: dict[str, Any], sign: float) -> int:
        left, right = a["self"], a["other"]
        factor = sign * a["alpha"]
        if all(isinstance(each, torch.fx.Node) for each in (left, right)):
            if factor != 1 or left.meta["val"].shape != right.meta["val"].shape:
                raise self._unknown(node, "of two that depend on the input, but for their plain sum")
            return self._add_node(node, Add(), left, right)
        if not isinstance(left, torch.fx.Node):
            return self._scaled(node, right, factor, left)
        return self._scaled(node, left, 1.0, factor * right)

    def _mul(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        both = a["self"], a["other"]
        variable = [each for each in both if isinstance(each, torch.fx.Node)]
        if len(variable) == 2:
            raise self._unknown(node, "of two that depend on the input")
        return self._scaled(node, variable[0], both[both[0] is variable[0]], None)

    def _div(self, node: torch.fx.Node, a: dict[str, Any]) -> int:
        if isinstance(a["other"], torch.fx.Node) or a.get("rounding_mode"):
            raise self._unknown(node, "by what depends on the input, or rounded")
        return self._scaled(node, a["self"], 1 / a["other"], None)

    def _scaled(self, node: torch.fx.Node, x: torch.fx.Node, scale: Any, bias: Any) -> int:
        if node.meta["val"].shape != x.meta["val"].shape:
            raise self._unknown(node, "with a constant of another shape")
        rank = x.meta["val"].dim()
        parts = []
        for value in (scale, bias):
            value = None if value is None else torch.as_tensor(value, dtype=torch.float64)
            if value is not None and value.dim() == rank:
                if value.shape[0] != 1:
                    raise self._unknown(node, "with a constant of each sample's own")
                value = value[0]
            parts.append(value)
        return self._add_node(node, Scale(parts[0], parts[1]), x)


_B = _Builder
_MAKERS: dict[str, Callable[[_Builder, torch.fx.Node, dict[str, Any]], int]] = {
    **dict.fromkeys(("contiguous", "clone", "alias", "detach"), _B._same),
    **dict.fromkeys(("dropout", "feature_dropout"), _B._dropout),
    **dict.fromkeys(("flatten", "view", "reshape", "unflatten", "squeeze", "unsqueeze"), _B._reshaped),
    **dict.fromkeys(("avg_pool2d", "adaptive_avg_pool2d"), _B._averaged),
    "to": _B._to, "conv2d": _B._conv2d, "linear": _B._linear, "batch_norm": _B._batch_norm, "relu": _B._relu,
    "max_pool2d": _B._max_pool2d, "mean": _B._mean, "cat": _B._cat, "add": _B._add, "sub": _B._sub, "mul": _B._mul,
    "div": _B._div,
}  # fmt: skip
_VIEWS = {
    _aten.view.default, _aten.reshape.default, _aten.flatten.using_ints, _aten.squeeze.dim, _aten.unsqueeze.default,
    _aten.contiguous.default, _aten.alias.default, _aten.detach.default, _aten.dropout.default,
    _aten.feature_dropout.default,
}  # fmt: skip


def _pair(value: Any) -> tuple[int, int]:
    first, second = value if len(value) == 2 else (value[0], value[0])
    return int(first), int(second)


def _joined(first: Step, second: Step, between: tuple[int, ...]) -> Step | None:
    """The two as one step, where one is a scale; ``between``: the shape of what goes from one to the other."""
    if isinstance(first, Scale) and isinstance(second, Scale):
        return Scale(first.scale * second.scale, _plus(second.linear(_or_zero(first.bias)), second.bias))
    if isinstance(second, Scale) and isinstance(first, Conv) and second.per_channel():
        factor = second.scale.expand(len(first.weight), 1, 1)
        bias = None if first.bias is None else factor * first.bias
        return dataclasses.replace(first, weight=factor[..., None] * first.weight, bias=_plus(bias, second.bias))
    if isinstance(second, Scale) and isinstance(first, Dense) and second.scale.dim() <= 1 and len(between) == 1:
        factor = second.scale.expand(len(first.weight))
        bias = None if first.bias is None else factor * first.bias
        return Dense(factor[:, None] * first.weight, _plus(bias, second.bias))
    if isinstance(first, Scale) and isinstance(second, Conv) and first.per_channel():
        weight, outputs = second.weight, second.weight.shape[0] // second.groups
        factor = first.scale.expand(between[0], 1, 1).reshape(second.groups, 1, -1, 1, 1)
        scaled = (weight.unflatten(0, (second.groups, outputs)) * factor).flatten(0, 1)
        # at the border padded zeros are not shifted: the bias is a map
        shift = None if first.bias is None else second.linear(first.bias.expand(between)[None])[0]
        return dataclasses.replace(second, weight=scaled, bias=_plus(shift, second.bias))
    if isinstance(first, Scale) and isinstance(second, Dense) and first.scale.dim() <= 1 and len(between) == 1:
        shift = None if first.bias is None else second.linear(first.bias.expand(between))
        return Dense(second.weight * first.scale, _plus(shift, second.bias))
    return None


def _plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _or_zero(a: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if a is None else a
