# SPDX-License-Identifier: Apache-2.0
"""Runs of a graph's nodes as programs of the C++ kernels: which nodes have a native form, and one program for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from ..backends import native
from ..routing import choose
from .capture import Captured, is_size, tensor_of
from .operators import ANY_LAYOUT, HANDLERS, VIEWS
from .recording import (
    Program,
    Recording,
    Unsupported,
    Value,
    image_size,
    offset_of,
    per_sample,
    place_of,
    plan_late,
    plan_memory,
    require_channels_first,
)

__all__ = ["DTYPES", "Program", "Unsupported", "lower", "why_not"]

_aten = torch.ops.aten
DTYPES = (torch.float32, torch.float64)


def why_not(node: torch.fx.Node, captured: Captured, dtype: torch.dtype) -> str | None:
    """None if a node has a native form, else why it has none. Looks at the node alone, with inputs of any origin."""
    try:
        low = Recording(captured, dtype)
        for source in node.all_input_nodes:
            if _is_value(source, captured):
                _read(low, source)
        handler = HANDLERS.get(node.target)
        if handler is None:
            many = node.target is _aten.conv2d.default
            raise Unsupported("many groups, or weights that are computed" if many else "no native kernel")
        result = tensor_of(node)
        if result is None or (result.dtype != dtype and node.target not in (choose, *VIEWS)):
            got = "no tensor" if result is None else str(result.dtype)
            raise Unsupported(f"gives {got}, the model computes in {dtype}")
        if node.target not in ANY_LAYOUT:
            for value in (*(n for n in node.all_input_nodes if n in low.values), node):
                require_channels_first(value)
        handler(low, node)
    except Unsupported as reason:
        return str(reason)
    return None


def _choices_of(node: Any) -> int:
    """How many there were to choose from, of a router's choice; 0 for other indices."""
    while node.target in VIEWS:
        node = node.args[0]
    return image_size(node.args[0])[0] if node.target is choose else 0


def _is_value(node: torch.fx.Node, captured: Captured) -> bool:
    """Neither a constant nor a size."""
    return captured.constant(node) is None and not is_size(node)


def _read(low: Recording, node: torch.fx.Node) -> None:
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
    low = Recording(captured, dtype)
    own = set(nodes)
    inputs: list[torch.fx.Node] = []
    for node in nodes:
        low.node = node
        for source in node.all_input_nodes:
            if source not in own and source not in low.values and _is_value(source, captured):
                _load(low, source, len(inputs))
                inputs.append(source)
        HANDLERS[node.target](low, node)
    for i, node in enumerate(outputs):
        low.node = node
        _store(low, node, i)
    sample_bytes = plan_memory(low.steps)
    program = native.module.Program(native.DTYPE[dtype], sample_bytes, chunk, plan_late(low.steps))
    for step in low.steps:
        step.record(program)
    shapes = [(per_sample(n), tensor_of(n).dtype) for n in outputs]  # type: ignore[union-attr]
    return Program(program, inputs, list(outputs), shapes, low.keep, [(s.name, s.node) for s in low.steps])


def _load(low: Recording, node: torch.fx.Node, number: int) -> None:
    _read(low, node)
    value = low.values[node]
    if value.index:
        low.add("load", [], value, lambda program: program.load_index(number, offset_of(value.buffer)))
        return
    low.add("load", [], value, lambda program: program.load(number, place_of(value)))


def _store(low: Recording, node: torch.fx.Node, number: int) -> None:
    value = low.values[node]
    if value.index:
        low.add("store", [value], None, lambda program: program.store_index(number, offset_of(value.buffer)))
        return
    before = low.prologue(value)
    low.add("store", [value], None, lambda program: program.store(number, place_of(value), before()))
