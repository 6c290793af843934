# SPDX-License-Identifier: Apache-2.0
"""A network with fewer channels, made of the most important ones of a wider network: :func:`narrow`.

Which channels belong together follows from the model's graph (torch.fx): what is added is kept or left out together, what
is concatenated lies side by side, a depthwise convolution keeps what it gets. Where an operation is not understood, or
channels are what the model gives out, they all stay.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["narrow"]

_KEEPING_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Mish,
    nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d,
)  # fmt: skip
_KEEPING_FUNCTIONS = {
    torch.relu, F.relu, F.relu6, F.leaky_relu, F.elu, F.gelu, F.silu, F.hardswish, F.hardsigmoid, torch.sigmoid,
    F.sigmoid, torch.tanh, F.tanh, F.mish, F.softplus, F.dropout, F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d,
    F.adaptive_max_pool2d, F.interpolate,
}  # fmt: skip
_KEEPING_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous", "clone", "to", "float", "detach"}
_JOINING = {operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, torch.add, torch.mul, torch.sub}
_JOINING_METHODS = {"add", "add_", "sub", "mul", "mul_"}


class _Group:
    """Channels that are kept or left out together; merged ones point to each other."""

    def __init__(self, size: int, fixed: bool) -> None:
        self.size = size
        self.fixed = fixed
        self.parent: _Group | None = None
        self.importance: Tensor | None = None
        self.kept: Tensor | None = None

    def root(self) -> _Group:
        group = self
        while group.parent is not None:
            group = group.parent
        return group

    def merge(self, other: _Group) -> None:
        a, b = self.root(), other.root()
        if a is not b:
            b.parent = a
            a.fixed |= b.fixed


Label = list[_Group]  # side by side along the channels


@dataclass
class _Use:
    """Of a module: what it reads and writes, as the first call has it."""

    source: Label
    out: Label


@dataclass
class _Graph:
    """Walks through a traced model."""

    model: nn.Module
    uses: dict[nn.Module, _Use] = field(default_factory=dict)
    labels: dict[torch.fx.Node, Label | None] = field(default_factory=dict)
    flat: set[torch.fx.Node] = field(default_factory=set)  # [B, features], the pixels of a channel side by side

    def walk(self, graph: torch.fx.Graph) -> None:
        for node in graph.nodes:
            if node.op == "placeholder":
                self.labels[node] = []  # nobody's channels
            elif node.op == "get_attr":
                self.labels[node] = []
            elif node.op == "output":
                self._fix(self._tensors(node))
            else:
                self.labels[node] = getattr(self, f"_{node.op}")(node)

    def _tensors(self, node: torch.fx.Node) -> list[Label]:
        return [label for n in node.all_input_nodes if (label := self.labels[n]) is not None]

    @staticmethod
    def _fix(labels: Sequence[Label]) -> None:
        for label in labels:
            for group in label:
                group.root().fixed = True

    def _unknown(self, node: torch.fx.Node) -> Label:
        """Everything that goes in stays as it is; what comes out is nobody's channels."""
        self._fix(self._tensors(node))
        return []

    def _call_module(self, node: torch.fx.Node) -> Label:
        module = self.model.get_submodule(str(node.target))
        inputs = self._tensors(node)
        source = inputs[0] if inputs else []
        if isinstance(module, _KEEPING_MODULES):
            return self._kept(node)
        if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            return self._flattened(node)
        if type(module) not in (nn.Conv2d, nn.BatchNorm2d, nn.Linear) or peculiarity(module) is not None:
            return self._unknown(node)
        if isinstance(module, nn.Conv2d) and (not source or _size(source) == module.in_channels):
            return self._convolution(module, source)
        if isinstance(module, nn.BatchNorm2d) and _size(source) == module.num_features:
            return self._use(module, source, source)
        behind = node.all_input_nodes[0] in self.flat if node.all_input_nodes else False
        if isinstance(module, nn.Linear) and source and behind and module.in_features % _size(source) == 0:
            return self._use(module, source, [])
        return self._unknown(node)

    def _kept(self, node: torch.fx.Node) -> Label:
        """The channels of what went in."""
        first = node.all_input_nodes[0]
        if first in self.flat:
            self.flat.add(node)
        return self.labels[first] or []

    def _flattened(self, node: torch.fx.Node) -> Label:
        self.flat.add(node)
        return self.labels[node.all_input_nodes[0]] or []

    def _convolution(self, conv: nn.Conv2d, source: Label) -> Label:
        if not source:  # images, or what an operation made that is not understood
            source = [_Group(conv.in_channels, fixed=True)]
        if conv.groups == 1:
            known = self.uses.get(conv)
            return self._use(conv, source, known.out if known else [_Group(conv.out_channels, fixed=False)])
        if conv.groups == conv.in_channels == conv.out_channels:
            return self._use(conv, source, source)
        self._fix([source])
        return [_Group(conv.out_channels, fixed=True)]

    def _use(self, module: nn.Module, source: Label, out: Label) -> Label:
        """One that is called several times needs the same channels each time."""
        if module in self.uses:
            self._join(self.uses[module].source, source)
        self.uses[module] = _Use(source, out)
        return out

    def _join(self, a: Label, b: Label) -> Label:
        if [g.size for g in a] != [g.size for g in b]:
            self._fix([a, b])
            return []
        for one, other in zip(a, b, strict=True):
            one.merge(other)
        return a

    def _call_function(self, node: torch.fx.Node) -> Label | None:
        inputs = self._tensors(node)
        if node.target in _KEEPING_FUNCTIONS:
            return self._kept(node)
        if node.target in _JOINING:
            return self._sum(node, inputs)
        if node.target in (torch.cat, torch.concat):
            return self._concatenated(node)
        if node.target is torch.flatten and node.args[1:] in ((1,), (1, -1)):
            return self._flattened(node)
        if node.target is torch.mean:
            return self._mean(node)
        if node.target is getattr and node.args[1] in ("shape", "dtype", "device", "ndim"):
            return None
        if node.target is operator.getitem:
            return self._item(node)
        return self._unknown(node)

    def _call_method(self, node: torch.fx.Node) -> Label | None:
        inputs = self._tensors(node)
        if node.target in _KEEPING_METHODS:
            return self._kept(node)
        if node.target in _JOINING_METHODS:
            return self._sum(node, inputs)
        if node.target == "size":
            return None
        if node.target == "flatten" and node.args[1:] in ((1,), (1, -1)):
            return self._flattened(node)
        if node.target in ("view", "reshape") and len(node.args) == 3 and node.args[2] == -1:
            return self._flattened(node)
        if node.target == "mean":
            return self._mean(node)
        return self._unknown(node)

    def _sum(self, node: torch.fx.Node, inputs: list[Label]) -> Label:
        if len(inputs) == 1:  # with a number, or with itself
            return self._kept(node)
        if any(n in self.flat for n in node.all_input_nodes):
            return self._unknown(node)
        return self._join(*inputs[:2])

    def _concatenated(self, node: torch.fx.Node) -> Label:
        listed = node.args[0] if node.args else None
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        nodes = list(listed) if isinstance(listed, (list, tuple)) else []
        labels = [self.labels[n] for n in nodes if isinstance(n, torch.fx.Node)]
        if dim != 1 or not nodes or not all(labels) or any(n in self.flat for n in nodes):
            return self._unknown(node)
        return [group for label in labels for group in label or []]

    def _mean(self, node: torch.fx.Node) -> Label:
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if not (isinstance(dims, (list, tuple)) and set(dims) in ({2, 3}, {-1, -2})):
            return self._unknown(node)
        keepdim = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
        return self._kept(node) if keepdim else self._flattened(node)

    def _item(self, node: torch.fx.Node) -> Label | None:
        source = self.labels[node.args[0]]  # type: ignore[index]
        if source is None:  # of a shape
            return None
        index = node.args[1]
        whole = slice(None)
        if isinstance(index, tuple) and len(index) == 4 and index[:2] == (whole, whole):
            return source
        return self._unknown(node)


def peculiarity(module: nn.Module) -> str | None:
    """What a module's forward does beside its class's on parameters of its own, or None."""
    if any(name not in module._parameters for name in ("weight", "bias")):
        return "its weight or bias is computed from something else"
    if "forward" in vars(module):
        return "it has a forward of its own, which would be lost"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has hooks, which would be lost"
    return None


def _size(label: Label) -> int:
    return sum(group.size for group in label)


def narrow(model: nn.Module, ratio: float, importance: Callable[[nn.Conv2d], Tensor] | None = None) -> nn.Module:
    """Keeps ``max(1, int(ratio * channels))`` channels wherever a convolution writes some, in place.

    Of a group of channels that are added to each other the same ones are kept: those of the highest importance in sum. A
    BatchNorm keeps its statistics. What is not understood keeps its width, and so does the model's output.

    Args:
        importance: of each output channel of a convolution ``[K]``, of any scale; by default the L1 norm of its weights
            (times the scale of the BatchNorm that is behind it, where one is).

    Returns:
        the model.

    Raises:
        ValueError: if the model cannot be traced by torch.fx, if nothing in it could be narrowed, or for a ratio that is
            not in (0, 1]. The model is as it was then.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected 0 < ratio <= 1, got {ratio}")
    try:
        traced = torch.fx.Tracer().trace(model)
    except Exception as error:  # whatever the model's forward does with a stand-in for a tensor
        raise ValueError(
            f"ratio: to have fewer channels the model must be traceable by torch.fx, and is not ({type(error).__name__}: "
            f"{error}); without ratio it need not be"
        ) from error
    graph = _Graph(model)
    graph.walk(traced)
    _weigh(graph, importance)
    groups = {g.root() for use in graph.uses.values() for g in (*use.source, *use.out)}
    for group in groups:
        count = group.size if group.fixed else max(1, int(ratio * group.size))
        scores = torch.zeros(group.size) if group.importance is None else group.importance
        group.kept = scores.argsort(descending=True, stable=True)[:count].sort().values
    if ratio < 1 and all(group.fixed for group in groups):
        raise ValueError("ratio: no channels of the model can be left out")
    for module, use in graph.uses.items():
        _cut(module, use)
    return model


def _weigh(graph: _Graph, importance: Callable[[nn.Conv2d], Tensor] | None) -> None:
    """Sums the importance of each channel over the convolutions that write it, each of mean 1."""
    scales = {id(g.root()): m for m, use in graph.uses.items() if isinstance(m, nn.BatchNorm2d) for g in use.out[:1]}
    for module, use in graph.uses.items():
        if not isinstance(module, nn.Conv2d) or len(use.out) != 1 or module.weight.is_meta:
            continue
        group = use.out[0].root()
        if importance is not None:
            each = importance(module).detach().to("cpu", torch.float64)
        else:
            each = module.weight.detach().abs().flatten(1).sum(1).to("cpu", torch.float64)
            behind = scales.get(id(group))
            if behind is not None and behind.affine and behind.num_features == group.size:
                each = each * behind.weight.detach().abs().to("cpu", torch.float64)
        each = each / each.mean().clamp_min(torch.finfo(torch.float64).tiny)
        group.importance = each if group.importance is None else group.importance + each


def _kept(label: Label, device: torch.device) -> Tensor | None:
    """Indices along the concatenated channels; None for all."""
    parts, start = [], 0
    for group in label:
        kept = group.root().kept
        assert kept is not None
        parts.append(kept + start)
        start += group.size
    indices = torch.cat(parts).to(device)
    return None if len(indices) == start else indices


def _take(module: nn.Module, name: str, *index: Tensor | None) -> None:
    value = getattr(module, name)
    if value is None or all(each is None for each in index):
        return
    with torch.no_grad():
        taken = value.detach()
        for dim, each in enumerate(index):
            taken = taken if each is None else taken.index_select(dim, each)
        if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous():
            taken = taken.contiguous(memory_format=torch.channels_last)
    new = nn.Parameter(taken, value.requires_grad) if isinstance(value, nn.Parameter) else taken
    setattr(module, name, new)


def _cut(module: nn.Module, use: _Use) -> None:
    if isinstance(module, nn.Conv2d):
        device = module.weight.device
        rows = _kept(use.out, device)
        columns = None if module.groups > 1 else _kept(use.source, device)
        _take(module, "weight", rows, columns)
        _take(module, "bias", rows)
        depthwise = module.groups > 1
        module.out_channels, module.in_channels = module.weight.shape[:2]
        if depthwise:
            module.in_channels = module.groups = module.out_channels
    elif isinstance(module, nn.BatchNorm2d):
        rows = _kept(use.source, _device(module))
        for name in ("weight", "bias", "running_mean", "running_var"):
            _take(module, name, rows)
        module.num_features = module.num_features if rows is None else len(rows)
    elif isinstance(module, nn.Linear):
        positions = module.in_features // _size(use.source)
        columns = _kept(use.source, module.weight.device)
        if columns is not None:
            columns = (columns[:, None] * positions + torch.arange(positions, device=columns.device)).flatten()
        _take(module, "weight", None, columns)
        module.in_features = module.weight.shape[1]


def _device(norm: nn.BatchNorm2d) -> torch.device:
    value: Any = norm.weight if norm.affine else norm.running_mean
    return torch.device("cpu") if value is None else value.device
