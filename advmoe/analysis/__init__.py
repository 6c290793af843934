# SPDX-License-Identifier: Apache-2.0
"""Analyses of routed models under attack: each gives rows and a picture.

:func:`observe` runs models on clean and attacked images once; what is known of that, :class:`Observation`, is what most
analyses are functions of. Those of :mod:`.reproduced` and :mod:`.history` are of what runs have written down.
"""

from ..certification.routes import linear_map, route_radii
from .certified import certified
from .dissection import dissection
from .dual import alphas
from .finding import Finding
from .history import history, stability
from .observation import Choice, Observation, observe
from .pathways import overlaps, pathways
from .radius import radius
from .reproduced import Result, fig2, fig3, fig7, fig8
from .robustness import epsilons, transfer
from .routing import classes, entropy, flips, usage

__all__ = [
    "Choice",
    "Finding",
    "Observation",
    "Result",
    "alphas",
    "certified",
    "classes",
    "dissection",
    "entropy",
    "epsilons",
    "fig2",
    "fig3",
    "fig7",
    "fig8",
    "flips",
    "history",
    "linear_map",
    "observe",
    "overlaps",
    "pathways",
    "radius",
    "route_radii",
    "stability",
    "transfer",
    "usage",
]
