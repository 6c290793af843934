# SPDX-License-Identifier: Apache-2.0
"""Which implementation computes a routed convolution, and why another one cannot.

A backend has the attributes of :class:`Backend`. The operators ask :func:`choose` each time they run, so ``use_backend``
and ``MOE_KERNELS_BACKEND`` also govern the backward pass and compiled graphs.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from . import cpu, reference

if TYPE_CHECKING:
    from ..geometry import Conv2dGeometry

__all__ = ["Backend", "BackendUnavailable", "available_backends", "choose", "use_backend"]


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here; the message says why and what to do."""


class Backend(Protocol):
    """The three calls, forward with its epilogue, and what each backend says of itself."""

    name: str

    def unavailable(self) -> str | None:
        """None, or why this backend cannot run in this process."""

    def unsupported(self, device: torch.device) -> str | None:
        """None, or why it cannot compute on this device."""

    def forward(
        self,
        input: Tensor,  # [B, C, H, W]
        weight: Tensor,  # [R_out, R_in / groups, kh, kw]
        out_expert: Tensor | None,  # int64 [V], V = B * samples_per_input
        in_expert: Tensor | None,  # int64 [V]
        geometry: Conv2dGeometry,
        *,
        bias: Tensor | None = None,
        gate: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        relu: bool = False,
        packed: Tensor | None = None,
    ) -> Tensor:  # [V, w_out, P, Q]
        ...

    def grad_input(
        self,
        grad: Tensor,  # [V, w_out, P, Q]
        weight: Tensor,
        out_expert: Tensor | None,
        in_expert: Tensor | None,
        geometry: Conv2dGeometry,
        size: tuple[int, int],  # H, W
        packed: Tensor | None = None,
    ) -> Tensor:  # [B, C, H, W]
        ...

    def grad_weight(
        self,
        grad: Tensor,
        input: Tensor,
        out_expert: Tensor | None,
        in_expert: Tensor | None,
        geometry: Conv2dGeometry,
        weight_shape: tuple[int, ...],
        channels_last: bool = False,
    ) -> Tensor: ...

    def pack(self, weight: Tensor, geometry: Conv2dGeometry) -> tuple[Tensor | None, Tensor | None]:
        """The weight as forward and as grad_input want it, or None where keeping it would not pay."""


_BACKENDS: dict[str, Backend] = {"reference": reference.ReferenceBackend(), "cpu": cpu.CpuBackend()}
_AUTO = {"cpu": "cpu"}
# Process-wide and not per thread: the backward pass of some devices runs in the engine's own threads.
_override: list[str] = []


def available_backends() -> dict[str, str | None]:
    """Backend name to None where it can run, or to the reason why it cannot."""
    return {name: backend.unavailable() for name, backend in _BACKENDS.items()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the routed operators of the whole process with one backend: ``"reference"``, ``"cpu"`` or ``"auto"``.

    Raises:
        ValueError: if there is no such backend.
        BackendUnavailable: if it cannot run here.
    """
    _named(name)
    _override.append(name)
    try:
        yield
    finally:
        _override.pop()


def choose(device: torch.device) -> Backend:
    """The backend for tensors on ``device``.

    Raises:
        ValueError: if the environment names an unknown backend.
        BackendUnavailable: if the backend cannot run here or not on this device.
    """
    name = _override[-1] if _override else os.environ.get("MOE_KERNELS_BACKEND") or "auto"
    if name == "auto":
        name = _AUTO.get(device.type, "")
        if not name:
            raise BackendUnavailable(
                f"no backend of moe_kernels computes on {device.type!r} yet; move the tensors to the CPU, or run the "
                "slow loop in torch with MOE_KERNELS_BACKEND=reference"
            )
    backend = _named(name)
    assert backend is not None
    reason = backend.unsupported(device)
    if reason is not None:
        raise BackendUnavailable(f"{name}: {reason}")
    return backend


def _named(name: str) -> Backend | None:
    if name == "auto":
        return None
    if name not in _BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(_BACKENDS)}, got {name!r}")
    reason = _BACKENDS[name].unavailable()
    if reason is not None:
        raise BackendUnavailable(f"{name}: {reason}")
    return _BACKENDS[name]
