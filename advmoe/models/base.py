# SPDX-License-Identifier: Apache-2.0
"""The registry of architectures, and views of a routed model that do not depend on its architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moe_kernels import RoutedConv2d, RoutedLinear, Routing

from ..registry import Registry, unknown_name
from ..routers import GATES, RouterOptions, list_routers, router_class, routers_of
from .upcycling import routed_in_place

__all__ = [
    "KINDS",
    "MODEL_OPTIONS",
    "ModelSpec",
    "Normalize",
    "backbone_parameters",
    "create_model",
    "initialize",
    "list_models",
    "record_routing",
    "register_model",
    "router_parameters",
]

WHOLE = ("network_moe", "dual_moe")  # those whose experts are whole networks
PLACED = ("block_moe", "conv_moe")  # those where chosen blocks or convolutions of a dense network are mixtures
ROUTED = ("moe", "upcycled", *WHOLE, *PLACED)
KINDS = ("dense", "s_dense", "sparse", *ROUTED)
LAYOUTS = ("partition", "windows")
ROUTE_PER = ("layer", "block", "stage", "network")
STEMS = ("cifar", "imagenet")
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
_COMMON = ("mean", "std", "stem")
_ROUTER = ("gate", "temperature", "noise", "standardize", "top_k", "capacity")
MODEL_OPTIONS = {  # of create_model, for each kind
    "dense": _COMMON,
    "s_dense": _COMMON,
    "sparse": _COMMON,
    "moe": (*_COMMON, *_ROUTER, "bn", "gate_after", "route_per", "moe_at"),
    "upcycled": (*_COMMON, *_ROUTER),
    "network_moe": (*_COMMON, *_ROUTER, "mix", "frozen_router"),
    "dual_moe": (*_COMMON, *_ROUTER, "mix", "frozen_router", "alpha", "dual_on"),
    "block_moe": (*_COMMON, *_ROUTER, "moe_at"),
    "conv_moe": (*_COMMON, *_ROUTER, "moe_at", "gate_after"),
}


@dataclass(frozen=True)
class ModelSpec:
    """What ``create_model`` was asked for, checked; an architecture is built from this alone."""

    arch: str
    kind: str
    num_classes: int
    image_size: int
    num_experts: int
    ratio: float
    width: int | None
    layout: str
    router: str
    normalize: bool
    stem: str | None
    mean: tuple[float, ...] = CIFAR10_MEAN
    std: tuple[float, ...] = CIFAR10_STD
    bn: str = "shared"
    gate_after: str = "conv"
    route_per: str = "layer"
    moe_at: tuple[int | str, ...] | None = None
    router_options: RouterOptions = field(default_factory=RouterOptions)
    mix: str = "logits"
    frozen_router: bool = False
    alpha: float = 0.7
    dual_on: str = "logits"

    @property
    def routed(self) -> bool:
        return self.kind == "moe"

    @property
    def whole(self) -> bool:
        """Whether experts are whole networks: every layer has a slice for each."""
        return self.kind in WHOLE

    def routes(self, routed: bool) -> bool:
        """Whether a layer is routed that kind moe routes, or (``routed`` False) does not."""
        return self.whole or (self.routed and routed)

    @property
    def imagenet_stem(self) -> bool:
        return self.image_size >= 128 if self.stem is None else self.stem == "imagenet"

    @property
    def windows(self) -> bool:
        """Whether experts are windows of a dense layer's channels, on both sides."""
        return self.routed and self.layout == "windows"

    def scaled(self, channels: int) -> int:
        """``int(ratio * channels)`` where the kind scales widths; at least 1."""
        whole = self.kind in ("dense", "sparse", "network_moe", *PLACED)
        return channels if whole else max(1, int(self.ratio * channels))

    def dense(self) -> ModelSpec:
        """The spec of an ordinary layer of the dense network's width."""
        return dataclasses.replace(self, kind="dense")

    def at_stage(self, stage: int) -> ModelSpec:
        """The spec of stage 1, 2, …: where ``moe_at`` leaves it out, its layers are ordinary, of a pathway's width."""
        if not self.routed or self.moe_at is None or stage in self.moe_at:
            return self
        return dataclasses.replace(self, kind="s_dense")


_MODELS: Registry[Callable[[ModelSpec], nn.Module]] = Registry("arch")


def register_model(name: str) -> Callable[[Callable[[ModelSpec], nn.Module]], Callable[[ModelSpec], nn.Module]]:
    """Decorator: makes ``build(spec) -> nn.Module`` known to ``create_model(name)``."""
    return _MODELS.register(name)


def list_models() -> list[str]:
    return _MODELS.names()


def build(spec: ModelSpec) -> nn.Module:
    """The architecture by itself."""
    return _MODELS[spec.arch](spec)


_KINDS: dict[str, Callable[[ModelSpec], nn.Module]] = {}
_Made = TypeVar("_Made", bound=Callable[[ModelSpec], nn.Module])


def register_kind(name: str) -> Callable[[_Made], _Made]:
    """Decorator: what makes a model of this kind, out of architectures that it builds."""

    def decorate(make: _Made) -> _Made:
        _KINDS[name] = make
        return make

    return decorate


def default_router(kind: str) -> str:
    return "linear" if kind in WHOLE else "gap-fc" if kind in PLACED else "light"


def read_gate(kind: str, router: str | None, gate: str | None) -> tuple[str | None, str | None]:
    """Router and gate as asked for. What the paper of kinds block_moe and conv_moe calls a gate is a router here, and
    their ``gate`` may name one.

    Raises:
        ValueError: for a gate that is none, or if both name a router.
    """
    if gate is None or gate in GATES:
        return router, gate
    known = (*GATES, *list_routers()) if kind in PLACED else GATES
    if gate not in known:
        raise unknown_name("gate", gate, known)
    if router is not None:
        raise ValueError(f"gate: {gate!r} is a router, and router {router!r} is given too")
    return gate, None


def default_gate(top_k: int) -> str:
    return "straight_through" if top_k == 1 else "softmax"


def create_model(
    arch: str,
    kind: str = "moe",
    num_classes: int = 10,
    image_size: int = 32,
    num_experts: int = 2,
    ratio: float = 0.5,
    width: int | None = None,
    layout: str = "partition",
    router: str | None = None,
    normalize: bool = True,
    **options: Any,
) -> nn.Module:
    """A network with ``forward(x [B, 3, H, W] in [0, 1]) -> logits [B, num_classes]``; normalisation inside.

    Args:
        arch: an architecture of :func:`list_models`.
        kind: ``"dense"`` (every width as it is), ``"s_dense"`` (all widths times ratio: about one pathway), ``"sparse"``
            (dense, with a mask over output channels that ``advmoe.sparse`` learns to keep ``ratio`` of them), ``"moe"``
            (routed convolutions of num_experts experts, each as wide as s_dense's), ``"upcycled"`` (what
            :func:`advmoe.upcycle` makes of the dense network), ``"network_moe"`` (num_experts dense networks and a
            router of the image: :class:`advmoe.models.NetworkMoE`), ``"dual_moe"`` (two of the latter, a standard and a
            robust one: :class:`advmoe.models.DualModel`), ``"block_moe"`` (a ResNet in which chosen residual blocks are
            mixtures of blocks) or ``"conv_moe"`` (a network in which chosen convolutions are mixtures of convolutions):
            the robust sparse MoE layers of Pavlitska et al., ICCVW 2025 (:mod:`advmoe.models.placed`).
        ratio: r, the width of an expert against the dense layer's; widths are ``int(r * channels)``.
        width: channels of the first stage; the architecture's own by default.
        layout: of kind moe. ``"partition"``: expert e owns rows ``e * w : (e + 1) * w`` of the weight, as in AdvMoE's
            released code. ``"windows"``: the paper's subsets of channels: the weights are the dense network's, expert e
            is :meth:`moe_kernels.ExpertSlices.windows` of them on both sides, overlapping where N * r > 1; with r = 1 it
            is the dense network. The stem keeps its full width (but DenseNet's), and the classifier has a column for each
            dense channel and reads those of the window that it gets.
        router: a name of ``advmoe.routers.list_routers()``, or ``module:Class``; by default ``"light"``, of kind
            network_moe and dual_moe ``"linear"``, of kind block_moe and conv_moe ``"gap-fc"``.
        normalize: subtract ``mean`` and divide by ``std`` (options; CIFAR-10's by default) inside the model.
        options: ``mean``, ``std``; ``stem``: ``"cifar"`` (3×3) or ``"imagenet"`` (7×7 of stride 2, pooled; by default
            from 128 pixels on). For kinds that have routers

            - ``gate``, ``temperature``, ``noise``, ``standardize``, ``top_k``, ``capacity``: see
              :class:`advmoe.routers.RouterOptions`; the gate of several choices is ``"softmax"`` by default; of kinds moe
              and upcycled more than one choice only in vision transformers; of kinds block_moe and conv_moe ``gate`` may
              name a router instead, such as ``"conv-gap"``;

            for kinds block_moe and conv_moe also

            - ``moe_at``: patterns of the names of the dense network's blocks or convolutions, such as
              ``("layer4.1",)``; ``*`` stands for any text, and what names a module names what is in it. By default
              ``("layer4",)``, both blocks of ResNet-18's conv5_x, and ``("layer4.*.conv*",)``, its convolutions but the
              shortcut's (``("layer4",)``: with it, as in the released code);
            - ``gate_after``, of kind conv_moe: ``"conv"``, or ``"norm"``: gates and sum come behind the next BatchNorm;

            for kinds network_moe and dual_moe also

            - ``mix``: ``"logits"`` of the chosen experts are mixed, or their ``"probabilities"``;
            - ``frozen_router``: the router stays as it is drawn;
            - ``alpha`` and ``dual_on``, of kind dual_moe alone: the robust one's share, and what is mixed, ``"logits"``
              or ``"probabilities"``;

            for kind moe also

            - ``bn``: ``"shared"`` by all experts (as released; the default of partition) or ``"per_expert"`` (the
              default of windows, where it belongs to the dense network's channels);
            - ``gate_after``: ``"conv"``, or ``"norm"``: behind the BatchNorm, which cancels part of the gradient of a
              gate before it (ResNet and VGG);
            - ``route_per``: a router for each ``"layer"`` (the default), ``"block"``, ``"stage"``, or one behind the stem
              (``"network"``); an image-level router makes one choice for all;
            - ``moe_at``: the stages that are routed, such as ``(3, 4)``; all by default (partition only). Of a vision
              transformer the blocks, by default every second one.

    Raises:
        ValueError: for an unknown name (with the near matches), option, or a size that does not fit.
    """
    _MODELS[arch]  # an unknown name raises
    if kind not in KINDS:
        raise unknown_name("kind", kind, KINDS)
    if kind in ("upcycled", *WHOLE, *PLACED) and layout != "partition":
        raise ValueError(
            f"layout: the experts of kind {kind} have weights of their own, layout 'partition'; got {layout!r}"
        )
    for name in options:
        if name not in MODEL_OPTIONS[kind]:
            raise unknown_name(f"option of kind {kind}", name, MODEL_OPTIONS[kind])
    options = {name: value for name, value in options.items() if value is not None}
    options.setdefault("stem", None)
    given_route_per = options.get("route_per")
    whole = kind in WHOLE
    options.setdefault("route_per", "network" if whole else "layer")
    options.setdefault("bn", "per_expert" if whole or layout == "windows" else "shared")
    router, options["gate"] = read_gate(kind, router, options.get("gate"))
    if options["gate"] is None:
        options["gate"] = default_gate(options.get("top_k", 1))
    if router is None:
        router = default_router(kind)
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio: expected 0 < ratio <= 1, got {ratio}")
    for name, size in (
        ("num_experts", num_experts),
        ("num_classes", num_classes),
        ("image_size", image_size),
        ("width", 1 if width is None else width),
    ):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    level = router_class(router).level
    if level == "image" and kind in PLACED:
        raise ValueError(f"router: the layers of kind {kind} have one each, of level layer; got {router!r}")
    if level == "image":
        if given_route_per not in (None, "network"):
            raise ValueError(f"route_per: the router {router!r} chooses once for each image; got {given_route_per!r}")
        options["route_per"] = "network"
    for name, value, known in (
        ("layout", layout, LAYOUTS),
        ("stem", options["stem"] or "cifar", STEMS),
        ("bn", options["bn"], ("shared", "per_expert")),
        ("gate_after", options.get("gate_after", "conv"), ("conv", "norm")),
        ("route_per", options["route_per"], ROUTE_PER),
    ):
        if value not in known:
            raise unknown_name(name, value, known)
    router_options = RouterOptions(**{n: options.pop(n) for n in _ROUTER if n in options})
    if router_options.gate == "softmax" and options["route_per"] in ("block", "stage"):
        raise ValueError("gate: 'softmax' multiplies through all layers that share a choice; use it per layer or network")
    for name in ("mean", "std"):
        if name in options:
            options[name] = tuple(float(v) for v in options[name])
    if "moe_at" in options:
        given = options["moe_at"]
        kind_of_place = str if kind in PLACED else int
        if isinstance(given, str) or not all(isinstance(at, kind_of_place) for at in given):
            what = "patterns of names" if kind in PLACED else "numbers of stages"
            raise ValueError(f"moe_at: expected {what} for kind {kind}, got {given!r}")
        options["moe_at"] = tuple(given if kind in PLACED else (int(v) for v in given))
        if layout == "windows":
            raise ValueError("moe_at: the windows of one layer are the input of the next; use layout 'partition'")
    spec = ModelSpec(
        arch, "dense" if kind == "upcycled" else kind, num_classes, image_size, num_experts, ratio, width, layout,
        router, normalize, router_options=router_options, **options,
    )  # fmt: skip
    model = _KINDS[kind](spec) if kind in _KINDS else build(spec)
    if kind == "upcycled":
        return routed_in_place(model, num_experts, ratio, router, router_options)
    for name, module in routers_of(model).items():
        module.routes = name.removesuffix(".router") if "." in name else ""
    return model


class Normalize(nn.Module):
    """``(x - mean) / std`` for each channel. Not in the state_dict: the model's own settings hold it."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"mean, std: expected as many positive deviations as means, got {mean} and {std}")
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def initialize(model: nn.Module) -> None:
    """The released code's: convolutions Kaiming normal by the fan-out (of one expert, where routed), linear layers
    N(0, 0.01), BatchNorm 1 and 0; routers keep torch's own."""
    skip = {id(m) for router in routers_of(model).values() for m in router.modules()}
    for module in model.modules():
        if id(module) in skip:
            continue
        if isinstance(module, RoutedConv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear | RoutedLinear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """φ: the parameters of all routers, each once; not of those that are frozen for good (:attr:`Router.frozen`)."""
    return _of_routers([router for router in routers_of(model).values() if not router.frozen])


def backbone_parameters(model: nn.Module) -> list[nn.Parameter]:
    """ψ: all parameters but the routers'."""
    routers = {id(p) for p in _of_routers(routers_of(model).values())}
    return [p for p in model.parameters() if id(p) not in routers]


def _of_routers(routers: Iterable[nn.Module]) -> list[nn.Parameter]:
    return list({id(p): p for router in routers for p in router.parameters()}.values())


@dataclass
class _Record:
    """Hooks of one ``record_routing``."""

    routings: dict[str, Routing] = field(default_factory=dict)

    def layer(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            routing = args[1] if len(args) > 1 else kwargs["routing"]
            follows = any(routing.expert.is_set_to(earlier.expert) for earlier in self.routings.values())
            if not (isinstance(module, RoutedLinear) and follows):
                self.routings[name] = routing

        return hook

    def clear(self, module: nn.Module, args: Any) -> None:
        self.routings.clear()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Every routed layer's Routing of the model's last forward, in order, by module name; of linear layers those whose
    choice no layer before them has made: the first of an MLP, and no classifier.

    Works with any module that holds RoutedConv2d or RoutedLinear layers.
    """
    record = _Record()
    handles = [model.register_forward_pre_hook(record.clear)]
    for name, module in model.named_modules():
        if isinstance(module, RoutedConv2d | RoutedLinear):
            handles.append(module.register_forward_pre_hook(record.layer(name), with_kwargs=True))
    try:
        yield record.routings
    finally:
        for handle in handles:
            handle.remove()
