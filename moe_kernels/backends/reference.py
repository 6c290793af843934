# SPDX-License-Identifier: Apache-2.0
"""The loop over samples in plain torch: the truth that every other backend is held against. Slow, any device."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from .. import checks
from ..geometry import output_size
from ..layout import in_format, memory_format_of
from .interface import Backend

if TYPE_CHECKING:
    from ..geometry import Conv2dGeometry
    from .interface import Epilogue, Experts

__all__ = ["ReferenceBackend"]


class ReferenceBackend(Backend):
    name = "reference"

    def describe(self) -> str:
        return "available; a loop over samples in torch, for any device"

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        packed: Tensor | None,
    ) -> Tensor:
        g = geometry
        bias, gate, scale, shift, residual, relu = epilogue
        wide = torch.promote_types(input.dtype, torch.float32)
        samples = input.shape[0] * g.samples_per_input
        size = [
            output_size(input.shape[2 + a], weight.shape[2 + a], g.stride[a], g.padding[a], g.dilation[a]) for a in (0, 1)
        ]
        out = input.new_empty((samples, g.out_width, *size))
        for v, (o, c) in enumerate(_slices(experts, g, samples)):
            x = input[v // g.samples_per_input].unsqueeze(0).to(wide)
            w = _slice(weight, o, c, g).to(wide).contiguous()  # torch reads past some strided ones
            with _without_autocast(input.device):
                y = F.conv2d(x, w, None, g.stride, g.padding, g.dilation, g.groups)
            channels = slice(o, o + g.out_width)
            if bias is not None:
                y = y + bias[channels].to(wide)[:, None, None]
            if gate is not None:
                y = y * gate[v].to(wide)
            if scale is not None:
                y = y * _of_slice(scale, channels, g).to(wide)[:, None, None]
            if shift is not None:
                y = y + _of_slice(shift, channels, g).to(wide)[:, None, None]
            if residual is not None:
                y = y + residual[v].to(wide)
            out[v] = (y.relu() if relu else y)[0].to(input.dtype)
        return in_format(out, memory_format_of(input))

    def grad_input(
        self,
        grad: Tensor,
        weight: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        size: tuple[int, int],
        packed: Tensor | None,
    ) -> Tensor:
        g = geometry
        wide = torch.promote_types(grad.dtype, torch.float32)
        samples = grad.shape[0]
        out = grad.new_zeros((samples // g.samples_per_input, g.in_width, *size), dtype=wide)
        for v, (o, c) in enumerate(_slices(experts, g, samples)):
            w = _slice(weight, o, c, g).to(wide).contiguous()
            one = [1, g.in_width, *size]
            dx = conv2d_input(one, w, grad[v : v + 1].to(wide), g.stride, g.padding, g.dilation, g.groups)
            out[v // g.samples_per_input] += dx[0]
        return in_format(out.to(grad.dtype), memory_format_of(grad))

    def grad_weight(
        self,
        grad: Tensor,
        input: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        shape: tuple[int, ...],
        channels_last: bool,
    ) -> Tensor:
        g = geometry
        wide = torch.promote_types(grad.dtype, torch.float32)
        out = grad.new_zeros(shape, dtype=wide)
        for v, (o, c) in enumerate(_slices(experts, g, grad.shape[0])):
            part = _slice(out, o, c, g)
            x = input[v // g.samples_per_input].unsqueeze(0).to(wide)
            dy = grad[v : v + 1].to(wide)
            part += conv2d_weight(x, list(part.shape), dy, g.stride, g.padding, g.dilation, g.groups)
        return in_format(out.to(grad.dtype), torch.channels_last if channels_last else torch.contiguous_format)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The operators may be called past the dispatcher, where autocast is still on and would narrow what is wide here."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _slices(experts: Experts, g: Conv2dGeometry, samples: int) -> list[tuple[int, int]]:
    """The first output and input channel of each sample's slice."""
    checks.choices(experts, g, samples)
    outs = _starts("routing", experts.out, g.num_out, g.out_starts, g.out_width, samples)
    ins = _starts("in_routing", experts.inner, g.num_in, g.in_starts, g.in_width, samples)
    return list(zip(outs, ins, strict=True))


def _starts(name: str, expert: Tensor | None, count: int, starts: Sequence[int], width: int, samples: int) -> list[int]:
    if not count or expert is None:
        return [0] * samples
    chosen = expert.tolist()
    for v, e in enumerate(chosen):
        if not 0 <= e < count:
            raise ValueError(f"{name}: expert index {e} of sample {v} is outside 0 .. {count - 1}")
    return [starts[e] if starts else e * width for e in chosen]


def _slice(weight: Tensor, o: int, c: int, g: Conv2dGeometry) -> Tensor:
    return weight[o : o + g.out_width, c : c + g.in_width // g.groups]


def _of_slice(value: Tensor, channels: slice, g: Conv2dGeometry) -> Tensor:
    return value if value.shape[0] == g.out_width else value[channels]
