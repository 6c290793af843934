# SPDX-License-Identifier: Apache-2.0
"""Whole networks that answer the same question, each as fast as its way allows: float32, channels_last, light routers.

``moe`` is the model as it is, ``moe fused`` its inference form, ``moe compiled`` what torch.compile makes of it;
``s_dense`` is the network of one pathway's width, ``dense`` that of full width. What is compiled is compiled by
torch.compile for one size of batch with frozen weights, the best that torch offers on the CPU. ``compute all and mask``
and ``index_select`` are the moe with its routed convolutions computed in these ways (:mod:`bench.contenders`), eagerly,
as they are written in practice.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.models import create_model, record_routing
from advmoe.profiling import profile
from moe_kernels import RoutedConv2d, Routing, ScoreNorm
from moe_kernels.inference import fuse

from .contenders import gather_and_scatter, mask_and_select

__all__ = [
    "CONTENDERS",
    "DIRECTIONS",
    "Form",
    "Memory",
    "Setting",
    "as_it_is",
    "build",
    "calibrated",
    "compiled",
    "fused",
    "gigaflops",
    "images",
    "largest_share",
    "make",
    "memory_of_forward",
    "timed",
]

SIZE = 32
CLASSES = 10
CALIBRATION = 128  # images that the routers' standardisation is set by


@dataclass(frozen=True)
class Setting:
    """What ``create_model`` is asked for; a dense network has no ``experts``, and no use for ``ratio``."""

    arch: str = "resnet18"
    experts: int = 2
    ratio: float = 0.5
    width: int | None = None


class _AllAndMask(RoutedConv2d):
    """A routed convolution that computes every expert."""

    def forward(self, input: Tensor, routing: Routing, in_routing: Routing | None = None) -> Tensor:
        y = F.conv2d(input, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return routing.combine(mask_and_select(y, routing.expert, self.num_experts))


class _IndexSelect(RoutedConv2d):
    """A routed convolution in a loop over the experts."""

    def forward(self, input: Tensor, routing: Routing, in_routing: Routing | None = None) -> Tensor:
        biases = None if self.bias is None else self.bias.chunk(self.num_experts)

        def convolve(x: Tensor, expert: int) -> Tensor:
            weight = self.weight[expert * self.out_channels : (expert + 1) * self.out_channels]
            bias = None if biases is None else biases[expert]
            return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

        return routing.combine(gather_and_scatter(input, routing.expert, self.num_experts, convolve))


def as_it_is(model: nn.Module, x: Tensor) -> nn.Module:
    return model


def fused(model: nn.Module, x: Tensor) -> nn.Module:
    return fuse(model, x[:1])


def compiled(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    fast: Callable[[Tensor], Tensor] = torch.compile(model, dynamic=False, fullgraph=True)
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        fast(x)
    return fast


def _routed_by(layer: type[RoutedConv2d]) -> Callable[[nn.Module, Tensor], nn.Module]:
    def replaced(model: nn.Module, x: Tensor) -> nn.Module:
        for module in model.modules():
            if isinstance(module, RoutedConv2d):
                assert module.in_slices.is_whole and module.out_slices.is_partition
                module.__class__ = layer
        return model

    return replaced


# The kind of model, and what is made of it for batches like x.
Form = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]
CONTENDERS: dict[str, tuple[str, Form]] = {
    "moe fused": ("moe", fused),
    "moe": ("moe", as_it_is),
    "moe compiled": ("moe", compiled),
    "s_dense": ("s_dense", as_it_is),
    "s_dense compiled": ("s_dense", compiled),
    "dense": ("dense", as_it_is),
    "dense compiled": ("dense", compiled),
    "compute all and mask": ("moe", _routed_by(_AllAndMask)),
    "index_select": ("moe", _routed_by(_IndexSelect)),
}
DIRECTIONS = {  # and who takes part
    "forward": tuple(CONTENDERS),
    "train": ("moe", "s_dense", "dense", "compute all and mask", "index_select"),
}


def images(batch: int) -> Tensor:
    """``[B, 3, 32, 32]`` of different colours: a router must have something to tell apart."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((batch, 3, SIZE, SIZE), generator=generator) * torch.rand((batch, 3, 1, 1), generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


def build(kind: str, setting: Setting) -> nn.Module:
    """A model in eval mode, channels_last, the same weights at each call; its experts are used about alike, as a trained
    model's are: the routers' standardisation gets the statistics of made images."""
    torch.manual_seed(0)
    s = setting
    model = create_model(s.arch, kind, CLASSES, SIZE, s.experts, s.ratio, s.width).eval()
    return calibrated(model.to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def calibrated(model: nn.Module) -> nn.Module:
    """The model, with the standardisation of its routers' scores set by made images."""

    def take(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        var, mean = torch.var_mean(args[0], 0)
        if (
            var.min() > 1e-6
        ):  # scores that are the same for all images, as behind a stem of one channel, would become ties
            norm.running_mean.copy_(mean)  # type: ignore[operator]
            norm.running_var.copy_(var)  # type: ignore[operator]

    handles = [m.register_forward_pre_hook(take) for m in model.modules() if isinstance(m, ScoreNorm)]
    if handles:
        with torch.no_grad():
            model(images(CALIBRATION))
    for handle in handles:
        handle.remove()
    return model


def make(name: str, setting: Setting, batch: int, direction: str = "forward") -> Callable[[], Any]:
    """A function that runs one forward without gradients and returns the logits, or one training step (``"train"``:
    forward, cross-entropy, backward and SGD with momentum and weight decay).

    Raises:
        ValueError: for a direction that the contender has not.
    """
    if direction not in DIRECTIONS or name not in DIRECTIONS[direction]:
        raise ValueError(f"direction: {name} has no {direction!r}")
    return timed(*CONTENDERS[name], setting, batch, direction)


def timed(kind: str, form: Form, setting: Setting, batch: int, direction: str) -> Callable[[], Any]:
    """As :func:`make`, of any kind of model in any form; in training the form is a module."""
    x = images(batch)
    model = build(kind, setting)
    network = form(model, x)
    if direction == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return network(x)

        return forward
    assert isinstance(network, nn.Module)
    network.train()
    target = torch.arange(batch) % CLASSES
    # of rate 0: the same work, and no routing that drifts from step to step
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(network(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return train


def gigaflops(name: str, setting: Setting) -> float:
    """Billions of floating-point operations that a forward of one image needs: two for each multiply-accumulate of
    convolutions and linear layers, of a routed layer those of the chosen expert, whoever computes more."""
    s = setting
    with torch.device("meta"):
        model = create_model(s.arch, CONTENDERS[name][0], CLASSES, SIZE, s.experts, s.ratio, s.width)
        return 2 * profile(model, SIZE).gflops


@torch.no_grad()
def largest_share(setting: Setting, batch: int) -> float:
    """Of the images that go to one expert, over the moe's layers."""
    model = build("moe", setting)
    with record_routing(model) as routings:
        model(images(batch))
    counts = [torch.bincount(r.expert, minlength=r.num_experts) for r in routings.values()]
    return max(float(c.max()) / batch for c in counts)


@dataclass(frozen=True)
class Memory:
    """Bytes: the most that a forward takes beyond what is there before it, and the model's parameters and buffers."""

    forward: int
    weights: int


def memory_of_forward(name: str, setting: Setting, batch: int) -> Memory:
    """Measured in a process of its own, by the kernel's high-water mark of resident memory.

    What is compiled has run once before, and what that left unused goes back to the system first; what is fused keeps its
    memory, and so has run on a single image only.

    Raises:
        RuntimeError: where the system has no /proc/self/clear_refs (Linux has).
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_memory_here, name, setting, batch).result()


def _memory_here(name: str, setting: Setting, batch: int) -> Memory:
    kind, form = CONTENDERS[name]
    model, x = build(kind, setting), images(batch)
    network = form(model, x)
    with torch.no_grad():
        network(x[:1] if form is fused else x)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        except OSError as error:
            raise RuntimeError(f"memory: the high-water mark cannot be reset ({error})") from error
        before = _status("VmRSS")
        network(x)
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return Memory(_status("VmHWM") - before, weights)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
