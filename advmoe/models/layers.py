# SPDX-License-Identifier: Apache-2.0
"""The layers that the backbones are made of, for every kind and layout, and what goes with the features between them."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels import ExpertSlices, RoutedBatchNorm2d, RoutedConv2d, RoutedLayerNorm, RoutedLinear, Routing
from moe_kernels.features import has_kernel, norm_relu_with_means, relu_with_means
from moe_kernels.rows import gather_rows

from ..routers import Router, build_router, router_class
from ..sparse import Add, LiveBatchNorm2d, MaskedConv2d
from .base import PLACED, ModelSpec, Normalize
from .placed import AddToEach, MixtureOfConvolutions

__all__ = [
    "Backbone",
    "Channels",
    "Path",
    "Projection",
    "Stage",
    "add_router",
    "classifier",
    "conv",
    "every",
    "layer_norm",
    "linear",
    "norm",
    "pointwise",
    "projection",
    "step_before",
]


@dataclass(frozen=True)
class Channels:
    """What a layer gets: so many channels of which, in the windows layout, each sample has its window of the dense
    layer's.

    Args:
        dense: the dense network's channels.
        width: those that are there.
        windows: where they lie among the dense ones, if that depends on the sample's expert.
    """

    dense: int
    width: int
    windows: ExpertSlices | None = None

    @classmethod
    def plain(cls, width: int, dense: int | None = None) -> Channels:
        """What no routed layer wrote; ``dense`` where the dense network has another width there."""
        return cls(width if dense is None else dense, width)

    @classmethod
    def of(cls, spec: ModelSpec, dense: int, multiple: int = 1) -> Channels:
        """What a routed layer of ``multiple * dense`` channels in the dense network gives out. Windows are of all of
        them; otherwise ``dense`` is scaled first, as released, which differs where ``r * dense`` is no integer."""
        if spec.windows:
            windows = ExpertSlices.windows(multiple * dense, spec.ratio, spec.num_experts)
            return cls(multiple * dense, windows.width, windows)
        return cls(multiple * dense, multiple * spec.scaled(dense))


class Path:
    """The routings that go with the features of one forward.

    ``choice`` is the one in force for the layers ahead; None where each has a router of its own. ``writer`` is that of
    the last routed convolution that wrote the features: in the windows layout it says which of the dense channels they
    are.
    ``gate_at_end`` holds gates that are to multiply once, at the network's end. ``rectified`` are the last features
    behind a ReLU, with their channel means, which the next router or the classifier may ask for.

    Args:
        pools: whether BatchNorm, ReLU and channel means are computed together: of networks with routed layers. Ordinary
            ones are torch's operators, as whoever compares with them expects.
    """

    __slots__ = ("choice", "gate_at_end", "pools", "rectified", "writer")

    def __init__(self, pools: bool = False) -> None:
        self.choice: Routing | None = None
        self.writer: Routing | None = None
        self.gate_at_end: Routing | None = None
        self.pools = pools
        self.rectified: tuple[Tensor, Tensor] | None = None

    @classmethod
    def following(cls, routing: Routing) -> Path:
        """One on which all layers take this choice, the first too."""
        path = cls(pools=True)
        path.choice = path.writer = routing
        return path

    def enter(self, site: nn.Module, x: Tensor) -> None:
        """Lets the site's router, if it has one, choose for the layers ahead."""
        router = getattr(site, "router", None)
        if router is None:
            return
        choice = self._route(router, x)
        if choice.gate is not None and not choice.unit_gate:
            # multiplied through all layers it would vanish; a straight-through gate has value 1 and is shared, each layer
            # adding its gradient
            self.gate_at_end = choice
            choice = choice.ungated()
        self.choice = choice

    def convolve(self, conv: nn.Module, x: Tensor, after: nn.Module | None = None, gate_after: bool = False) -> Tensor:
        """``after(conv(x))``, routed where the convolution is; ``gate_after`` puts the gate behind ``after``, a
        BatchNorm. The choice becomes the writer."""
        if gate_after and isinstance(conv, MixtureOfConvolutions):
            return conv(x, after)
        if not isinstance(conv, RoutedConv2d):
            y = conv(x)
            return y if after is None else after(y)
        routing = self.choice
        if routing is None:
            routing = self._route(conv.router, x)  # type: ignore[arg-type]
        y = conv(x, routing.ungated() if gate_after else routing, self.of_input(conv))
        self.writer = routing
        if after is not None:
            y = self.normalize(after, y)
        return routing.combine(y) if gate_after else y

    def activate(
        self,
        conv: nn.Module,
        x: Tensor,
        after: nn.Module,
        gate_after: bool = False,
        add: nn.Module | None = None,
        shortcut: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """``relu(add(after(conv(x)), shortcut()))``, arguments as those of :meth:`convolve`; without ``add`` no sum."""
        gated = gate_after and isinstance(conv, RoutedConv2d | MixtureOfConvolutions)
        y = self.convolve(conv, x, after if gated else None, gate_after)
        other = None if shortcut is None else shortcut()
        return self.rectify(y, None if gated else after, add, other)

    def rectify(
        self, x: Tensor, after: nn.Module | None = None, add: nn.Module | None = None, other: Tensor | None = None
    ) -> Tensor:
        """``relu(add(after(x), other))``, ``after`` a BatchNorm of what the writer wrote; without these, ``relu(x)``. The
        result's channel means are remembered, if the path pools and they cost little."""
        fast = self.pools and has_kernel(x)
        if fast and after is not None and _adds_alike(add, x, other):
            routing = self.writer if isinstance(after, RoutedBatchNorm2d) else None
            self.rectified = norm_relu_with_means(after, x, routing, other)
            return self.rectified[0]
        if after is not None:
            x = self.normalize(after, x)
        if add is not None:
            x = add(x, other)
        if not fast:
            return F.relu(x)
        self.rectified = relu_with_means(x)
        return self.rectified[0]

    def _route(self, router: Router, x: Tensor) -> Routing:
        means = self._means(x) if router.reads_means else None
        return router.route(x) if means is None else router.route(x, means)

    def _means(self, x: Tensor) -> Tensor | None:
        """The channel means of ``x``, if it is what was rectified last."""
        return self.rectified[1] if self.rectified is not None and self.rectified[0] is x else None

    def of_input(self, conv: RoutedConv2d) -> Routing | None:
        return None if conv.in_slices.is_whole else self.writer

    def normalize(self, norm: nn.Module, x: Tensor) -> Tensor:
        """``norm(x)``; one of each expert's own follows the writer."""
        return norm(x, self.writer) if isinstance(norm, RoutedBatchNorm2d | RoutedLayerNorm) else norm(x)

    def rows(self, values: Tensor) -> Tensor:
        """Of values ``[1, ...]`` those; of values of each expert's own, ``[N, ...]``, each sample's: ``[V, ...]``."""
        if len(values) == 1:
            return values
        assert self.writer is not None
        width = values[0].numel()
        each = gather_rows(values.flatten(), self.writer.expert, len(values), (), width)
        return each.view(-1, *values.shape[1:])

    def project(self, shortcut: nn.Module, x: Tensor, source: Routing | None, gate_after: bool = False) -> Tensor:
        """A shortcut from features that ``source`` wrote to those that ``writer`` wrote, which stays the writer."""
        if isinstance(shortcut, Projection):
            return shortcut(x, source, self.writer)
        routed = RoutedConv2d | MixtureOfConvolutions
        if not (isinstance(shortcut, nn.Sequential) and len(shortcut) and isinstance(shortcut[0], routed)):
            return shortcut(x)
        if isinstance(shortcut, Shortcut):
            x = every(x, shortcut.step)
        writer, self.writer = self.writer, source
        y = self.convolve(shortcut[0], x, shortcut[1], gate_after)
        self.writer = writer
        return y

    def features(self, x: Tensor) -> Tensor:
        """Means over the image, ``[B, C]``, gated if a gate waits."""
        means = self._means(x)
        return self.gated(x.mean((2, 3)) if means is None else means.to(x.dtype))

    def gated(self, features: Tensor) -> Tensor:
        return features if self.gate_at_end is None else self.gate_at_end.combine(features)

    def linear(self, layer: nn.Module, features: Tensor) -> Tensor:
        """``layer(features)``; one over windows reads the columns of those channels that the writer wrote, one of each
        expert's own follows the writer."""
        if not isinstance(layer, RoutedLinear):
            return layer(features)
        assert self.writer is not None
        return layer(features, self.writer.ungated())


def conv(
    spec: ModelSpec, source: Channels, out: Channels, kernel: int, stride: int = 1, *, routed: bool = True
) -> nn.Module:
    """A convolution without bias, padded to keep the size at stride 1; routed where the spec's kind is. ``routed=False``:
    only where all of the network is."""
    padding = kernel // 2
    if spec.kind == "sparse":
        return MaskedConv2d(source.width, out.width, kernel, stride, padding, bias=False, ratio=spec.ratio)
    if not spec.routes(routed):
        return nn.Conv2d(source.width, out.width, kernel, stride, padding, bias=False)
    layer = _routed(spec, source, out, kernel, stride, padding)
    if spec.route_per == "layer" and router_class(spec.router).level == "layer":
        add_router(layer, spec, source.width)
    return layer


def _routed(spec: ModelSpec, source: Channels, out: Channels, kernel: int, stride: int, padding: int) -> RoutedConv2d:
    in_side = source.width if source.windows is None else source.windows
    out_side = out.width if out.windows is None else out.windows
    return RoutedConv2d(in_side, out_side, kernel, stride, padding, bias=False, num_experts=spec.num_experts)


def norm(spec: ModelSpec, channels: Channels, *, routed: bool = True) -> nn.Module:
    """A BatchNorm of these channels; ``routed``: they were written by a routed convolution."""
    if spec.kind == "sparse":
        return LiveBatchNorm2d(channels.width)
    if spec.routes(routed) and spec.bn == "per_expert":
        if channels.windows is None:
            return RoutedBatchNorm2d(channels.width, spec.num_experts)
        if not channels.windows.is_whole:
            return RoutedBatchNorm2d(channels.windows)
    return nn.BatchNorm2d(channels.width)


def linear(spec: ModelSpec, features: int, out: int) -> nn.Module:
    """A linear layer; of each expert's own where all of the network is."""
    return RoutedLinear(features, out, num_experts=spec.num_experts) if spec.whole else nn.Linear(features, out)


def layer_norm(spec: ModelSpec, features: int) -> nn.Module:
    return RoutedLayerNorm(features, spec.num_experts, eps=1e-6) if spec.whole else nn.LayerNorm(features, eps=1e-6)


def classifier(spec: ModelSpec, channels: Channels, features: int, positions: int = 1) -> nn.Module:
    """A linear layer that reads ``positions`` values of each of the channels; of windows, the dense layer's columns."""
    windows = channels.windows
    if windows is None or windows.is_whole:
        return linear(spec, channels.width * positions, features)
    starts = tuple(start * positions for start in windows.starts)
    return RoutedLinear(ExpertSlices(windows.total * positions, windows.width * positions, starts), features)


def add_router(site: nn.Module, spec: ModelSpec, in_channels: int) -> None:
    site.router = build_router(spec.router, in_channels, spec.num_experts, spec.router_options, spec.image_size)


class Projection(nn.Module):
    """The windows layout's shortcut that has no router: from the window that wrote the input to the block's output's.

    Args:
        source, out: the channels on its sides.
        stride: of the 1×1 convolution; ``convolution=False``: the identity, which takes the output's window of a whole
            input and otherwise adds position by position.
    """

    def __init__(self, spec: ModelSpec, source: Channels, out: Channels, stride: int, convolution: bool) -> None:
        super().__init__()
        assert out.windows is not None
        if convolution:
            # the names of an ordinary projection, nn.Sequential(conv, norm)
            self.add_module("0", _routed(spec, source, out, 1, stride, 0))
            self.add_module("1", norm(spec, out))
        channels = torch.tensor(out.windows.starts)[:, None] + torch.arange(out.windows.width)
        self.register_buffer("channels", channels, persistent=False)

    def forward(self, x: Tensor, source: Routing | None, out: Routing | None) -> Tensor:
        assert out is not None
        if not len(self._modules):
            index = self.channels[out.expert]  # type: ignore[index]
            return x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))
        layer, after = self._modules.values()
        assert isinstance(layer, RoutedConv2d) and after is not None
        y = layer(x, out.ungated(), None if layer.in_slices.is_whole else source)
        return after(y, out) if isinstance(after, RoutedBatchNorm2d) else after(y)


def step_before(spec: ModelSpec, stride: int, *, routed: bool = True) -> int:
    """By how much a block thins out the pixels before a 1×1 convolution of this stride, which then has stride 1: the same
    sum. The backward of torch's own (2.13, CPU, channels_last) writes past its memory at 8 channels or fewer on images
    from 56 pixels on. The routed convolutions have kernels of their own."""
    return 1 if spec.routes(routed) else stride


def every(x: Tensor, step: int) -> Tensor:
    """Every ``step``-th pixel; by pooling, whose derivative keeps channels_last: that of slicing is contiguous, and all
    that is added to it behind goes from one format to the other."""
    return x if step == 1 else F.avg_pool2d(x, 1, step)


class Shortcut(nn.Sequential):
    """A 1×1 convolution and its BatchNorm, of every ``step``-th pixel."""

    def __init__(self, step: int, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(every(x, self.step))


def pointwise(spec: ModelSpec, source: Channels, out: Channels, stride: int, *, routed: bool = True) -> Shortcut:
    """The shortcut of a 1×1 convolution with its BatchNorm."""
    step = step_before(spec, stride, routed=routed)
    layer = conv(spec, source, out, 1, stride // step, routed=routed)
    return Shortcut(step, layer, norm(spec, out, routed=routed))


def projection(spec: ModelSpec, source: Channels, out: Channels, stride: int, needed: bool) -> nn.Module:
    """The shortcut of a block whose 1×1 projection has no router. ``needed``: the dense network has one here."""
    if spec.windows:
        if needed:
            return Projection(spec, source, out, stride, convolution=True)
        if source.windows is None and not out.windows.is_whole:  # type: ignore[union-attr]
            return Projection(spec, source, out, stride, convolution=False)
        return nn.Sequential()
    if not needed:
        return nn.Sequential()
    return pointwise(spec, source, out, stride, routed=False)


def _adds_alike(add: nn.Module | None, x: Tensor, other: Tensor | None) -> bool:
    """Whether a block's sum, if it has one, is that of two tensors of one shape."""
    return add is None or type(add) is Add or (type(add) is AddToEach and other is not None and x.shape == other.shape)


class Stage(nn.Module):
    """Blocks one after the other, named 0, 1, …; with ``route_per="stage"`` a router for them all."""

    def __init__(self, spec: ModelSpec, source: Channels, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(str(i), block)
        self.blocks = len(blocks)
        if spec.routed and spec.route_per == "stage":
            add_router(self, spec, source.width)

    def forward(self, x: Tensor, path: Path) -> Tensor:
        path.enter(self, x)
        for i in range(self.blocks):
            x = self[i](x, path)
        return x

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, index: int) -> nn.Module:
        return getattr(self, str(range(self.blocks)[index]))


class Backbone(nn.Module, abc.ABC):
    """What the backbones share: normalisation, and the router of a whole network.

    Raises:
        ValueError: for a ``moe_at`` that is empty or names a stage that is not among the ``stages``.
    """

    router: Router | None
    takes_top_k = False

    def __init__(self, spec: ModelSpec, stages: int) -> None:
        super().__init__()
        if spec.router_options.top_k > 1 and not self.takes_top_k and spec.kind not in PLACED:
            raise ValueError(f"top_k: the layers of {spec.arch} take one expert each, got {spec.router_options.top_k}")
        if (
            spec.routed
            and spec.moe_at is not None
            and not (spec.moe_at and all(1 <= int(stage) <= stages for stage in spec.moe_at))
        ):
            raise ValueError(f"moe_at: expected stages from 1 to {stages} of {spec.arch}, got {spec.moe_at}")
        self.spec = spec
        self.normalize = Normalize(spec.mean, spec.std) if spec.normalize else nn.Identity()

    def _add_network_router(self, channels: int) -> None:
        """Of the image, or of the ``channels`` features behind the stem."""
        self.image_level = router_class(self.spec.router).level == "image"
        if self.spec.routed and (self.image_level or self.spec.route_per == "network"):
            add_router(self, self.spec, 3 if self.image_level else channels)

    def forward(self, x: Tensor) -> Tensor:
        """x ``[B, 3, H, W]`` in [0, 1] to logits ``[B, num_classes]``."""
        x, path = self.normalize(x), Path(self.spec.routed)
        if self.image_level:
            path.enter(self, x)
        return self.run(x, path)

    @abc.abstractmethod
    def run(self, x: Tensor, path: Path) -> Tensor:
        """The network behind the normalisation, along a path that begins."""

    def _behind_stem(self, x: Tensor, path: Path) -> Tensor:
        if not self.image_level:
            path.enter(self, x)
        return x
