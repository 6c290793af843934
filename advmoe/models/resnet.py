# SPDX-License-Identifier: Apache-2.0
"""ResNet-18, 34 and 50 (He et al. 2016) and Wide ResNet-50-2: dense, scaled, sparse, with routed convolutions where
AdvMoE's released code has them, or with mixtures of blocks."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from moe_kernels import Routing

from ..sparse import Add
from .base import ModelSpec, initialize, register_model
from .layers import Backbone, Channels, Path, Stage, add_router, classifier, conv, norm, pointwise, projection
from .placed import AddToEach, Mixture, experts_of, matches

__all__ = ["BasicBlock", "Bottleneck", "MixtureOfBlocks", "ResNet", "WideBottleneck"]


class _Block(nn.Module):
    """A shortcut around some convolutions, and, with ``route_per="block"``, one router for them all.

    On 3×3 stems the shortcut's 1×1 projection has no router, on ImageNet's it is routed like the rest, as released.
    """

    expansion = 1
    depth = 2

    def __init__(self, spec: ModelSpec, source: Channels, width: int, stride: int) -> None:
        super().__init__()
        out = Channels.of(spec, width, self.expansion)
        # with windows where the dense network has one, else where the widths that are there ask for it, as released
        needed = stride != 1 or (source.dense != out.dense if spec.windows else source.width != out.width)
        self._add_convolutions(spec, source, width, stride)
        self.shortcut: nn.Module
        if spec.imagenet_stem and needed:
            self.shortcut = pointwise(spec, source, out, stride)
        else:
            self.shortcut = projection(spec, source, out, stride, needed)
        self.add = Add()
        self.gate_after_norm = spec.gate_after == "norm"
        self.out_channels = out
        if spec.routed and spec.route_per == "block":
            add_router(self, spec, source.width)

    def _add_convolutions(self, spec: ModelSpec, source: Channels, width: int, stride: int) -> None:
        inner = Channels.of(spec, width)
        self.conv1 = conv(spec, source, inner, 3, stride)
        self.bn1 = norm(spec, inner)
        self.conv2 = conv(spec, inner, inner, 3)
        self.bn2 = norm(spec, inner)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        path.enter(self, x)
        source = path.writer
        y, gate_after = x, self.gate_after_norm
        for i in range(1, self.depth):
            y = path.activate(getattr(self, f"conv{i}"), y, getattr(self, f"bn{i}"), gate_after)
        last, bn = getattr(self, f"conv{self.depth}"), getattr(self, f"bn{self.depth}")

        def shortcut() -> Tensor:
            return path.project(self.shortcut, x, source, gate_after)

        return path.activate(last, y, bn, gate_after, self.add, shortcut)


class BasicBlock(_Block):
    """Two 3×3 convolutions."""


class Bottleneck(_Block):
    """1×1, 3×3 (with the stride) and 1×1 to four times the width."""

    expansion = 4
    depth = 3
    widen = 1

    def _add_convolutions(self, spec: ModelSpec, source: Channels, width: int, stride: int) -> None:
        inner, out = Channels.of(spec, self.widen * width), Channels.of(spec, width, self.expansion)
        self.conv1 = conv(spec, source, inner, 1)
        self.bn1 = norm(spec, inner)
        self.conv2 = conv(spec, inner, inner, 3, stride)
        self.bn2 = norm(spec, inner)
        self.conv3 = conv(spec, inner, out, 1)
        self.bn3 = norm(spec, out)


class WideBottleneck(Bottleneck):
    """A bottleneck of twice the width between its 1×1 convolutions."""

    widen = 2


class MixtureOfBlocks(Mixture):
    """A residual block as a mixture of ``num_experts`` blocks, each with its shortcut, its BatchNorms and its last ReLU:
    ``sum over the top_k of gate_e * block_e(x)``.

    A block's convolutions and BatchNorms follow one choice (:mod:`moe_kernels`' routed layers); with k choices there are
    ``B * k`` virtual samples, of which the first convolution reads the B inputs. In training an expert's batch statistics
    are those of its own samples.

    Attributes:
        experts: the blocks as one, each of whose layers has a slice for each.
    """

    def __init__(self, spec: ModelSpec, experts: nn.Module, in_channels: int) -> None:
        super().__init__(spec, in_channels)
        self.experts = experts
        experts.add = AddToEach()
        self.out_channels = experts.out_channels

    def forward(self, x: Tensor, path: Path, routing: Routing | None = None) -> Tensor:
        """Features ``[B, C, H, W]`` to ``[B, C', H', W']``; the path outside goes on as it was.

        Args:
            routing: ``[B]`` or ``[B, k]`` in place of the router's.
        """
        routing = self.router.route(x) if routing is None else routing
        return routing.combine(self.experts(x, Path.following(routing.expand())))


def _block(
    spec: ModelSpec, block: type[_Block], name: str, source: Channels, width: int, stride: int
) -> _Block | MixtureOfBlocks:
    """A block, or, of kind block_moe where ``moe_at`` names it, a mixture of them."""
    if spec.kind != "block_moe" or spec.moe_at is None or not matches(name, spec.moe_at):
        return block(spec, source, width, stride)
    return MixtureOfBlocks(spec, block(experts_of(spec), source, width, stride), source.width)


class ResNet(Backbone):
    """A ResNet of four stages with a stem for small images (3×3) or ImageNet's (7×7 of stride 2, max-pooled).

    Of kind moe the 3×3 stem keeps its full width, as released; then layer1.0 has a projection. The 7×7 stem is scaled in
    the partition layout, as released.
    """

    def __init__(self, spec: ModelSpec, block: type[_Block], blocks: tuple[int, ...]) -> None:
        super().__init__(spec, len(blocks))
        if spec.image_size < 8:
            raise ValueError(f"image_size: {spec.arch} takes images from 8 pixels on; got {spec.image_size}")
        width = 64 if spec.width is None else spec.width
        full = spec.windows or (spec.routed and not spec.imagenet_stem)
        channels = Channels.plain(width if full else spec.scaled(width), width)
        small = not spec.imagenet_stem
        self.conv1 = conv(spec, Channels.plain(3), channels, 3 if small else 7, 1 if small else 2, routed=False)
        self.bn1 = norm(spec, channels, routed=False)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self._add_network_router(channels.width)
        self.stages: list[str] = []
        self.block_names: list[str] = []
        for stage, count in enumerate(blocks, start=1):
            here, source, layers = spec.at_stage(stage), channels, []
            for i in range(count):
                where = channels, width * 2 ** (stage - 1), 2 if stage > 1 and not i else 1
                self.block_names.append(f"layer{stage}.{i}")
                layers.append(_block(here, block, self.block_names[-1], *where))
                channels = cast(Channels, layers[-1].out_channels)
            self.stages.append(f"layer{stage}")
            self.add_module(self.stages[-1], Stage(here, source, layers))
        self.linear = classifier(spec, channels, spec.num_classes)
        initialize(self)

    def run(self, x: Tensor, path: Path) -> Tensor:
        stem = path.activate(self.conv1, x, self.bn1, self.spec.gate_after == "norm")
        x = self._behind_stem(self.pool(stem), path)
        for name in self.stages:
            x = getattr(self, name)(x, path)
        return path.linear(self.linear, path.features(x))


@register_model("resnet18")
def resnet18(spec: ModelSpec) -> nn.Module:
    """ResNet-18: two basic blocks a stage; width 64; 16 routed convolutions."""
    return ResNet(spec, BasicBlock, (2, 2, 2, 2))


@register_model("resnet34")
def resnet34(spec: ModelSpec) -> nn.Module:
    """ResNet-34: 3, 4, 6 and 3 basic blocks; width 64; 32 routed convolutions."""
    return ResNet(spec, BasicBlock, (3, 4, 6, 3))


@register_model("resnet50")
def resnet50(spec: ModelSpec) -> nn.Module:
    """ResNet-50: 3, 4, 6 and 3 bottlenecks; width 64; 48 routed convolutions."""
    return ResNet(spec, Bottleneck, (3, 4, 6, 3))


@register_model("wrn50_2")
def wrn50_2(spec: ModelSpec) -> nn.Module:
    """Wide ResNet-50-2 (Zagoruyko and Komodakis 2016): ResNet-50 with bottlenecks of twice the inner width."""
    return ResNet(spec, WideBottleneck, (3, 4, 6, 3))
