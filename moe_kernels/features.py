# SPDX-License-Identifier: Apache-2.0
"""What lies between a convolution and the next one's router, in as few passes over memory as it takes: BatchNorm, the sum
with a shortcut, ReLU, and the channel means behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as _Function  # as in ops.py

from . import backends, norm, ops
from .backends import REFERENCE, Backend, BackendUnavailable, Behind, Side
from .layout import is_channels_last
from .nn import RoutedBatchNorm2d
from .routing import Routing

__all__ = ["has_kernel", "norm_relu_with_means", "relu_with_means"]


def relu_with_means(x: Tensor) -> tuple[Tensor, Tensor]:
    """``y = max(x, 0)`` of ``x [B, C, H, W]``, and ``y.mean((2, 3))``, ``[B, C]`` in float32 at least.

    On the CPU, for a channels_last input outside of traces and transforms, one pass over memory forward and one
    backward: the gradient that the means give to every pixel alike is added where ReLU's is computed. Elsewhere torch's
    own operators. Differentiable to any order.

    Raises:
        ValueError: if ``x`` is not floating and of four dimensions.
    """
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"x: expected floating [B, C, H, W], got {got}")
    backend = _able(x)
    if backend is None:
        y = x.relu()
        return y, y.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
    if torch.is_grad_enabled() and x.requires_grad:
        return _ReluWithMeans.apply(x, backend)  # type: ignore[attr-defined]
    return backend.rectify(x)


def norm_relu_with_means(
    layer: nn.Module, x: Tensor, routing: Routing | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``y = relu(layer(x) + residual)`` of ``x [B, C, H, W]``, and ``y.mean((2, 3))``, ``[B, C]`` in float32 at least.

    On the CPU, for channels_last features and a BatchNorm without hooks, what follows the statistics is one pass over
    memory, and without a residual so is what follows the two sums in the backward. Elsewhere the operators one by one.

    Args:
        layer: an ``nn.BatchNorm2d``, or a :class:`RoutedBatchNorm2d`, which is given ``routing``; any other module of one
            input is called as it is.
        residual: of x's shape.

    Raises:
        ValueError: if ``x`` is not floating and of four dimensions; and what the layer raises.
    """
    backend = _able(x) if isinstance(x, Tensor) and x.dim() == 4 else None
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        backend = None
    if backend is None or not _by_kernels(layer, x, routing):
        y = layer(x) if routing is None else layer(x, routing)
        return relu_with_means(y if residual is None else y + residual)
    side = Side.shared(x) if routing is None else layer.side(x, routing)  # type: ignore[operator]
    weight, bias = layer.weight, layer.bias
    mean, var = (None, None) if layer.training else (layer.running_mean, layer.running_var)
    if isinstance(mean, Tensor) and isinstance(var, Tensor):
        wide = torch.promote_types(x.dtype, torch.float32)
        kept = torch.is_grad_enabled()  # for a backward, which a training step in between must not spoil
        mean, var = mean.to(wide, copy=kept), var.to(wide, copy=kept)
    plan = None
    arguments = (x, weight, bias, residual, mean, var, layer.eps, side, plan, backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        y, means, mean, var, count = _NormReluWithMeans.apply(*arguments)  # type: ignore[attr-defined]
    else:
        y, means, mean, var, count = _forward(*arguments)  # type: ignore[arg-type]
    if layer.training and layer.track_running_stats:
        (_update if routing is None else RoutedBatchNorm2d.update)(layer, mean, var, count)  # type: ignore[arg-type]
    return y, means


def _by_kernels(layer: nn.Module, x: Tensor, routing: Routing | None) -> bool:
    """Whether the layer is one that the kernels know, and nobody watches it."""
    if getattr(layer, "weight", None) is None or getattr(layer, "bias", None) is None:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if nn.modules.module._has_any_global_hook():
        return False
    if type(layer) is RoutedBatchNorm2d:
        return routing is not None and not layer.synchronized and not layer.slices.is_whole
    if type(layer) is not nn.BatchNorm2d or routing is not None:
        return False
    kept = layer.running_mean, layer.running_var, layer.num_batches_tracked
    if layer.training and layer.track_running_stats and any(each is None for each in kept):
        return False  # taken away by hand: torch goes on without them
    # of one value alone torch refuses to take statistics
    return x.shape[1] == layer.num_features and x.numel() > x.shape[1]


@torch.no_grad()
def _update(layer: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """As torch's."""
    assert layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    step = 1.0 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    unbiased = var * (count / (count - 1))
    for running, value in ((layer.running_mean, mean), (layer.running_var, unbiased)):
        running.lerp_(value.to(running.dtype), step)


def has_kernel(x: Tensor) -> bool:
    """Whether :func:`relu_with_means` takes one pass over ``x``; elsewhere the means are an operation of their own."""
    return _able(x) is not None


def _able(x: Tensor) -> Backend | None:
    """The backend, if it has a kernel and nobody watches or wants another derivative."""
    # first: within vmap a tensor does not say its memory format
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or ops.traced(x, x):
        return None
    if not x.numel() or not is_channels_last(x) or x.is_neg():
        return None
    try:
        backend = backends.choose(x.device)
    except BackendUnavailable:  # torch's own operators need none
        return None
    return backend if backend.rectifies else None


class _ReluWithMeans(_Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        y, means = backend.rectify(x)
        ctx.save_for_backward(y)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return y, means

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_means: Tensor | None) -> tuple[Tensor | None, None]:
        if grad is None and grad_means is None:
            return None, None
        (y,) = ctx.saved_tensors
        # with a graph of its own, for a second derivative: torch's operators
        backend = backends.REFERENCE if torch.is_grad_enabled() else ctx.backend
        return backend.rectify_backward(grad, grad_means, y), None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    side: Side,
    plan: Tensor | None,
    backend: Backend,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """y and its channel means; mean and variance by which it was normalised, and the number of values behind them if they
    are the batch's own."""
    count = None
    if mean is None or var is None:
        mean, var, count = backend.moments(x, side, plan)
    _, scale = norm.scale_of(var, weight, eps)
    y, means = backend.rectify(x, side, scale, mean, bias, residual)
    return y, means, mean, var, count


class _NormReluWithMeans(_Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        x, weight, bias, residual, _, _, ctx.eps, side, ctx.plan, ctx.backend = arguments
        y, _, mean, var, count = results = _forward(*arguments)
        expert, *ctx.side = side
        ctx.save_for_backward(x, weight, bias, mean, var, count, expert, None if residual is None else y)
        ctx.mark_non_differentiable(*(t for t in (mean, var, count) if t is not None))
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_means: Tensor | None, *others: Any) -> tuple[Any, ...]:
        none = (None,) * 6
        if grad is None and grad_means is None:
            return None, None, None, None, *none
        x, weight, bias, mean, var, count, expert, y = ctx.saved_tensors
        side = Side(expert, *ctx.side)
        if torch.is_grad_enabled():  # a second derivative is asked for
            if count is None:
                _, scale = norm.scale_of(var, weight, ctx.eps)
                z = REFERENCE.affine(x, side, scale, mean, bias)
            else:
                z, *_ = norm.normalise(REFERENCE, x, weight, bias, ctx.eps, side, None)
            through = REFERENCE.rectify_backward(grad, grad_means, z.detach() if y is None else y)
            return (
                *norm.derivatives(ctx, z, (x, weight, bias), through),
                through if ctx.needs_input_grad[3] else None,
                *none,
            )
        asked = [ops.wanted(ctx, index) for index in range(4)]
        rstd, scale = norm.scale_of(var, weight, ctx.eps)
        backend: Backend = ctx.backend
        statistics = count is not None
        behind = Behind(scale, bias, grad_means) if y is None else None
        d: Tensor | None = None if y is None else backend.rectify_backward(grad, grad_means, y)
        sum_grad = sum_product = dx = slope = shift = None
        if asked[1] or asked[2] or (asked[0] and statistics):
            if behind is not None:
                sum_grad, sum_product = backend.sums_behind(x, grad, mean, side, behind)
            else:
                sum_grad, sum_product = backend.sums(x, d, mean, side, ctx.plan)  # type: ignore[arg-type]
        if asked[0]:
            if statistics:
                slope, shift = norm.slope_of(scale, rstd, count, sum_grad, sum_product)  # type: ignore[arg-type]
            if behind is not None:
                dx = backend.affine_behind(x, side, slope, mean, shift, grad, behind)
            elif slope is not None:
                dx = backend.affine(x, side, slope, mean, shift, d, scale)
            else:
                dx = backend.affine(d, side, scale, torch.zeros_like(mean), None)  # type: ignore[arg-type]
        dw = (sum_product * rstd).to(weight.dtype) if asked[1] else None  # type: ignore[operator]
        db = sum_grad.to(bias.dtype) if asked[2] else None  # type: ignore[union-attr]
        return dx, dw, db, d if asked[3] else None, *none
