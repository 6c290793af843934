# SPDX-License-Identifier: Apache-2.0
"""Routers: from features or images to scores ``[B, num_experts]``.

A router of level ``"layer"`` sees the input of the one layer it routes; a router of level ``"image"`` sees the normalised
image, once, and its choice goes to every routed layer. :func:`register_router` adds one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from moe_kernels import Routing, functional

from .registry import Registry

__all__ = [
    "GlobalRouter",
    "LightRouter",
    "NonFiniteRouterError",
    "Router",
    "build_router",
    "list_routers",
    "record_scores",
    "register_router",
]


class NonFiniteRouterError(RuntimeError):
    """A router gave NaN or infinite scores; the message names its layer."""


class Router(nn.Module):
    """What a router is: ``forward`` gives scores, :meth:`route` the choice made of them.

    Subclasses take ``(in_channels, num_experts)`` and say their ``level``.
    """

    level: ClassVar[str] = "layer"  # "layer" or "image"

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.num_experts = num_experts
        self.gate = "straight_through"
        self.routes = ""  # the name of the layer it routes; "" for all

    def route(self, x: Tensor) -> Routing:
        """The chosen expert of each sample of ``x``.

        Raises:
            NonFiniteRouterError: if a score is not finite (looked at on the CPU, outside a trace).
        """
        scores = self(x)
        if scores.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(torch.isfinite(scores).all()):
            hint = "a lower learning rate usually helps"
            if self.gate == "raw_straight_through":
                hint = "the gate 'raw_straight_through' is known to diverge: 'straight_through' does not"
            raise NonFiniteRouterError(
                f"the router of {self.routes or 'all layers'} gave scores that are not finite; {hint}"
            )
        return Routing.from_scores(scores, gate=self.gate)

    def extra_repr(self) -> str:
        return f"gate={self.gate!r}"


_ROUTERS: Registry[Callable[[int, int], Router]] = Registry("router")


def register_router(name: str) -> Callable[[type[Router]], type[Router]]:
    """Class decorator: makes a :class:`Router` known to ``create_model(router=name)``."""
    return _ROUTERS.register(name)  # type: ignore[return-value]


def list_routers() -> list[str]:
    return _ROUTERS.names()


def build_router(name: str, in_channels: int, num_experts: int, gate: str, routes: str = "") -> Router:
    router = _ROUTERS[name](in_channels, num_experts)
    router.gate = gate
    router.routes = routes
    return router


def router_class(name: str) -> type[Router]:
    return _ROUTERS[name]  # type: ignore[return-value]


@register_router("light")
class LightRouter(Router):
    """One for each routed layer: channel means of the layer's input, layer-normalised, then linear; C * N
    multiply-accumulates, far below 1 % of the layer's.

    Normalised over the channels of each sample (LayerNorm), because the features' scale drifts with depth and training,
    and a choice must not depend on the rest of the batch. The paper leaves its layer routers open; this is our choice.
    """

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__(in_channels, num_experts)
        self.norm = nn.LayerNorm(in_channels)
        self.linear = nn.Linear(in_channels, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x.mean((2, 3))))

    def route(self, x: Tensor) -> Routing:
        # the CPU has no kernel for it, and there the scores are looked at
        if x.device.type == "cpu" or torch.compiler.is_compiling() or not self._is_plain():
            return super().route(x)
        norm, linear = self.norm, self.linear
        return functional.pooled_routing(
            x, linear.weight, linear.bias, norm.weight, norm.bias, eps=norm.eps, gate=self.gate
        )

    def _is_plain(self) -> bool:
        """Whether nobody changed or watches the forward or a part of it: a subclass, another module in place, a hook."""
        return (
            getattr(self.forward, "__func__", None) is LightRouter.forward
            and (type(self.norm), type(self.linear)) == (nn.LayerNorm, nn.Linear)
            and not _has_any_global_hook()
            and not any(
                hooks
                for m in (self, self.norm, self.linear)
                for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
            )
        )


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
    """Every router's scores of a forward, by module name, with their graph; a router's last forward stands."""
    scores: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            scores[name] = output

        return record

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if isinstance(m, Router)]
    try:
        yield scores
    finally:
        for handle in handles:
            handle.remove()
