# SPDX-License-Identifier: Apache-2.0
"""Wide ResNet 28-10 (Zagoruyko and Komodakis 2016): blocks with BatchNorm and ReLU before each convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..sparse import Add
from .base import ModelSpec, initialize, register_model
from .layers import Backbone, Channels, Path, Stage, add_router, classifier, conv, every, norm, step_before

__all__ = ["WideResNet"]


class _Block(nn.Module):
    """BatchNorm, ReLU, 3×3, twice, and a shortcut; its 1×1 projection is routed like the rest, as released.

    The projection and the first convolution read the activated input. AdvMoE's released code lets both read the raw one
    where there is a projection (``raw_input=True``; :func:`advmoe.models.released.load_released` sets it).
    """

    def __init__(self, spec: ModelSpec, source: Channels, width: int, stride: int, source_routed: bool) -> None:
        super().__init__()
        out = Channels.of(spec, width)
        self.bn1 = norm(spec, source, routed=source_routed)
        self.conv1 = conv(spec, source, out, 3, stride)
        self.bn2 = norm(spec, out)
        self.conv2 = conv(spec, out, out, 3)
        needed = stride != 1 or source.dense != out.dense or source.width != out.width
        self.step = step_before(spec, stride)
        self.convShortcut = conv(spec, source, out, 1, stride // self.step) if needed else None
        self.add = Add()
        self.raw_input = False
        self.out_channels = out
        if spec.routed and spec.route_per == "block":
            add_router(self, spec, source.width)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        path.enter(self, x)
        source = path.writer
        activated = path.rectify(x, self.bn1)
        if self.convShortcut is not None:
            if self.raw_input:
                activated = x
            x = path.convolve(self.convShortcut, every(activated, self.step))
            path.writer = source
        y = path.activate(self.conv1, activated, self.bn2)
        return self.add(path.convolve(self.conv2, y), x)


class WideResNet(Backbone):
    """Three stages of ``(depth - 4) / 6`` blocks, ``width`` channels in the first; the stem has a tenth of it and is not
    routed. Its ImageNet form has a 7×7 stem of stride 2 with BatchNorm and a max-pool.

    In the partition layout the stem is scaled too, as released; in the windows layout it keeps its full width.
    """

    def __init__(self, spec: ModelSpec, depth: int, widen: int) -> None:
        super().__init__(spec, 3)
        if spec.image_size < 8:
            raise ValueError(f"image_size: {spec.arch} takes images from 8 pixels on; got {spec.image_size}")
        if spec.gate_after != "conv":
            raise ValueError(f"gate_after: {spec.arch} has its BatchNorms before the convolutions; expected 'conv'")
        width = 16 * widen if spec.width is None else spec.width
        first = max(1, width // widen)
        channels = Channels.plain(first if spec.windows else spec.scaled(first))
        small = not spec.imagenet_stem
        self.conv1 = conv(spec, Channels.plain(3), channels, 3 if small else 7, 1 if small else 2, routed=False)
        self.bn0 = nn.Identity() if small else norm(spec, channels, routed=False)
        self._add_network_router(channels.width)
        self.stages: list[str] = []
        routed = False
        for stage in (1, 2, 3):
            here, source, blocks = spec.at_stage(stage), channels, []
            for i in range((depth - 4) // 6):
                blocks.append(_Block(here, channels, width * 2 ** (stage - 1), 2 if stage > 1 and not i else 1, routed))
                channels, routed = blocks[-1].out_channels, here.routed
            self.stages.append(f"block{stage}")
            self.add_module(self.stages[-1], Stage(here, source, blocks))
        self.bn1 = norm(spec, channels, routed=routed)
        self.fc = classifier(spec, channels, spec.num_classes)
        initialize(self)

    def run(self, x: Tensor, path: Path) -> Tensor:
        x = path.convolve(self.conv1, x)
        if self.spec.imagenet_stem:
            x = F.max_pool2d(F.relu(path.normalize(self.bn0, x)), 3, 2, 1)
        x = self._behind_stem(x, path)
        for name in self.stages:
            x = getattr(self, name)(x, path)
        return path.linear(self.fc, path.features(path.rectify(x, self.bn1)))


@register_model("wrn28_10")
def wrn28_10(spec: ModelSpec) -> nn.Module:
    """WRN-28-10: three stages of four blocks; width 160; 27 routed convolutions (a projection in each stage)."""
    return WideResNet(spec, 28, 10)
