# SPDX-License-Identifier: Apache-2.0
"""Training methods: a small class each, with one ``step``."""

from __future__ import annotations

from torch import nn

from ...attacks import PGD
from ...config import ONE_STEP, MethodConfig, OptimConfig, RoutingConfig
from ...models import router_parameters
from ...routers import routers_of
from ..parallel import World
from .adversarial import AT, Standard
from .advmoe import AdvMoE
from .base import Batch, Method, NonFiniteLossError, StepResult
from .free_fast import FastAT, FreeAT
from .rter import RTER, JTDMoE
from .sparse import ATSparse

__all__ = [
    "AT",
    "RTER",
    "ATSparse",
    "AdvMoE",
    "Batch",
    "FastAT",
    "FreeAT",
    "JTDMoE",
    "Method",
    "NonFiniteLossError",
    "Standard",
    "StepResult",
    "build_method",
]

_METHODS: dict[str, type[Method]] = {
    "standard": Standard, "at": AT, "free-at": FreeAT, "fast-at": FastAT, "at_sparse": ATSparse, "advmoe": AdvMoE,
    "rt-er": RTER, "jtdmoe": JTDMoE,
}  # fmt: skip
# settings of MethodConfig that one method alone has
_OWN = {
    "advmoe": (
        "order", "batches", "router_objective", "router_alpha", "share_attack", "router_every",
    ),
    "at": ("part",),
    "at_sparse": ("pretrain_epochs", "mask_epochs"),
    "free-at": ("replays", "reset_noise"),
    "fast-at": ("keep_start",),
}  # fmt: skip


def build_method(
    model: nn.Module,
    config: MethodConfig,
    optim: OptimConfig,
    attack: PGD,
    routing: RoutingConfig | None = None,
    world: World | None = None,
) -> Method:
    """The method named by the config.

    Args:
        world: the processes that train together; this one alone by default.

    Raises:
        ValueError: if the method does not go with the model, or if a setting of another method or of the routers is given
            to a method or a model that has no use for it.
    """
    plain = MethodConfig(config.name)
    robust = config.name in ("rt-er", "jtdmoe")
    if config.robust_experts != plain.robust_experts and not robust:
        raise ValueError(f"robust_experts: a setting of the methods rt-er and jtdmoe, without effect on {config.name}")
    if config.objective != plain.objective and robust:
        raise ValueError(f"objective: without effect on {config.name}, whose own is cross-entropy and KL")
    if config.objective != plain.objective and config.name in ONE_STEP:
        raise ValueError(f"objective: without effect on {config.name}, whose own is cross-entropy on attacked images")
    for method, names in _OWN.items():
        given = [name for name in names if getattr(config, name) != getattr(plain, name)]
        if given and method != config.name:
            raise ValueError(f"{given[0]}: a setting of the method {method}, without effect on {config.name}")
    if optim.router_lr is not None and (not router_parameters(model) or config.part == "experts"):
        raise ValueError("router_lr: without effect where no router is trained")
    if config.router_alpha != plain.router_alpha and config.router_objective != "pseudo_label":
        raise ValueError("router_alpha: a setting of the router objective pseudo_label, without effect on another")
    if config.attack_routers and (config.name in ("standard", "free-at") or robust or not routers_of(model)):
        raise ValueError(
            "attack_routers: without effect on rt-er, jtdmoe, free-at, a method without attack or a model without routers"
        )
    return _METHODS[config.name](model, config, optim, attack, routing, world)
