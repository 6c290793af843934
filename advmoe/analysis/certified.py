# SPDX-License-Identifier: Apache-2.0
"""Within which radius a mixture of whole networks is certain to be right: Theorems 5.4 and 5.5 of arXiv 2502.06832."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import nn

from ..certification import Certificates, Certifier
from ..data import Split
from . import style
from .finding import Finding
from .observation import Observation

__all__ = ["certified"]

IMAGES = 100
LOCAL = 20_000_000  # multiply-accumulates of an expert up to which a ball's own constants are searched for
_LINES = {"sound": "sound", "twice": "twice the printed denominator", "paper": "as printed (no certificate)"}


def certified(observed: Observation, model: nn.Module, images: Split, method: str | None = None) -> Finding:
    """The share of images that are right, and certain to stay so within a radius, against the radius.

    Args:
        images: those that were observed; the first 100 are looked at.
        method: of the experts' Lipschitz constants, :data:`advmoe.certification.METHODS`; by default ``"interval"`` for
            experts of at most 20 million multiply-accumulates, else ``"product"``.

    Columns: ``radius`` in L-inf, in units of the pixel range; the share of images of a larger radius by each variant,
    ``sound``, ``twice`` (the printed denominator) and ``printed``, None where the theorem is not about such a mixture;
    ``route``: of images whose experts are certain to stay.

    Raises:
        ValueError: as :class:`advmoe.certification.Certifier`.
    """
    chosen = images.first(IMAGES)
    x, y = chosen.batch(torch.arange(len(chosen)))
    certifier = Certifier(model, "linf", method or "product", tuple(x.shape[1:]))
    if method is None and certifier.operations <= LOCAL:
        certifier = Certifier(model, "linf", "interval", tuple(x.shape[1:]))
    found: dict[str, Certificates] = {}
    missing = ""
    for variant in _LINES:
        try:
            found[variant] = certifier.certify(x, y, variant)
        except ValueError as error:  # the printed theorems are of probabilities
            if variant == "sound":
                raise
            missing = f". {str(error).partition(': ')[2].partition(';')[0]}"
    sound, epsilon = found["sound"], observed.epsilon
    radii = torch.cat([each.radius for each in found.values()])
    positive = radii[(radii > 0) & radii.isfinite()]
    ends = torch.cat([positive, torch.tensor([epsilon or 1.0], dtype=torch.float64)]).log10()
    grid = torch.logspace(float(ends.min()) - 0.2, float(ends.max()) + 0.2, 120, dtype=torch.float64).tolist()
    rows = [
        (radius, *(found[v].certified(radius) if v in found else None for v in _LINES), _beyond(sound, radius))
        for radius in sorted({0.0, epsilon, *grid})
    ]
    right = (observed.clean == observed.labels)[: len(y)]
    stands = float((right & (observed.attacked == observed.labels)[: len(y)]).double().mean())
    sa = float(right.double().mean())

    def draw() -> Figure:
        with style.figure(6.4, 4.2) as (fig, axis):
            lines = [row for row in rows if row[0] > 0]
            for at, (variant, label) in enumerate(_LINES.items()):
                if variant in found:
                    share = [100 * row[1 + at] for row in lines]
                    axis.step([255 * row[0] for row in lines], share, label=label, **_line(at))
            axis.plot([255 * epsilon], [100 * stands], label="right under the attack", **style.points("attacked"))
            axis.axhline(100 * sa, color="black", linestyle=":", linewidth=1.2, label="SA")
            axis.set_xscale("log")
            style.percent_axis(axis, "images, %", 104)
            axis.set_xlabel("L-inf radius, in 1/255 of the pixel range")
            axis.set_title("Images that are certain to stay right", loc="left")
            fig.legend(loc="outside lower center", ncols=2)
            return fig

    median = 255 * float(sound.radius.median())
    note = (
        f"The first {len(y)} images; {sound.note}. SA {100 * sa:.1f} %. Certain at {255 * epsilon:.2f}/255: "
        f"{100 * sound.certified(epsilon):.1f} %, right under the attack ({observed.attack}): {100 * stands:.1f} %. "
        f"Median certified radius {median:.3g}/255{missing}. The printed form is no certificate: docs/certified.md"
    )
    columns = ("radius", "sound", "twice", "printed", "route")
    return Finding("certified", "Certified radius of the prediction", columns, rows, draw, note)


def _beyond(found: Certificates, radius: float) -> float:
    return float((found.route_radius > radius).double().mean())


def _line(index: int) -> dict[str, object]:
    look = style.line_style(index)
    return {"color": look["color"], "linestyle": look["linestyle"], "where": "post"}
