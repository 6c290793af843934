# SPDX-License-Identifier: Apache-2.0
"""What a backend is asked for. Letters as in :mod:`moe_kernels.ops`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..geometry import Conv2dGeometry

__all__ = ["NO_EPILOGUE", "Backend", "BackendUnavailable", "Epilogue", "Experts"]


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here; the message says why and what to do."""


class Experts(NamedTuple):
    """The slice of each virtual sample on both sides, int64 ``[V]``; None where that side is whole."""

    out: Tensor | None
    inner: Tensor | None


class Epilogue(NamedTuple):
    """What follows the convolution: ``relu(scale * (gate * (conv + bias)) + shift + residual)``."""

    bias: Tensor | None = None  # [R_out]
    gate: Tensor | None = None  # [V]
    scale: Tensor | None = None  # [w_out] for all experts, or [R_out]
    shift: Tensor | None = None  # as scale
    residual: Tensor | None = None  # [V, w_out, P, Q]
    relu: bool = False


NO_EPILOGUE = Epilogue()


class Backend(Protocol):
    """The three calls, forward with its epilogue, and what each backend says of itself."""

    name: str

    def unavailable(self) -> str | None:
        """None, or why this backend cannot run in this process."""

    def unsupported(self, device: torch.device) -> str | None:
        """None, or why it cannot compute on this device."""

    def describe(self) -> str:
        """What runs here, in one line, for bug reports; only where it is available."""

    def forward(
        self,
        input: Tensor,  # [B, C, H, W]
        weight: Tensor,  # [R_out, R_in / groups, kh, kw]
        experts: Experts,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        packed: Tensor | None,
    ) -> Tensor:  # [V, w_out, P, Q]
        ...

    def grad_input(
        self,
        grad: Tensor,  # [V, w_out, P, Q]
        weight: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        size: tuple[int, int],  # H, W
        packed: Tensor | None,
    ) -> Tensor:  # [B, C, H, W]
        ...

    def grad_weight(
        self,
        grad: Tensor,
        input: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        shape: tuple[int, ...],  # of the weight
        channels_last: bool,  # the memory format of what is returned
    ) -> Tensor: ...

    def pack(self, weight: Tensor, geometry: Conv2dGeometry, backward: bool) -> Tensor | None:
        """The weight as forward wants it (``backward``: as grad_input does), or None where keeping it would not pay."""
