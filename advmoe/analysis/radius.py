# SPDX-License-Identifier: Apache-2.0
"""How far an image may be moved before a linear router chooses otherwise: exactly, without an attack."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import nn

from ..certification.routes import linear_map, route_radii
from . import style
from .finding import Finding
from .observation import Observation

__all__ = ["radius"]


def radius(observed: Observation, model: nn.Module) -> Finding:
    """The share of images whose expert no perturbation of a radius can change, against the radius.

    Columns: ``radius`` in units of the pixel range, from 0 to the largest image's or four times epsilon, epsilon itself
    among them; ``certified``: the share of images of a larger radius.

    Raises:
        ValueError: as :func:`linear_map`.
    """
    weight = linear_map(model)
    (choice,) = observed.routed()
    assert choice.scores is not None
    radii = route_radii(weight, choice.scores).cpu()
    epsilon = observed.epsilon
    finite = radii[radii.isfinite()]
    far = max(float(finite.max()) if len(finite) else 0.0, epsilon)
    far = min(far, 4 * epsilon) if epsilon else far
    grid = sorted({*torch.linspace(0, far, 101, dtype=torch.float64).tolist(), epsilon})
    rows = [(each, float((radii > each).double().mean())) for each in grid]
    certified = float((radii > epsilon).double().mean())
    kept = 1 - float(observed.flipped().double().mean())

    def draw() -> Figure:
        with style.figure(6.0, 3.9) as (fig, axis):
            axis.plot(
                [255 * row[0] for row in rows], [100 * row[1] for row in rows], color=style.COLOURS[0], label="certified"
            )
            axis.axvline(255 * epsilon, color="black", linestyle=":", linewidth=1.2, label="the attack's radius")
            axis.plot([255 * epsilon], [100 * kept], label="kept its expert under the attack", **style.points("attacked"))
            axis.set_xlim(0, None)
            style.percent_axis(axis, "images, %", 104)
            axis.set_xlabel("L-inf radius, in 1/255 of the pixel range")
            axis.set_title("Images whose expert cannot change", loc="left")
            fig.legend(loc="outside lower center", ncols=3)
            return fig

    note = (
        f"{observed.note()}. Exact radius of the linear router, without the box [0, 1]: median "
        f"{255 * float(radii.median()):.2f}/255, least {255 * float(radii.min()):.2f}/255; at {255 * epsilon:.2f}/255 "
        f"{100 * certified:.1f} % of the images are certified to keep their expert, under the attack on the prediction "
        f"{100 * kept:.1f} % did"
    )
    return Finding("radius", "Certified radius of the routing", ("radius", "certified"), rows, draw, note)
