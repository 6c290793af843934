# SPDX-License-Identifier: Apache-2.0
"""The paper's figures that compare many runs (AdvMoE, figures 2, 3, 7 and 8), of what those runs gave."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from . import style
from .finding import Finding

__all__ = ["Result", "fig2", "fig3", "fig7", "fig8"]

_COLUMNS = (
    "recipe", "arch", "method", "experts", "ratio", "epsilon", "seeds", "sa", "sa_sd", "ra", "ra_sd",
    "paper_sa", "paper_ra",
)  # fmt: skip

_DENSE: dict[str, Any] = {"color": "black", "linestyle": "--", "linewidth": 1.2}


@dataclass(frozen=True)
class Result:
    """A recipe and what became of it; accuracies are shares.

    Args:
        recipe: its name; ``arch``, ``method``: how they are called in the picture.
        experts, ratio, epsilon: N, r and the attack's radius where the recipe says them.
        sa, ra: a value for each seed that is done; none yet if empty.
        paper_sa, paper_ra: the paper's, where it prints them.
    """

    recipe: str
    arch: str
    method: str
    experts: int | None = None
    ratio: float | None = None
    epsilon: float | None = None
    sa: tuple[float, ...] = ()
    ra: tuple[float, ...] = ()
    paper_sa: float | None = None
    paper_ra: float | None = None

    def mean(self, measure: str) -> float | None:
        values = getattr(self, measure)
        return statistics.mean(values) if values else None

    def deviation(self, measure: str) -> float | None:
        """Of the seeds; None of fewer than two."""
        values = getattr(self, measure)
        return statistics.stdev(values) if len(values) > 1 else None


def fig2(results: Sequence[Result], label: str = "") -> Finding:
    """RA against the attack's radius, a line for each method (AdvMoE, figure 2, which prints no numbers).

    Args:
        results: of methods and radii; label: of the scale that they were made at.

    Columns: as of all findings here: ``recipe``, ``arch``, ``method``, ``experts``, ``ratio``, ``epsilon``, ``seeds``
    (how many are done), means and standard deviations over the seeds of ``sa`` and ``ra``, the paper's; all as shares.

    Raises:
        ValueError: if nothing is done.
    """
    done = _done(results, "fig2")

    def draw() -> Figure:
        with style.figure(6.0, 4.2) as (fig, axis):
            for at, method in enumerate(_ordered(r.method for r in done)):
                line = sorted((r for r in done if r.method == method), key=lambda r: r.epsilon or 0)
                _line(axis, [255 * (r.epsilon or 0) for r in line], line, "ra", label=method, **style.line_style(at))
            style.over_radius(fig, axis)
            return fig

    return _finding("fig2", "Figure 2: RA against the radius of the attack", results, draw, label)


def fig3(results: Sequence[Result], methods: Sequence[str], label: str = "") -> Finding:
    """RA of a MoE whose routers alone are trained adversarially, beside M1, M2 and M3 (AdvMoE, figure 3): bars over r.

    Args:
        methods: those that are drawn, in their order; the others stand in the rows alone.

    Columns: as of :func:`fig2`.

    Raises:
        ValueError: if none of the methods is done.
    """
    drawn = [r for r in results if r.method in methods]
    done = _done(drawn, "fig3")
    ratios = sorted({r.ratio for r in done if r.ratio is not None}, reverse=True)

    def draw() -> Figure:
        with style.figure(7.2, 4.4) as (fig, axis):
            width = 0.8 / len(methods)
            for at, method in enumerate(methods):
                for place, ratio in enumerate(ratios):
                    x = place + (at - (len(methods) - 1) / 2) * width
                    for r in drawn:
                        if (r.method, r.ratio) == (method, ratio):
                            _bar(axis, x, width, r, at)
            handles: list[Any] = [Patch(label=method, **style.bar(at)) for at, method in enumerate(methods)]
            if any(r.paper_ra is not None for r in drawn):
                handles.append(Line2D([], [], color="black", linewidth=2.2, label="the paper's"))
            axis.set_xticks(range(len(ratios)), [f"r = {ratio:g}" for ratio in ratios])
            axis.grid(axis="x", visible=False)
            style.percent_axis(axis, "RA, %")
            axis.margins(y=0.12)
            axis.set_ylim(0, max(axis.get_ylim()[1], 5))
            axis.set_title("Adversarially trained routers alone", loc="left")
            fig.legend(handles=handles, loc="outside lower center", ncols=2)
            return fig

    return _finding("fig3", "Figure 3: a MoE of which only the routers are trained adversarially", results, draw, label)


def fig7(results: Sequence[Result], label: str = "") -> Finding:
    """RA against r, a line for each N, and the dense network's (AdvMoE, figure 7, which prints no numbers).

    Args:
        results: those without ``experts`` are the dense network's.

    Columns: as of :func:`fig2`.

    Raises:
        ValueError: if nothing is done.
    """
    done = _done(results, "fig7")

    def draw() -> Figure:
        with style.figure(6.4, 4.4) as (fig, axis):
            for at, experts in enumerate(sorted({r.experts for r in done if r.experts is not None})):
                line = sorted((r for r in done if r.experts == experts), key=lambda r: r.ratio or 0)
                ratios = [r.ratio or 0 for r in line]
                _line(axis, ratios, line, "ra", label=f"{line[0].method}, N = {experts}", **style.line_style(at))
            _dense(axis, [r for r in done if r.experts is None], "ra")
            axis.set_xlim(1.04, 0.06)  # as in the paper: from the full width down
            axis.set_ylabel("RA, %")
            axis.set_xlabel("r, an expert's width against the dense layer's")
            axis.set_title("Robust accuracy, the experts' width and number", loc="left")
            fig.legend(loc="outside lower center", ncols=3)
            return fig

    return _finding("fig7", "Figure 7: RA against r and N", results, draw, label)


def fig8(results: Sequence[Result], label: str = "") -> Finding:
    """RA and SA against the model scale r for each method, ours and the paper's (AdvMoE, figure 8 and table A2).

    Args:
        results: those without a ``ratio`` are the dense network's.

    Columns: as of :func:`fig2`.

    Raises:
        ValueError: if nothing is done.
    """
    _done(results, "fig8")
    archs = _ordered(r.arch for r in results if r.ra)
    methods = _ordered(r.method for r in results if r.ratio is not None)

    def draw() -> Figure:
        hollow: dict[str, Any] = {"linestyle": ":", "linewidth": 1.2, "markerfacecolor": "white"}
        with style.figure(3.9 * len(archs) + 0.8, 6.4, nrows=2, ncols=len(archs), squeeze=False, sharex=True) as (
            fig,
            axes,
        ):
            for row, measure in enumerate(("ra", "sa")):
                for column, arch in enumerate(archs):
                    axis = axes[row, column]
                    own = [r for r in results if r.arch == arch]
                    for at, method in enumerate(methods):
                        line = sorted((r for r in own if r.method == method), key=lambda r: r.ratio or 0)
                        look = style.line_style(at) | {"linestyle": "-"}
                        done = [r for r in line if r.ra]
                        _line(axis, [r.ratio or 0 for r in done], done, measure, **look)
                        theirs = [(r.ratio, p) for r in line if (p := getattr(r, f"paper_{measure}")) is not None]
                        axis.plot([r for r, _ in theirs], [100 * p for _, p in theirs], **(look | hollow))
                    _dense(axis, [r for r in own if r.ratio is None and r.ra], measure)
                    axis.set_xlim(0.13, 0.87)
                    axis.set_xticks([0.2, 0.5, 0.8])
                    axis.set_ylabel(f"{measure.upper()}, %")
                    if row == 0:
                        axis.set_title(arch, loc="left")
                    else:
                        axis.set_xlabel("model scale r")
            handles = [
                Line2D([], [], label=m, **(style.line_style(at) | {"linestyle": "-"})) for at, m in enumerate(methods)
            ]
            ours: dict[str, Any] = {"color": "black", "marker": "o"}
            handles.append(Line2D([], [], label="ours", **ours))
            handles.append(Line2D([], [], label="the paper's", **(ours | hollow)))
            handles.append(Line2D([], [], label="AT (Dense), ours", **_DENSE))
            fig.legend(handles=handles, loc="outside lower center", ncols=4)
            return fig

    return _finding("fig8", "Figure 8 and Table A2: the model scale r", results, draw, label)


def _done(results: Sequence[Result], recipes: str) -> list[Result]:
    done = [r for r in results if r.ra]
    if not done:
        raise ValueError(f"{recipes}: nothing of it is done yet; advmoe reproduce {recipes} runs it")
    return done


def _finding(name: str, title: str, results: Sequence[Result], draw: Callable[[], Figure], label: str) -> Finding:
    rows = []
    for r in results:
        if r.ra or r.paper_ra is not None:
            figures = [f(m) for m in ("sa", "ra") for f in (r.mean, r.deviation)]
            rows.append(
                (r.recipe, r.arch, r.method, r.experts, r.ratio, r.epsilon, len(r.ra), *figures, r.paper_sa, r.paper_ra)
            )
    done = sum(bool(r.ra) for r in results)
    seeds = sorted({len(r.ra) for r in results if r.ra})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    note = (
        f"{done} of {len(results)} recipes done, {counted} seed{'s' * (seeds != [1])} each; their means; error bars: "
        "standard deviations"
    )
    return Finding(name, title, _COLUMNS, rows, draw, f"{note}. {label}" if label else note)


def _ordered(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _line(axis: Any, x: Sequence[float], results: Sequence[Result], measure: str, **look: Any) -> None:
    means = [100 * (r.mean(measure) or 0) for r in results]
    spread = [100 * (r.deviation(measure) or 0) for r in results]
    axis.errorbar(x, means, spread if any(spread) else None, capsize=3, **look)


def _dense(axis: Any, dense: Sequence[Result], measure: str) -> None:
    for r in dense[:1]:
        axis.axhline(100 * (r.mean(measure) or 0), label=r.method, **_DENSE)


def _bar(axis: Any, x: float, width: float, result: Result, index: int) -> None:
    mean, spread = result.mean("ra"), result.deviation("ra")
    text: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    if mean is None:
        axis.annotate("not run", (x, 0), xytext=(0, 4), rotation=90, color="#555555", **text)
    else:
        error = None if spread is None else 100 * spread
        axis.bar(x, 100 * mean, 0.9 * width, yerr=error, capsize=3, **style.bar(index))
        axis.annotate(f"{100 * mean:.1f}", (x, 100 * (mean + (spread or 0))), xytext=(0, 4), **text)
    if result.paper_ra is not None:
        half = 0.45 * width
        axis.hlines(100 * result.paper_ra, x - half, x + half, color="black", linewidth=2.2, zorder=4)
