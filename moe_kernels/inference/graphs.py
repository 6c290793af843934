# SPDX-License-Identifier: Apache-2.0
"""A function of tensors on a CUDA device as CUDA graphs, one for each size of batch."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import memory_format_of

__all__ = ["CudaGraphs"]

# Graphs that are kept; each holds the memory of its batch's activations.
_KEPT = 8
_WARM_UP = 3


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    outputs: list[Tensor]


class CudaGraphs:
    """Calls ``function``, by a graph that was captured at the first call for such inputs; the least recently used of more
    than eight is dropped. Where capturing fails, because an operator synchronises, it is called as it is, and a warning
    says so. Results are copies: the next call does not change them. Not for several threads at once.
    """

    def __init__(self, function: Callable[[Sequence[Tensor]], list[Tensor]]) -> None:
        self._function = function
        self._graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()
        self._fails = False

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        if self._fails or torch.cuda.is_current_stream_capturing():
            return self._function(inputs)
        key = tuple((x.shape, x.device, x.dim() == 4 and memory_format_of(x)) for x in inputs)
        captured = self._graphs.get(key)
        if captured is None:
            try:
                captured = self._capture(inputs)
            except RuntimeError as error:
                warnings.warn(
                    f"fuse: the model cannot be captured as a CUDA graph, and runs without: {error}", stacklevel=4
                )
                self._fails = True
                return self._function(inputs)
            self._graphs[key] = captured
            if len(self._graphs) > _KEPT:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        for mine, given in zip(captured.inputs, inputs, strict=True):
            mine.copy_(given)
        captured.graph.replay()
        return [y.clone() if isinstance(y, Tensor) else y for y in captured.outputs]

    def _capture(self, inputs: Sequence[Tensor]) -> _Graph:
        static = [x.detach().clone() for x in inputs]
        stream = torch.cuda.Stream(static[0].device)
        stream.wait_stream(torch.cuda.current_stream(static[0].device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function(static)
        torch.cuda.current_stream(static[0].device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(static[0].device), torch.cuda.graph(graph):
            outputs = self._function(static)
        return _Graph(graph, static, outputs)
