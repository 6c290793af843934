# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts out of a trained dense network (sparse upcycling: Komatsuzaki et al. 2023), anybody's."""

from __future__ import annotations

import copy

from torch import nn

from moe_kernels import convert

from ..routers import Router, RouterOptions, build_router, router_class, routers_of

__all__ = ["routed_in_place", "upcycle"]


def upcycle(
    dense_model: nn.Module, num_experts: int, ratio: float = 1.0, router: str = "light", **options: object
) -> nn.Module:
    """A copy of a dense network in which all convolutions but the first are routed, each by a router of its own.

    The network is narrowed to its most important channels (:func:`moe_kernels.narrow.narrow`: those whose weights have
    the largest L1 norm, times the BatchNorm's scale, the same ones where outputs are added), and every expert begins as
    a copy of what is left. With ``ratio=1`` the result computes what the dense network does. Of the vision transformers
    of :func:`advmoe.models.create_model` the MLPs of every second block are routed instead, token by token, with the
    hidden features of the largest norms.

    Any nn.Module of ordinary convolutions will do that torch.fx can trace (for ``ratio=1`` it need not be traceable). The
    methods of :mod:`advmoe.training.methods` train the result like a model of kind moe.

    Args:
        num_experts: N.
        ratio: r, the width of an expert against the dense layer's.
        router: a router of level layer, by name.
        options: of :class:`advmoe.routers.RouterOptions`.

    Raises:
        ValueError: as :func:`moe_kernels.convert`, and for a router that is of level image.
    """
    return routed_in_place(copy.deepcopy(dense_model), num_experts, ratio, router, RouterOptions(**options))  # type: ignore[arg-type]


def routed_in_place(model: nn.Module, num_experts: int, ratio: float, router: str, options: RouterOptions) -> nn.Module:
    """As :func:`upcycle`; what becomes of ``model`` is nobody's concern."""
    if router_class(router).level != "layer":
        raise ValueError(f"router: each layer of an upcycled model has its own, of level layer; got {router!r}")
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected 0 < ratio <= 1, got {ratio}")
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    own = getattr(model, "_upcycled", None)
    if own is not None:
        result: nn.Module = own(num_experts, ratio, router, options)
    else:
        if options.top_k > 1:
            raise ValueError(f"top_k: convolutions take one expert each, got {options.top_k}")

        def make(in_channels: int, experts: int) -> Router:
            return build_router(router, in_channels, experts, options)

        result = convert(model, num_experts, ratio if ratio != 1 else None, make)
    for name, module in routers_of(result).items():
        module.routes = name.removesuffix(".router")
    return result
