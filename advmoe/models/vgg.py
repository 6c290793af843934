# SPDX-License-Identifier: Apache-2.0
"""VGG-16 with BatchNorm (Simonyan and Zisserman 2015), in the form for small images that AdvMoE's released code has."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import ModelSpec, initialize, register_model
from .layers import Backbone, Channels, Path, add_router, classifier, conv, linear, norm

__all__ = ["VGG"]


class _Site(nn.Module):
    """Where a stage's router hangs; the convolutions themselves lie in ``features``, as released."""


class VGG(Backbone):
    """13 convolutions of 3×3 in five stages of 1, 2, 4, 8 and 8 times ``width`` with four max-pools between them, pooled
    to 2×2, and three linear layers. The first convolution is not routed, the other twelve are.

    The first convolution is scaled in the partition layout, as released, and keeps its full width in the windows layout.
    A block (``route_per="block"``) is a stage here.
    """

    def __init__(self, spec: ModelSpec, stages: tuple[tuple[int, int], ...]) -> None:
        super().__init__(spec, len(stages))
        if spec.image_size < 16:
            raise ValueError(f"image_size: {spec.arch} pools four times, from 16 pixels on; got {spec.image_size}")
        if spec.stem == "imagenet":
            raise ValueError(f"stem: {spec.arch} has none for ImageNet; expected 'cifar', got {spec.stem!r}")
        width = 64 if spec.width is None else spec.width
        layers: list[nn.Module] = []
        source = Channels.plain(3)
        self.convolutions: list[int] = []  # their indices in features
        self.sites = nn.ModuleDict()  # by the index in features of the layer before which the router chooses
        for stage, (multiple, count) in enumerate(stages, start=1):
            here = spec.at_stage(stage)
            if stage > 1:
                layers.append(nn.MaxPool2d(2, 2))
            for i in range(count):
                first = not layers
                out = Channels.plain(width if spec.windows else spec.scaled(width))
                if not first:
                    out = Channels.of(here, width * multiple)
                begins = i == (1 if stage == 1 else 0)  # the first layer of all is not routed
                if here.routed and begins and spec.route_per in ("block", "stage"):
                    self.sites[str(len(layers))] = _Site()
                    add_router(self.sites[str(len(layers))], spec, source.width)
                self.convolutions.append(len(layers))
                layers += [conv(here, source, out, 3, routed=not first), norm(here, out, routed=not first), nn.ReLU()]
                if first:
                    self._add_network_router(out.width)
                source = out
        self.features = nn.Sequential(*layers)
        self.gate_after_norm = spec.gate_after == "norm"
        hidden = max(1, 4 * width)
        self.classifier = nn.Sequential(
            classifier(spec, source, hidden, positions=4), nn.ReLU(),
            linear(spec, hidden, hidden), nn.ReLU(),
            linear(spec, hidden, spec.num_classes),
        )  # fmt: skip
        initialize(self)

    def run(self, x: Tensor, path: Path) -> Tensor:
        for i, layer in enumerate(self.features):
            if str(i) in self.sites:
                path.enter(self.sites[str(i)], x)
            if isinstance(layer, nn.MaxPool2d):
                x = layer(x)
            elif i in self.convolutions:  # with the two layers behind it
                x = path.activate(layer, x, self.features[i + 1], self.gate_after_norm)
            if i == 0:
                x = self._behind_stem(x, path)
        x = path.gated(F.adaptive_avg_pool2d(x, 2).flatten(1))
        for layer in self.classifier:
            x = path.linear(layer, x)
        return x


@register_model("vgg16_bn")
def vgg16_bn(spec: ModelSpec) -> nn.Module:
    """VGG-16 with BatchNorm: 2, 2, 3, 3 and 3 convolutions; width 64; 12 routed convolutions."""
    return VGG(spec, ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)))
