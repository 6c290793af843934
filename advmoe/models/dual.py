# SPDX-License-Identifier: Apache-2.0
"""The Dual-Model (arXiv 2502.06832): a standard and a robust mixture of networks, mixed once more by one number."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

from ..registry import unknown_name
from .base import ModelSpec, register_kind
from .network_moe import MIXES, NetworkMoE

__all__ = ["DualModel"]


class DualModel(nn.Module):
    """``F_D(x) = (1 - alpha) F_S(x) + alpha F_R(x)`` of two networks that take the same images.

    Args:
        standard, robust: F_S and F_R, of the images in [0, 1] to logits ``[B, classes]``.
        alpha: from 0 (the standard one alone) to 1 (the robust one alone); at an end the other is not computed.
        on: what is mixed: ``"logits"``, as in the released code, or ``"probabilities"``, which the paper's bounds are
            about; then the result is the logarithm of the mixture.

    Raises:
        ValueError: for an ``alpha`` outside of [0, 1], or an unknown ``on``.
    """

    def __init__(self, standard: nn.Module, robust: nn.Module, alpha: float = 0.7, on: str = "logits") -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: expected a number from 0 to 1, got {alpha}")
        if on not in MIXES:
            raise unknown_name("on", on, MIXES)
        self.standard = standard
        self.robust = robust
        self.alpha = alpha
        self.on = on

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, S, S]`` in [0, 1] to logits ``[B, classes]``."""
        if self.alpha in (0, 1):
            alone = self.robust(images) if self.alpha else self.standard(images)
            return alone if self.on == "logits" else alone.log_softmax(1)
        return self.mixed(self.standard(images), self.robust(images))

    def mixed(self, standard: Tensor, robust: Tensor) -> Tensor:
        """Of the logits of both, those of the Dual-Model."""
        alpha = self.alpha
        if self.on == "logits":
            return (1 - alpha) * standard + alpha * robust
        if alpha in (0, 1):
            return (robust if alpha else standard).log_softmax(1)
        return torch.logaddexp(standard.log_softmax(1) + math.log(1 - alpha), robust.log_softmax(1) + math.log(alpha))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, on={self.on!r}"


@register_kind("dual_moe")
def _dual_moe(spec: ModelSpec) -> DualModel:
    standard, robust = (NetworkMoE(dataclasses.replace(spec, kind="network_moe")) for _ in range(2))
    return DualModel(standard, robust, spec.alpha, spec.dual_on)
