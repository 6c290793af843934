# SPDX-License-Identifier: Apache-2.0
"""Every test here needs a CUDA device; without one they are skipped and counted. tests/moe_kernels has the oracle.

Each runs with every backend that has kernels for one; ``MOE_KERNELS_BACKEND=cuda`` leaves that one alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import moe_kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "moe_kernels"))

BACKENDS = ("triton", "cuda")
_asked = os.environ.get("MOE_KERNELS_BACKEND")


@pytest.fixture(params=[_asked] if _asked in BACKENDS else BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that the test runs with. What is special to one asks for it (``indirect``)."""
    name: str = request.param
    if _asked in BACKENDS and name != _asked:
        pytest.skip(f"MOE_KERNELS_BACKEND asks for {_asked} alone")
    reason = moe_kernels.available_backends()[name]
    if reason is not None:
        pytest.skip(f"backend {name}: {reason}")
    with moe_kernels.use_backend(name):
        yield name


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same random numbers; float32 with full products, where a test does not ask for others."""
    torch.manual_seed(0)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
