# SPDX-License-Identifier: Apache-2.0
"""Mixtures in chosen places of a dense network: BlockMoE and ConvMoE, the robust sparse MoE layers of Pavlitska et al.
(arXiv 2509.05086, ICCVW 2025)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from moe_kernels import RoutedConv2d, Routing

from ..registry import unknown_name
from ..routers import Router, RouterOptions, build_router
from .base import ModelSpec, build, initialize, register_kind

__all__ = ["AddToEach", "Mixture", "MixtureOfConvolutions", "experts_of", "matches"]


class AddToEach(nn.Module):
    """``y [B * k, ...] + x [B, ...]``: each input to its k virtual samples, without a copy of it; as many, one to one."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        if y.shape[0] == x.shape[0]:
            return y + x
        return (y.unflatten(0, (x.shape[0], -1)) + x.unsqueeze(1)).flatten(0, 1)


class Mixture(nn.Module):
    """Experts and the router that chooses for each image among them, by what comes in."""

    experts: nn.Module
    router: Router

    def __init__(self, spec: ModelSpec, in_channels: int) -> None:
        super().__init__()
        self.num_experts = spec.num_experts
        self.router = build_router(spec.router, in_channels, spec.num_experts, spec.router_options)


class MixtureOfConvolutions(Mixture):
    """A convolution as a mixture of ``num_experts``: ``sum over the top_k of gate_e * conv_e(x)``.

    A BatchNorm that follows belongs to all and takes its statistics from the sum. In training it cancels a factor that a
    whole batch has in common, and part of a gate's gradient with it; with ``after`` gates and sum come behind it.

    Attributes:
        experts: the convolutions as one, a :class:`moe_kernels.RoutedConv2d`.
    """

    def __init__(self, spec: ModelSpec, conv: nn.Conv2d) -> None:
        super().__init__(spec, conv.in_channels)
        assert isinstance(conv.padding, tuple)
        self.experts = RoutedConv2d(
            conv.in_channels, conv.out_channels, _pair(conv.kernel_size), _pair(conv.stride), _pair(conv.padding),
            _pair(conv.dilation), conv.groups, conv.bias is not None, num_experts=spec.num_experts,
        )  # fmt: skip

    def forward(self, x: Tensor, after: nn.Module | None = None, routing: Routing | None = None) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', H', W']``.

        Args:
            after: goes between the convolutions and their gates, to ``B * k`` virtual samples.
            routing: ``[B]`` or ``[B, k]`` in place of the router's.
        """
        routing = self.router.route(x) if routing is None else routing
        y = self.experts(x, routing.expand())
        return routing.combine(y if after is None else after(y))


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return height, width


def experts_of(spec: ModelSpec) -> ModelSpec:
    """The spec of a block whose every layer has a slice for each expert, and no router."""
    return dataclasses.replace(
        spec, kind="network_moe", route_per="network", bn="per_expert", moe_at=None, router_options=RouterOptions()
    )


def matches(name: str, patterns: Sequence[int | str]) -> bool:
    """Whether a module's name, or that of one it lies in, matches one of the patterns."""
    parts = name.split(".")
    names = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(fnmatchcase(each, str(pattern)) for pattern in patterns for each in names)


def _require_all_placed(spec: ModelSpec, names: Sequence[str], what: str) -> None:
    for pattern in spec.moe_at or ():
        if not any(matches(name, (pattern,)) for name in names):
            raise unknown_name(f"moe_at: {what} of {spec.arch}", str(pattern), names)


@register_kind("block_moe")
def block_moe(spec: ModelSpec) -> nn.Module:
    """A ResNet in which the blocks that ``moe_at`` names are mixtures of blocks.

    Raises:
        ValueError: for a pattern that names none, or a network without residual blocks of ResNet's.
    """
    spec = dataclasses.replace(spec, moe_at=("layer4",) if spec.moe_at is None else spec.moe_at)
    model = build(spec)
    blocks = list(getattr(model, "block_names", ()))
    if not blocks:
        raise ValueError(f"kind: block_moe takes the ResNets and wrn50_2, got {spec.arch}")
    _require_all_placed(spec, blocks, "block")
    return model


@register_kind("conv_moe")
def conv_moe(spec: ModelSpec) -> nn.Module:
    """A network in which the convolutions that ``moe_at`` names are mixtures of convolutions.

    Raises:
        ValueError: for a pattern that names none.
    """
    spec = dataclasses.replace(spec, moe_at=("layer4.*.conv*",) if spec.moe_at is None else spec.moe_at)
    model = build(spec)
    convolutions = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    _require_all_placed(spec, list(convolutions), "convolution")
    assert spec.moe_at is not None
    for name, conv in convolutions.items():
        if not matches(name, spec.moe_at):
            continue
        mixture = MixtureOfConvolutions(spec, conv)
        initialize(mixture)
        model.set_submodule(name, mixture)
    return model
