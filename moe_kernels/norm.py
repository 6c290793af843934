# SPDX-License-Identifier: Apache-2.0
"""The operators of a BatchNorm of each expert's own, for backends that have kernels for it.

``batch_norm`` normalises by the batch's own statistics: two passes over the input, one for the statistics of each slice
and one for the result; its backward is one pass for two sums and one for dx. ``batch_norm_affine`` is the map by given
statistics. A second derivative is taken of the same formula in torch's own operators.

Letters: V samples, C channels of one slice, ``total`` channels of the whole side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .backends import Backend, Side
from .layout import memory_format_of
from .ops import wanted

__all__ = ["affine", "batch_norm", "derivatives", "normalise", "scale_of", "slope_of"]

_SIDE = "Tensor expert, int num_experts, int[] starts, int width, int total, Tensor? plan"
_SIDE_FIELDS = len(Side._fields) + 1
_lib = torch.library.Library("moe_kernels", "FRAGMENT")
_lib.define(f"batch_norm(Tensor x, Tensor? weight, Tensor? bias, float eps, {_SIDE}) -> (Tensor, Tensor, Tensor, Tensor)")
_lib.define(f"batch_norm_sums(Tensor x, Tensor grad, Tensor mean, {_SIDE}) -> (Tensor, Tensor)")
_lib.define(
    "batch_norm_affine(Tensor x, Tensor scale, Tensor mean, Tensor? shift, Tensor? grad, Tensor? grad_scale, "
    f"{_SIDE}) -> Tensor"
)
_ops = torch.ops.moe_kernels


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, side: Side, plan: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalised input, and mean, biased variance and number of values of each channel, ``[total]`` in float32 at
    least."""
    return _ops.batch_norm.default(x, weight, bias, eps, *side, plan)


def affine(x: Tensor, scale: Tensor, mean: Tensor, shift: Tensor | None, side: Side, plan: Tensor | None) -> Tensor:
    """``scale * (x - mean) + shift`` with the values of each sample's slice; differentiable in x, scale and shift."""
    return _ops.batch_norm_affine.default(x, scale, mean, shift, None, None, *side, plan)


def _side(args: Sequence[Any]) -> tuple[Side, Tensor | None]:
    side = Side(*args[:-1])
    if side.starts is None:  # what a package of AOTInductor makes of an empty list (torch 2.13)
        side = side._replace(starts=())
    return side, args[-1]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def scale_of(var: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """``1 / sqrt(var + eps)``, and that times the weight."""
    rstd = torch.rsqrt(var + eps)
    return rstd, rstd if weight is None else rstd * weight.to(rstd.dtype)


def slope_of(scale: Tensor, rstd: Tensor, count: Tensor, sum_grad: Tensor, sum_product: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative by way of the statistics is ``slope * (x - mean) + shift``: these two."""
    each = scale / count.clamp_min(1)
    return -each * rstd * rstd * sum_product, -each * sum_grad


def normalise(backend: Backend, x: Tensor, weight: Any, bias: Any, eps: float, side: Side, plan: Any) -> Any:
    """As :func:`batch_norm`, by the calls of one backend."""
    mean, var, count = backend.moments(x, side, plan)
    _, scale = scale_of(var, weight, eps)
    shift = None if bias is None else bias.to(scale.dtype)
    return backend.affine(x, side, scale, mean, shift), mean, var, count


def _batch_norm(x: Tensor, weight: Any, bias: Any, eps: float, *rest: Any) -> Any:
    side, plan = _side(rest)
    return normalise(backends.choose(x.device), x, weight, bias, eps, side, plan)


def _sums(x: Tensor, grad: Tensor, mean: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    side, plan = _side(rest)
    return backends.choose(x.device).sums(x, grad, mean, side, plan)


def _affine(x: Tensor, scale: Tensor, mean: Tensor, shift: Any, grad: Any, grad_scale: Any, *rest: Any) -> Tensor:
    side, _ = _side(rest)
    return backends.choose(x.device).affine(x, side, scale, mean, shift, grad, grad_scale)


def _batch_norm_fake(x: Tensor, weight: Any, bias: Any, eps: float, *rest: Any) -> Any:
    total = rest[4]
    return _affine_fake(x), *(x.new_empty((total,), dtype=_wide(x)) for _ in range(3))


def _sums_fake(x: Tensor, grad: Tensor, mean: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def _affine_fake(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x))


def _set_up_batch_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, ctx.eps, expert, *sizes, plan = inputs
    _, mean, var, count = output
    ctx.save_for_backward(x, weight, bias, expert, plan, mean, var, count)
    ctx.sizes = sizes
    ctx.mark_non_differentiable(mean, var, count)


def _batch_norm_backward(ctx: Any, grad: Tensor, *others: Any) -> tuple[Any, ...]:
    x, weight, bias, expert, plan, mean, var, count = ctx.saved_tensors
    side = Side(expert, *ctx.sizes)
    none = (None,) * (1 + _SIDE_FIELDS)
    if torch.is_grad_enabled():  # a second derivative is asked for
        y, *_ = normalise(backends.REFERENCE, x, weight, bias, ctx.eps, side, None)
        return *derivatives(ctx, y, (x, weight, bias), grad), *none
    rstd, scale = scale_of(var, weight, ctx.eps)
    asked = [wanted(ctx, index) for index in range(3)]
    if not any(asked):
        return None, None, None, *none
    sum_grad, sum_product = _ops.batch_norm_sums.default(x, grad, mean, *side, plan)
    dx = None
    if asked[0]:
        slope, shift = slope_of(scale, rstd, count, sum_grad, sum_product)
        dx = _ops.batch_norm_affine.default(x, slope, mean, shift, grad, scale, *side, plan)
    dw = (sum_product * rstd).to(weight.dtype) if asked[1] else None
    return dx, dw, sum_grad.to(bias.dtype) if asked[2] else None, *none


def _set_up_affine(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, scale, mean, shift, _, _, expert, *sizes, plan = inputs
    ctx.save_for_backward(x, scale, mean, shift, expert, plan)
    ctx.sizes = sizes


def _affine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, scale, mean, shift, expert, plan = ctx.saved_tensors
    side = Side(expert, *ctx.sizes)
    none = (None,) * (2 + _SIDE_FIELDS)
    if torch.is_grad_enabled():
        y = backends.REFERENCE.affine(x, side, scale, mean, shift)
        return *derivatives(ctx, y, (x, scale, None, shift), grad), *none
    dx = dscale = dshift = None
    if ctx.needs_input_grad[0]:
        dx = _ops.batch_norm_affine.default(grad, scale, torch.zeros_like(mean), None, None, None, *side, plan)
    slope, offset = wanted(ctx, 1), wanted(ctx, 3)  # an attack asks for neither
    if slope or offset:
        dshift, dscale = _ops.batch_norm_sums.default(x, grad, mean, *side, plan)
    return dx, dscale if slope else None, None, dshift if offset else None, *none


def derivatives(
    ctx: Any, outputs: Sequence[Tensor] | Tensor, inputs: Sequence[Tensor | None], grads: Sequence[Tensor] | Tensor
) -> list[Tensor | None]:
    """Of ``outputs`` for those of the function's first inputs that need one, with a graph of their own."""
    wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed and t is not None]
    # none where a residual alone has a derivative, which torch refuses to be asked for
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True) if wanted else ())
    return [
        next(found) if needed and t is not None else None for t, needed in zip(inputs, ctx.needs_input_grad, strict=False)
    ]


for _name, _run, _fake in (
    ("batch_norm", _batch_norm, _batch_norm_fake),
    ("batch_norm_sums", _sums, _sums_fake),
    ("batch_norm_affine", _affine, _affine_fake),
):
    _lib.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moe_kernels::{_name}", _fake, lib=_lib)
torch.library.register_autograd(
    "moe_kernels::batch_norm", _batch_norm_backward, setup_context=_set_up_batch_norm, lib=_lib
)
torch.library.register_autograd(
    "moe_kernels::batch_norm_affine", _affine_backward, setup_context=_set_up_affine, lib=_lib
)
