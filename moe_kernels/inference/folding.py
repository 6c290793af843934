# SPDX-License-Identifier: Apache-2.0
"""A captured graph with less to do: BatchNorm, residual and ReLU become part of the convolution before them, and a router
of pooled features one call where the device has a kernel for it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from .. import functional, ops
from ..backends import Epilogue
from ..geometry import Conv2dGeometry
from ..routing import choose
from .capture import Captured, tensor_of

__all__ = ["NORMS", "FusedConv", "affine_of", "as_fused", "fold", "route"]

_aten = torch.ops.aten
_BATCH_NORM = _aten.batch_norm.default
_ROUTED_NORM = torch.ops.moe_kernels.batch_norm_affine.default
NORMS = {_BATCH_NORM, _ROUTED_NORM}
_GEOMETRY = len(Conv2dGeometry._fields)


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
    geometry = Conv2dGeometry._make(node.args[4 : 4 + _GEOMETRY])
    rest = node.args[4 + _GEOMETRY : 4 + _GEOMETRY + len(Epilogue._fields)]
    return FusedConv(*node.args[:4], geometry, Epilogue._make(rest))  # type: ignore[arg-type]


class Affine(NamedTuple):
    """``scale * x + shift`` by channel: ``[C]``, or, with ``expert``, ``[total]`` of all slices."""

    scale: Tensor
    shift: Tensor
    expert: torch.fx.Node | None = None
    starts: tuple[int, ...] = ()  # empty: a partition
    count: int = 0


def affine_of(node: torch.fx.Node, captured: Captured) -> Affine | None:
    """What a BatchNorm by running statistics does, in float32 at least; None for any other node."""
    if node.target is _BATCH_NORM:
        weight, bias, mean, var = (captured.constant(a) for a in node.args[1:5])
        if node.args[5] or mean is None or var is None:  # by the batch's own statistics
            return None
        wide = torch.promote_types(mean.dtype, torch.float32)
        scale = torch.rsqrt(var.to(wide) + node.args[7])  # type: ignore[operator]
        if weight is not None:
            scale = scale * weight.to(wide)
        shift = -mean.to(wide) * scale
        return Affine(scale, shift if bias is None else shift + bias.to(wide))
    if node.target is _ROUTED_NORM:
        constants = [captured.constant(a) for a in node.args[1:4]]
        scale, mean, bias = constants  # type: ignore[assignment]
        if scale is None or mean is None or any(a is not None for a in node.args[4:6]):
            return None
        shift = -mean * scale
        expert, count, starts = node.args[6:9]
        return Affine(scale, shift if bias is None else shift + bias, expert, tuple(starts), count)  # type: ignore[arg-type]
    return None


def fold(captured: Captured, *, dense: bool, routers: bool) -> None:
    """In place.

    Args:
        dense: dense convolutions become the library's too, with an epilogue; otherwise BatchNorm is folded into their
            weights.
        routers: whether a router of pooled features becomes one call.
    """
    graph = captured.graph
    for node in list(graph.nodes):
        if node.target is ops.conv2d:
            _routed(node)
        elif dense and node.target is _aten.conv2d.default:
            _dense(node, captured)
    for node in list(graph.nodes):
        if as_fused(node) is not None:
            _fold_behind(node, captured)
        elif node.target is _aten.conv2d.default:
            _fold_into_weights(node, captured)
        elif routers and node.target is choose:
            _fold_router(node, captured)
    captured.drop_unused()


def _routed(node: torch.fx.Node) -> None:
    made = 4 + _GEOMETRY
    FusedConv(*node.args[:4], Conv2dGeometry._make(node.args[4:made]), Epilogue()).write(node)  # type: ignore[arg-type]


def _dense(node: torch.fx.Node, captured: Captured) -> None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    values: dict[str, Any] = dict(zip(names, (None, None, None, [1, 1], [0, 0], [1, 1], 1), strict=True))
    values |= dict(zip(names, node.args, strict=False)) | node.kwargs
    weight, image = captured.constant(values["weight"]), tensor_of(values["input"])
    bias = captured.constant(values["bias"])
    if weight is None or image is None or image.dim() != 4 or (values["bias"] is not None and bias is None):
        return
    pairs = [tuple(v) * 2 if len(v) == 1 else tuple(v) for v in (values["stride"], values["padding"], values["dilation"])]
    geometry = Conv2dGeometry((), (), 0, 0, weight.shape[0], image.shape[1], *pairs, values["groups"])
    epilogue = Epilogue(bias=values["bias"])
    FusedConv(values["input"], values["weight"], None, None, geometry, epilogue).write(node)


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
        same = affine.expert is conv.out_expert and affine.starts == tuple(g.out_starts) and affine.count == g.num_out
        if not same or affine.scale.shape[0] != of_all:
            return None
    elif affine.scale.shape[0] != g.out_width:
        return None
    scale, shift = (captured.add_constant(t, user) for t in affine[:2])
    return conv._replace(epilogue=e._replace(scale=scale, shift=shift))  # type: ignore[arg-type]


def _with_residual(conv: FusedConv, node: torch.fx.Node, user: torch.fx.Node) -> FusedConv | None:
    a, b = user.args[:2]
    other = b if a is node else a
    mine, others = tensor_of(node), tensor_of(other)
    if user.kwargs or not isinstance(other, torch.fx.Node) or other is node or mine is None or others is None:
        return None
    if others.dtype != mine.dtype or [str(s) for s in others.shape] != [str(s) for s in mine.shape]:
        return None
    later = as_fused(other)
    if later is not None and len(other.users) == 1 and later.epilogue.residual is None and not later.epilogue.relu:
        # two convolutions are added: the later one, which may run when the other is there, takes it
        order = {n: i for i, n in enumerate(node.graph.nodes)}
        if order[other] > order[node]:
            return None
    return conv._replace(epilogue=conv.epilogue._replace(residual=other))  # type: ignore[arg-type]


def _fold_into_weights(node: torch.fx.Node, captured: Captured) -> None:
    user = _only_user(node)
    if user is None or user.target is not _BATCH_NORM or user.args[0] is not node:
        return
    affine = affine_of(user, captured)
    weight = captured.constant(node.args[1])
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    value = captured.constant(bias)
    if affine is None or weight is None or (bias is not None and value is None):
        return
    scale, shift = affine[:2]
    folded = (weight.to(scale.dtype) * scale[:, None, None, None]).to(weight.dtype)
    moved = shift if value is None else shift + scale * value.to(scale.dtype)
    args = list(node.args) + [None] * (3 - len(node.args))
    args[1] = captured.add_constant(folded, node)
    args[2] = captured.add_constant(moved.to(weight.dtype), node)
    node.args = tuple(args)
    node.kwargs = {name: v for name, v in node.kwargs.items() if name != "bias"}
    user.replace_all_uses_with(node)
    captured.graph.erase_node(user)


def route(x: Tensor, weight: Tensor, bias: Tensor | None, norm: Tensor | None, norm_bias: Tensor | None, eps: float) -> Tensor:
    """The choice of a router of pooled features, ``[B]``; ``norm`` None: not normalised."""
    made = functional.pooled_routing(x, weight, bias, norm, norm_bias, normalize=norm is not None, eps=eps, gate="none")
    return made.expert


def _fold_router(node: torch.fx.Node, captured: Captured) -> None:
    """``choose([batch_norm](linear([layer_norm](mean(x)))))`` to one call, if nothing between is read elsewhere."""
    scores = node.args[0]
    scale: Tensor | None = None
    if isinstance(scores, torch.fx.Node) and scores.target is _BATCH_NORM:
        affine = affine_of(scores, captured)
        if affine is None or _only_user(scores) is None:
            return
        scale, shift = affine[:2]
        scores = scores.args[0]
    if not (isinstance(scores, torch.fx.Node) and scores.target is _aten.linear.default and _only_user(scores)):
        return
    weight, bias = (captured.constant(a) for a in (*scores.args, None)[1:3])
    features = scores.args[0]
    norm = norm_bias = None
    eps = 0.0
    if isinstance(features, torch.fx.Node) and features.target is _aten.layer_norm.default:
        norm, norm_bias = (captured.constant(a) for a in (*features.args, None, None)[2:4])
        eps = features.args[4] if len(features.args) > 4 else 1e-5  # type: ignore[assignment]
        if norm is None or _only_user(features) is None:
            return
        features = features.args[0]
    if weight is None or not is_mean_of_pixels(features) or _only_user(features) is None:  # type: ignore[arg-type]
        return
    if scale is not None:
        bias = shift if bias is None else shift + scale * bias
        weight = (weight * scale[:, None]).to(weight.dtype)
        bias = bias.to(weight.dtype)
    tensors = [None if t is None else captured.add_constant(t, node) for t in (weight, bias, norm, norm_bias)]
    node.target = route
    node.args = (features.args[0], *tensors, eps)  # type: ignore[union-attr]


def is_mean_of_pixels(node: torch.fx.Node) -> bool:
    """Whether a node is ``x.mean((2, 3))`` of an image, with or without the pixels' dimensions kept."""
    if not isinstance(node, torch.fx.Node) or node.target is not _aten.mean.dim:
        return False
    source = tensor_of(node.args[0])
    dims = node.args[1]
    return source is not None and source.dim() == 4 and {d % 4 for d in dims} == {2, 3}  # type: ignore[union-attr]
