# SPDX-License-Identifier: Apache-2.0
"""A captured graph with less to do: BatchNorm, residual and ReLU become part of the convolution before them, and a router
of pooled features one call where the device has a kernel for it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from .. import functional, ops
from ..backends import Epilogue
from ..geometry import Conv2dGeometry
from ..routing import choose
from .capture import Captured, arguments, tensor_of

__all__ = ["NORMS", "FusedConv", "affine_of", "as_fused", "fold", "route"]

_aten = torch.ops.aten
_BATCH_NORM = _aten.batch_norm.default
_ROUTED_NORM = torch.ops.moe_kernels.batch_norm_affine.default
NORMS = {_BATCH_NORM, _ROUTED_NORM}
# Output channels of a group, below which torch's convolution is faster: the library's works on vectors of them.
_FEW = 16
_GEOMETRY, _EPILOGUE = len(Conv2dGeometry._fields), len(Epilogue._fields)


class FusedConv(NamedTuple):
    """The arguments of a ``conv2d_fused`` node."""

    input: torch.fx.Node
    weight: torch.fx.Node
    out_expert: torch.fx.Node | None
    in_expert: torch.fx.Node | None
    geometry: Conv2dGeometry
    epilogue: Epilogue  # of nodes

    def write(self, node: torch.fx.Node) -> None:
        node.target = ops.conv2d_fused
        node.args = (*self[:4], *self.geometry, *self.epilogue)
        node.kwargs = {}


def as_fused(node: torch.fx.Node) -> FusedConv | None:
    """A node's arguments, if it is a convolution that has an epilogue."""
    if node.target is not ops.conv2d_fused:
        return None
    x, weight, out, inner, *rest = arguments(node)
    geometry = Conv2dGeometry._make(rest[:_GEOMETRY])
    return FusedConv(x, weight, out, inner, geometry, Epilogue._make(rest[_GEOMETRY : _GEOMETRY + _EPILOGUE]))


class Affine(NamedTuple):
    """``scale * x + shift`` by channel: ``[C]``, or, with ``expert``, ``[total]`` of all slices."""

    scale: Tensor
    shift: Tensor
    expert: torch.fx.Node | None = None
    starts: tuple[int, ...] = ()  # empty: a partition
    num_experts: int = 0


def affine_of(node: torch.fx.Node, captured: Captured) -> Affine | None:
    """What a BatchNorm by running statistics does, in float32 at least; None for any other node."""
    if node.target is _BATCH_NORM:
        _, *values, training, _, eps, _ = arguments(node)
        weight, bias, mean, var = map(captured.constant, values)
        if training or mean is None or var is None:  # by the batch's own statistics
            return None
        if _any_computed(values, captured):
            return None
        wide = torch.promote_types(mean.dtype, torch.float32)
        scale = torch.rsqrt(var.to(wide) + eps)
        if weight is not None:
            scale = scale * weight.to(wide)
        shift = -mean.to(wide) * scale
        return Affine(scale, shift if bias is None else shift + bias.to(wide))
    if node.target is _ROUTED_NORM:
        _, *values, grad, grad_scale, expert, count, starts, _, _, _ = arguments(node)
        given, mean, bias = map(captured.constant, values)
        if given is None or grad is not None or grad_scale is not None or mean is None or _any_computed(values, captured):
            return None
        shift = -mean * given
        return Affine(given, shift if bias is None else shift + bias, expert, tuple(starts), count)
    return None


def _any_computed(nodes: Iterable[Any], captured: Captured) -> bool:
    """Whether one of these arguments is there and no constant."""
    return any(node is not None and captured.constant(node) is None for node in nodes)


def fold(captured: Captured, *, dense: bool, routers: bool) -> None:
    """In place.

    Args:
        dense: dense convolutions become the library's too, with an epilogue, but those of many groups; otherwise
            BatchNorm is folded into their weights.
        routers: whether a router of pooled features becomes one call.
    """
    graph = captured.graph
    for node in list(graph.nodes):
        if node.target is _aten.conv2d.padding:
            _pad_by_numbers(node)
        if node.target is ops.conv2d:
            _routed(node)
        elif dense and node.target is _aten.conv2d.default:
            _dense(node, captured)
    for node in list(graph.nodes):
        if as_fused(node) is not None:
            _fold_steps_before(node)
            _fold_behind(node, captured)
        elif node.target is _aten.conv2d.default:
            _fold_into_weights(node, captured)
        elif routers and node.target is choose:
            _fold_router(node, captured)
    captured.drop_unused()


def _routed(node: torch.fx.Node) -> None:
    x, weight, out, inner, *rest = arguments(node)
    FusedConv(x, weight, out, inner, Conv2dGeometry._make(rest[:_GEOMETRY]), Epilogue()).write(node)


def _pad_by_numbers(node: torch.fx.Node) -> None:
    """``"same"`` and ``"valid"`` as numbers, where those are alike on both sides."""
    x, weight, bias, stride, padding, dilation, groups = arguments(node)
    kernel = weight.meta["val"].shape[2:]
    total = [0, 0] if padding == "valid" else [d * (k - 1) for d, k in zip(dilation * 2, kernel, strict=False)]
    if not any(t % 2 for t in total):
        node.target = _aten.conv2d.default
        node.args, node.kwargs = (x, weight, bias, stride, [t // 2 for t in total], dilation, groups), {}


def _dense(node: torch.fx.Node, captured: Captured) -> None:
    x, weight, bias, stride, padding, dilation, groups = arguments(node)
    value, image = captured.constant(weight), tensor_of(x)
    if value is None or image is None or image.dim() != 4 or (bias is not None and captured.constant(bias) is None):
        return
    if groups > 1 and value.shape[0] // groups < _FEW:
        return
    s, p, d = (tuple(v) * 2 if len(v) == 1 else tuple(v) for v in (stride, padding, dilation))
    geometry = Conv2dGeometry((), (), 0, 0, value.shape[0], value.shape[1] * groups, s, p, d, groups)
    FusedConv(x, weight, None, None, geometry, Epilogue(bias=bias)).write(node)


def _fold_steps_before(node: torch.fx.Node) -> None:
    """A convolution of one pixel of every so manieth row and column is one with a stride."""
    conv = as_fused(node)
    assert conv is not None
    stride = list(conv.geometry.stride)
    if tuple(conv.weight.meta["val"].shape[2:]) != (1, 1) or any(conv.geometry.padding) or stride != [1, 1]:
        return
    source: Any = conv.input
    while (step := _step(source)) is not None:
        stride = [a * b for a, b in zip(stride, step, strict=True)]
        source = source.args[0]
    conv._replace(input=source, geometry=conv.geometry._replace(stride=tuple(stride))).write(node)


def _step(node: torch.fx.Node) -> tuple[int, int] | None:
    """Of a node that takes every so manieth row and column, by slicing or by pooling single pixels: how manieth."""
    if node.target is _aten.slice.Tensor:
        x, dim, start, end, step = arguments(node)
        image = tensor_of(x)
        if image is None or dim not in (2, 3) or start or (end is not None and end < image.shape[dim]):
            return None
        return (step, 1) if dim == 2 else (1, step)
    if node.target is _aten.avg_pool2d.default:
        _, kernel, stride, padding, ceil, _, divisor = arguments(node)
        if set(kernel) != {1} or any(padding) or ceil or divisor is not None or not stride:
            return None
        return stride[0], stride[-1]
    return None


def _only_user(node: torch.fx.Node) -> torch.fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _fold_behind(node: torch.fx.Node, captured: Captured) -> None:
    """Takes what follows into the convolution's epilogue, as far as its order goes."""
    while True:
        conv, user = as_fused(node), _only_user(node)
        assert conv is not None
        if user is None:
            return
        later = _with(conv, node, user, captured)
        if later is None:
            return
        # the convolution moves to where the node was that it replaces: a residual may come from between the two
        with captured.graph.inserting_before(user):
            moved = captured.graph.call_function(ops.conv2d_fused)
        later.write(moved)
        moved.meta = {**node.meta, "val": user.meta["val"]}
        user.replace_all_uses_with(moved)
        captured.graph.erase_node(user)
        captured.graph.erase_node(node)
        node = moved


def _with(conv: FusedConv, node: torch.fx.Node, user: torch.fx.Node, captured: Captured) -> FusedConv | None:
    e, g = conv.epilogue, conv.geometry
    if e.relu or g.samples_per_input != 1:
        return None
    if user.target is _aten.relu.default:
        return conv._replace(epilogue=e._replace(relu=True))
    if e.residual is not None:
        return None
    if user.target is _aten.add.Tensor:
        return _with_residual(conv, node, user)
    if user.target not in NORMS or user.args[0] is not node or e.scale is not None or e.shift is not None:
        return None
    affine = affine_of(user, captured)
    if affine is None:
        return None
    of_all = conv.weight.meta["val"].shape[0]
    if affine.expert is not None:
        same = (
            affine.expert is conv.out_expert and affine.starts == tuple(g.out_starts) and affine.num_experts == g.num_out
        )
        if not same or affine.scale.shape[0] != of_all:
            return None
    elif affine.scale.shape[0] != g.out_width:
        return None
    scale, shift = (captured.add_constant(t, user) for t in affine[:2])
    return conv._replace(epilogue=e._replace(scale=scale, shift=shift))  # type: ignore[arg-type]


def _with_residual(conv: FusedConv, node: torch.fx.Node, user: torch.fx.Node) -> FusedConv | None:
    a, b, alpha = arguments(user)
    other = b if a is node else a
    mine, others = tensor_of(node), tensor_of(other)
    if alpha != 1 or other is node or mine is None or others is None:
        return None
    if others.dtype != mine.dtype or [str(s) for s in others.shape] != [str(s) for s in mine.shape]:
        return None
    later = as_fused(other)
    if later is not None and len(other.users) == 1 and later.epilogue.residual is None and not later.epilogue.relu:
        # two convolutions are added: the later one, which may run when the other is there, takes it
        order = {n: i for i, n in enumerate(node.graph.nodes)}
        if order[other] > order[node]:
            return None
    return conv._replace(epilogue=conv.epilogue._replace(residual=other))


def _fold_into_weights(node: torch.fx.Node, captured: Captured) -> None:
    user = _only_user(node)
    if user is None or user.target is not _BATCH_NORM or user.args[0] is not node:
        return
    affine = affine_of(user, captured)
    x, given, bias, *rest = arguments(node)
    weight, value = captured.constant(given), captured.constant(bias)
    if affine is None or weight is None or _any_computed([bias], captured):
        return
    scale, shift = affine[:2]
    folded = (weight.to(scale.dtype) * scale[:, None, None, None]).to(weight.dtype)
    moved = shift if value is None else shift + scale * value.to(scale.dtype)
    constants = (captured.add_constant(t, node) for t in (folded, moved.to(weight.dtype)))
    node.args, node.kwargs = (x, *constants, *rest), {}
    user.replace_all_uses_with(node)
    captured.graph.erase_node(user)


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, norm_bias: Tensor | None, eps: float
) -> Tensor:
    """The choice of a router of pooled features, ``[B]``; ``norm`` None: not normalised."""
    made = functional.pooled_routing(x, weight, bias, norm, norm_bias, normalize=norm is not None, eps=eps, gate="none")
    return made.expert


def _fold_router(node: torch.fx.Node, captured: Captured) -> None:
    """``choose([batch_norm](linear([layer_norm](mean(x)))))`` to one call, if nothing between is read elsewhere."""
    scores: Any = node.args[0]
    affine = None
    if scores.target is _BATCH_NORM:
        affine = affine_of(scores, captured)
        if affine is None or _only_user(scores) is None:
            return
        scores = scores.args[0]
    if scores.target is not _aten.linear.default or _only_user(scores) is None:
        return
    features, *values = arguments(scores)
    weight, bias = map(captured.constant, values)
    if _any_computed(values, captured):
        return
    norm = norm_bias = None
    eps = 0.0
    if features.target is _aten.layer_norm.default:
        normalised, shape, of_norm, of_bias, eps, _ = arguments(features)
        norm, norm_bias = captured.constant(of_norm), captured.constant(of_bias)
        if norm is None or len(shape) != 1 or _only_user(features) is None or _any_computed([of_bias], captured):
            return
        features = normalised
    if weight is None or not is_mean_of_pixels(features) or _only_user(features) is None:
        return
    if affine is not None:
        bias = affine.shift if bias is None else affine.shift + affine.scale * bias
        weight, bias = (weight * affine.scale[:, None]).to(weight.dtype), bias.to(weight.dtype)
    tensors = [None if t is None else captured.add_constant(t, node) for t in (weight, bias, norm, norm_bias)]
    node.target = route
    node.args = (features.args[0], *tensors, eps)


def is_mean_of_pixels(node: Any) -> bool:
    """Whether a node is ``x.mean((2, 3))`` of an image, with or without the pixels' dimensions kept."""
    if not isinstance(node, torch.fx.Node) or node.target is not _aten.mean.dim:
        return False
    x, dims, _, dtype = arguments(node)
    source = tensor_of(x)
    if source is None or source.dim() != 4 or dtype not in (None, source.dtype):
        return False
    return {d % 4 for d in dims or ()} == {2, 3}
