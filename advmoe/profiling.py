# SPDX-License-Identifier: Apache-2.0
"""What a model costs: multiply-accumulates counted, latency measured."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import RoutedConv2d, RoutedLinear

from .models import create_model
from .modes import undisturbed
from .routers import routers_of
from .sparse import masked_convolutions

__all__ = ["BackboneCost", "Latency", "LayerCost", "Profile", "backbone_costs", "measure_latency", "profile"]


@dataclass(frozen=True)
class LayerCost:
    name: str
    macs: int  # multiply-accumulates for one image
    router: bool


@dataclass(frozen=True)
class Profile:
    """Costs for one image, counting a multiply-accumulate as 1, of convolutions, linear layers and attention only.

    ``gflops = pathway_gflops + router_gflops``: of a routed layer the chosen expert's slice counts: what is computed.
    """

    params: int
    gflops: float
    pathway_gflops: float
    router_gflops: float
    layers: tuple[LayerCost, ...]


def profile(model: nn.Module, image_size: int = 32, channels: int = 3) -> Profile:
    """Counts by one forward of one grey image, in eval mode; the model is left as it was."""
    layers: list[LayerCost] = []
    routers = {id(m) for router in routers_of(model).values() for m in router.modules()}

    def hook(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            each = weight[0].numel()
            if isinstance(module, (RoutedConv2d, RoutedLinear)):
                each = each * module.in_slices.width // module.in_slices.total
            # all of the output belongs to the one image, also where it has several experts' virtual samples
            layers.append(LayerCost(name, output.numel() * each, id(module) in routers))

        return count

    def own(name: str) -> Callable[..., None]:
        def count(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            layers.append(LayerCost(name, module.own_macs(output), False))  # type: ignore[operator]

        return count

    kinds = (nn.Conv2d, nn.Linear, RoutedConv2d, RoutedLinear)
    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if isinstance(m, kinds)]
    handles += [m.register_forward_hook(own(name)) for name, m in model.named_modules() if hasattr(m, "own_macs")]
    parameter = next(model.parameters(), torch.empty(0))
    image = torch.full((1, channels, image_size, image_size), 0.5, device=parameter.device, dtype=parameter.dtype)
    try:
        with undisturbed(model), torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    router = sum(layer.macs for layer in layers if layer.router) / 1e9
    pathway = sum(layer.macs for layer in layers if not layer.router) / 1e9
    # the scores of masks are no part of the network
    masks = {id(conv.scores) for conv in masked_convolutions(model).values()}
    params = sum(p.numel() for p in model.parameters() if id(p) not in masks)
    return Profile(params, pathway + router, pathway, router, tuple(layers))


@dataclass(frozen=True)
class BackboneCost:
    """Billions of multiply-accumulates for one image (a multiply-accumulate as 1; convolutions, linear layers and
    attention): the dense network, the one with all widths times r, a pathway of the MoE, and its routers."""

    arch: str
    image_size: int
    ratio: float
    dense: float
    s_dense: float
    pathway: float
    routers: float


def backbone_costs(
    archs: Sequence[str],
    ratios: Sequence[float],
    image_sizes: Sequence[int],
    num_experts: int = 2,
    router: str = "light",
    num_classes: int = 10,
    **options: Any,
) -> list[BackboneCost]:
    """Counted for every architecture, size and ratio, on the meta device: nothing is computed.

    Args:
        options: of ``create_model`` for the MoE, such as ``layout`` and ``width``.

    Raises:
        ValueError: as ``create_model``.
    """
    shared = {name: options[name] for name in ("width", "stem") if name in options}

    def cost(arch: str, kind: str, size: int, ratio: float = 1.0, **more: Any) -> Profile:
        model = create_model(arch, kind, num_classes, size, num_experts, ratio, **more)
        return profile(model, size)

    costs = []
    with torch.device("meta"):
        for arch, size in itertools.product(archs, image_sizes):
            dense = cost(arch, "dense", size, **shared).gflops
            for ratio in ratios:
                scaled = cost(arch, "s_dense", size, ratio, **shared).gflops
                moe = cost(arch, "moe", size, ratio, router=router, **options)
                costs.append(BackboneCost(arch, size, ratio, dense, scaled, moe.pathway_gflops, moe.router_gflops))
    return costs


@dataclass(frozen=True)
class Latency:
    """Of one forward in eval mode without gradients: milliseconds over ``repeats`` timings."""

    median_ms: float
    low_ms: float  # first quartile
    high_ms: float  # third quartile
    batch_size: int
    repeats: int


def measure_latency(
    models: Sequence[nn.Module],
    image_size: int = 32,
    batch_size: int = 1,
    repeats: int = 30,
    channels: int = 3,
    device: torch.device | None = None,
) -> list[Latency]:
    """Times the models in turn, A B A B, so that they share what else the machine does; after a warm-up.

    The images are random, so that routed models use the experts that they would use. Modes are restored. On a CUDA device
    each timing waits for it. ``device`` is by default the parameters'; fused models (:func:`moe_kernels.fuse`) have none.

    Raises:
        ValueError: if there is nothing to time.
    """
    for name, value in (("batch_size", batch_size), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((batch_size, channels, image_size, image_size), generator=generator)
    if device is None:
        device = next((p.device for model in models for p in model.parameters()), torch.device("cpu"))
    images = images.contiguous(memory_format=torch.channels_last).to(device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: list[list[float]] = [[] for _ in models]
    with contextlib.ExitStack() as stack:
        for model in models:
            stack.enter_context(undisturbed(model))
        with torch.inference_mode():
            for repeat in range(repeats + 3):
                for model, mine in zip(models, times, strict=True):
                    wait()
                    start = time.perf_counter()
                    model(images)
                    wait()
                    if repeat >= 3:
                        mine.append((time.perf_counter() - start) * 1e3)
    results = []
    for mine in times:
        low, middle, high = statistics.quantiles(mine, n=4) if len(mine) > 1 else (mine[0],) * 3
        results.append(Latency(middle, low, high, batch_size, repeats))
    return results
