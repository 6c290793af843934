# SPDX-License-Identifier: Apache-2.0
"""A model's forward as a graph of torch's operators and the routed ones, its parameters as constants."""

from __future__ import annotations

import inspect
import itertools
import operator
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..tracing import for_fusion

__all__ = ["Captured", "arguments", "capture", "is_size", "schema_of", "size_for", "tensor_of", "unused_size"]

_aten = torch.ops.aten

# What changes no value in eval mode.
_NOTHING = {
    _aten.detach.default, _aten.clone.default, _aten.contiguous.default, _aten.alias.default, _aten.lift_fresh.default,
    _aten.lift_fresh_copy.default,
}  # fmt: skip
_DROPOUTS = {_aten.dropout.default, _aten.feature_dropout.default, _aten.alpha_dropout.default}
_CASTS = {_aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten._to_copy.default}
# What changes nothing where the shape stays.
_SAME = {
    _aten.slice.Tensor, _aten.expand.default, _aten.reshape.default, _aten.view.default, _aten.flatten.using_ints,
    _aten.view_as.default,
}  # fmt: skip
_OUT_OF_PLACE = {
    _aten.relu_.default: _aten.relu.default, _aten.add_.Tensor: _aten.add.Tensor, _aten.mul_.Tensor: _aten.mul.Tensor,
    _aten.sub_.Tensor: _aten.sub.Tensor, _aten.hardtanh_.default: _aten.hardtanh.default,
    _aten.silu_.default: _aten.silu.default,
}  # fmt: skip


# What gives new memory always.
_FRESH = {
    _aten.conv2d.default, _aten.conv2d.padding, _aten.batch_norm.default, _aten.linear.default, _aten.relu.default,
    _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor, _aten.cat.default, _aten.max_pool2d.default,
    _aten.avg_pool2d.default, _aten.layer_norm.default, _aten.group_norm.default, _aten.matmul.default,
}  # fmt: skip


@dataclass
class Captured:
    """The graph, and what its ``get_attr`` nodes name.

    A tensor's shape, dtype and device are those of ``node.meta["val"]``; the batch is a symbol there.
    """

    graph: torch.fx.Graph
    constants: dict[str, Tensor]
    inputs: list[torch.fx.Node]
    out_spec: pytree.TreeSpec
    writers: list[torch.fx.Node] = field(default_factory=list)  # that write in place where others may see it
    packed: dict[torch.fx.Node, Tensor | None] = field(default_factory=dict)  # convolutions' weights
    _names: Iterator[int] = field(default_factory=itertools.count)

    def constant(self, value: Any) -> Tensor | None:
        """The tensor of a ``get_attr`` node; None for anything else."""
        if isinstance(value, torch.fx.Node) and value.op == "get_attr":
            return self.constants[str(value.target)]
        return None

    def add_constant(self, tensor: Tensor, before: torch.fx.Node) -> torch.fx.Node:
        name = f"constant_{next(self._names)}"
        self.constants[name] = tensor
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", name)
        node.meta["val"] = tensor
        return node

    def drop_unused(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users and not _mutates(node):
                self.graph.erase_node(node)
        self.keep_constants_of(self.graph.nodes)

    def keep_constants_of(self, nodes: Iterable[torch.fx.Node]) -> None:
        """Forgets those that no other node reads."""
        named = {str(n.target) for node in nodes for n in (node, *node.all_input_nodes) if n.op == "get_attr"}
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in named}


def tensor_of(node: Any) -> Tensor | None:
    """The stand-in tensor of a node's value; None where it has none."""
    value = node.meta.get("val") if isinstance(node, torch.fx.Node) else None
    return value if isinstance(value, Tensor) else None


def is_size(node: torch.fx.Node) -> bool:
    """Whether a node's value is a size that depends on the batch."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def size_for(node: torch.fx.Node, batch: int) -> int:
    """What such a node gives for a batch of that size."""
    return _for(node.meta["val"], batch)


def _for(size: int | torch.SymInt, batch: int) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.xreplace(dict.fromkeys(expression.free_symbols, batch)))


def arguments(node: torch.fx.Node) -> list[Any]:
    """An operator's arguments in the order of its schema, those that are not given by their defaults."""
    schema = schema_of(node)
    assert schema is not None
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | node.kwargs
    return [given.get(a.name, a.default_value) for a in schema.arguments]


def schema_of(node: torch.fx.Node) -> torch._C.FunctionSchema | None:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def capture(model: nn.Module, example: tuple[Tensor, ...]) -> Captured:
    """By torch.export, for batches of any size, a single sample's traced besides to be compared.

    Args:
        example: inputs ``[B, ...]``, of which the first sample's shape, dtype, device and memory format count.

    Raises:
        ValueError: if torch.export cannot trace the model, or its forward depends on the size of the batch.
    """
    batch = torch.export.Dim("batch", min=1)
    program = _exported(model, example, unused_size(model, example), batch)
    asked = _asked_of_batch(program)
    if asked is None and _steps(program) != _steps(_exported(model, example, 1, None)):
        # torch.export takes an open batch for one of at least two samples, without a guard
        asked = "for a single sample it is another one"
    if asked is not None:
        raise ValueError(f"model: its forward depends on the size of the batch, which a fused form leaves open: {asked}")
    return _simplified(_taken_apart(program))


def _exported(
    model: nn.Module, example: tuple[Tensor, ...], size: int, batch: torch.export.Dim | None
) -> torch.export.ExportedProgram:
    examples = tuple(_resized(x, size) for x in example)
    dims = None if batch is None else _as_given(model, [{0: batch} for _ in example])
    try:
        with torch.no_grad(), for_fusion():
            return torch.export.export(model, examples, dynamic_shapes=dims, strict=False)
    except Exception as error:  # whatever a model's forward does with a stand-in for a tensor
        raise ValueError(f"model: torch.export cannot trace it ({type(error).__name__}: {error})") from error


def _as_given(model: nn.Module, dims: list[Any]) -> tuple[Any, ...]:
    """One for each positional argument of the forward, as torch.export wants them: those of ``*args`` are a tuple."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    kinds = [p.kind for p in parameters]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(dims)
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return tuple(dims) if len(dims) <= named else (*dims[:named], tuple(dims[named:]))


def _steps(program: torch.export.ExportedProgram) -> list[tuple[str, tuple[int, ...]]]:
    """What a program computes and gives, by the shapes of a single sample; without views, which may be none there."""
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    nodes = [n for n in calls if n.target not in _SAME and not _does_nothing(n)]
    nodes += [n for n in program.graph.output_node().all_input_nodes if n.op == "call_function"]
    values = [(node, tensor_of(node)) for node in nodes]
    return [(str(node.target), tuple(_for(s, 1) for s in v.shape)) for node, v in values if v is not None]


def unused_size(model: nn.Module, example: Iterable[Tensor]) -> int:
    """A batch to trace with: 0 and 1 would be taken for constants, and one that is also a tensor's size for that size."""
    sizes = {n for t in (*model.parameters(), *model.buffers(), *example) for n in t.shape}
    return next(n for n in (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, *range(47, 10**6)) if n not in sizes)


def _resized(x: Tensor, size: int) -> Tensor:
    """The first sample ``size`` times, in the same memory format."""
    repeated = x[:1].repeat(size, *[1] * (x.dim() - 1)) if len(x) else x.new_zeros(size, *x.shape[1:])
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        repeated = repeated.contiguous(memory_format=torch.channels_last)
    return repeated


_SIZES_AGREE = re.compile(r"L\['?\w+'?\](\[\d+\])?\.size\(\)\[0\] == L\['?\w+'?\](\[\d+\])?\.size\(\)\[0\]")


def _asked_of_batch(program: torch.export.ExportedProgram) -> str | None:
    """What the model's code asked of the batch's size, for which torch.export then noted the answer; None for nothing."""
    # private, and the only place that tells more than a range
    for guard in getattr(program, "_guards_code", None) or ():
        if ".size()[0]" in guard and not _SIZES_AGREE.fullmatch(guard):
            return str(guard)
    for node in program.graph.nodes:
        value = tensor_of(node)
        if node.name not in program.graph_signature.user_inputs or value is None or not value.dim():
            continue
        size = value.shape[0]
        if not isinstance(size, torch.SymInt) or not size.node.expr.is_Symbol:
            return f"{node.name} has {size} samples"
        allowed = program.range_constraints.get(size.node.expr)
        if allowed is not None and (allowed.lower > 1 or bool(allowed.upper < 1 << 32)):
            return f"{node.name} has {allowed.lower} to {allowed.upper} samples"
    return None


def _taken_apart(program: torch.export.ExportedProgram) -> Captured:
    """The exported graph with its parameters and buffers as ``get_attr`` nodes."""
    signature, graph = program.graph_signature, program.graph
    state = {**program.state_dict, **program.constants}
    named = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    captured = Captured(graph, {}, [], program.call_spec.out_spec)
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        if node.name not in named:
            captured.inputs.append(node)
            continue
        if node.users:
            tensor = state[named[node.name]].detach().clone()  # a fused form does not change when the model does
            node.replace_all_uses_with(captured.add_constant(tensor, node))
        graph.erase_node(node)
    return captured


def _simplified(captured: Captured) -> Captured:
    graph = captured.graph
    for node in list(graph.nodes):
        if node.target in _DROPOUTS and (arguments(node)[2] is False or arguments(node)[1] == 0):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    _write_elsewhere(graph)
    captured.writers = [n for n in graph.nodes if _mutates(n) or n.target is _aten.as_strided.default]
    if captured.writers:  # what shares memory with what is not followed: the graph stays as it is
        return captured
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is _aten._assert_tensor_metadata.default or node.target is _aten._assert_scalar.default:
            graph.erase_node(node)
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is _aten.view.default:  # a copy that it needed may have gone
            node.target = _aten.reshape.default
    _fold_constants(captured)
    captured.drop_unused()
    return captured


def _does_nothing(node: torch.fx.Node) -> bool:
    if node.target in _NOTHING:
        return True
    source, result = tensor_of(node.args[0] if node.args else None), tensor_of(node)
    if source is None or result is None:
        return False
    if node.target in _CASTS:
        return source.dtype == result.dtype and source.device == result.device
    return node.target in _SAME and [str(s) for s in source.shape] == [str(s) for s in result.shape]


def _mutates(node: torch.fx.Node) -> bool:
    schema = schema_of(node)
    return schema is not None and schema.is_mutable


def _write_elsewhere(graph: torch.fx.Graph) -> None:
    """Makes an in-place operation on what nobody else sees the other form."""
    nodes = list(graph.nodes)
    order = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        if node.target not in _OUT_OF_PLACE or not isinstance(node.args[0], torch.fx.Node):
            continue
        written = node.args[0]
        if _is_fresh(written) and not any(_may_alias(user) for user in written.users if user is not node):
            node.target = _OUT_OF_PLACE[node.target]
            for user in [u for u in written.users if order[u] > order[node]]:
                user.replace_input_with(written, node)


def _is_fresh(node: torch.fx.Node) -> bool:
    return node.target in _FRESH or str(node.target).startswith("moe_kernels.")


def _may_alias(node: torch.fx.Node) -> bool:
    """Whether a result may be a view of an argument."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    schema = schema_of(node)
    if schema is None:
        return False
    composite = node.target in (
        _aten.reshape.default,
        _aten.flatten.using_ints,
        _aten.contiguous.default,
        _aten.view_as.default,
    )
    return composite or node.target in _CASTS or any(r.alias_info is not None for r in schema.returns)


def _fold_constants(captured: Captured) -> None:
    """Computes what depends on constants alone."""
    graph = captured.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.all_input_nodes or _is_random(node):
            continue
        if any(captured.constant(n) is None for n in node.all_input_nodes) or tensor_of(node) is None:
            continue
        args, kwargs = pytree.tree_map(
            lambda a: captured.constants[str(a.target)] if isinstance(a, torch.fx.Node) else a, (node.args, node.kwargs)
        )
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        node.replace_all_uses_with(captured.add_constant(value, node))
        graph.erase_node(node)


def _is_random(node: torch.fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
