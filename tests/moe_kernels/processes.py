# SPDX-License-Identifier: Apache-2.0
"""Python in a process of its own, and the instruction sets to try there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import moe_kernels


def python(code: str, *arguments: str, **environment: str) -> str:
    """The output of ``code`` in a process of its own that imports this moe_kernels."""
    here = [str(Path(moe_kernels.__file__).parents[1]), str(Path(__file__).parent)]
    path = os.pathsep.join([*here, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return set(next((line for line in lines if line.startswith(("flags", "Features"))), "").split())


def _isa(name: str, flag: str) -> object:
    missing = pytest.mark.skipif(flag not in _flags(), reason=f"this CPU has no {name}")
    return pytest.param(name, marks=missing if flag else ())


ISAS = [_isa("generic", ""), _isa("avx2", "avx2"), _isa("avx512", "avx512f")]  # values of MOE_KERNELS_CPU_ISA
