# SPDX-License-Identifier: Apache-2.0
"""What every test here leaves as it found it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """Runs set the thread count and seed torch's generator, for the process; names of modules extend its path."""
    path = sys.path[:]
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    yield
    sys.path[:] = path
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
