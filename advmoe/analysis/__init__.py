# SPDX-License-Identifier: Apache-2.0
"""Analyses of routed models under attack: each gives rows and a picture.

:func:`observe` runs models on clean and attacked images once; what is known of that, :class:`Observation`, is what most
analyses are functions of. Those of :mod:`.reproduced` and :mod:`.history` are of what runs have written down.
"""

from ..certification.routes import linear_map, route_radii
from .certified import certified
from .dissection import dissection
from .dual import alphas
from .experts import Alone, FixedExperts, experts_alone, fixed_experts, layer_routers
from .finding import Finding
from .history import collapse, history, stability
from .observation import Choice, Observation, observe
from .pathways import overlaps, pathways
from .radius import radius
from .reproduced import Result, fig2, fig3, fig7, fig8
from .robustness import epsilons, transfer
from .routing import classes, entropy, flips, usage

__all__ = [
    "Alone",
    "Choice",
    "Finding",
    "FixedExperts",
    "Observation",
    "Result",
    "alphas",
    "certified",
    "classes",
    "collapse",
    "dissection",
    "entropy",
    "epsilons",
    "experts_alone",
    "fig2",
    "fig3",
    "fig7",
    "fig8",
    "fixed_experts",
    "flips",
    "history",
    "layer_routers",
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
