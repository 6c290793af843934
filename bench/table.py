# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.table``: RoutedConv2d against the alternatives, paired in one run.

Functions of a shape are timed in turn, round by round, so that they share what else the machine does. The floor is among
them twice, and a shape whose floor/floor ratio of medians leaves 0.95 .. 1.05 is timed again. Printed are geometric means
over the eight shapes of the ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from advmoe.tables import table

from .contenders import CONTENDERS, DIRECTIONS, SHAPES, Shape, make
from .machine import describe

LIMITS = (0.95, 1.05)
TRIES = 5


def _medians(functions: Sequence[Callable[[], object]], repeats: int, least: float) -> list[float]:
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


def measure(
    shape: Shape, batch: int, direction: str, names: Sequence[str], experts: int, more_experts: int, repeats: int
) -> dict[str, Any]:
    """Ratios of medians on one shape: the routed layer against the floor, after as many tries as a quiet floor takes;
    then the alternatives against the routed layer."""
    floor, routed = (make(name, shape, batch, experts, direction) for name in ("floor", "routed"))
    more = make("routed", shape, batch, more_experts, direction)
    attempt, a_a, medians = 0, 0.0, [0.0]
    while attempt < TRIES and not LIMITS[0] <= a_a <= LIMITS[1]:
        attempt += 1
        medians = _medians([floor, routed, floor], repeats, 2e-3)
        a_a = medians[2] / medians[0]
    base = (medians[0] + medians[2]) / 2
    fewer, many = _medians([routed, more], repeats, 2e-3)
    ratios = {"routed/floor": medians[1] / base, f"N={more_experts}/N={experts}": many / fewer}
    others = [n for n in names if n not in ("routed", "floor")]
    if others:
        against = [routed, *(make(n, shape, batch, experts, direction) for n in others)]
        first, *rest = _medians(against, max(3, repeats // 2), 2e-3)
        ratios |= {f"{name}/routed": seconds / first for name, seconds in zip(others, rest, strict=True)}
    return {
        "shape": str(shape), "batch": batch, "direction": direction, "floor_us": base * 1e6, "ratios": ratios, "a_a": a_a,
        "tries": attempt, "quiet": LIMITS[0] <= a_a <= LIMITS[1],
    }  # fmt: skip


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--more-experts", type=int, default=16, help="a second routed layer, to see what N costs")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--isa", choices=("avx512", "avx2"), help="hold both sides to this instruction set")
    parser.add_argument("--shapes", action="store_true", help="print a line for each shape")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args()
    if options.isa and os.environ.get("MOE_KERNELS_CPU_ISA") != options.isa:
        # both libraries read their variable once, at the start of the process
        onednn = {"avx2": "AVX2", "avx512": "AVX512_CORE"}[options.isa]
        environment = {**os.environ, "MOE_KERNELS_CPU_ISA": options.isa, "ONEDNN_MAX_CPU_ISA": onednn}
        raise SystemExit(subprocess.call([sys.executable, "-m", "bench.table", *sys.argv[1:]], env=environment))
    if options.threads:
        torch.set_num_threads(options.threads)
    names = [n for n in CONTENDERS if n in {*options.contenders, "routed", "floor"}]
    results = []
    rows = []
    columns: list[str] = []
    for direction in options.direction:
        for batch in options.batch:
            here = [
                measure(s, batch, direction, names, options.experts, options.more_experts, options.repeats)
                for s in SHAPES
            ]
            results += here
            if options.shapes:
                for r in here:
                    parts = ", ".join(f"{name} {value:.2f}" for name, value in r["ratios"].items())
                    print(
                        f"{direction} B={batch} {r['shape']}: floor {r['floor_us']:.0f} us; {parts}; A/A {r['a_a']:.3f}"
                    )
            means = {name: geometric_mean([r["ratios"][name] for r in here]) for name in here[0]["ratios"]}
            columns = [*means, "A/A"]
            a_a = geometric_mean([r["a_a"] for r in here])
            rows.append([direction, str(batch), *[f"{m:.2f}" for m in means.values()], f"{a_a:.2f}"])
            print(f"{direction} B={batch}: routed/floor {means['routed/floor']:.3f}", file=sys.stderr, flush=True)
    print(table(["direction", "batch", *columns], rows))
    machine = describe()
    print(
        f"\n{machine['cpu']}, {machine['threads']} threads, {machine['isa']} (oneDNN: {machine['onednn_max_isa']}), "
        f"torch {machine['torch']}, Python {machine['python']}; float32, channels_last, N={options.experts}; ratios of "
        f"medians of n={options.repeats} timings in turn, geometric mean over {len(SHAPES)} shapes"
    )
    noisy = [f"{r['direction']} B={r['batch']} {r['shape']} (A/A {r['a_a']:.2f})" for r in results if not r["quiet"]]
    if noisy:
        print(f"A/A left {LIMITS[0]} .. {LIMITS[1]} {TRIES} times: {'; '.join(noisy)}")
    if options.json:
        record = {"machine": machine, "experts": options.experts, "repeats": options.repeats, "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
