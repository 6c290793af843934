# SPDX-License-Identifier: Apache-2.0
"""Latencies by pytest-benchmark: ``pytest bench --benchmark-only``. Paired ratios: ``python -m bench.table``."""

from __future__ import annotations

from typing import Any

import pytest

from .contenders import CONTENDERS, DIRECTIONS, SHAPES, Shape, make


@pytest.mark.parametrize("name", list(CONTENDERS))
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], SHAPES[7]], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_routed_conv2d(benchmark: Any, direction: str, shape: Shape, batch: int, name: str) -> None:
    function = make(name, shape, batch, 2, direction)
    benchmark.group = f"{direction} {shape} B={batch}"
    benchmark.pedantic(function, rounds=15, iterations=max(1, 32 // batch), warmup_rounds=2)
