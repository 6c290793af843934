# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.table``: RoutedConv2d against the alternatives, paired in one run; ``--level model`` and ``--level
training`` the same of whole networks, with options of their own (``--level model --help``).

Functions of a shape are timed in turn, round by round, so that they share what else the machine does. The floor is among
them twice, and a shape whose floor/floor ratio of medians leaves 0.95 .. 1.05 is timed again. Printed are geometric means
over the eight shapes of the ratios of medians. Where memory lies differs from process to process and matters to small
batches: --processes takes medians over several.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from advmoe.tables import table

from . import model_table
from .contenders import CONTENDERS, DIRECTIONS, SHAPES, Shape, make
from .machine import describe
from .timing import LIMITS, TRIES, geometric_mean, medians, quiet_medians


def measure(
    shape: Shape, batch: int, direction: str, names: Sequence[str], experts: int, more_experts: int, repeats: int
) -> dict[str, Any]:
    """Ratios of medians on one shape: the routed layer against the floor, after as many tries as a quiet floor takes;
    then the alternatives against the routed layer."""
    floor, routed = (make(name, shape, batch, experts, direction) for name in ("floor", "routed"))
    more = make("routed", shape, batch, more_experts, direction)
    timing = quiet_medians([floor, routed], repeats)
    base, seconds = timing.seconds
    fewer, many = medians([routed, more], repeats)
    ratios = {"routed/floor": seconds / base, f"N={more_experts}/N={experts}": many / fewer}
    others = [n for n in names if n not in ("routed", "floor")]
    if others:
        against = [routed, *(make(n, shape, batch, experts, direction) for n in others)]
        first, *rest = medians(against, max(3, repeats // 2))
        ratios |= {f"{name}/routed": seconds / first for name, seconds in zip(others, rest, strict=True)}
    return {
        "shape": str(shape), "batch": batch, "direction": direction, "floor_us": base * 1e6, "ratios": ratios,
        "a_a": timing.a_a, "tries": timing.tries, "quiet": timing.quiet,
    }  # fmt: skip


def main() -> None:
    levels = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    levels.add_argument("--level", choices=("layer", *model_table.LEVELS), default="layer")
    chosen, arguments = levels.parse_known_args()
    if chosen.level == "layer":
        _layers(arguments)
    else:
        model_table.main(chosen.level, arguments)


def _layers(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS))
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--more-experts", type=int, default=16, help="a second routed layer, to see what N costs")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--processes", type=int, default=1, help="medians over so many processes")
    parser.add_argument("--isa", choices=("avx512", "avx2"), help="hold both sides to this instruction set")
    parser.add_argument("--shapes", action="store_true", help="print a line for each shape")
    parser.add_argument("--json", type=Path, help="write all figures there")
    options = parser.parse_args(arguments)
    for name in ("batch", "experts", "more_experts", "repeats", "threads", "processes"):
        value = getattr(options, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if options.isa and os.environ.get("MOE_KERNELS_CPU_ISA") != options.isa:
        # both libraries read their variable once, at the start of the process
        onednn = {"avx2": "AVX2", "avx512": "AVX512_CORE"}[options.isa]
        environment = {**os.environ, "MOE_KERNELS_CPU_ISA": options.isa, "ONEDNN_MAX_CPU_ISA": onednn}
        raise SystemExit(subprocess.call([sys.executable, "-m", "bench.table", *arguments], env=environment))
    if options.processes > 1:
        runs = [_child(arguments) for _ in range(options.processes)]
        record = {**runs[0], "processes": options.processes, "results": _merge([run["results"] for run in runs])}
    else:
        record = _measure_all(options)
    _report(record, options.shapes)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")


def _measure_all(options: argparse.Namespace) -> dict[str, Any]:
    if options.threads:
        torch.set_num_threads(options.threads)
    names = [n for n in CONTENDERS if n in {*options.contenders, "routed", "floor"}]
    results = []
    for direction in options.direction:
        for batch in options.batch:
            here = [
                measure(s, batch, direction, names, options.experts, options.more_experts, options.repeats)
                for s in SHAPES
            ]
            results += here
            mean = geometric_mean([r["ratios"]["routed/floor"] for r in here])
            print(f"{direction} B={batch}: routed/floor {mean:.3f}", file=sys.stderr, flush=True)
    return {
        "machine": describe(), "experts": options.experts, "repeats": options.repeats, "processes": 1, "results": results,
    }  # fmt: skip


def _child(arguments: Sequence[str]) -> dict[str, Any]:
    """The same command in a process of its own, once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, "-m", "bench.table", *arguments, "--processes", "1", "--json", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return json.loads(path.read_text())


def _merge(runs: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each shape's medians over the processes."""
    merged = []
    for rows in zip(*runs, strict=True):
        merged.append(
            {
                **rows[0],
                "floor_us": statistics.median(r["floor_us"] for r in rows),
                "ratios": {name: statistics.median(r["ratios"][name] for r in rows) for name in rows[0]["ratios"]},
                "routed/floor of each": [r["ratios"]["routed/floor"] for r in rows],
                "a_a": statistics.median(r["a_a"] for r in rows),
                "tries": max(r["tries"] for r in rows),
                "quiet": all(r["quiet"] for r in rows),
            }
        )
    return merged


def _report(record: dict[str, Any], shapes: bool) -> None:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for r in record["results"]:
        groups.setdefault((r["direction"], r["batch"]), []).append(r)
    rows = []
    columns: list[str] = []
    for (direction, batch), here in groups.items():
        if shapes:
            for r in here:
                parts = ", ".join(f"{name} {value:.2f}" for name, value in r["ratios"].items())
                print(f"{direction} B={batch} {r['shape']}: floor {r['floor_us']:.0f} us; {parts}; A/A {r['a_a']:.3f}")
        means = {name: geometric_mean([r["ratios"][name] for r in here]) for name in here[0]["ratios"]}
        if record["processes"] > 1:
            each = [geometric_mean(values) for values in zip(*(r["routed/floor of each"] for r in here), strict=True)]
            columns = ["of each process"]
            cells = [f"{min(each):.2f} .. {max(each):.2f}"]
        else:
            columns, cells = [], []
        columns = [*means, *columns, "A/A"]
        a_a = geometric_mean([r["a_a"] for r in here])
        rows.append([direction, str(batch), *[f"{m:.2f}" for m in means.values()], *cells, f"{a_a:.2f}"])
    print(table(["direction", "batch", *columns], rows))
    machine = record["machine"]
    of = f"medians over {record['processes']} processes of " if record["processes"] > 1 else ""
    print(
        f"\n{machine['cpu']}, {machine['threads']} threads, {machine['isa']} (oneDNN: {machine['onednn_max_isa']}), "
        f"torch {machine['torch']}, Python {machine['python']}; float32, channels_last, N={record['experts']}; "
        f"{of}ratios of medians of n={record['repeats']} timings in turn, geometric mean over {len(SHAPES)} shapes"
    )
    noisy = [
        f"{r['direction']} B={r['batch']} {r['shape']} (A/A {r['a_a']:.2f})" for r in record["results"] if not r["quiet"]
    ]
    if noisy:
        print(f"A/A left {LIMITS[0]} .. {LIMITS[1]} {TRIES} times: {'; '.join(noisy)}")


if __name__ == "__main__":
    main()
