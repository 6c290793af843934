# SPDX-License-Identifier: Apache-2.0
"""torch.compile without graph breaks or recompilation, torch.export with a Routing as an argument."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import CallCounter, windows
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from moe_kernels import RoutedBatchNorm2d, RoutedConv2d, RoutedLinear, Routing, use_backend

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Net(nn.Module):
    """Convolutions, normalisation, a linear head; the routing is given."""

    def __init__(self, num_experts: int = 3) -> None:
        super().__init__()
        n = num_experts
        self.first = RoutedConv2d(3, 6, 3, padding=1, num_experts=n, bias=False)
        self.norm = RoutedBatchNorm2d(6, n)
        self.second = RoutedConv2d(6, windows(8, 0.5, n), 3, stride=2, padding=1)
        self.head = RoutedLinear(windows(8, 0.5, n), 5)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        x = self.norm(self.first(x, routing), routing).relu()
        return self.head(self.second(x, routing).relu().mean((2, 3)), routing)


class Routed(nn.Module):
    """The same with a router of its own."""

    def __init__(self, top_k: int, gate: str) -> None:
        super().__init__()
        self.router, self.net, self.top_k, self.gate = nn.Linear(3, 3), Net(), top_k, gate

    def forward(self, x: Tensor) -> Tensor:
        routing = Routing.from_scores(self.router(x.mean((2, 3))), self.top_k, self.gate)
        return routing.combine(self.net(x, routing.expand()))


def _same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    for (name, p), (_, q) in zip(a.named_buffers(), b.named_buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("gated", [True, False])
def test_compile_fullgraph_forward_and_backward_without_recompilation(gated: bool) -> None:
    """Only the choices, the gates and the images change: one compilation."""
    eager = Net()
    net = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for expert in ([0, 1, 2, 0], [1, 1, 1, 1], [2, 2, 0, 0]):
            gate = torch.rand(4, requires_grad=True) if gated else None
            x = torch.randn(4, 3, 8, 8, requires_grad=True)
            routing = Routing(torch.tensor(expert), gate, num_experts=3)
            y, expected = compiled(x, routing), eager(x, routing)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            leaves = [x] + ([gate] if gated else [])
            dy = torch.randn_like(y)
            for model, out in ((net, y), (eager, expected)):
                model.zero_grad()
                for leaf in leaves:
                    leaf.grad = None
                out.backward(dy)
                grads = [leaf.grad for leaf in leaves]
                if model is net:
                    actual = grads
            for a, e in zip(actual, grads, strict=True):
                torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
            _same(net, eager)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("top_k", "gate"),
    [(1, "straight_through"), (1, "softmax"), (1, "raw_straight_through"), (2, "softmax"), (2, "none")],
)
def test_compile_with_the_router_inside(top_k: int, gate: str) -> None:
    eager = Routed(top_k, gate)
    net = copy.deepcopy(eager)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            x = torch.randn(4, 3, 8, 8) * 5
            y, expected = compiled(x), eager(x)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            for model, out in ((net, y), (eager, expected)):
                model.zero_grad()
                out.square().sum().backward()
            if gate == "none":  # the router learns nothing
                assert net.router.weight.grad is None and eager.router.weight.grad is None
            _same(net.net, eager.net)
            if gate != "none":
                _same(net.router, eager.router)
    assert counter.frame_count == 1


def _sees_thawed_parameters() -> bool:
    """Whether torch.compile compiles anew where parameters require gradients again: torch 2.11 does not, and a compiled
    nn.Conv2d then gets none."""
    conv = torch.nn.Conv2d(1, 1, 1).requires_grad_(False)
    compiled = torch.compile(conv, backend="aot_eager")
    x = torch.randn(1, 1, 2, 2, requires_grad=True)
    compiled(x).sum().backward()
    conv.requires_grad_(True)
    compiled(x).sum().backward()
    return conv.weight.grad is not None


@pytest.mark.parametrize("training", [True, False])
def test_compiled_attack_pays_for_no_weight_gradient(calls: CallCounter, training: bool) -> None:
    """Under compile an attack freezes the parameters and restores them; then nothing is computed for them."""
    net = Net().train(training)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    net.requires_grad_(False)
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    routing = Routing(torch.tensor([0, 1, 2, 0]), num_experts=3)
    (dx,) = torch.autograd.grad(compiled(x, routing).square().sum(), x)
    assert calls["grad_weight"] == 0 and calls["grad_input"] == 3
    reference = copy.deepcopy(net)
    torch.testing.assert_close(dx, torch.autograd.grad(reference(x, routing).square().sum(), x)[0], rtol=1e-4, atol=1e-5)
    net.requires_grad_(True)
    compiled(x, routing).sum().backward()
    assert calls["grad_weight"] == (3 if _sees_thawed_parameters() else 0)


def test_compiled_graphs_follow_use_backend(calls: CallCounter) -> None:
    """The backend is read at run time: one graph serves both."""
    net = Net().eval()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        x, routing = torch.randn(2, 3, 8, 8), Routing(torch.tensor([0, 2]), num_experts=3)
        y = compiled(x, routing)
        assert calls["forward"] == 3
        with use_backend("reference"):
            torch.testing.assert_close(compiled(x, routing), y, rtol=1e-4, atol=1e-5)
        assert calls["forward"] == 3


def test_compile_in_inference_and_under_autocast() -> None:
    net = Net().eval()
    x, routing = torch.randn(2, 3, 8, 8), Routing(torch.tensor([0, 2]), num_experts=3)
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        with context:
            y, expected = compiled(x, routing), net(x, routing)
        assert y.dtype == expected.dtype
        torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)


def test_compile_keeps_the_memory_format() -> None:
    layer = RoutedConv2d(3, 4, 3, num_experts=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    routing = Routing(torch.tensor([0, 1]), num_experts=2)
    x = torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    assert compiled(x, routing).is_contiguous(memory_format=torch.channels_last)
    assert compiled(x.contiguous(), routing).is_contiguous()


def test_compile_with_dynamic_batch() -> None:
    eager = Net()
    net = copy.deepcopy(eager)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (4, 6, 9):
            x, routing = torch.randn(batch, 3, 8, 8), Routing(torch.arange(batch) % 3, num_experts=3)
            y, expected = compiled(x, routing), eager(x, routing)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            for model, out in ((net, y), (eager, expected)):
                model.zero_grad()
                out.sum().backward()
            _same(net, eager)


def _train_with_inductor(make: Any) -> None:
    eager = make()
    layers = copy.deepcopy(eager)

    def forward(layers: Any, x: Tensor, routing: Routing) -> Tensor:
        for layer in layers:
            x = layer(x, routing)
        return x

    compiled = torch.compile(forward, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for expert in ([0, 1, 2, 0], [2, 2, 2, 1]):
            x = torch.randn(4, 3, 8, 8)
            routing = Routing(torch.tensor(expert), num_experts=3)
            y, expected = compiled(layers, x, routing), forward(eager, x, routing)
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            dy = torch.randn_like(y)
            for modules, out in ((layers, y), (eager, expected)):
                modules.zero_grad()
                out.backward(dy)
            _same(layers, eager)


def test_inductor() -> None:
    """The operators alone: nothing else that inductor would have to compile with a C++ compiler."""
    _train_with_inductor(
        lambda: nn.ModuleList(
            [
                RoutedConv2d(3, 6, 3, padding=1, num_experts=3, bias=False),
                RoutedConv2d(6, windows(8, 0.5, 3), 3, stride=2, bias=False),
            ]
        )
    )


@pytest.mark.nightly
def test_inductor_of_everything() -> None:
    _train_with_inductor(
        lambda: nn.ModuleList(
            [
                RoutedConv2d(3, 6, 3, padding=1, num_experts=3),
                RoutedBatchNorm2d(6, 3),
                RoutedConv2d(6, windows(8, 0.5, 3), 3, stride=2),
            ]
        )
    )


# --- torch.export ---


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_export_with_a_routing_as_input(gated: bool, training: bool) -> None:
    net = Net().train(training)

    def arguments(expert: list[int]) -> tuple[Tensor, Routing]:
        gate = torch.rand(len(expert)) if gated else None
        return torch.randn(len(expert), 3, 8, 8), Routing(torch.tensor(expert), gate, num_experts=3)

    program = torch.export.export(net, arguments([0, 1, 2, 0]))
    names = [str(node.target) for node in program.graph.nodes if "moe_kernels" in str(node.target)]
    assert len(names) == 3
    module = program.module()
    for expert in ([2, 2, 1, 1], [0, 0, 1, 1]):
        x, routing = arguments(expert)
        torch.testing.assert_close(module(x, routing), copy.deepcopy(net)(x, routing), rtol=1e-4, atol=1e-5)
    x, routing = arguments([2, 0, 1, 1])
    # an exported graph has gradients
    module(x, routing).square().sum().backward()
    reference = copy.deepcopy(net)
    reference(x, routing).square().sum().backward()
    grads = dict(module.named_parameters())
    for name, p in reference.named_parameters():
        torch.testing.assert_close(grads[name].grad, p.grad, rtol=1e-3, atol=1e-4)


def test_export_saves_and_loads(tmp_path: Any) -> None:
    net = Net().eval()
    x, routing = torch.randn(4, 3, 8, 8), Routing(torch.tensor([0, 1, 2, 0]), torch.rand(4), num_experts=3)
    program = torch.export.export(net, (x, routing))
    torch.export.save(program, tmp_path / "net.pt2")
    again = torch.export.load(tmp_path / "net.pt2").module()
    torch.testing.assert_close(again(x, routing), net(x, routing), rtol=1e-5, atol=1e-6)


def test_export_with_dynamic_batch() -> None:
    net = Net().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    x, routing = torch.randn(4, 3, 8, 8), Routing(torch.tensor([0, 1, 2, 0]), num_experts=3)
    shapes = ({0: batch}, [{0: batch}, None])
    module = torch.export.export(net, (x, routing), dynamic_shapes=shapes).module()
    x, routing = torch.randn(7, 3, 8, 8), Routing(torch.tensor([0, 1, 2, 0, 1, 1, 2]), num_experts=3)
    torch.testing.assert_close(module(x, routing), net(x, routing), rtol=1e-5, atol=1e-6)
