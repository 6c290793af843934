# SPDX-License-Identifier: Apache-2.0
"""What the Dual-Model gives up of one accuracy for the other (arXiv 2502.06832, figure 3)."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from ..evaluation import Evaluation
from . import style
from .finding import Finding

__all__ = ["alphas"]


def alphas(evaluations: Mapping[float, Evaluation]) -> Finding:
    """SA and RA against alpha.

    Args:
        evaluations: of the Dual-Model by its alpha, with the same attacks on the same images.

    Columns: ``alpha``, ``attack``, ``images``, ``sa``, ``ra``, and the ends of RA's 95 % interval, ``low`` and ``high``.

    Raises:
        ValueError: if there is nothing.
    """
    rows = [
        (alpha, name, outcome.images, each.sa, outcome.ra, *outcome.interval)
        for alpha, each in sorted(evaluations.items())
        for name, outcome in each.attacks.items()
    ]
    if not rows:
        raise ValueError("evaluations: expected at least one with an attack, got none")
    attacks = dict.fromkeys(row[1] for row in rows)

    def draw() -> Figure:
        with style.figure(5.6, 3.9) as (fig, axis):
            clean = sorted({(row[0], row[3]) for row in rows})
            axis.plot([a for a, _ in clean], [100 * sa for _, sa in clean], label="SA", **style.line_style(0))
            for at, name in enumerate(attacks, start=1):
                line = [(a, ra, low, high) for a, attack, _, _, ra, low, high in rows if attack == name]
                x, ra, low, high = ([each[i] * (100 if i else 1) for each in line] for i in range(4))
                look = style.line_style(at)
                axis.plot(x, ra, label=f"RA, {name}", **look)
                axis.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
            style.percent_axis(axis, "accuracy, %")
            axis.set_xlabel("alpha: the robust mixture's share")
            axis.set_title("The Dual-Model", loc="left")
            fig.legend(loc="outside lower center", ncols=3)
            return fig

    one = next(iter(evaluations.values()))
    against = "; ".join(
        f"{name}: {outcome.description} on {outcome.images} images" for name, outcome in one.attacks.items()
    )
    note = (
        f"SA on {one.images} test images. Every attack is made anew for each alpha, on the Dual-Model as a whole. "
        f"{against}. Shaded: RA's 95 % interval by the number of images. The paper's figure 3"
    )
    columns = ("alpha", "attack", "images", "sa", "ra", "low", "high")
    return Finding("dual", "SA and RA of the Dual-Model against alpha", columns, rows, draw, note)
