# SPDX-License-Identifier: Apache-2.0
"""Which implementation computes a routed convolution, and why another one cannot.

A backend is a :class:`Backend`. The operators ask :func:`choose` each time they run, so ``use_backend``
and ``MOE_KERNELS_BACKEND`` also govern the backward pass and compiled graphs.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator

import torch

from . import cpu, cuda, triton
from .fallback import REFERENCE
from .interface import NO_EPILOGUE, Backend, BackendUnavailable, Behind, Epilogue, Experts, Side

__all__ = [
    "NO_EPILOGUE",
    "REFERENCE",
    "Backend",
    "BackendUnavailable",
    "Behind",
    "Epilogue",
    "Experts",
    "Side",
    "automatic",
    "available_backends",
    "choose",
    "describe",
    "use_backend",
]

_BACKENDS: dict[str, Backend] = {
    "reference": REFERENCE,
    "cpu": cpu.CpuBackend(),
    "triton": triton.TritonBackend(),
    "cuda": cuda.CudaBackend(),
    "cuda_sim": cuda.SimulatedCudaBackend(),
}
# The first that can run. Which of the two is faster on a GPU has not been measured.
_AUTO = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}
_environment = os.environ.get("MOE_KERNELS_BACKEND") or "auto"  # read once: a look at it costs a microsecond a call
# Process-wide and not per thread: the backward pass of some devices runs in the engine's own threads.
_override: list[str] = []


def available_backends() -> dict[str, str | None]:
    """Backend name to None where it can run, or to the reason why it cannot."""
    return {name: backend.unavailable() for name, backend in _BACKENDS.items()}


def describe() -> dict[str, str]:
    """Each backend's state in one line."""
    return {
        name: backend.describe() if (reason := backend.unavailable()) is None else f"not available: {reason}"
        for name, backend in _BACKENDS.items()
    }


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """``with use_backend(name):`` runs the routed operators of the whole process, all its threads, with one backend:
    ``"reference"``, ``"cpu"``, ``"triton"``, ``"cuda"``, ``"cuda_sim"`` or ``"auto"``.

    Raises:
        ValueError: if there is no such backend.
        BackendUnavailable: if it cannot run here.
    """
    if name != "auto":
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
    name = _override[-1] if _override else _environment
    if name == "auto":
        name = automatic(device.type)
        if not name:
            raise BackendUnavailable(
                f"no backend of moe_kernels computes on {device.type!r} yet; move the tensors to the CPU, or run the "
                "slow loop in torch with MOE_KERNELS_BACKEND=reference"
            )
    backend = _BACKENDS.get(name) or _named(name)
    reason = backend.unsupported(device)
    if reason is not None:
        raise BackendUnavailable(f"{name}: {reason}")
    return backend


@functools.cache
def automatic(device_type: str) -> str:
    """What ``"auto"`` means for a type of device: a backend's name, or an empty string."""
    names = _AUTO.get(device_type, ())
    return next((name for name in names if _BACKENDS[name].unavailable() is None), names[0] if names else "")


def _named(name: str) -> Backend:
    if name not in _BACKENDS:
        raise ValueError(f"backend: expected one of auto, {', '.join(_BACKENDS)}, got {name!r}")
    reason = _BACKENDS[name].unavailable()
    if reason is not None:
        raise BackendUnavailable(f"{name}: {reason}")
    return _BACKENDS[name]
