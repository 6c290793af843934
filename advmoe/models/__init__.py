# SPDX-License-Identifier: Apache-2.0
"""Backbones by name, and what training needs to know about a routed model."""

from . import densenet, placed, resnet, vgg, vit, wide_resnet  # noqa: F401  each registers its architectures or kinds
from .base import (
    MODEL_OPTIONS,
    backbone_parameters,
    create_model,
    list_models,
    record_routing,
    register_model,
    router_parameters,
)
from .dual import DualModel
from .network_moe import NetworkMoE
from .released import load_released
from .upcycling import upcycle

__all__ = [
    "MODEL_OPTIONS",
    "DualModel",
    "NetworkMoE",
    "backbone_parameters",
    "create_model",
    "list_models",
    "load_released",
    "record_routing",
    "register_model",
    "router_parameters",
    "upcycle",
]
