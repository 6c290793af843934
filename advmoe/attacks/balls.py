# SPDX-License-Identifier: Apache-2.0
"""The sets that an attack may not leave: balls around the images, within the pixel range [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..registry import unknown_name

__all__ = ["NORMS", "Ball", "SharedGenerator", "require_batch"]

NORMS = ("linf", "l2")


@dataclass(frozen=True)
class SharedGenerator:
    """Draws for a batch of ``total`` images that several processes share; this one has those from ``start`` on."""

    generator: torch.Generator
    start: int
    total: int


@dataclass(frozen=True)
class Ball:
    """Of radius ``epsilon``, in units of the pixel range, in the norm ``"linf"`` or ``"l2"`` (of a whole image).

    Images are ``[B, C, H, W]`` in [0, 1].
    """

    epsilon: float
    norm: str = "linf"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise unknown_name("norm", self.norm, NORMS)
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon: expected a finite number of at least 0, got {self.epsilon}")
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError(
                f"epsilon: expected at most 1, since pixels lie in [0, 1], got {self.epsilon:g} (8/255 is {8 / 255:.4f})"
            )

    def project(self, x: Tensor, images: Tensor) -> Tensor:
        """The point of the ball around ``images``, and of [0, 1], that ``x`` becomes. For L2: onto the ball, then into
        [0, 1], which moves no pixel away from the image's."""
        if self.norm == "linf":
            low, high = (images - self.epsilon).clamp_min_(0.0), (images + self.epsilon).clamp_max_(1.0)
            return torch.clamp(x, low, high)
        delta = x - images
        length = _length(delta)
        return (images + delta * (self.epsilon / length.clamp_min(self.epsilon or 1.0))).clamp_(0.0, 1.0)

    def ascend(self, x: Tensor, grad: Tensor, images: Tensor, step_size: float) -> Tensor:
        """One projected step of length ``step_size``: along the gradient's sign, or its direction for L2."""
        if self.norm == "linf":
            return self.project(x + step_size * grad.sign(), images)
        # in units of the largest entry: squares of tiny gradients would vanish
        largest = grad.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
        unit = grad / torch.where(largest > 0, largest, 1.0)
        return self.project(x + step_size * unit / _length(unit).clamp_min(1e-12), images)

    def start(self, images: Tensor, kind: bool | str, generator: torch.Generator | SharedGenerator | None) -> Tensor:
        """Where an attack begins: True uniform in the ball, ``"gaussian"`` at 0.001 * N(0, 1) from the image, False at
        the image; projected."""
        if kind is False:
            return self.project(images, images)
        rows, part = len(images), slice(None)
        if isinstance(generator, SharedGenerator):
            rows, part = generator.total, slice(generator.start, generator.start + len(images))
            generator = generator.generator
        device = images.device if generator is None else generator.device  # a CPU generator serves any device
        # contiguous: one order of numbers for any memory format
        noise = torch.empty((rows, *images.shape[1:]), dtype=images.dtype, device=device)
        if kind == "gaussian":
            noise.normal_(generator=generator).mul_(0.001)
        elif self.norm == "linf":
            noise.uniform_(-self.epsilon, self.epsilon, generator=generator)
        else:
            noise.normal_(generator=generator)
            radius = torch.empty((rows, 1, 1, 1), dtype=images.dtype, device=device).uniform_(generator=generator)
            dimensions = images[0].numel()
            noise *= self.epsilon * radius.pow(1 / dimensions) / _length(noise).clamp_min(1e-12)
        return self.project(images + noise[part].to(images.device), images)


def require_batch(images: Tensor, labels: Tensor) -> None:
    """Looks at what an attack gets.

    Raises:
        ValueError: if the images are not ``[B, C, H, W]`` in [0, 1], or the labels not int64 ``[B]``.
    """
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images: expected floating [B, C, H, W], got {images.dtype} {tuple(images.shape)}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64 [{len(images)}], got {labels.dtype} {tuple(labels.shape)}")
    if len(images):
        low, high = torch.stack(images.aminmax()).tolist()
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"images: expected pixels in [0, 1], got {low:.4g} to {high:.4g}; normalisation belongs into the model"
            )


def _length(x: Tensor) -> Tensor:
    """The L2 norm of each image, ``[B, 1, 1, 1]``."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1).view(-1, 1, 1, 1)
