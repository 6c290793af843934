# SPDX-License-Identifier: Apache-2.0
"""Certified bounds: Lipschitz constants of networks and routers, and the radii that follow from them.

The mathematics, and what of the printed theorems holds, is in docs/certified.md.
"""

from .bounds import VARIANTS, Certificates, Certifier, certify, denominator, dual_radius, moe_radius
from .lipschitz import METHODS, Lipschitz, lipschitz
from .routes import linear_map, route_radii, softmax_constants

__all__ = [
    "METHODS",
    "VARIANTS",
    "Certificates",
    "Certifier",
    "Lipschitz",
    "certify",
    "denominator",
    "dual_radius",
    "linear_map",
    "lipschitz",
    "moe_radius",
    "route_radii",
    "softmax_constants",
]
