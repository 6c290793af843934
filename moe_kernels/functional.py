# SPDX-License-Identifier: Apache-2.0
"""Routed convolution, and a router, as functions of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import backends, checks, ops
from .backends import Backend, BackendUnavailable, Epilogue
from .geometry import Conv2dGeometry, pair
from .planning import plan_for
from .routing import GATES, Routing, apply_gate
from .rows import sum_choices
from .slices import ExpertSlices

__all__ = ["apply_geometry", "pooled_routing", "routed_conv2d", "routed_conv2d_fused"]

IntPair = int | tuple[int, int]


def routed_conv2d(
    input: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [R_out, R_in / groups, kh, kw]
    routing: Routing,  # expert [B] or [B, k]
    bias: Tensor | None = None,  # [R_out]
    *,
    out_slices: ExpertSlices,
    in_slices: ExpertSlices | None = None,
    in_routing: Routing | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
) -> Tensor:  # [B, w_out, P, Q]
    """For each sample the convolution with the slice of ``weight`` that ``routing`` chose, and nothing else.

        y[i] = gate[i] * (conv2d(x[i], W[o(i) : o(i) + w_out, c(i) : c(i) + w_in]) + b[o(i) : o(i) + w_out])

    and for k > 1 the sum of the k choices. ``in_slices`` is whole by default; where it is not, ``in_routing`` (default:
    ``routing``) is the choice that made the input's channels. channels_last in, channels_last out.

    Raises:
        TypeError: for a wrong type or dtype, ValueError: for a wrong shape, device or index; both name the argument.
        BackendUnavailable: if no backend computes on the input's device.
    """
    checks.image(input)
    if in_slices is None:
        in_slices = ExpertSlices.whole(input.shape[1])
    geometry = _checked_geometry(weight, bias, out_slices, in_slices, stride, padding, dilation, groups)
    return apply_geometry(input, weight, bias, routing, in_routing, geometry)


def routed_conv2d_fused(
    input: Tensor,
    weight: Tensor,
    routing: Routing,
    bias: Tensor | None = None,
    *,
    out_slices: ExpertSlices,
    in_slices: ExpertSlices | None = None,
    in_routing: Routing | None = None,
    stride: IntPair = 1,
    padding: IntPair = 0,
    dilation: IntPair = 1,
    groups: int = 1,
    scale: Tensor | None = None,  # [w_out] for all experts, or [R_out]
    shift: Tensor | None = None,  # as scale
    residual: Tensor | None = None,  # [B, w_out, P, Q]
    relu: bool = False,
) -> Tensor:
    """:func:`routed_conv2d` with its epilogue: ``relu(scale * (gate * (conv + bias)) + shift + residual)``.

    One pass where no gradient is needed and k = 1; differentiable in every argument, by composition, where one is.

    Raises:
        As :func:`routed_conv2d`; ValueError for ``scale``, ``shift`` or ``residual`` of another shape.
    """
    checks.image(input)
    if in_slices is None:
        in_slices = ExpertSlices.whole(input.shape[1])
    geometry = _checked_geometry(weight, bias, out_slices, in_slices, stride, padding, dilation, groups)
    if not input.is_meta and torch.is_autocast_enabled(input.device.type):  # torch has no autocast for meta
        input, weight, bias, residual = _autocast(input, weight, bias, residual)
    checks.layer_input(input, weight, bias, routing, routing if in_routing is None else in_routing, geometry)
    out_expert, in_expert, geometry = _experts(input, routing, in_routing, geometry)
    k = routing.top_k
    rows, columns = ops.output_shape(input, weight, geometry)[2:]
    samples = input.shape[0] * geometry.samples_per_input // k
    values = Epilogue(None, None, scale, shift, residual, relu)  # bias and gate are checked already
    checks.epilogue(input, values, out_slices.width, out_slices.total, k, (samples, out_slices.width, rows, columns))
    gate = routing.gate
    if k == 1 and not (torch.is_grad_enabled() and gate is not None and gate.requires_grad):
        values = values._replace(bias=bias, gate=None if gate is None or routing.unit_gate else gate.reshape(-1))
        plan = plan_for(routing, in_routing, input, weight, out_expert, in_expert, geometry)
        return ops.conv2d_fused(input, weight, out_expert, in_expert, *geometry, *values, None, plan)
    y = apply_geometry(input, weight, bias, routing, in_routing, geometry._replace(samples_per_input=1))
    choice = out_expert if k == 1 else None
    return ops.epilogue(y, choice, geometry, scale, shift, residual, relu)


def pooled_routing(
    input: Tensor,  # [B, C, H, W]
    weight: Tensor,  # [N, C]
    bias: Tensor | None = None,  # [N]
    norm_weight: Tensor | None = None,  # [C]
    norm_bias: Tensor | None = None,  # [C]
    *,
    normalize: bool = True,
    eps: float = 1e-5,
    gate: str = "straight_through",
) -> Routing:  # expert [B]
    """The choice of a router that looks at channel means: pool, normalise, linear, highest score.

        features = layer_norm(input.mean((2, 3)), [C], norm_weight, norm_bias, eps)    (normalize=False: the means)
        Routing.from_scores(linear(features, weight, bias), gate=gate)

    Differentiable as that composition. Where no gradient is needed and nothing traces, a backend with a kernel for it
    (CUDA's) takes one launch that reads a channels_last input once, with all in between in float32; a gate of exactly 1
    is None then. Elsewhere it costs what the composition does: on CUDA a dozen launches.

    Raises:
        TypeError: for a wrong type or dtype, ValueError: for a wrong shape, device or gate; both name the argument.
        ValueError: if a score is NaN on the CPU, as :meth:`Routing.from_scores`; on other devices that sample's expert is
            N, out of range.
    """
    checks.pooled_router(input, weight, bias, norm_weight, norm_bias, normalize, gate, GATES)
    backend = _router_of(input, weight, bias, norm_weight, norm_bias)
    made = None
    if backend is not None:
        made = backend.route(input, weight, bias, norm_weight, norm_bias, normalize, eps)
    if made is None:
        features = input.mean((2, 3))
        if normalize:
            features = F.layer_norm(features, features.shape[1:], norm_weight, norm_bias, eps)
        return Routing.from_scores(F.linear(features, weight, bias), gate=gate)
    expert, scores, probability = made
    checks.no_nan("scores", scores)
    value = probability.to(scores.dtype) if gate == "softmax" else None
    return Routing(expert, value, num_experts=weight.shape[0])


def _router_of(input: Tensor, *others: Tensor | None) -> Backend | None:
    """The backend, if it has a kernel and neither a derivative nor anybody watching needs the steps."""
    if torch.compiler.is_compiling() or input.is_meta:
        return None
    try:
        backend = backends.choose(input.device)
    except BackendUnavailable:  # torch's own operators need none
        return None
    if not backend.routes or forward_ad._current_level >= 0 or torch.is_autocast_enabled(input.device.type):
        return None
    given = [t for t in others if t is not None]
    if torch.is_grad_enabled() and (input.requires_grad or any(t.requires_grad for t in given)):
        return None
    return None if any(ops.traced(input, t) for t in given) else backend


def _checked_geometry(
    weight: Tensor,
    bias: Tensor | None,
    out_slices: ExpertSlices,
    in_slices: ExpertSlices,
    stride: IntPair,
    padding: IntPair,
    dilation: IntPair,
    groups: int,
) -> Conv2dGeometry:
    checks.sides(out_slices, in_slices, groups)
    checks.weight(weight, out_slices, in_slices, groups)
    if bias is not None and tuple(bias.shape) != (out_slices.total,):
        raise ValueError(f"bias: expected shape [{out_slices.total}], got {tuple(bias.shape)}")
    pairs = [pair(v, n) for v, n in ((stride, "stride"), (padding, "padding"), (dilation, "dilation"))]
    for name, value, minimum in zip(("stride", "padding", "dilation"), pairs, (1, 0, 1), strict=True):
        checks.positive_pair(name, value, minimum)
    return Conv2dGeometry.of(out_slices, in_slices, pairs[0], pairs[1], pairs[2], groups)


def apply_geometry(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routing: Routing,
    in_routing: Routing | None,
    geometry: Conv2dGeometry,
    packed: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """:func:`routed_conv2d` with its slices and sizes made a value before; the modules' way in."""
    checks.image(input)
    if not input.is_meta and torch.is_autocast_enabled(input.device.type):  # torch has no autocast for meta
        input, weight, bias = _autocast(input, weight, bias)
    checks.layer_input(input, weight, bias, routing, routing if in_routing is None else in_routing, geometry)
    out_expert, in_expert, geometry = _experts(input, routing, in_routing, geometry)
    gate = None if routing.gate is None else routing.gate.reshape(-1)
    plan = plan_for(routing, in_routing, input, weight, out_expert, in_expert, geometry)
    if not torch.is_grad_enabled() or not (
        input.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
        or (gate is not None and gate.requires_grad)
    ):
        # no gradient although it may be enabled: the operators' autograd layer has nothing to do
        if routing.unit_gate:
            gate = None
        if bias is None and gate is None:
            y = ops.call(ops.conv2d, input, weight, out_expert, in_expert, geometry, *packed, plan)
        else:
            epilogue = Epilogue(bias, gate)
            y = ops.call(ops.conv2d_fused, input, weight, out_expert, in_expert, geometry, *epilogue, packed[0], plan)
    else:
        # without a gradient of the input, that of the gate costs less from the output
        inside = gate if input.requires_grad or (gate is not None and not gate.requires_grad) else None
        if bias is None and inside is None:
            y = ops.call(ops.conv2d, input, weight, out_expert, in_expert, geometry, *packed, plan)
        else:
            around = (bias, inside, inside is not None and routing.unit_gate)
            y = ops.call(ops.conv2d_gated, input, weight, out_expert, in_expert, geometry, *around, *packed, plan)
        if gate is not None and inside is None:
            y = apply_gate(y, gate, routing.unit_gate)
    return sum_choices(y, routing.top_k)


def _autocast(*tensors: Any) -> Iterator[Any]:
    """Floating tensors in the autocast dtype of their device, before the checks compare dtypes; float64 stays."""
    return (
        t.to(torch.get_autocast_dtype(t.device.type))
        if t is not None and t.is_floating_point() and t.dtype != torch.float64
        else t
        for t in tensors
    )


def _experts(
    input: Tensor, routing: Routing, in_routing: Routing | None, geometry: Conv2dGeometry
) -> tuple[Tensor | None, Tensor | None, Conv2dGeometry]:
    """The expert of each virtual sample on both sides, and the geometry with the number of virtual samples an input."""
    expert = routing.expert if routing.expert.dim() == 1 else routing.expert.reshape(-1)
    batch = input.shape[0]
    choices = routing.top_k if routing.expert.dim() == 2 else routing.choices
    if choices > 1:
        # [B, k] reads each input k times; an expanded routing does so unless it is given as many inputs as choices
        repeats = choices if expert.shape[0] == batch * choices else 1
        if repeats > 1:
            geometry = geometry._replace(samples_per_input=repeats)
    in_expert = None
    if geometry.num_in:
        made_by = routing if in_routing is None else in_routing
        in_expert = made_by.expert.reshape(-1)
        if in_expert.shape[0] != expert.shape[0]:
            if in_expert.shape[0] != batch:
                raise ValueError(
                    f"in_routing: expected {expert.shape[0]} choices as the routing's, or one a sample, got "
                    f"{in_expert.shape[0]}"
                )
            in_expert = in_expert.repeat_interleave(expert.shape[0] // batch)
    return (expert if geometry.num_out else None), in_expert, geometry
