# SPDX-License-Identifier: Apache-2.0
"""DenseNet-BC (Huang et al. 2017), depth 40 and growth 12: what AdvMoE's tables call DenseNet."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import ModelSpec, initialize, register_model
from .layers import Backbone, Channels, Path, add_router, conv, linear, norm

__all__ = ["DenseNet"]

BOTTLENECK = 4  # channels of a layer's 1×1 convolution, against its 3×3's
COMPRESSION = 0.5  # of a transition


class _DenseLayer(nn.Module):
    """BatchNorm, ReLU, 1×1, BatchNorm, ReLU, 3×3 to ``growth`` new channels.

    The input holds what several layers wrote, each under a choice of its own: its BatchNorm is shared by all experts.
    """

    def __init__(self, spec: ModelSpec, source: Channels, growth: int) -> None:
        super().__init__()
        inner, out = Channels.of(spec, growth, BOTTLENECK), Channels.of(spec, growth)
        self.norm1 = norm(spec, source, routed=False)
        self.conv1 = conv(spec, source, inner, 1)
        self.norm2 = norm(spec, inner)
        self.conv2 = conv(spec, inner, out, 3)
        self.out_channels = out
        if spec.routed and spec.route_per == "block":
            add_router(self, spec, source.width)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        path.enter(self, x)
        y = path.activate(self.conv1, path.rectify(x, self.norm1), self.norm2)
        return path.convolve(self.conv2, y)


class _DenseBlock(nn.Module):
    """Layers that each get what all before them gave: the compact channels of their pathways, side by side."""

    def __init__(self, spec: ModelSpec, source: Channels, layers: int, growth: int) -> None:
        super().__init__()
        width = source.width
        for i in range(layers):
            layer = _DenseLayer(spec, Channels.plain(width), growth)
            self.add_module(f"denselayer{i + 1}", layer)
            width += layer.out_channels.width
        self.layers = layers
        self.out_channels = Channels.plain(width)
        if spec.routed and spec.route_per == "stage":
            add_router(self, spec, source.width)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        path.enter(self, x)
        for i in range(self.layers):
            x = torch.cat([x, self._modules[f"denselayer{i + 1}"](x, path)], 1)  # type: ignore[misc]
        return x


class _Transition(nn.Module):
    """BatchNorm, ReLU, 1×1 to half the channels, average over 2×2; not routed."""

    def __init__(self, spec: ModelSpec, source: Channels, out: Channels) -> None:
        super().__init__()
        self.norm = norm(spec, source, routed=False)
        self.conv = conv(spec, source, out, 1, routed=False)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        return F.avg_pool2d(path.convolve(self.conv, F.relu(path.normalize(self.norm, x))), 2)


class DenseNet(Backbone):
    """Three dense blocks; ``width`` is the stem's and twice the growth.

    The released code cannot construct its MoE DenseNet. Ours: the 1×1 and 3×3 convolutions of the dense layers are
    routed, each expert giving ``int(r * ...)`` of their channels; stem and transitions are not routed and have a
    pathway's width; concatenated are the compact outputs, so that every input side is whole. In the windows layout a
    layer's outputs are windows of the dense layer's (the input of the 3×3 convolution too), with r = 1 the dense network.
    """

    def __init__(self, spec: ModelSpec, layers: tuple[int, ...]) -> None:
        super().__init__(spec, len(layers))
        least = 16 if spec.imagenet_stem else 8
        if spec.image_size < least:
            raise ValueError(f"image_size: {spec.arch} takes images from {least} pixels on; got {spec.image_size}")
        if spec.gate_after != "conv":
            raise ValueError(f"gate_after: {spec.arch} has its BatchNorms before the convolutions; expected 'conv'")
        width = 24 if spec.width is None else spec.width
        small = not spec.imagenet_stem
        channels = Channels.plain(spec.scaled(width))
        self.features = nn.Module()
        self.features.conv0 = conv(spec, Channels.plain(3), channels, 3 if small else 7, 1 if small else 2, routed=False)
        if not small:
            self.features.norm0 = norm(spec, channels, routed=False)
        self._add_network_router(channels.width)
        for i, count in enumerate(layers, start=1):
            block = _DenseBlock(spec.at_stage(i), channels, count, max(1, width // 2))
            self.features.add_module(f"denseblock{i}", block)
            channels = block.out_channels
            if i < len(layers):
                after = Channels.plain(max(1, int(COMPRESSION * channels.width)))
                self.features.add_module(f"transition{i}", _Transition(spec, channels, after))
                channels = after
        self.features.norm_final = norm(spec, channels, routed=False)
        self.stages = len(layers)
        self.classifier = linear(spec, channels.width, spec.num_classes)
        initialize(self)

    def run(self, x: Tensor, path: Path) -> Tensor:
        parts = self.features._modules
        x = path.convolve(parts["conv0"], x)  # type: ignore[arg-type]
        if "norm0" in parts:
            x = F.max_pool2d(F.relu(path.normalize(parts["norm0"], x)), 3, 2, 1)  # type: ignore[arg-type]
        x = self._behind_stem(x, path)
        for i in range(1, self.stages + 1):
            x = parts[f"denseblock{i}"](x, path)  # type: ignore[misc]
            if i < self.stages:
                x = parts[f"transition{i}"](x, path)  # type: ignore[misc]
        return path.linear(self.classifier, path.features(path.rectify(x, parts["norm_final"])))


@register_model("densenet40")
def densenet40(spec: ModelSpec) -> nn.Module:
    """DenseNet-BC of depth 40 and growth 12: three blocks of six layers; width 24; 36 routed convolutions."""
    return DenseNet(spec, (6, 6, 6))
