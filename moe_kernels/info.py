# SPDX-License-Identifier: Apache-2.0
"""``python -m moe_kernels.info``: which backends there are, why not, and which one computes what.

For bug reports: whatever is wrong, the report says it, and goes on.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import torch

from . import __version__, backends

__all__ = ["main", "openmp_runtimes"]


def openmp_runtimes() -> list[str]:
    """The OpenMP runtimes loaded in this process (Linux; elsewhere an empty list). One is right."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {
        line.split(maxsplit=5)[5].strip() for line in maps.read_text().splitlines() if len(line.split(maxsplit=5)) == 6
    }
    names = ("libgomp", "libomp", "libiomp")
    return sorted(path for path in paths if Path(path).name.startswith(names))


def _versions() -> list[str]:
    try:
        import triton

        triton_version = str(triton.__version__)
    except Exception as error:
        triton_version = f"not importable ({_text(error)})"
    return [
        f"moe_kernels {__version__}, torch {torch.__version__} (CUDA {torch.version.cuda or 'none'}), Triton "
        f"{triton_version}, Python {platform.python_version()}, {platform.machine()}"
    ]


def _states() -> list[str]:
    return [f"backend {name}: {state}" for name, state in backends.describe().items()]


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return ["GPUs: none that torch sees"]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(
            f"GPU {index}: {device.name}, sm_{device.major}{device.minor}, {device.multi_processor_count} "
            f"multiprocessors, {device.total_memory / 2**30:.0f} GiB"
        )
    return lines


def _choices() -> list[str]:
    asked = os.environ.get("MOE_KERNELS_BACKEND") or "auto"
    known = ["auto", *backends.available_backends()]
    if asked not in known:
        expected = ", ".join(known)
        return [f"MOE_KERNELS_BACKEND={asked}: no such backend, so every call fails; expected one of {expected}"]
    lines = []
    for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        try:
            chosen = backends.choose(torch.device(kind)).name
        except backends.BackendUnavailable as error:
            chosen = f"none: {error}"
        lines.append(f"{kind} tensors, with MOE_KERNELS_BACKEND={asked}: {chosen}")
    return lines


def _threads() -> list[str]:
    return [f"threads: {torch.get_num_threads()}; OpenMP runtimes: {', '.join(openmp_runtimes()) or 'none found'}"]


def _text(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def main() -> None:
    parts: dict[str, Callable[[], list[str]]] = {
        "versions": _versions,
        "backends": _states,
        "GPUs": _gpus,
        "choice of a backend": _choices,
        "threads": _threads,
    }
    for name, part in parts.items():
        try:
            lines = part()
        except Exception as error:
            lines = [f"{name}: asking for it failed: {_text(error)}"]
        print(*lines, sep="\n")


if __name__ == "__main__":
    main()
