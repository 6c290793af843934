# SPDX-License-Identifier: Apache-2.0
"""The memory format of images: channels_last in, channels_last out; contiguous in, contiguous out."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["is_channels_last", "memory_format_of"]


def is_channels_last(x: Tensor) -> bool:
    """Whether a 4-D tensor is channels_last. Where both formats fit (one channel, one pixel), its strides tell."""
    if not x.is_contiguous(memory_format=torch.channels_last):
        return False
    return not x.is_contiguous() or (x.stride(1) == 1 and x.stride(3) == x.shape[1])


def memory_format_of(x: Tensor) -> torch.memory_format:
    return torch.channels_last if is_channels_last(x) else torch.contiguous_format
