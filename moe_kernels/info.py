# SPDX-License-Identifier: Apache-2.0
"""``python -m moe_kernels.info``: which backends there are, and why not."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from . import __version__
from .backends import describe

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


def main() -> None:
    print(
        f"moe_kernels {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )
    for name, state in describe().items():
        print(f"backend {name}: {state}")
    print(f"threads: {torch.get_num_threads()}; OpenMP runtimes: {', '.join(openmp_runtimes()) or 'none found'}")


if __name__ == "__main__":
    main()
