# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import moe_kernels
from moe_kernels.backends.cpu import CpuBackend

__all__ = ["describe"]


def describe() -> dict[str, str | int]:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "isa": CpuBackend().isa(),
        "onednn_max_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "default"),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "gomp_spincount": os.environ.get("GOMP_SPINCOUNT", "default"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "moe_kernels": moe_kernels.__version__,
    }
