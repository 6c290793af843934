# SPDX-License-Identifier: Apache-2.0
"""Random crop and mirror of a whole batch at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["augment"]


def augment(
    images: Tensor,
    generator: torch.Generator,
    padding: int = 4,
    flip: bool = True,
    part: Tensor | slice = slice(None),
    total: int | None = None,
) -> Tensor:
    """``images [B, C, H, W]``, each moved by up to ``padding`` pixels (zeros come in) and, if ``flip``, mirrored or not.

    The CIFAR recipe (RandomCrop with padding, RandomHorizontalFlip) as one gather; the memory format is kept.

    Args:
        part: of a batch of ``total`` images, which ``images`` are; the generator draws for all of them.
    """
    batch, _, height, width = images.shape
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
    if images.is_contiguous(memory_format=torch.channels_last):
        return moved.contiguous(memory_format=torch.channels_last)
    return moved.contiguous()
