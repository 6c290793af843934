# SPDX-License-Identifier: Apache-2.0
"""ResNet for 32×32 images (He et al. 2016), dense, scaled, or with routed convolutions as in AdvMoE's released code."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels import RoutedBatchNorm2d, RoutedConv2d, Routing

from ..routers import Router, build_router, router_class
from .base import ModelSpec, Normalize, initialize, register_model

__all__ = ["BasicBlock", "ResNet"]


def _conv3x3(spec: ModelSpec, in_channels: int, out_channels: int, stride: int) -> nn.Module:
    if spec.kind != "moe":
        return nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
    conv = RoutedConv2d(in_channels, out_channels, 3, stride, 1, bias=False, num_experts=spec.num_experts)
    if router_class(spec.router).level == "layer":
        conv.router = build_router(spec.router, in_channels, spec.num_experts, spec.gate)
    return conv


def _norm(spec: ModelSpec, channels: int) -> nn.Module:
    if spec.kind == "moe" and spec.bn == "per_expert":
        return RoutedBatchNorm2d(channels, spec.num_experts)
    return nn.BatchNorm2d(channels)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, projected by an unrouted 1×1 convolution where the shape changes."""

    def __init__(self, spec: ModelSpec, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(spec, in_channels, channels, stride)
        self.bn1 = _norm(spec, channels)
        self.conv2 = _conv3x3(spec, channels, channels, 1)
        self.bn2 = _norm(spec, channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        self.gate_after_norm = spec.gate_after == "norm"

    def forward(self, x: Tensor, routing: Routing | None) -> Tensor:
        y = F.relu(self._convolve(self.conv1, self.bn1, x, routing))
        y = self._convolve(self.conv2, self.bn2, y, routing)
        return F.relu(y + self.shortcut(x))

    def _convolve(self, conv: nn.Module, norm: nn.Module, x: Tensor, routing: Routing | None) -> Tensor:
        if not isinstance(conv, RoutedConv2d):
            return norm(conv(x))
        if routing is None:
            router = conv.router
            assert isinstance(router, Router)
            routing = router.route(x)
        y = conv(x, routing.ungated() if self.gate_after_norm else routing)
        y = norm(y, routing) if isinstance(norm, RoutedBatchNorm2d) else norm(y)
        return routing.combine(y) if self.gate_after_norm else y


class ResNet(nn.Module):
    """A ResNet with a 3×3 stem and four stages.

    For kind moe the stem keeps its full width, as released; then layer1.0 has a projection.
    """

    def __init__(self, spec: ModelSpec, blocks: tuple[int, ...]) -> None:
        super().__init__()
        if not 8 <= spec.image_size <= 32:
            raise ValueError(f"image_size: {spec.arch} has the stem for images of 8 to 32 pixels; got {spec.image_size}")
        width = 64 if spec.width is None else spec.width
        stem = width if spec.kind == "moe" else spec.scaled(width)
        self.normalize = Normalize(spec.mean, spec.std) if spec.normalize else nn.Identity()
        self.conv1 = nn.Conv2d(3, stem, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        channels = stem
        self.stages: list[str] = []
        for stage, count in enumerate(blocks):
            out = spec.scaled(width * 2**stage)
            layers = nn.ModuleList()
            for block in range(count):
                layers.append(BasicBlock(spec, channels, out, 2 if stage and not block else 1))
                channels = out
            name = f"layer{stage + 1}"
            self.add_module(name, layers)
            self.stages.append(name)
        self.linear = nn.Linear(channels, spec.num_classes)
        self.router: Router | None = None
        if spec.kind == "moe" and router_class(spec.router).level == "image":
            self.router = build_router(spec.router, 3, spec.num_experts, spec.gate)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[B, 3, H, W]`` in [0, 1] to logits ``[B, num_classes]``."""
        x = self.normalize(x)
        choice = None if self.router is None else self.router.route(x)
        # A gate that multiplies (softmax) would multiply through all layers: it is applied once, to the features. A
        # straight-through gate has value 1 and is shared, each layer adding its gradient.
        shared = choice if choice is None or choice.unit_gate else choice.ungated()
        x = F.relu(self.bn1(self.conv1(x)))
        for name in self.stages:
            for block in getattr(self, name):
                x = block(x, shared)
        features = x.mean((2, 3))
        if choice is not None and not choice.unit_gate:
            features = choice.combine(features)
        return self.linear(features)


@register_model("resnet18")
def resnet18(spec: ModelSpec) -> nn.Module:
    """ResNet-18: two basic blocks a stage; width 64."""
    return ResNet(spec, (2, 2, 2, 2))
