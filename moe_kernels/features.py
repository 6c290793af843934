# SPDX-License-Identifier: Apache-2.0
"""ReLU and the channel means behind it in one pass: what lies between a convolution and the next one's router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction as _Function  # as in ops.py

from . import backends, ops
from .backends import Backend, BackendUnavailable
from .layout import is_channels_last

__all__ = ["has_kernel", "relu_with_means"]


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


def has_kernel(x: Tensor) -> bool:
    """Whether :func:`relu_with_means` takes one pass over ``x``; elsewhere the means are an operation of their own."""
    return _able(x) is not None


def _able(x: Tensor) -> Backend | None:
    """The backend, if it has a kernel and nobody watches or wants another derivative."""
    if torch.compiler.is_compiling() or not x.numel() or not is_channels_last(x) or x.is_neg():
        return None
    if forward_ad._current_level >= 0 or ops.traced(x, x):
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
