# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gate``: whether something has become slower, by ratios in one process and not by seconds.

Each pair is timed in turn, and the ratio of its medians held against its limit, up to three times. The limits leave room
for a busy machine: what they find is a loss of a third, not of a few per cent.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from advmoe.tables import table

from . import contenders, models
from .contenders import SHAPES
from .models import Setting
from .timing import medians

__all__ = ["PAIRS", "Pair", "gate", "main", "ratio"]

TRIES = 3
REPEATS = 9
Make = Callable[[str], Callable[[], object]]


@dataclass(frozen=True)
class Pair:
    """``one`` may take at most ``limit`` times as long as ``other``; ``make`` makes a function of either name."""

    what: str
    make: Make
    one: str
    other: str
    limit: float


def _layer(direction: str, batch: int) -> Make:
    return lambda name: contenders.make(name, SHAPES[3], batch, 2, direction)


def _model(direction: str, batch: int) -> Make:
    return lambda name: models.make(name, Setting(width=32), batch, direction)


PAIRS = (
    Pair("layer 64->64@16, forward, B = 1", _layer("forward", 1), "routed", "floor", 1.5),
    Pair("layer 64->64@16, forward, B = 32", _layer("forward", 32), "routed", "floor", 1.4),
    Pair("layer 64->64@16, training step, B = 32", _layer("train", 32), "routed", "floor", 1.5),
    Pair("layer 64->64@16, input gradient, B = 32", _layer("grad_input", 32), "routed", "floor", 1.4),
    Pair("ResNet-18 of width 32, forward, B = 1", _model("forward", 1), "moe fused", "s_dense", 0.6),
    Pair("ResNet-18 of width 32, forward, B = 32", _model("forward", 32), "moe fused", "s_dense", 1.25),
    Pair("ResNet-18 of width 32, training step, B = 32", _model("train", 32), "moe", "dense", 0.85),
)


def ratio(pair: Pair) -> float:
    """Of medians, timed in turn."""
    one, other = medians([pair.make(pair.one), pair.make(pair.other)], REPEATS)
    return one / other


def gate(pairs: Sequence[Pair], measure: Callable[[Pair], float] = ratio) -> int:
    """Prints each pair with the ratios that it took; 1 if one was above its limit ``TRIES`` times, otherwise 0."""
    rows, failed = [], False
    for pair in pairs:
        ratios: list[float] = []
        while len(ratios) < TRIES and (not ratios or ratios[-1] > pair.limit):
            ratios.append(measure(pair))
        slow = ratios[-1] > pair.limit
        failed = failed or slow
        verdict = "too slow" if slow else "ok"
        tries = ", ".join(f"{r:.2f}" for r in ratios)
        rows.append([pair.what, f"{pair.one} / {pair.other}", tries, f"{pair.limit:.2f}", verdict])
    print(table(["what", "ratio of", "measured", "at most", ""], rows))
    return int(failed)


def main() -> None:
    sys.exit(gate(PAIRS))


if __name__ == "__main__":
    main()
