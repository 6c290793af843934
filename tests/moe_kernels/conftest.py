# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of moe_kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from oracle import BACKENDS, CallCounter, products

import moe_kernels

hypothesis.settings.register_profile("quick", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("MOE_KERNELS_HYPOTHESIS", "quick"))


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """The same random numbers, and one thread: threads are the subject of test_determinism, elsewhere they only wait."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=(*BACKENDS, "cuda_sim"))
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with each backend; the CUDA kernels in the simulator, float32 by full products there."""
    reason = moe_kernels.available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    with products(), moe_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> CallCounter:
    """Counts the calls of the cpu backend, by name."""
    return CallCounter(monkeypatch)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
