# SPDX-License-Identifier: Apache-2.0
"""Latencies of whole networks by pytest-benchmark: ``pytest bench --benchmark-only``. Paired ratios: ``python -m
bench.table --level model``, which also has what torch.compile makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from .models import CONTENDERS, DIRECTIONS, Setting, make

EAGER = [name for name in CONTENDERS if not name.endswith("compiled")]
SETTING = Setting(width=32)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("batch", [1, 32])
def test_forward(benchmark: Any, batch: int, name: str) -> None:
    benchmark.group = f"ResNet-18 of width 32, forward, B={batch}"
    benchmark.pedantic(make(name, SETTING, batch), rounds=9, iterations=max(1, 8 // batch), warmup_rounds=2)


@pytest.mark.parametrize("name", DIRECTIONS["train"])
def test_training_step(benchmark: Any, name: str) -> None:
    benchmark.group = "ResNet-18 of width 32, training step, B=32"
    benchmark.pedantic(make(name, SETTING, 32, "train"), rounds=5, warmup_rounds=1)
