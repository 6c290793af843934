# SPDX-License-Identifier: Apache-2.0
"""The memory format of images: channels_last in, channels_last out; contiguous in, contiguous out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dense", "gpu_weight", "in_format", "is_channels_last", "memory_format_of", "nhwc", "reads_well"]


def is_channels_last(x: Tensor) -> bool:
    """Whether a 4-D tensor is channels_last. Where both formats fit (one channel, one pixel), its strides tell."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return not x.is_contiguous() or (x.stride(1) == 1 and x.stride(3) == x.shape[1])


def memory_format_of(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format


def in_format(x: Tensor, layout: torch.memory_format) -> Tensor:
    """``x`` with that format's strides also where both fit and ``contiguous`` would leave them: they decide what the next
    layer takes its input for, in eager mode and under a trace alike."""
    if x.is_contiguous(memory_format=layout) and is_channels_last(x) != (layout == torch.channels_last):
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout).copy_(x)
    return x.contiguous(memory_format=layout)


def nhwc(x: Tensor) -> Tensor:
    """In memory as kernels read it, its signs too: torch negates the imaginary part of a conjugate by a bit only."""
    return x.contiguous(memory_format=torch.channels_last).resolve_neg()


def dense(value: Tensor | None) -> Tensor | None:
    """In memory as kernels read it, without its history."""
    return None if value is None else value.detach().contiguous().resolve_neg()


def reads_well(weight: Tensor) -> bool:
    """Whether the input channels that a GPU's tile reads together lie together."""
    return is_channels_last(weight) or weight.shape[2] * weight.shape[3] == 1 or weight.shape[1] == 1


def gpu_weight(weight: Tensor, packed: Tensor | None) -> Tensor:
    """Channels last: reading a contiguous 3×3 weight in place would fetch every ninth element."""
    if packed is not None:
        return packed
    weight = weight.detach().resolve_neg()
    return weight if reads_well(weight) else weight.contiguous(memory_format=torch.channels_last)
