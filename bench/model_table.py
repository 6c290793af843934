# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.table --level model`` and ``--level training``: whole networks against each other, paired in one run.

The contenders of :mod:`bench.models` are timed in turn, round by round, with a float32 product of matrices among them, by
each of torch's libraries, of which the faster one's rate is called the machine's peak. S-Dense is among them twice, and
where its two medians differ by more than 5 % all are timed again. Four things can be measured: latency against the batch
(``batch``), against r (``ratio``), against the number of experts (``experts``), and the memory of a forward
(``memory``). ``--json`` names a file of results: read, those of this run added, and written; the tables, ``--csv`` and
``--picture`` are of all that is in it, and with ``--measure`` and nothing behind it of that alone.

GFLOP/s are of the work that is asked for (two FLOPs for each multiply-accumulate; of the chosen expert alone), of a
training step three times the forward's.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F

from advmoe.analysis.style import figure, line_style
from advmoe.tables import percent, table

from .machine import describe
from .models import CONTENDERS, DIRECTIONS, Setting, gigaflops, largest_share, make, memory_of_forward
from .timing import LIMITS, quiet_medians

__all__ = ["MEASURES", "Entrant", "entrants", "main", "measure", "picture", "report", "write_csv"]

LEVELS = {"model": "forward", "training": "train"}
MEASURES = ("batch", "ratio", "experts", "memory")
GEMM = 2048
TRIES = 3
LEAST = 0.02  # seconds of one timing
# Without the eager forms of what torch.compile makes faster.
USUAL = {
    "forward": tuple(name for name in CONTENDERS if name not in ("s_dense", "dense")),
    "train": DIRECTIONS["train"],
}
# The library's, one pathway's network and the full network, at their best in each direction.
BEST = {"forward": ("moe fused", "s_dense compiled", "dense compiled"), "train": ("moe", "s_dense", "dense")}
Record = dict[str, Any]


@dataclass(frozen=True)
class Entrant:
    """A contender in a setting."""

    name: str
    setting: Setting


def entrants(
    what: str,
    direction: str,
    base: Setting,
    names: Sequence[str],
    more: int,
    ratios: Sequence[float],
    counts: Sequence[int],
) -> list[Entrant]:
    """Who is timed against whom: S-Dense first where it takes part, which is timed twice."""
    moe, s_dense, dense = BEST[direction]
    if what == "batch":
        first = [name for name in (s_dense,) if name in names]
        rest = [name for name in names if name != s_dense]
        others = [Entrant(moe, _with(base, experts=more))] if moe in names and more != base.experts else []
        return [*(Entrant(name, base) for name in first + rest), *others]
    if what == "ratio":
        at = [_with(base, ratio=r) for r in ratios]
        return [*(Entrant(s_dense, s) for s in at), *(Entrant(moe, s) for s in at), Entrant(dense, base)]
    loops = [name for name in (moe, "index_select", "compute all and mask") if name in names]
    return [Entrant(name, _with(base, experts=n)) for name in loops for n in counts]


def _with(setting: Setting, **changes: Any) -> Setting:
    return Setting(**{**asdict(setting), **changes})


def measure(what: str, direction: str, batch: int, field: Sequence[Entrant], repeats: int) -> Record:
    """One case: medians of all entrants, timed in turn, and what they were of."""
    torch._dynamo.reset()  # each case compiles its own; what the last one compiled would be looked through at each call
    functions: list[Callable[[], object]] = [make(e.name, e.setting, batch, direction) for e in field]
    timing = quiet_medians([*functions, *_products()], repeats, TRIES, LEAST)
    seconds, products = timing.seconds[: len(field)], timing.seconds[len(field) :]
    factor = batch * (1 if direction == "forward" else 3)
    rows = []
    for e, t in zip(field, seconds, strict=True):
        routed = CONTENDERS[e.name][0] == "moe"
        row = {"contender": e.name, "experts": e.setting.experts if routed else 1, "ratio": e.setting.ratio}
        if CONTENDERS[e.name][0] == "dense":
            row["ratio"] = 1.0
        row |= {"ms": 1e3 * t, "gflop": factor * gigaflops(e.name, e.setting)}
        row["largest_share"] = largest_share(e.setting, batch) if routed else None
        rows.append(row)
    of = field[0].setting
    return {
        "what": what, "direction": direction, "arch": of.arch, "width": of.width, "batch": batch, "n": repeats,
        "a_a": timing.a_a, "tries": timing.tries, "quiet": timing.quiet, "peak_gflops": 2e-9 * GEMM**3 / min(products),
        "rows": rows,
    }  # fmt: skip


def _products() -> tuple[Callable[[], object], Callable[[], object]]:
    """The product of two square matrices by each of torch's two libraries: ``a @ b`` is MKL's, which is not at its best
    on every processor; as a 1×1 convolution it is oneDNN's, which has the other convolutions too."""
    a, b = (torch.rand(GEMM, GEMM) for _ in range(2))
    weight = b.view(GEMM, GEMM, 1, 1).contiguous(memory_format=torch.channels_last)
    x = torch.rand(1, GEMM, GEMM // 64, 64).contiguous(memory_format=torch.channels_last)
    return lambda: a @ b, lambda: F.conv2d(x, weight)


def _memory(batch: int, base: Setting, names: Iterable[str]) -> Record:
    rows = [{"contender": name, **asdict(memory_of_forward(name, base, batch))} for name in names]
    return {
        "what": "memory", "direction": "forward", "arch": base.arch, "width": base.width, "batch": batch, "n": 1,
        "rows": rows,
    }  # fmt: skip


def _key(case: Record) -> tuple[Any, ...]:
    return tuple(case[name] for name in ("direction", "what", "arch", "width", "batch"))


# --- what is printed ----------------------------------------------------------------------------------------------------


def _ms(case: Record, contender: str, **of: Any) -> float | None:
    """Of the first row that fits."""
    for row in case["rows"]:
        if row["contender"] == contender and all(row[name] == value for name, value in of.items()):
            return row["ms"]
    return None


def _ratio(one: float | None, other: float | None) -> str:
    return "" if one is None or other is None else f"{one / other:.2f}"


def _network(case: Record) -> str:
    return case["arch"] + ("" if case["width"] is None else f", width {case['width']}")


def _of(record: Record, what: str, direction: str) -> list[Record]:
    cases = [case for case in record["cases"] if (case["what"], case["direction"]) == (what, direction)]
    return sorted(cases, key=lambda case: (case["arch"] != "resnet18", case["arch"], case["width"] or 0, case["batch"]))


def report(record: Record) -> str:
    """All tables, in Markdown."""
    parts = []
    for level, direction in LEVELS.items():
        if cases := _of(record, "batch", direction):
            parts += [_latencies(cases), _ratios(cases, direction), _rates(cases, direction)]
        parts += [_over_ratios(case, direction) for case in _of(record, "ratio", direction)]
        parts += [_over_experts(case) for case in _of(record, "experts", direction)]
        parts += [_of_memory(case) for case in _of(record, "memory", direction)]
        noisy = [f"{_network(c)} {c['what']} B={c['batch']} (A/A {c['a_a']:.2f})" for c in cases if not c["quiet"]]
        if noisy:
            parts.append(f"{level}: A/A left {LIMITS[0]} .. {LIMITS[1]} {TRIES} times: {'; '.join(noisy)}")
    machine = record["machine"]
    repeats = sorted({case["n"] for case in record["cases"] if case["what"] != "memory"})
    parts.append(
        f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}, Python "
        f"{machine['python']}; float32, channels_last, images of 32 pixels, light routers; medians of n = "
        f"{', '.join(map(str, repeats))} timings in turn"
    )
    return "\n\n".join(parts)


def _first(case: Record, contender: str) -> Record | None:
    return next((row for row in case["rows"] if row["contender"] == contender), None)


def _latencies(cases: Sequence[Record]) -> str:
    names = [name for name in CONTENDERS if any(_first(case, name) for case in cases)]
    rows = []
    for case in cases:
        found = [_first(case, name) for name in names]
        rows.append([_network(case), str(case["batch"]), *("" if r is None else f"{r['ms']:.2f}" for r in found)])
    return table(["ms", "batch", *names], rows)


def _ratios(cases: Sequence[Record], direction: str) -> str:
    moe, s_dense, dense = BEST[direction]
    more = max(row["experts"] for case in cases for row in case["rows"])
    others = [n for n in CONTENDERS if n not in BEST[direction] and any(_first(c, n) for c in cases)]
    rows = []
    for case in cases:
        mine = _ms(case, moe)
        full, pathway = _first(case, dense), _first(case, moe)
        counted = "" if full is None or pathway is None else f"{full['gflop'] / pathway['gflop']:.2f}"
        rows.append(
            [
                _network(case), str(case["batch"]), _ratio(mine, _ms(case, s_dense)), _ratio(_ms(case, dense), mine),
                counted, _ratio(_ms(case, moe, experts=more), mine), *(_ratio(_ms(case, name), mine) for name in others),
                f"{case['a_a']:.2f}",
            ]
        )  # fmt: skip
    header = [
        f"{moe}/{s_dense}",
        f"{dense}/{moe}",
        "by FLOPs",
        f"N={more}/N",
        *(f"{name}/{moe}" for name in others),
        "A/A",
    ]
    return table(["ratio", "batch", *header], rows)


def _rates(cases: Sequence[Record], direction: str) -> str:
    rows = []
    for case in cases:
        cells = []
        for name in BEST[direction]:
            row = _first(case, name)
            if row is not None:
                rate = 1e3 * row["gflop"] / row["ms"]
                cells.append(f"{rate:.0f} ({percent(rate / case['peak_gflops'])})")
            else:
                cells.append("")
        rows.append([_network(case), str(case["batch"]), *cells, f"{case['peak_gflops']:.0f}"])
    return table(["GFLOP/s", "batch", *BEST[direction], f"GEMM {GEMM}"], rows)


def _over_ratios(case: Record, direction: str) -> str:
    moe, s_dense, dense = BEST[direction]
    full = _first(case, dense)
    assert full is not None
    rows = []
    for row in case["rows"]:
        if row["contender"] == moe:
            r = row["ratio"]
            rows.append(
                [
                    f"{r:g}", f"{full['gflop'] / row['gflop']:.2f}", f"{full['ms'] / row['ms']:.2f}",
                    _ratio(full["ms"], _ms(case, s_dense, ratio=r)), _ratio(row["ms"], _ms(case, s_dense, ratio=r)),
                ]
            )  # fmt: skip
    header = [f"{dense}/{moe} by FLOPs", f"{dense}/{moe}", f"{dense}/{s_dense}", f"{moe}/{s_dense}"]
    return f"{_network(case)}, B = {case['batch']}:\n\n" + table(["r", *header], rows)


def _over_experts(case: Record) -> str:
    names = list(dict.fromkeys(row["contender"] for row in case["rows"]))
    counts = sorted({row["experts"] for row in case["rows"]})
    rows = []
    for n in counts:
        each = [(_ms(case, name, experts=n), _ms(case, name, experts=counts[0])) for name in names]
        rows.append([str(n), *(_ratio(*pair) for pair in each)])
    return f"{_network(case)}, B = {case['batch']}, time against N = {counts[0]}:\n\n" + table(["N", *names], rows)


def _of_memory(case: Record) -> str:
    rows = [[r["contender"], f"{r['forward'] / 1e6:.1f}", f"{r['weights'] / 1e6:.1f}"] for r in case["rows"]]
    return f"{_network(case)}, B = {case['batch']}, MB:\n\n" + table(["", "forward", "weights"], rows)


def write_csv(record: Record, path: Path) -> None:
    """A line for each timing; memory is in the JSON file alone."""
    machine = {name: record["machine"][name] for name in ("cpu", "threads", "torch", "python")}
    with path.open("w", newline="") as file:
        writer = None
        for case in record["cases"]:
            if case["what"] == "memory":
                continue
            shared = {name: value for name, value in case.items() if name != "rows"}
            for row in case["rows"]:
                rate = 1e3 * row["gflop"] / row["ms"]
                line = {**shared, **row, "gflops": rate, "share_of_peak": rate / case["peak_gflops"], **machine}
                line = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in line.items()}
                if writer is None:
                    writer = csv.DictWriter(file, line, lineterminator="\n")
                    writer.writeheader()
                writer.writerow(line)


def picture(record: Record, direction: str, path: Path) -> None:
    """Latency against the batch, speed-up over Dense against r, cost against N; of the first network that has each."""
    moe, s_dense, dense = BEST[direction]
    styles = {name: line_style(i) for i, name in enumerate(USUAL[direction])}
    handles: dict[str, Any] = {}

    def draw(axis: Any, name: str, x: Sequence[float], y: Sequence[float]) -> None:
        (handles[name],) = axis.plot(x, y, **styles[name], label=name)

    with figure(12, 4.4, ncols=3) as (fig, axes):
        cases = _of(record, "batch", direction)
        cases = [case for case in cases if _network(case) == _network(cases[0])]
        for name in styles:
            points = [(case["batch"], _ms(case, name)) for case in cases]
            shown = [(x, y) for x, y in points if y is not None]
            if shown:
                draw(axes[0], name, *zip(*shown, strict=True))
        axes[0].set_xscale("log", base=2)
        axes[0].set_yscale("log")
        batches = [case["batch"] for case in cases]
        axes[0].set_xticks(batches, map(str, batches))
        axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[0].minorticks_off()
        axes[0].set(xlabel="batch", ylabel="ms")
        _title(axes[0], "Latency", cases[:1], batch=False)

        over_ratios = _of(record, "ratio", direction)[:1]
        for case in over_ratios:
            full = _first(case, dense)
            assert full is not None
            for name in (moe, s_dense):
                rows = [row for row in case["rows"] if row["contender"] == name]
                draw(axes[1], name, [r["ratio"] for r in rows], [full["ms"] / r["ms"] for r in rows])
            rows = [row for row in case["rows"] if row["contender"] == moe]
            counted = [full["gflop"] / r["gflop"] for r in rows]
            ratios = [r["ratio"] for r in rows]
            (handles["FLOP ratio"],) = axes[1].plot(
                ratios, counted, color="black", linestyle=(0, (5, 3)), linewidth=1.2, zorder=1
            )
            axes[1].set_yscale("log", base=2)
            axes[1].set_xticks(ratios, [f"{r:g}" for r in ratios])
            axes[1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes[1].set(xlabel="r", ylabel=f"times as fast as {dense}")
        _title(axes[1], "Speed-up", over_ratios)

        over_experts = _of(record, "experts", direction)[:1]
        for case in over_experts:
            counts = sorted({row["experts"] for row in case["rows"]})
            for name in dict.fromkeys(row["contender"] for row in case["rows"]):
                ms = [row["ms"] for row in case["rows"] if row["contender"] == name]
                draw(axes[2], name, counts, [t / ms[0] for t in ms])
            axes[2].set_xscale("log", base=2)
            axes[2].set_yscale("log", base=2)
            axes[2].set_xticks(counts, map(str, counts))
            axes[2].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes[2].minorticks_off()
        axes[2].set(xlabel="N experts", ylabel="time against the smallest N")
        _title(axes[2], "Cost of experts", over_experts)
        fig.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
        fig.savefig(path, dpi=110)


def _title(axis: Any, text: str, cases: Sequence[Record], *, batch: bool = True) -> None:
    of = "".join(f", {_network(case)}" + (f", batch {case['batch']}" if batch else "") for case in cases)
    axis.set_title(text + of, loc="left")


# --- the command --------------------------------------------------------------------------------------------------------


def _parser(level: str) -> argparse.ArgumentParser:
    direction = LEVELS[level]
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.table --level {level}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--measure", nargs="*", choices=MEASURES, default=["batch"])
    parser.add_argument("--arch", nargs="+", default=["resnet18"])
    parser.add_argument("--width", type=int, help="channels of the first stage; the architecture's own by default")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32, 128], help="of 'batch'")
    parser.add_argument("--at-batch", type=int, default=32, help="of 'ratio' and 'experts'")
    parser.add_argument("--memory-batch", type=int, default=128, help="of 'memory'")
    parser.add_argument("--experts", type=int, default=2)
    parser.add_argument("--more-experts", type=int, default=16, help="of one more entrant of 'batch'")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0], help="of 'ratio'")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 8, 16], help="numbers of experts, of 'experts'")
    parser.add_argument("--contenders", nargs="+", choices=DIRECTIONS[direction], default=list(USUAL[direction]))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="a file of results: read, this run's added, and written")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--picture", type=Path, help="a PNG file of three panels; needs 'batch', 'ratio' and 'experts'")
    return parser


def main(level: str, arguments: Sequence[str]) -> None:
    parser, direction = _parser(level), LEVELS[level]
    o = parser.parse_args(arguments)
    for name in ("batch", "at_batch", "memory_batch", "experts", "more_experts", "counts", "repeats", "threads"):
        value = getattr(o, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if direction == "train" and "memory" in o.measure:
        parser.error("--measure: memory is measured at --level model")
    if o.threads:
        torch.set_num_threads(o.threads)
    record: Record = {"machine": describe(), "cases": []}
    if o.json and o.json.exists():
        record = json.loads(o.json.read_text())
        if o.measure and record["machine"] != describe():
            parser.error(f"--json: {o.json} was measured on another machine or with other settings; name another file")
    for case in _measured(o, direction):
        record["cases"] = [*(other for other in record["cases"] if _key(other) != _key(case)), case]
        print(f"{direction} {case['what']} {_network(case)} B={case['batch']}", file=sys.stderr, flush=True)
        if o.json:
            o.json.write_text(json.dumps(record, indent=1) + "\n")
    print(report(record))
    if o.csv:
        write_csv(record, o.csv)
    if o.picture:
        missing = [what for what in ("batch", "ratio", "experts") if not _of(record, what, direction)]
        if missing:
            parser.error(f"--picture: there are no results of {', '.join(missing)}")
        picture(record, direction, o.picture)


def _measured(o: argparse.Namespace, direction: str) -> Iterable[Record]:
    for arch in o.arch:
        base = Setting(arch, o.experts, o.ratio, o.width)
        for what in o.measure:
            if what == "memory":
                yield _memory(o.memory_batch, base, BEST[direction])
                continue
            field = entrants(what, direction, base, o.contenders, o.more_experts, o.ratios, o.counts)
            for batch in o.batch if what == "batch" else [o.at_batch]:
                yield measure(what, direction, batch, field, o.repeats)
