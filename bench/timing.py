# SPDX-License-Identifier: Apache-2.0
"""Paired timings: functions in turn, round by round, so that they share what else the machine does."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["LIMITS", "TRIES", "Timing", "geometric_mean", "medians", "quiet_medians"]

LIMITS = (0.95, 1.05)  # of the ratio of a function's two medians
TRIES = 5


@dataclass(frozen=True)
class Timing:
    """Median seconds of each function; ``a_a``: the first function's second median against its first, of the last of so
    many ``tries``."""

    seconds: tuple[float, ...]
    a_a: float
    tries: int

    @property
    def quiet(self) -> bool:
        return LIMITS[0] <= self.a_a <= LIMITS[1]


def medians(functions: Sequence[Callable[[], object]], repeats: int, least: float = 2e-3) -> list[float]:
    """Median seconds of one call of each function, timed ``repeats`` times in turn for ``least`` seconds or more; each
    timing follows an untimed call of the same function, so that none pays for what the one before left in the caches."""
    inner = []
    for function in functions:
        function()
        start = time.perf_counter()
        function()
        inner.append(max(1, math.ceil(least / max(time.perf_counter() - start, 1e-7))))
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, count, mine in zip(functions, inner, times, strict=True):
            function()
            start = time.perf_counter()
            for _ in range(count):
                function()
            mine.append((time.perf_counter() - start) / count)
    return [statistics.median(mine) for mine in times]


def quiet_medians(
    functions: Sequence[Callable[[], object]], repeats: int, tries: int = TRIES, least: float = 2e-3
) -> Timing:
    """:func:`medians` with the first function once more at the end of each round: until its two medians agree, or
    ``tries`` times. Its seconds are the mean of both."""
    for attempt in range(1, tries + 1):
        first, *rest, again = medians([*functions, functions[0]], repeats, least)
        timing = Timing(((first + again) / 2, *rest), again / first, attempt)
        if timing.quiet:
            break
    return timing


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
