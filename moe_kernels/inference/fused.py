# SPDX-License-Identifier: Apache-2.0
"""The inference form of a model: :func:`fuse`."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .. import backends
from ..layout import memory_format_of
from . import lowering
from .capture import Captured, capture, is_size, size_for
from .folding import fold
from .graphs import CudaGraphs
from .lowering import Program

__all__ = ["Fallback", "FusedModel", "StepTime", "fuse"]

# Samples that go through a network together on the CPU.
_CHUNK = 16


@dataclass(frozen=True)
class Fallback:
    """An operation that runs as torch's own: its name, the module that it belongs to, and why."""

    operation: str
    module: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation} of {self.module or 'the model'}: {self.reason}"


@dataclass
class _Torch:
    """Nodes that run one after the other as torch's operators."""

    nodes: list[torch.fx.Node]


_Stage = Program | _Torch


@dataclass(frozen=True)
class StepTime:
    """What a part of a fused model took: its operation, the module that it belongs to, and seconds of all threads."""

    operation: str
    module: str
    seconds: float


def fuse(model: nn.Module, example_input: Tensor | tuple[Tensor, ...]) -> FusedModel:
    """An inference form of a model with routed layers: what it computes in eval mode, with less work.

    BatchNorm, residual and ReLU become part of the convolution before them (or, where that cannot be, of the layers that
    read the result), weights are packed once, and memory is planned once and used again. On the CPU, in float32 and
    float64, the whole network is recorded as one sequence of C++ kernel calls, without Python between layers; on a CUDA
    device it runs as a CUDA graph for each size of batch, with each router of pooled features as one kernel. What has no
    native form runs as torch's operator between two such sequences: see :attr:`FusedModel.fallbacks`, of which a warning
    tells.

    The form is a copy of the model's values at this moment: after training on, fuse again. It takes batches of any size,
    of images of the example's size; it has no backward, and autocast does not reach into it.

    Args:
        model: in eval mode; ``torch.export`` must be able to trace its forward with these inputs as positional arguments.
            Of keyword arguments their defaults become part of the form.
        example_input: an input ``[B, ...]`` with B >= 1, or a tuple of them, for the sizes, dtype and device.

    Raises:
        ValueError: if the model is in training mode, of another dtype than the example, or cannot be traced; TypeError:
            for an example that is no tensor, or a model that is no module or fused already.
        BackendUnavailable: if no backend computes on the example's device.
    """
    if not isinstance(model, nn.Module) or isinstance(model, FusedModel):
        raise TypeError(f"model: expected an nn.Module that is not fused yet, got {type(model).__name__}")
    examples = example_input if isinstance(example_input, tuple) else (example_input,)
    for x in examples:
        if not isinstance(x, Tensor):
            raise TypeError(f"example_input: expected a tensor or a tuple of tensors, got {type(x).__name__}")
        if x.dim() < 1 or not len(x):
            raise ValueError(f"example_input: expected a batch of at least one sample, got shape {tuple(x.shape)}")
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(f"model: expected eval mode, call model.eval() first; {training[0]} is in training mode")
    given = {x.dtype for x in examples if x.is_floating_point()}
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if given and own and not given & own:
        raise ValueError(f"example_input: expected {_names(own)} as the model's parameters, got {_names(given)}")
    captured = capture(model, examples)
    device, dtype = examples[0].device, examples[0].dtype
    backend = backends.choose(device)
    on_cpu = backend.name == "cpu" and dtype in lowering.DTYPES and not captured.writers
    if not captured.writers:
        fold(captured, dense=on_cpu, routers=backend.routes)
    fused = FusedModel(captured, examples, native=on_cpu)
    if device.type == "cpu" and not on_cpu and not captured.writers:
        why = f"backend {backend.name!r}" if backend.name != "cpu" else f"{dtype}, and not float32 or float64"
        warnings.warn(f"fuse: the whole model runs as torch's own operators ({why})", stacklevel=2)
    if fused.fallbacks:
        shown = "; ".join(str(f) for f in fused.fallbacks[:3])
        more = f"; and {len(fused.fallbacks) - 3} more" if len(fused.fallbacks) > 3 else ""
        warnings.warn(f"fuse: {len(fused.fallbacks)} operations run as torch's own: {shown}{more}", stacklevel=2)
    return fused


def _names(dtypes: set[torch.dtype]) -> str:
    return " or ".join(sorted(map(str, dtypes)))


class FusedModel(nn.Module):
    """What :func:`fuse` makes. Called as the model is; without a backward.

    Attributes:
        fallbacks: the operations that have no native form, as :class:`Fallback`; on a CUDA device only those that write
            in place where others may see it, which leave the whole model as it is.
    """

    fallbacks: tuple[Fallback, ...]

    def __init__(self, captured: Captured, examples: tuple[Tensor, ...], *, native: bool) -> None:
        super().__init__()
        self._captured = captured
        self._like = [(tuple(x.shape[1:]), x.dtype, x.device) for x in examples]
        self._leaves = pytree.tree_leaves(_result(captured.graph))  # nodes, and what is the same in each call
        self._outputs = [n for n in self._leaves if isinstance(n, torch.fx.Node)]
        self._stages, self.fallbacks = _stages(captured, self._outputs, examples[0].dtype if native else None)
        left = [n for stage in self._stages if isinstance(stage, _Torch) for n in stage.nodes]
        captured.keep_constants_of([*left, *self._outputs])  # programs have copies of what they read
        captured.packed.clear()
        self._dead = _last_uses(self._stages, self._outputs)
        self._graphs = CudaGraphs(self._run) if examples[0].device.type == "cuda" else None
        super().train(False)

    def forward(self, *inputs: Tensor) -> Any:
        """As the model's.

        Raises:
            ValueError: for inputs of another size, dtype or device than the example's, or a router that gives NaN;
            TypeError: for another number of them, or what is no tensor.
            RuntimeError: if an input needs a gradient.
        """
        self._check(inputs)
        with torch.no_grad(), _without_autocast(inputs[0].device.type):
            results = iter(self._run(inputs) if self._graphs is None else self._graphs(inputs))
        leaves = [next(results) if isinstance(leaf, torch.fx.Node) else leaf for leaf in self._leaves]
        return pytree.tree_unflatten(leaves, self._captured.out_spec)

    def train(self, mode: bool = True) -> FusedModel:
        """Raises ValueError for ``mode=True``: there is nothing to train."""
        if mode:
            raise ValueError("mode: a fused model is for inference; train the model that it was made of, and fuse again")
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedModel:
        """Of ``to()``, ``half()``, ``cuda()`` and their kin.

        Raises:
            TypeError: if they ask for another dtype or device.
        """
        for _, dtype, device in self._like:
            probe = fn(torch.empty(0, dtype=dtype, device=device))
            if probe.dtype != dtype or probe.device != device:
                raise TypeError(
                    f"a fused model stays of {dtype} on {device}; take the model that it was made of to {probe.dtype} on "
                    f"{probe.device}, and fuse that"
                )
        return self

    def profile(self, *inputs: Tensor) -> list[StepTime]:
        """The time of each step in one call, after another one that is not timed; on the CPU.

        Where each thread takes a part of the batch through the network, seconds are the sum of the threads'.

        Raises:
            ValueError: on another device; and as :meth:`forward`.
        """
        if self._graphs is not None:
            raise ValueError("profile: a CUDA graph has no steps to be timed one by one; use torch.profiler")
        self(*inputs)
        times: list[StepTime] = []
        with torch.no_grad(), _without_autocast(inputs[0].device.type):
            self._run(inputs, times)
        return times

    def memory(self, batch: int) -> int:
        """Bytes of activations that a batch of this size takes on the CPU, beside inputs, results and fallbacks. They are
        kept for the next call."""
        return sum(s.native.memory(batch, torch.get_num_threads()) for s in self._stages if isinstance(s, Program))

    def __getstate__(self) -> Any:
        raise TypeError("a fused model is neither saved nor copied: save the model that it was made of, and fuse that")

    def extra_repr(self) -> str:
        native = [s for s in self._stages if isinstance(s, Program)]
        text = (
            f"{sum(len(s.steps) for s in native)} native steps in {len(native)} programs, {len(self.fallbacks)} fallbacks"
        )
        return "\n".join([text, *map(str, self.fallbacks)])

    def _check(self, inputs: Sequence[Tensor]) -> None:
        if len(inputs) != len(self._like):
            raise TypeError(f"inputs: expected {len(self._like)}, got {len(inputs)}")
        for x, (shape, dtype, device) in zip(inputs, self._like, strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(f"input: expected a tensor, got {type(x).__name__}")
            if tuple(x.shape[1:]) != shape or x.dtype != dtype or x.device != device:
                raise ValueError(
                    f"input: expected [B, {', '.join(map(str, shape))}] of {dtype} on {device} as the example's, got "
                    f"{list(x.shape)} of {x.dtype} on {x.device}; fuse once more for another size, dtype or device"
                )
            if len(x) != len(inputs[0]):
                raise ValueError(f"inputs: expected batches of one size, got {[len(i) for i in inputs]}")
            if x.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    "input: a fused model has no backward; use the model it was made of, or torch.no_grad()"
                )

    def _run(self, inputs: Sequence[Tensor], times: list[StepTime] | None = None) -> list[Tensor]:
        values: dict[Any, Any] = dict(zip(self._captured.inputs, inputs, strict=True))
        layout = memory_format_of(inputs[0]) if inputs[0].dim() == 4 else torch.contiguous_format
        for stage, dead in zip(self._stages, self._dead, strict=True):
            if isinstance(stage, Program):
                seconds: list[float] | None = None if times is None else []
                results = stage.run([values[n] for n in stage.inputs], layout, seconds)
                values.update(zip(stage.outputs, results, strict=True))
                if times is not None and seconds is not None:
                    times += [StepTime(n, _module(at), t) for (n, at), t in zip(stage.steps, seconds, strict=True)]
            else:
                for node in stage.nodes:
                    begin = time.perf_counter()
                    values[node] = self._call(node, values)
                    if times is not None:
                        times.append(StepTime(_operation(node), _module(node), time.perf_counter() - begin))
            for node in dead:
                del values[node]
        # a constant is the caller's to write to
        return [self._value(n, values).clone() if n.op == "get_attr" else self._value(n, values) for n in self._outputs]

    def _value(self, node: torch.fx.Node, values: dict[Any, Any]) -> Any:
        if is_size(node):
            return size_for(node, len(values[self._captured.inputs[0]]))
        return values[node] if node in values else self._captured.constants[str(node.target)]

    def _call(self, node: torch.fx.Node, values: dict[Any, Any]) -> Any:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: self._value(n, values))
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _without_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """What was traced without it is computed without it."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _result(graph: torch.fx.Graph) -> Any:
    return next(n for n in graph.nodes if n.op == "output").args


def _stages(
    captured: Captured, outputs: list[torch.fx.Node], dtype: torch.dtype | None
) -> tuple[list[_Stage], tuple[Fallback, ...]]:
    """Runs of neighbouring nodes of one kind. ``dtype`` None: torch's operators for all."""
    in_place = "it writes in place where others may see it, and nothing is fused"
    fallbacks = [Fallback(_operation(n), _module(n), in_place) for n in captured.writers]
    runs: list[tuple[bool, list[torch.fx.Node]]] = []
    for node in captured.graph.nodes:
        if node.op != "call_function" or is_size(node):
            continue
        reason = "" if dtype is None else lowering.why_not(node, captured, dtype)
        if reason and _is_work(node):
            fallbacks.append(Fallback(_operation(node), _module(node), reason))
        native = reason is None
        if not runs or runs[-1][0] != native:
            runs.append((native, []))
        runs[-1][1].append(node)
    stages: list[_Stage] = []
    for native, nodes in runs:
        own = set(nodes)
        if native:
            assert dtype is not None
            wanted = [
                n for n in nodes if n in outputs or any(user not in own and user.op != "output" for user in n.users)
            ]
            stages.append(lowering.lower(captured, nodes, wanted, dtype, _CHUNK))
        else:
            stages.append(_Torch(nodes))
    return stages, tuple(fallbacks)


def _is_work(node: torch.fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _operation(node: torch.fx.Node) -> str:
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", str(packet))


def _module(node: torch.fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]).removeprefix("L['self'].") if stack else ""


def _last_uses(stages: Sequence[_Stage], outputs: Sequence[torch.fx.Node]) -> list[list[torch.fx.Node]]:
    """After each stage the values that nobody reads again."""
    last: dict[torch.fx.Node, int] = {}
    for i, stage in enumerate(stages):
        made = stage.outputs if isinstance(stage, Program) else stage.nodes
        read = stage.inputs if isinstance(stage, Program) else [n for node in stage.nodes for n in node.all_input_nodes]
        for node in (*made, *read):
            if node.op == "call_function" and not is_size(node):
                last[node] = i
    return [[n for n, at in last.items() if at == i and n not in outputs] for i in range(len(stages))]
