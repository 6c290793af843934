# SPDX-License-Identifier: Apache-2.0
"""Random brightness, contrast, saturation and hue of a whole batch at once, as torchvision's ColorJitter has them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["adjust_brightness", "adjust_contrast", "adjust_hue", "adjust_saturation", "color_jitter"]

_GREY = (0.2989, 0.587, 0.114)  # torchvision's, of ITU-R BT.601 to four digits


def color_jitter(
    images: Tensor,
    generator: torch.Generator,
    strength: float,
    part: Tensor | slice = slice(None),
    total: int | None = None,
) -> Tensor:
    """``images [B, 3, H, W]`` in [0, 1], each with brightness, contrast and saturation multiplied by factors from
    ``1 - strength`` to ``1 + strength`` and its hue turned by up to ``strength`` of the circle either way, uniformly
    drawn and in an order that is drawn too: ``ColorJitter(c, c, c, c)`` as torchvision documents it, for each image by
    itself and without rounding to 8 bits between the four.

    Args:
        strength: from 0 to 0.5.
        part: of a batch of ``total`` images, which ``images`` are; the generator draws for all of them.

    Raises:
        ValueError: if the strength is out of range, or the images have not three channels.
    """
    if not 0 <= strength <= 0.5:
        raise ValueError(f"color_jitter: expected a number from 0 to 0.5, got {strength}")
    if images.shape[1] != 3:
        raise ValueError(f"color_jitter: expected images of 3 channels, got {images.shape[1]}")
    total = len(images) if total is None else total
    order = torch.rand((total, 4), generator=generator).argsort(1)[part]  # which of the four is the first, second, …
    drawn = (2 * torch.rand((total, 4), generator=generator)[part] - 1) * strength
    out = images.clone()
    for place in range(4):
        for number, adjust in enumerate((adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)):
            rows = (order[:, place] == number).nonzero().squeeze(1)
            if len(rows):
                amount = drawn[rows, number].to(images.dtype)
                out[rows] = adjust(out[rows], amount if adjust is adjust_hue else 1 + amount)
    return out


def adjust_brightness(images: Tensor, factors: Tensor) -> Tensor:
    """``images [B, 3, H, W]`` times ``factors [B]``, clipped to [0, 1]."""
    return (images * _each(factors)).clamp_(0.0, 1.0)


def adjust_contrast(images: Tensor, factors: Tensor) -> Tensor:
    """``images [B, 3, H, W]`` moved from the mean of their grey values, 1 being as they are, clipped to [0, 1]."""
    return _blend(images, _grey(images).mean((1, 2, 3), keepdim=True), factors)


def adjust_saturation(images: Tensor, factors: Tensor) -> Tensor:
    """``images [B, 3, H, W]`` moved from each pixel's grey value, 1 being as they are, clipped to [0, 1]."""
    return _blend(images, _grey(images), factors)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """``images [B, 3, H, W]`` in [0, 1] with their hues turned by ``turns [B]``, of a circle of 1."""
    red, green, blue = images.unbind(1)
    value, chroma = images.amax(1), images.amax(1) - images.amin(1)
    safe = torch.where(chroma > 0, chroma, 1.0)  # of a grey pixel any hue gives the same
    sextant = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    turned = sextant[:, None] + 6 * _each(turns)
    # the sextants that red, green and blue are counted from: each channel falls from value by up to chroma
    k = (turned + torch.tensor([5.0, 3.0, 1.0], dtype=images.dtype).view(1, 3, 1, 1)) % 6
    return (value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0.0, 1.0)).clamp_(0.0, 1.0)


def _grey(images: Tensor) -> Tensor:
    """``[B, 1, H, W]``."""
    weights = torch.tensor(_GREY, dtype=images.dtype).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def _blend(images: Tensor, other: Tensor, factors: Tensor) -> Tensor:
    f = _each(factors)
    return (f * images + (1 - f) * other).clamp_(0.0, 1.0)


def _each(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)
