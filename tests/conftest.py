# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests: Ctrl-C is heard; those marked gpu are skipped and counted where there is no CUDA device."""

from __future__ import annotations

import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    # before moe_kernels is imported: the Triton kernels run in numpy, on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_device = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(no_device)


def pytest_configure() -> None:
    """A script's background jobs are started with Ctrl-C ignored; the tests of Ctrl-C want to be heard there too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
