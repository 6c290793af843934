# SPDX-License-Identifier: Apache-2.0
"""Routers: from features or images to scores ``[B, num_experts]``.

A router of level ``"layer"`` sees the features before what it routes (a layer, or a block, a stage or the network: option
``route_per`` of ``create_model``); a router of level ``"image"`` sees the normalised image, once, and its choice goes to
every routed layer. :func:`register_router` adds one's own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from moe_kernels import Routing, ScoreNorm, functional
from moe_kernels.routing import GATES

from .registry import Registry, imported, unknown_name

__all__ = [
    "GATES",
    "ConvGapRouter",
    "ConvRouter",
    "DoubleConvRouter",
    "FixedRouter",
    "GapFcRouter",
    "GlobalRouter",
    "ImageRouter",
    "LightRouter",
    "LinearRouter",
    "NonFiniteRouterError",
    "ProjectionRouter",
    "RandomRouter",
    "Router",
    "RouterOptions",
    "ScoreNorm",
    "build_router",
    "limited_choice",
    "list_routers",
    "observe_routers",
    "only_expert",
    "record_scores",
    "register_router",
    "replay_routing",
    "router_class",
    "routers_of",
]

LEVELS = ("layer", "image")
Observer = Callable[["Router", Tensor, Routing], None]


@dataclass(frozen=True)
class RouterOptions:
    """How a router's scores become a choice.

    Args:
        gate: see :meth:`moe_kernels.Routing.from_scores`.
        temperature: scores are divided by it: above 1 the probabilities, and with them the gates' gradients and the
            balancing losses, are softer. The choice itself is the same.
        noise: standard deviation of Gaussian noise on the scores (after the temperature), in training mode only.
        standardize: each expert's scores get mean 0 and variance 1 over the images, by the batch in training and by
            running statistics in eval mode (BatchNorm without affine parameters). Experts are then used about alike from
            the first step on, whatever the router has learned, and its probabilities differ among images. None: as the
            router's class has it (:attr:`Router.standardized`).
        top_k: experts for each sample; with more than one the gate is ``"softmax"`` or ``"none"``.
        capacity: in training an expert takes at most ``ceil(capacity * B * top_k / N)`` choices of a forward's B samples,
            at least ``top_k``; what is above goes to the next best experts (:func:`limited_choice`). None: no limit. In
            eval mode there is none: an answer does not depend on the batch.

    Raises:
        ValueError: for a value out of range.
    """

    gate: str = "straight_through"
    temperature: float = 1.0
    noise: float = 0.0
    standardize: bool | None = None
    top_k: int = 1
    capacity: float | None = None

    def __post_init__(self) -> None:
        if self.capacity is not None and not 1 <= self.capacity < math.inf:
            raise ValueError(f"capacity: expected a finite number of at least 1, got {self.capacity}")
        if self.gate not in GATES:
            raise unknown_name("gate", self.gate, GATES)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: expected a finite number above 0, got {self.temperature}")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise: expected a finite number of at least 0, got {self.noise}")
        if self.top_k < 1:
            raise ValueError(f"top_k: expected at least 1, got {self.top_k}")
        if self.top_k > 1 and self.gate not in ("softmax", "none"):
            raise ValueError(f"gate: expected 'softmax' or 'none' with top_k {self.top_k}, got {self.gate!r}")


class NonFiniteRouterError(RuntimeError):
    """A router gave NaN or infinite scores; the message names its layer."""


class Router(nn.Module):
    """What a router is: ``forward`` gives scores, :meth:`route` the choice made of them.

    Subclasses take ``(in_channels, num_experts)`` and say their ``level``; one that has to know the size of the image
    overrides :meth:`build`.
    """

    level: ClassVar[str] = "layer"  # or "image"
    standardized: ClassVar[bool] = True  # whether scores are standardised by default
    reads_means: ClassVar[bool] = False  # whether forward takes channel means that are there already: forward(x, means)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if {"forward", "route", "_scores"} & cls.__dict__.keys() and "reads_means" not in cls.__dict__:
            cls.reads_means = False  # one of its own takes the features

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_experts = num_experts
        self.options = RouterOptions()
        self.routes = ""  # the name of the layer it routes; "" for all
        self.frozen = False  # stays as it was drawn, for good
        self.only: int | None = None  # every sample to this expert, without looking at it
        self.replayed: Routing | None = None  # the next choice, whatever comes in: see replay_routing
        self.score_norm: ScoreNorm | None = None
        self._observers: list[Observer] = []

    @classmethod
    def build(cls, in_channels: int, num_experts: int, image_size: int) -> Router:
        """A router for features of ``in_channels`` channels, or, of level image, for images of ``image_size`` pixels."""
        return cls(in_channels, num_experts)

    def route(self, x: Tensor, means: Tensor | None = None) -> Routing:
        """The chosen expert of each sample of ``x``.

        Args:
            means: the channel means of ``x``, where they are there already; for a router that ``reads_means``.

        Raises:
            NonFiniteRouterError: if a score is not finite (looked at on the CPU, outside a trace).
        """
        if self.replayed is not None:
            return self.replayed
        if self.only is not None:
            same = torch.full((x.shape[0],), self.only, dtype=torch.int64, device=x.device)
            return Routing(same, num_experts=self.num_experts)
        scores = self.scores(x, means)
        if scores.device.type == "cpu" and not torch.compiler.is_compiling():
            self.require_finite(scores)
        chosen = scores
        if self.options.noise and self.training:
            chosen = scores + self.options.noise * torch.randn_like(scores)
        k = self.options.top_k
        expert: Tensor | None = None
        if self.options.capacity is not None and self.training:
            expert = limited_choice(chosen.detach(), k, self.options.capacity)
        routing = Routing.from_scores(chosen, k, self.options.gate, expert)
        for observer in self._observers:
            observer(self, scores, routing)
        return routing

    def scores(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        """``[B, num_experts]`` as :meth:`route` chooses by them, but for noise: standardised, after the temperature."""
        scores = self._scores(x, means)
        return scores if self.options.temperature == 1 else scores / self.options.temperature

    def _scores(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        """Standardised; in float32 also under autocast: a choice between close scores is a matter of digits."""
        if _under_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return self._scores(x.float()) if means is None else self._scores(x, means.float())
        # a forward put in this router's place takes the features
        scores = self(x) if means is None or "forward" in self.__dict__ else self(x, means)
        return scores if self.score_norm is None else self.score_norm(scores)

    def require_finite(self, scores: Tensor) -> None:
        """Waits for the device.

        Raises:
            NonFiniteRouterError: if a score is NaN or infinite.
        """
        if bool(torch.isfinite(scores).all()):
            return
        hint = "a lower learning rate usually helps"
        if self.options.gate == "raw_straight_through":
            hint = "the gate 'raw_straight_through' is known to diverge: 'straight_through' does not"
        raise NonFiniteRouterError(f"the router of {self.routes or 'all layers'} gave scores that are not finite; {hint}")

    def extra_repr(self) -> str:
        options, plain = dataclasses.asdict(self.options), dataclasses.asdict(RouterOptions())
        changed = {n: v for n, v in options.items() if n == "gate" or v != plain[n]}
        return ", ".join(f"{name}={value!r}" for name, value in changed.items())


@torch.no_grad()
def limited_choice(scores: Tensor, top_k: int, capacity: float) -> Tensor:
    """The ``top_k`` highest of ``scores [B, N]`` for each sample, no expert more than ``ceil(capacity * B * top_k / N)``
    times (at least ``top_k``): int64 ``[B]``, or ``[B, top_k]``.

    Of those that want a full expert the highest scores get it, the first samples of equal ones; the others go on to their
    next best with room, first choices before second ones. Where only experts that a sample has already are left, the
    limit yields. The order of the samples in the batch decides nothing else. (The released code of robust sparse MoE
    layers fills experts in that order.)
    """
    samples, experts = scores.shape
    scores = scores.clamp_min(torch.finfo(scores.dtype).min)  # minus infinity is for what is not to be had
    room = max(top_k, math.ceil(capacity * samples * top_k / experts))
    left = torch.full((experts,), room, device=scores.device)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    expert = torch.empty((samples, top_k), dtype=torch.int64, device=scores.device)
    for choice in range(top_k):
        waiting = torch.ones(samples, dtype=torch.bool, device=scores.device)
        while waiting.any():  # each round fills an expert, or places all
            allowed = ~taken & (left > 0)
            # nothing with room is left: whatever the sample has not yet
            forced = ~allowed.any(1)
            wanted = scores.masked_fill(~torch.where(forced[:, None], ~taken, allowed), -math.inf).argmax(1)
            rest = waiting & forced
            expert[rest, choice] = wanted[rest]
            waiting &= ~rest
            for e in wanted[waiting].unique().tolist():
                here = (waiting & (wanted == e)).nonzero().squeeze(1)
                first = here[scores[here, e].argsort(descending=True, stable=True)][: int(left[e])]
                expert[first, choice] = e
                waiting[first] = False
                left[e] -= len(first)
        taken.scatter_(1, expert[:, choice : choice + 1], True)
    return expert[:, 0] if top_k == 1 else expert


def _under_autocast(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # torch has no autocast for meta


_ROUTERS: Registry[type[Router]] = Registry("router")


def register_router(name: str) -> Callable[[type[Router]], type[Router]]:
    """Class decorator: makes a :class:`Router` known to ``create_model(router=name)``.

    Raises:
        ValueError: if the name is taken, or the class' level is none.
    """

    def decorate(router: type[Router]) -> type[Router]:
        if router.level not in LEVELS:
            raise unknown_name("level", router.level, LEVELS)
        return _ROUTERS.register(name)(router)

    return decorate


def list_routers() -> list[str]:
    return _ROUTERS.names()


def build_router(name: str, in_channels: int, num_experts: int, options: RouterOptions, image_size: int = 32) -> Router:
    """A router by its name.

    Raises:
        ValueError: as :func:`router_class`.
    """
    router = router_class(name).build(in_channels, num_experts, image_size)
    router.options = options
    standardize = router.standardized if options.standardize is None else options.standardize
    if options.top_k > num_experts:
        raise ValueError(f"top_k: expected at most the {num_experts} experts, got {options.top_k}")
    # of one that learns nothing there is nothing to keep alive, and a constant would be lost
    if standardize and next(router.parameters(), None) is not None:
        router.score_norm = ScoreNorm(num_experts)
    return router


def router_class(name: str) -> type[Router]:
    """A registered router, or the class that ``module:Class`` names, which is imported (commands register none).

    Raises:
        ValueError: if there is none of the name, or if the class is no :class:`Router`.
    """
    if not isinstance(name, str) or ":" not in name:
        return _ROUTERS[name]
    try:
        router: type[Router] = imported(name)
    except ValueError as error:
        raise ValueError(f"router: {error}") from error
    if not (isinstance(router, type) and issubclass(router, Router) and router.level in LEVELS):
        raise ValueError(f"router: expected a subclass of Router with a level of {' or '.join(LEVELS)}, got {name}")
    return router


def routers_of(model: nn.Module) -> dict[str, Router]:
    """Every router by the name of its module, in order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


@register_router("light")
class LightRouter(Router):
    """One for each routed layer: channel means of the layer's input, layer-normalised, then linear; C * N
    multiply-accumulates, far below 1 % of the layer's.

    Normalised over the channels of each sample (LayerNorm), because the features' scale drifts with depth and training,
    and a choice must not depend on the rest of the batch. The paper leaves its layer routers open; this is our choice.
    """

    reads_means = True

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__(in_channels, num_experts)
        self.norm = nn.LayerNorm(in_channels)
        self.linear = nn.Linear(in_channels, num_experts)

    def forward(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        """Scores; ``means [B, C]`` of ``x [B, C, H, W]`` are taken where they are given."""
        means = x.mean((2, 3)) if means is None else means.to(self.linear.weight.dtype)
        return self.linear(self.norm(means))

    def route(self, x: Tensor, means: Tensor | None = None) -> Routing:
        # the CPU has no kernel for it, and there the scores are looked at
        watched = x.device.type == "cpu" or torch.compiler.is_compiling() or _under_autocast(x)
        if watched or not self._is_plain():
            return super().route(x, means)
        weight, bias = self._as_one_layer()
        return functional.pooled_routing(
            x, weight, bias, self.norm.weight, self.norm.bias, eps=self.norm.eps, gate=self.options.gate
        )

    def _as_one_layer(self) -> tuple[Tensor, Tensor]:
        """The linear layer with what comes behind it in eval mode, standardisation and temperature, which are linear."""
        weight: Tensor = self.linear.weight
        bias: Tensor = self.linear.bias
        if self.score_norm is not None:
            mean, var = self.score_norm.running_mean, self.score_norm.running_var
            assert mean is not None and var is not None
            scale = torch.rsqrt(var + self.score_norm.eps)
            weight, bias = weight * scale[:, None], (bias - mean) * scale
        if self.options.temperature != 1:
            weight, bias = weight / self.options.temperature, bias / self.options.temperature
        return weight, bias

    def _is_plain(self) -> bool:
        """Whether nobody changed or watches the forward or a part of it: a subclass, another module in place, a hook."""
        # in training noise is drawn, and the batch's own statistics are taken
        moving = self.training and (bool(self.options.noise) or self.score_norm is not None)
        return (
            self.only is None
            and self.replayed is None
            and self.options.top_k == 1
            and not (self.training and self.options.capacity is not None)
            and not self._observers
            and not moving
            and getattr(self.forward, "__func__", None) is LightRouter.forward
            and (type(self.norm), type(self.linear)) == (nn.LayerNorm, nn.Linear)
            and type(self.score_norm) in (ScoreNorm, type(None))
            and not _has_any_global_hook()
            and not any(
                hooks
                for m in self.modules()
                for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            )
        )


@register_router("conv")
class ConvRouter(Router):
    """One for each routed layer: a 3×3 convolution to one channel for each expert, then their means; 9 * C * N * H * W
    multiply-accumulates. It sees patterns that the means over the image hide from :class:`LightRouter`."""

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__(in_channels, num_experts)
        self.norm = nn.GroupNorm(1, in_channels)
        self.conv = nn.Conv2d(in_channels, num_experts, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x)).mean((2, 3))


@register_router("linear")
class LinearRouter(Router):
    """One choice for the whole network: a linear map of the flattened image; 3 * S * S * N multiply-accumulates."""

    level = "image"

    def __init__(self, in_channels: int, num_experts: int, image_size: int) -> None:
        super().__init__(in_channels, num_experts)
        self.image_size = image_size
        self.linear = nn.Linear(in_channels * image_size**2, num_experts)

    @classmethod
    def build(cls, in_channels: int, num_experts: int, image_size: int) -> Router:
        return cls(in_channels, num_experts, image_size)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"input: expected images of {self.image_size} pixels, got {tuple(x.shape[2:])}")
        return self.linear(x.flatten(1))


@register_router("image")
class ImageRouter(Router):
    """One choice for the whole network: three convolutions of stride 2 (8, 16 and 32 channels), means, linear; 0.20
    million multiply-accumulates on 32×32 images, less than 1 % of a ResNet-18's pathway.

    Normalised within each sample (GroupNorm with one group), because a choice must not depend on the rest of the batch.
    """

    level = "image"

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__(in_channels, num_experts)
        layers: list[nn.Module] = []
        channels = in_channels
        for width in (8, 16, 32):
            layers += [nn.Conv2d(channels, width, 3, 2, 1, bias=False), nn.GroupNorm(1, width), nn.ReLU()]
            channels = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean((2, 3)))


@register_router("gap-fc")
class GapFcRouter(Router):
    """Channel means of the layer's input, then linear; C * N multiply-accumulates. Of robust sparse MoE layers (Pavlitska
    et al., ICCVW 2025); :class:`LightRouter` without its normalisations."""

    standardized = False
    reads_means = True

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__(in_channels, num_experts)
        self.linear = nn.Linear(in_channels, num_experts)

    def forward(self, x: Tensor, means: Tensor | None = None) -> Tensor:
        """Scores; ``means [B, C]`` of ``x [B, C, H, W]`` are taken where they are given."""
        return self.linear(x.mean((2, 3)) if means is None else means.to(self.linear.weight.dtype))


@register_router("conv-gap")
class ConvGapRouter(Router):
    """A 3×3 convolution without padding and bias to one channel for each expert, then their means; 9 * C * N * (H - 2) *
    (W - 2) multiply-accumulates. Of the same paper; :class:`ConvRouter` without its normalisations.

    Raises:
        ValueError: in ``forward`` for features of fewer than 3 pixels a side.
    """

    standardized = False

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__(in_channels, num_experts)
        self.conv = nn.Conv2d(in_channels, num_experts, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 3:
            raise ValueError(f"router: conv-gap has no padding and takes features from 3x3 on, got {tuple(x.shape[2:])}")
        return self.conv(x).mean((2, 3))


@register_router("double-conv")
class DoubleConvRouter(Router):
    """A 3×3 convolution to 8 channels, BatchNorm, ReLU, a 3×3 convolution to one channel for each expert, means; 72 * H *
    W * (C + N) multiply-accumulates. Of the same paper; in training its choice depends on the batch."""

    standardized = False

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__(in_channels, num_experts)
        self.conv1 = nn.Conv2d(in_channels, 8, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, num_experts, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn(self.conv1(x)))).mean((2, 3))


@register_router("projection")
class ProjectionRouter(Router):
    """A random projection of the channel means, drawn once and never trained; C * N multiply-accumulates. Of the same
    paper."""

    standardized = False

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__(in_channels, num_experts)
        self.linear = nn.Linear(in_channels, num_experts, bias=False).requires_grad_(False)
        nn.init.normal_(self.linear.weight, 0.0, in_channels**-0.5)
        self.frozen = True

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


@register_router("random")
class RandomRouter(Router):
    """For ablation: each sample's expert is drawn anew, alike, in every forward, also in eval mode; from torch's global
    generator, which a run's checkpoint holds."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.rand((x.shape[0], self.num_experts), device=x.device, dtype=x.dtype)


@register_router("fixed")
class FixedRouter(Router):
    """For ablation: every sample to expert ``expert``, an attribute; 0 unless set."""

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__(in_channels, num_experts)
        self.expert = 0

    def forward(self, x: Tensor) -> Tensor:
        scores = x.new_zeros(x.shape[0], self.num_experts)
        scores[:, self.expert] = 1
        return scores


class _RouterBlock(nn.Module):
    """ResNet's basic block with the parameter-free shortcut (He et al. 2016, option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.widen = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.widen:
            half = self.widen // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.widen - half))
        return F.relu(y + x)


@register_router("global")
class GlobalRouter(Router):
    """One choice for the whole network: CIFAR ResNet-20 on the image, as in AdvMoE's released code; 269,202 parameters at
    N = 2 and 40.55 million multiply-accumulates on 32×32 images."""

    level = "image"
    standardized = False

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__(in_channels, num_experts)
        self.conv1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        channels = 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for block in range(3):
                blocks.append(_RouterBlock(channels, width, stride if block == 0 else 1))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(64, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


@contextmanager
def record_scores(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Every router's scores by module name, as they choose (standardised, after the temperature, before noise), with
    their graph; a router's last choice stands."""
    names = {router: name for name, router in routers_of(model).items()}
    scores: dict[str, Tensor] = {}

    def record(router: Router, chosen_by: Tensor, routing: Routing) -> None:
        scores[names[router]] = chosen_by

    with observe_routers(model, record):
        yield scores


@contextmanager
def observe_routers(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Calls ``observer(router, scores, routing)`` at each choice that a router of the model makes meanwhile: scores after
    the temperature, before noise, with their graph. Not while :attr:`Router.only` holds, when there is no choice."""
    routers = list(routers_of(model).values())
    for router in routers:
        router._observers.append(observer)
    try:
        yield
    finally:
        for router in routers:
            router._observers.remove(observer)


@contextmanager
def only_expert(router: Router, expert: int) -> Iterator[None]:
    """Meanwhile the router sends every sample to this expert, without a gate: see :attr:`Router.only`, which is restored,
    also on errors.

    Raises:
        ValueError: if there is no such expert.
    """
    if not 0 <= expert < router.num_experts:
        raise ValueError(f"expert: expected one of 0 .. {router.num_experts - 1}, got {expert}")
    before = router.only
    router.only = expert
    try:
        yield
    finally:
        router.only = before


@contextmanager
def replay_routing(choices: Mapping[Router, Routing]) -> Iterator[None]:
    """Meanwhile these routers make these choices, whatever they see, and are not observed; gates are as given."""
    for router, routing in choices.items():
        router.replayed = routing
    try:
        yield
    finally:
        for router in choices:
            router.replayed = None
