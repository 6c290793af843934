# SPDX-License-Identifier: Apache-2.0
"""Random crop, mirror, colours and cutout of a whole batch at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .color import color_jitter

__all__ = ["augment"]


def augment(
    images: Tensor,
    generator: torch.Generator,
    padding: int = 4,
    flip: bool = True,
    part: Tensor | slice = slice(None),
    total: int | None = None,
    cutout: int = 0,
    fill: Sequence[float] = (0.0, 0.0, 0.0),
    jitter: float = 0.0,
) -> Tensor:
    """``images [B, C, H, W]``, each moved by up to ``padding`` pixels (zeros come in) and, if ``flip``, mirrored or not.

    The CIFAR recipe (RandomCrop with padding, RandomHorizontalFlip) as one gather; the memory format is kept.

    Args:
        part: of a batch of ``total`` images, which ``images`` are; the generator draws for all of them.
        cutout: side of a square within each image, anywhere, that becomes ``fill``, a value for each channel (DeVries and
            Taylor 2017; theirs reaches over the border); 0: none.
        jitter: strength of :func:`color_jitter`, before the cutout; 0: none.

    Raises:
        ValueError: if the square is larger than the images, or the jitter is none.
    """
    batch, _, height, width = images.shape
    if cutout > min(height, width):
        raise ValueError(f"cutout: expected at most the images' {min(height, width)} pixels, got {cutout}")
    total = batch if total is None else total
    top, left = torch.randint(0, 2 * padding + 1, (2, total, 1), generator=generator)[:, part]
    rows = torch.arange(height) + top  # [B, H]
    columns = torch.arange(width) + left
    if flip:
        mirrored = torch.rand((total, 1), generator=generator)[part] < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)  # [B, H + 2p, W + 2p, C]
    sample = torch.arange(batch)[:, None, None]
    moved = padded[sample, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if jitter:
        moved = color_jitter(moved, generator, jitter, part, total)
    if cutout:
        top = torch.randint(0, height - cutout + 1, (total, 1), generator=generator)[part]
        left = torch.randint(0, width - cutout + 1, (total, 1), generator=generator)[part]
        down, across = torch.arange(height) - top, torch.arange(width) - left
        inside = ((down >= 0) & (down < cutout))[:, :, None] & ((across >= 0) & (across < cutout))[:, None, :]
        moved = torch.where(inside[:, None], torch.tensor(fill, dtype=images.dtype).view(1, -1, 1, 1), moved)
    if images.is_contiguous(memory_format=torch.channels_last):
        return moved.contiguous(memory_format=torch.channels_last)
    return moved.contiguous()
