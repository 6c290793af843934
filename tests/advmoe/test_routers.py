# SPDX-License-Identifier: Apache-2.0
"""Routers: what they cost, what they look at, and one's own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmoe import routers
from advmoe.models import create_model, record_routing, router_parameters
from advmoe.profiling import profile
from advmoe.routers import (
    GlobalRouter,
    LightRouter,
    NonFiniteRouterError,
    Router,
    list_routers,
    record_scores,
    register_router,
)
from moe_kernels import Routing, functional


def images(count: int, size: int = 8) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_global_router_costs_what_the_released_one_does() -> None:
    model = create_model("resnet18", "moe", router="global")
    assert sum(p.numel() for p in router_parameters(model)) == 269_202
    assert profile(model).router_gflops == pytest.approx(0.04055, abs=5e-6)


@pytest.mark.parametrize(("width", "experts"), [(64, 2), (32, 2), (16, 2), (64, 8)])
def test_light_routers_cost_less_than_a_hundredth(width: int, experts: int) -> None:
    cost = profile(create_model("resnet18", "moe", router="light", width=width, num_experts=experts))
    assert 0 < cost.router_gflops < 0.01 * cost.pathway_gflops
    assert sum(layer.router for layer in cost.layers) == 16


@pytest.fixture()
def own_router() -> Iterator[type[Router]]:
    @register_router("test_corner")
    class Corner(Router):
        def __init__(self, in_channels: int, num_experts: int) -> None:
            super().__init__(in_channels, num_experts)
            self.linear = nn.Linear(in_channels, num_experts)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x[:, :, 0, 0])

    yield Corner
    del routers._ROUTERS._entries["test_corner"]


def test_a_router_of_ones_own(own_router: type[Router]) -> None:
    assert "test_corner" in list_routers()
    model = create_model("resnet18", "moe", width=8, image_size=8, router="test_corner", num_experts=3)
    model(images(4)).sum().backward()
    assert isinstance(model.layer1[0].conv1.router, own_router)
    assert model.layer1[0].conv1.router.linear.weight.grad.abs().sum() > 0
    assert len(router_parameters(model)) == 32
    with pytest.raises(ValueError, match="registered already"):
        register_router("test_corner")(own_router)


def test_the_near_match_of_an_unknown_router() -> None:
    assert list_routers() == ["light", "global"]
    with pytest.raises(ValueError, match="router: expected one of light, global, got 'gloabl'; did you mean global"):
        create_model("resnet18", width=8, router="gloabl")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_non_finite_scores_name_the_layer(value: str) -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8)
    with torch.no_grad():
        model.layer2[1].conv1.router.linear.bias[0] = float(value)
    with pytest.raises(NonFiniteRouterError, match=r"router of layer2\.1\.conv1 "):
        model(images(2))


def test_non_finite_scores_of_the_global_router() -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8, router="global")
    with torch.no_grad():
        model.router.linear.bias[1] = float("nan")
    with pytest.raises(NonFiniteRouterError, match="router of all layers "):
        model(images(2))


@pytest.mark.parametrize("training", [True, False])
def test_light_router_does_not_look_at_the_rest_of_the_batch(training: bool) -> None:
    torch.manual_seed(0)
    router = LightRouter(5, 3).train(training)
    x = torch.randn(7, 5, 4, 4)
    together = router(x)
    for i in range(7):
        torch.testing.assert_close(router(x[i : i + 1]), together[i : i + 1])


@pytest.mark.parametrize("router", ["light", "global"])
def test_a_choice_does_not_depend_on_the_rest_of_the_batch(router: str) -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8, router=router, num_experts=4).eval()
    x = images(12)
    with record_routing(model) as routings, torch.no_grad():
        model(x)
        together = {n: r.expert.clone() for n, r in routings.items()}
        for i in range(12):
            model(x[i : i + 1])
            assert {n: r.expert.item() for n, r in routings.items()} == {n: e[i].item() for n, e in together.items()}
        order = torch.randperm(12)
        model(x[order])
        assert all(torch.equal(r.expert, together[n][order]) for n, r in routings.items())
    assert any(e.unique().numel() > 1 for e in together.values())


def test_light_router_sees_no_scale() -> None:
    torch.manual_seed(0)
    router = LightRouter(16, 3)
    x = torch.randn(7, 16, 4, 4)
    torch.testing.assert_close(router(100 * x), router(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [8, 32])
def test_global_router_takes_any_image_size(size: int) -> None:
    assert GlobalRouter(3, 5)(images(2, size)).shape == (2, 5)


@pytest.mark.parametrize(("router", "count"), [("light", 16), ("global", 1)])
def test_record_scores_keeps_the_graph(router: str, count: int) -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8, router=router)
    with record_scores(model) as scores:
        model(images(2))
    assert len(scores) == count and all(s.shape == (2, 2) and s.requires_grad for s in scores.values())
    assert not any(m._forward_hooks for m in model.modules())


# --- the light router's one launch ---

# The meta device stands for one with a kernel: there too the light router asks functional.pooled_routing.


@pytest.fixture()
def pooled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of each call of functional.pooled_routing."""
    calls = []
    route = functional.pooled_routing

    def record(*args: Any, **options: Any) -> Routing:
        calls.append((args, options))
        return route(*args, **options)

    monkeypatch.setattr(functional, "pooled_routing", record)
    return calls


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("gate", ["straight_through", "softmax"])
def test_light_router_asks_for_what_its_forward_gives(pooled: list[Any], gate: str, gradients: bool) -> None:
    torch.manual_seed(0)
    router = LightRouter(5, 3)
    router.gate, router.norm.eps = gate, 0.1
    for parameter in (*router.norm.parameters(), router.linear.bias):
        nn.init.normal_(parameter)
    elsewhere = copy.deepcopy(router).to("meta")
    x = torch.randn(7, 5, 4, 4)
    with torch.set_grad_enabled(gradients):
        expected = router.route(x)
        assert not pooled
        assert elsewhere.route(x.to("meta")).expert.is_meta
        ((_, *parameters), options) = pooled.pop()
        names = {parameter: name for name, parameter in elsewhere.named_parameters()}
        actual = functional.pooled_routing(x, *(router.get_parameter(names[p]) for p in parameters), **options)
    assert torch.equal(actual.expert, expected.expert) and actual.unit_gate == expected.unit_gate
    assert (actual.gate is None) == (expected.gate is None) == (gate == "straight_through" and not gradients)
    if actual.gate is not None and expected.gate is not None:
        assert torch.equal(actual.gate, expected.gate) and actual.gate.requires_grad == gradients


def _own_forward(router: LightRouter) -> LightRouter:
    class Own(LightRouter):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    return Own(5, 3)


def _patched(router: LightRouter) -> LightRouter:
    router.forward = lambda x: x[:, :3, 0, 0]  # type: ignore[method-assign]
    return router


def _other_linear(router: LightRouter) -> LightRouter:
    router.linear = nn.Sequential(router.linear)  # type: ignore[assignment]
    return router


def _hooked(name: str, register: str) -> Callable[[LightRouter], LightRouter]:
    def change(router: LightRouter) -> LightRouter:
        getattr(router.get_submodule(name), register)(lambda *args: None)
        return router

    return change


@pytest.mark.parametrize(
    "change",
    [
        _own_forward,
        _patched,
        _other_linear,
        _hooked("", "register_forward_hook"),
        _hooked("", "register_full_backward_hook"),
        _hooked("norm", "register_forward_pre_hook"),
        _hooked("linear", "register_forward_hook"),
    ],
)
def test_a_light_router_that_is_changed_or_watched_runs_its_forward(
    pooled: list[Any], change: Callable[[LightRouter], LightRouter]
) -> None:
    router = change(LightRouter(5, 3)).to("meta").eval()
    with torch.no_grad():
        router.route(torch.empty(7, 5, 4, 4, device="meta"))
    assert not pooled


def test_scores_and_costs_are_seen_off_the_cpu_too(pooled: list[Any]) -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8, router="light").eval()
    model.to("meta")
    x = images(2).to("meta")
    with torch.no_grad():
        with record_scores(model) as scores:
            model(x)
        assert len(scores) == 16 and not pooled
        assert profile(model, image_size=8).router_gflops > 0 and not pooled
        model(x)
    assert len(pooled) == 16
