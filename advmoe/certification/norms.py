# SPDX-License-Identifier: Apache-2.0
"""Norms of linear maps: upper bounds that hold, and power iteration, which estimates from below."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SLACK", "convolution_norm", "dense_norm", "power_iteration"]

SLACK = 1 + 1e-9  # what rounding in float64 may have taken from a bound
_ENTRIES = 1 << 23  # complex numbers that are in memory at a time


def dense_norm(matrix: Tensor) -> float:
    """The greatest singular value of ``matrix [O, I]``: exact, but for rounding, which is added."""
    smaller = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    return SLACK * math.sqrt(max(float(torch.linalg.eigvalsh(smaller)[-1]), 0.0))


def convolution_norm(
    weight: Tensor, size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], groups: int
) -> float:
    """An upper bound of the L2 operator norm of a zero-padded convolution, whatever its padding.

    It is a compression of the circular convolution on a torus so large that nothing wraps around: its input lives on a
    part of the torus, its output is some of that one's. The circular one is block-diagonal in the Fourier basis (Sedghi
    et al. 2019); with strides ``s_h * s_w`` frequencies fall onto one, and the block is those side by side, divided by
    ``sqrt(s_h * s_w)``.

    Args:
        weight: ``[O, I / groups, kh, kw]``, float64.
        size: of the input, H and W.
    """
    o, i, kh, kw = weight.shape
    sh, sw = stride
    # the least multiples of the strides on which nothing wraps around
    h = sh * math.ceil((size[0] + dilation[0] * (kh - 1)) / sh)
    w = sw * math.ceil((size[1] + dilation[1] * (kw - 1)) / sw)
    taps = weight.reshape(groups, o // groups, i, kh, kw).to(torch.complex128)
    rows = torch.arange(kh, dtype=torch.float64) * dilation[0] * 2 * math.pi / h
    columns = torch.arange(kw, dtype=torch.float64) * dilation[1] * 2 * math.pi / w
    # a real kernel's symbols at opposite frequencies are conjugates: half of the rows of coarse frequencies suffice
    coarse = torch.cartesian_prod(torch.arange(h // sh // 2 + 1), torch.arange(w // sw))
    aliases = torch.cartesian_prod(torch.arange(sh) * (h // sh), torch.arange(sw) * (w // sw))
    largest = 0.0
    for part in coarse.split(max(1, _ENTRIES // (o * i * sh * sw))):
        at = part[:, None] + aliases  # [F, s, 2]
        down = torch.polar(torch.ones(()).double(), -at[..., :1] * rows)  # [F, s, kh]
        across = torch.polar(torch.ones(()).double(), -at[..., 1:] * columns)
        symbol = torch.einsum("goiyx,fsy,fsx->fgosi", taps, down, across).flatten(3)  # [F, g, O / g, s * I]
        if symbol.shape[2] > symbol.shape[3]:
            symbol = symbol.mH
        largest = max(largest, float(torch.linalg.eigvalsh(symbol @ symbol.mH)[..., -1].max()))
    return SLACK * math.sqrt(largest / (sh * sw))


def power_iteration(
    push: Callable[[Tensor], Tensor], pull: Callable[[Tensor], Tensor], shape: tuple[int, ...], steps: int = 100
) -> float:
    """An estimate, from below, of the L2 norm of the linear map ``push`` with the adjoint ``pull``."""
    x = torch.randn((1, *shape), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    length = 0.0
    for _ in range(steps):
        x = x / x.norm().clamp_min(torch.finfo(torch.float64).tiny)
        y = push(x)
        length = float(y.norm())
        x = pull(y)
    return length
