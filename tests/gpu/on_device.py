# SPDX-License-Identifier: Apache-2.0
"""The oracle's cases on a device, a small network of every routed layer, and what CUDA's tests have in common."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import torch
import torch.nn.functional as F
from oracle import Case, Numbers, windows
from torch import Tensor, nn

from moe_kernels import RoutedBatchNorm2d, RoutedConv2d, RoutedLinear, Routing, backends
from moe_kernels.backends import cuda

DEVICE = torch.device("cuda")
EXPERTS = 3

# Both operands of a product lose all but 10 bits: 2 * 2**-10 of the product, in units of float32's eps.
TF32_ROUNDINGS = 2**14

# Batches of the tests about plans: the backend cuda reads none for the first, every backend reads one for the second.
FEW, MANY = 6, 36


def there(t: Tensor, device: torch.device | None = None) -> Tensor:
    """``t`` on the device in the same layout, with the memory around it: outside of a slice lies NaN there too."""
    memory = torch.empty(0, dtype=t.dtype).set_(t.detach().untyped_storage())
    moved = memory.to(DEVICE if device is None else device).as_strided(t.shape, t.stride(), t.storage_offset())
    return moved.requires_grad_(t.requires_grad)


def on_device(values: Numbers, device: torch.device | None = None) -> Numbers:
    named = {f.name: getattr(values, f.name) for f in dataclasses.fields(values)}
    return Numbers(**{name: None if t is None else there(t, device) for name, t in named.items()})


def check(case: Case, tf32: bool = False, device: torch.device | None = None) -> None:
    """:func:`oracle.check` on the device: values and every gradient against the float64 loop on the CPU."""
    values = oracle.numbers(case)
    expected, magnitude = oracle.truth(case, values)
    values = on_device(values, device)
    with oracle.poisoned():
        y = oracle.run(case, values)
        leaves = values.leaves()
        grads = torch.autograd.grad(y, list(leaves.values()), values.grad)
    says = values.x.is_contiguous() != values.x.is_contiguous(memory_format=torch.channels_last)
    if says and case.layout in ("contiguous", "channels_last") and y.numel():
        assert y.is_contiguous(memory_format=getattr(torch, f"{case.layout}_format", torch.channels_last))
    compare(case, {"output": y, **dict(zip(leaves, grads, strict=True))}, expected, magnitude, tf32)


def compare(
    case: Case, actual: dict[str, Tensor], expected: dict[str, Tensor], magnitude: dict[str, Tensor], tf32: bool = False
) -> None:
    """Within the oracle's tolerance, that of tf32 where float32 is multiplied so."""
    oracle.compare(case, actual, expected, magnitude, TF32_ROUNDINGS if tf32 else 0)


def assert_close_in_norm(actual: Tensor, expected: Tensor, bound: float, what: str = "") -> None:
    """``|actual - expected| <= bound * |expected|`` in the Euclidean norm."""
    difference = (actual.detach().double().cpu() - expected.detach().double().cpu()).norm().item()
    size = expected.detach().double().norm().item()
    assert difference <= bound * size, f"{what}: {difference / max(size, 1e-300):.3g} of the norm, at most {bound:.3g}"


class Net(nn.Module):
    """A router, then every routed layer: both kinds of slices, on either side and on both; bias, BatchNorm, a head."""

    def __init__(self, norm: bool = True, router: bool = True) -> None:
        super().__init__()
        wide, narrow = windows(64, 0.5, EXPERTS), windows(48, 0.5, EXPERTS)
        self.router = nn.Linear(16, EXPERTS) if router else None
        self.first = RoutedConv2d(16, 32, 3, padding=1, num_experts=EXPERTS)
        self.norm = RoutedBatchNorm2d(32, EXPERTS) if norm else None
        self.second = RoutedConv2d(32, wide, 3, stride=2, padding=1, bias=False)
        self.third = RoutedConv2d(wide, narrow, 3, padding=1)
        self.head = RoutedLinear(narrow, 10)

    def route(self, x: Tensor) -> Routing:
        assert self.router is not None
        return Routing.from_scores(self.router(x.mean((2, 3))))

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        if routing is None:
            routing = self.route(x)
        x = self.first(x, routing)
        if self.norm is not None:
            x = self.norm(x, routing)
        x = self.second(x.relu(), routing)
        return self.head(self.third(x.relu(), routing).mean((2, 3)), routing)


def net(**options: Any) -> Net:
    return Net(**options).to(DEVICE, memory_format=torch.channels_last)


def images(batch: int = 6, size: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images whose channel means differ enough for a router to choose differently."""
    x = torch.randn(batch, 16, size, size) + 2 * torch.randn(batch, 16, 1, 1)
    return x.to(DEVICE, dtype, memory_format=torch.channels_last)


def choice(*expert: int, num_experts: int = EXPERTS) -> Routing:
    return Routing(torch.tensor(expert, device=DEVICE), num_experts=num_experts)


def counters() -> dict[Any, int]:
    """Where the backend in use keeps counters of its split reductions, for each stream; emptied, so that what is found
    there afterwards is a test's own."""
    torch.cuda.synchronize()
    kept: dict[Any, int] = getattr(backends.choose(DEVICE), "_counters", {})
    kept.clear()
    return kept


def all_zero(kept: dict[Any, int]) -> bool:
    """Whether the counters at these addresses are zero."""

    class Memory:
        def __init__(self, address: int) -> None:
            shape = (cuda._COUNTERS,)
            self.__cuda_array_interface__ = {"shape": shape, "typestr": "<i4", "data": (address, False), "version": 3}

    torch.cuda.synchronize()
    return not any(bool(torch.as_tensor(Memory(address), device=DEVICE).any()) for address in kept.values())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, foreach=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, *routing: Routing) -> Tensor:
    """One step; returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x, *routing), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert torch.equal(value, expected[name]), f"{name}: {(value != expected[name]).sum()} of {value.numel()} differ"


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Inside, whatever waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def warm_up(step: Callable[[], object], times: int = 3) -> None:
    """What torch asks for before a capture: a few runs on a stream of their own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(stream)


def capture(step: Callable[[], object]) -> Callable[[], object]:
    """``step`` as a CUDA graph; the tensors that it writes are the caller's to keep."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
