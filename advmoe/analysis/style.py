# SPDX-License-Identifier: Apache-2.0
"""How all pictures look: matplotlib without pyplot's global state, readable in print and by the colour-blind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

__all__ = [
    "COLOURS",
    "HATCHES",
    "MARKERS",
    "SEQUENTIAL",
    "bar",
    "expert_legend",
    "figure",
    "height_of_rows",
    "layer_axis",
    "line_style",
    "over_radius",
    "percent_axis",
    "points",
    "shades",
]

# Okabe and Ito's, told apart with any colour vision; the darker ones first, yellow left out, which is lost on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")  # for bars, as dashes are for lines
_DASHES = ("-", "--", "-.", ":")
SEQUENTIAL = "cividis"  # grows in lightness alone, so that it survives a grey printer

_SETTINGS: dict[str, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#D9D9D9",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "hatch.linewidth": 0.6,
    "figure.facecolor": "white",
    "image.interpolation": "nearest",
}


@contextmanager
def figure(width: float = 6.4, height: float = 4.0, **subplots: Any) -> Iterator[tuple[Figure, Any]]:
    """A figure with its axes, in inches, drawn under the project's settings: ``with figure(6, 4) as (fig, axes): …``.

    ``subplots`` go to :meth:`Figure.subplots`; nothing of matplotlib's global state is changed, and no display is needed.
    """
    with matplotlib.rc_context(_SETTINGS):  # type: ignore[arg-type]
        fig = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(fig)
        yield fig, fig.subplots(**subplots)


def line_style(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the index-th line: any one of the three tells two lines apart."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": _DASHES[index % len(_DASHES)],
    }


def bar(index: int) -> dict[str, Any]:
    """Colour and hatching of the index-th kind of bar."""
    return {
        "facecolor": COLOURS[index % len(COLOURS)],
        "hatch": HATCHES[index % len(HATCHES)],
        "edgecolor": "black",
        "linewidth": 0.6,
    }


def points(name: str) -> dict[str, Any]:
    """Of ``"clean"`` and ``"attacked"`` values: points without a line, filled and hollow."""
    index = ("clean", "attacked").index(name)
    face = COLOURS[0] if name == "clean" else "white"
    return {
        "color": COLOURS[index],
        "marker": MARKERS[index],
        "markerfacecolor": face,
        "markersize": 6.5,
        "linestyle": "none",
    }


def over_radius(fig: Figure, axis: Any) -> None:
    """Axes, title and legend of lines of RA over the radius in 1/255."""
    axis.set_xlim(-0.02 * axis.get_xlim()[1], None)
    percent_axis(axis, "RA, %")
    axis.set_xlabel("radius of the attack, in 1/255 of the pixel range")
    axis.set_title("Robust accuracy against the radius", loc="left")
    fig.legend(loc="outside lower center", ncols=2)


def percent_axis(axis: Any, label: str, top: float | None = None) -> None:
    """A vertical axis of shares given in percent, from 0 on."""
    axis.set_ylabel(label)
    axis.set_ylim(0, top)


def height_of_rows(rows: int, around: float) -> float:
    """Inches of a picture with so many named rows; ``around``: for what is above and below them."""
    return max(0.23 * rows, 0.6) + around


def layer_axis(axis: Any, names: Sequence[str]) -> None:
    """A vertical axis of layers, the first at the top: their names stay readable, however many there are."""
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def shades(count: int) -> list[Any]:
    """Colours of ``count`` experts, from dark to light, told apart in grey too."""
    colours = matplotlib.colormaps[SEQUENTIAL]
    return [colours(0.08 + 0.84 * i / max(count - 1, 1)) for i in range(count)]


def expert_legend(fig: Figure, colours: Sequence[Any]) -> None:
    handles = [Patch(facecolor=colour, label=f"expert {i}") for i, colour in enumerate(colours)]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(len(colours), 6))
