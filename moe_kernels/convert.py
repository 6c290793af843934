# SPDX-License-Identifier: Apache-2.0
"""Anybody's convolutions made routed, with routers of their own: :func:`convert`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .narrow import narrow, peculiarity
from .nn import RoutedConv2d
from .routing import Routing

__all__ = ["LightRouter", "ScoreNorm", "SelfRoutedConv2d", "convert"]

RouterFactory = Callable[[int, int], nn.Module]
Where = str | Sequence[str] | Callable[[str, nn.Conv2d], bool]


class ScoreNorm(nn.BatchNorm1d):
    """Scores ``[B, N]`` of mean 0 and variance 1 over the images, which keeps all experts in use; a single image, which
    has no variance, by the running statistics in training too."""

    def __init__(self, num_experts: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__(num_experts, affine=False, device=device, dtype=dtype)

    def forward(self, scores: Tensor) -> Tensor:
        if not self.training or scores.shape[0] != 1:
            return super().forward(scores)
        return F.batch_norm(scores, self.running_mean, self.running_var, eps=self.eps)


class LightRouter(nn.Module):
    """Channel means of features ``[B, C, H, W]``, layer-normalised, linear, standardised over the images: scores
    ``[B, N]``, at the cost of C * N multiply-accumulates."""

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(in_channels)
        self.linear = nn.Linear(in_channels, num_experts)
        self.score_norm = ScoreNorm(num_experts)

    def forward(self, x: Tensor) -> Tensor:
        return self.score_norm(self.linear(self.norm(x.mean((2, 3)))))


class SelfRoutedConv2d(nn.Module):
    """A RoutedConv2d with a router of its own, called as nn.Conv2d is: ``y = layer(x)``.

    Args:
        conv: gets the input and the router's choice.
        router: gives scores ``[B, N]``, or a :class:`Routing`, for the input, by ``route`` where it has such a method.

    Shapes: as of ``conv``.
    """

    def __init__(self, conv: RoutedConv2d, router: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.router = router

    def forward(self, input: Tensor) -> Tensor:
        chosen = getattr(self.router, "route", self.router)(input)
        return self.conv(input, chosen if isinstance(chosen, Routing) else Routing.from_scores(chosen))


def convert(
    model: nn.Module,
    num_experts: int,
    ratio: float | None = None,
    router: str | RouterFactory = "light",
    where: Where | None = None,
) -> nn.Module:
    """Makes convolutions of a model routed, in place; ``model(x)`` is called as before, and trained as before.

    Each ``nn.Conv2d`` becomes a :class:`SelfRoutedConv2d` of ``num_experts`` experts, which begin as copies of it, with
    its settings, device and dtype. Without ``ratio`` they are as wide as the convolution was: the model computes what it
    did before, at the same cost, and has N times the weights to learn with. With ``ratio`` the whole network is first
    narrowed to its most important channels (:func:`moe_kernels.narrow.narrow`), and an expert costs about ``ratio ** 2``
    of the convolution that it was made of; the model computes something else then and wants training.

    Args:
        num_experts: N.
        ratio: r; channels are ``int(r * channels)``. The model must be traceable by torch.fx for it.
        router: ``"light"`` (:class:`LightRouter`), or ``make(in_channels, num_experts) -> nn.Module`` whose forward
            takes the layer's input and gives scores ``[B, N]`` or a :class:`Routing`.
        where: which convolutions: names as ``"layer?.*.conv2"`` (a pattern as of the shell, or several), or a function of
            name and module. By default all but the first, in the order of ``named_modules``: the first sees images.

    Returns:
        the model; another module only if the model is itself a convolution.

    Raises:
        ValueError: if nothing is chosen, or if something is that cannot be converted: a subclass of nn.Conv2d, one with
            hooks or parametrizations, or one without its weights yet (lazy); and as :func:`narrow`. The model is as it
            was then (if ``router`` itself raises, it may have been narrowed).
    """
    make = LightRouter if router == "light" else router
    if isinstance(make, str):
        raise ValueError(f"router: expected 'light' or a function of in_channels and num_experts, got {make!r}")
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    chosen = _chosen(model, where)
    for name, conv in chosen.items():
        reason = _refusal(conv)
        if reason is not None:
            raise ValueError(f"where: {name or 'the model'} cannot be converted: {reason}; choose others")
    if ratio is not None:
        narrow(model, ratio)
    made = {conv: _routed(conv, num_experts, make) for conv in chosen.values()}
    if model in made:
        return made[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() leaves out what is there twice
            if child in made:
                setattr(parent, name, made[child])
    return model


def _chosen(model: nn.Module, where: Where | None) -> dict[str, nn.Conv2d]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if where is None:
        chosen = dict(list(found.items())[1:])
    elif callable(where):
        chosen = {name: conv for name, conv in found.items() if where(name, conv)}
    else:
        patterns = [where] if isinstance(where, str) else list(where)
        chosen = {name: conv for name, conv in found.items() if any(fnmatchcase(name, p) for p in patterns)}
    if not chosen:
        names = ", ".join(found) or "none"
        routed = sum(isinstance(module, RoutedConv2d) for module in model.modules())
        also = f", beside {routed} that are routed already" if routed else ""
        if where is None:
            raise ValueError(f"model: expected nn.Conv2d behind the first, which stays as it is; it has {names}{also}")
        raise ValueError(f"where: expected to find convolutions, got none with {where!r}; the model has {names}{also}")
    return chosen


def _refusal(conv: nn.Conv2d) -> str | None:
    if type(conv) is not nn.Conv2d:
        return f"it is a {type(conv).__name__}, and what that does beyond nn.Conv2d would be lost"
    if conv._backward_hooks or conv._backward_pre_hooks:
        return "it has hooks, which would be lost"
    return peculiarity(conv)


def _routed(conv: nn.Conv2d, num_experts: int, make: RouterFactory) -> SelfRoutedConv2d:
    weight, bias = conv.weight, conv.bias
    layer = RoutedConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        bias is not None,
        conv.padding_mode,
        weight.device,
        weight.dtype,
        num_experts=num_experts,
    )
    with torch.no_grad():
        layer.weight.copy_(weight.repeat(num_experts, 1, 1, 1))
        if bias is not None:
            assert layer.bias is not None
            layer.bias.copy_(bias.repeat(num_experts))
            layer.bias.requires_grad_(bias.requires_grad)
    layer.weight.requires_grad_(weight.requires_grad)
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    router = make(conv.in_channels, num_experts).to(weight.device, weight.dtype)
    return SelfRoutedConv2d(layer, router).train(conv.training)
