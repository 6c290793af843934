# SPDX-License-Identifier: Apache-2.0
"""Every test here needs a CUDA device; without one they are skipped and counted. tests/moe_kernels has the oracle."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "moe_kernels"))


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
