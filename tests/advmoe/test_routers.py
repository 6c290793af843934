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
    RouterOptions,
    build_router,
    list_routers,
    observe_routers,
    record_scores,
    register_router,
    router_class,
    routers_of,
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


# (channels in, pixels of a side) of the 16 routed layers of ResNet-18 at width 8, r = 0.5, on 8×8 images
ROUTED = [(8, 8), *[(4, 8)] * 4, *[(8, 4)] * 4, *[(16, 2)] * 4, *[(32, 1)] * 3]
COSTS = {
    "light": sum(c * 3 for c, _ in ROUTED),
    "conv": sum(9 * c * 3 * s * s for c, s in ROUTED),
    "linear": 3 * 8 * 8 * 3,
    # 3×3 convolutions to 8, 16 and 32 channels on 4×4, 2×2 and 1×1 pixels
    "image": 16 * 8 * 27 + 4 * 16 * 72 + 1 * 32 * 144 + 32 * 3,
    "gap-fc": sum(c * 3 for c, _ in ROUTED),
    "conv-gap": sum(9 * c * 3 * max(0, s - 2) ** 2 for c, s in ROUTED),
    "double-conv": sum(72 * (c + 3) * s * s for c, s in ROUTED),
    "projection": sum(c * 3 for c, _ in ROUTED),
    "random": 0,
    "fixed": 0,
    # a stem, then 6 convolutions of 3×3 a stage, the first of the second and the third with half the channels in
    "global": 64 * 16 * 27
    + 6 * 64 * 16 * 144
    + 16 * 32 * (144 + 5 * 288)
    + 4 * 64 * (288 + 5 * 576)
    + 64 * 3,
}  # fmt: skip


@pytest.mark.parametrize("router", [name for name in COSTS if name != "conv-gap"])  # which takes no features of 1 pixel
def test_the_cost_of_each_is_counted(router: str) -> None:
    model = create_model("resnet18", width=8, image_size=8, router=router, num_experts=3)
    cost = profile(model, image_size=8)
    assert sum(layer.macs for layer in cost.layers if layer.router) == COSTS[router]
    assert cost.router_gflops == pytest.approx(COSTS[router] / 1e9)
    per_layer = router_class(router).level == "layer"
    assert len(routers_of(model)) == (16 if per_layer else 1)
    plain = create_model("resnet18", width=8, image_size=8, router="fixed", num_experts=3)
    assert cost.pathway_gflops == profile(plain, image_size=8).pathway_gflops


def test_every_registered_router_is_tested_here() -> None:
    assert list(COSTS) == list_routers()


def test_the_image_router_costs_less_than_a_hundredth() -> None:
    cost = profile(create_model("resnet18", router="image"))
    assert cost.router_gflops == pytest.approx(0.20e-3, abs=0.005e-3)
    assert cost.router_gflops < 0.01 * cost.pathway_gflops


def built(name: str, num_experts: int = 3) -> tuple[Router, Tensor]:
    """A router with room for a choice, and an input of 7 samples for it."""
    torch.manual_seed(0)
    level = router_class(name).level
    channels, size = (5, 4) if level == "layer" else (3, 8)
    router = build_router(name, channels, num_experts, RouterOptions(), 8)
    return router, torch.randn(7, channels, size, size)


@pytest.mark.parametrize("name", list(COSTS))
def test_every_router_gives_a_score_for_each_expert(name: str) -> None:
    router, x = built(name)
    for count in (0, 1, 7) if name != "global" else (2, 7):  # its BatchNorm takes no empty batch
        scores = router(x[:count])
        assert scores.shape == (count, 3) and torch.isfinite(scores).all()
    routing = router.route(x)
    assert routing.expert.shape == (7,) and routing.num_experts == 3
    learns = name not in ("projection", "random", "fixed")
    assert bool([p for p in router.parameters() if p.requires_grad]) == learns and scores.requires_grad == learns
    assert (router.in_channels, router.num_experts) == (x.shape[1], 3)


@pytest.mark.parametrize(
    ("name", "training"),
    [
        (n, t)
        for n in ("light", "conv", "gap-fc", "conv-gap", "projection", "linear", "image", "fixed")
        for t in (True, False)
    ]
    + [("double-conv", False), ("global", False)],
)
def test_scores_do_not_depend_on_the_rest_of_the_batch(name: str, training: bool) -> None:
    router, x = built(name)
    router.train(training)
    together = router(x)
    for i in range(len(x)):
        torch.testing.assert_close(router(x[i : i + 1]), together[i : i + 1])


def test_the_global_routers_batch_norm_looks_at_the_batch_in_training() -> None:
    router, x = built("global")
    apart = (router.train()(x)[:2] - router(x[:2])).abs().max()
    assert apart > 1e-3


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


@pytest.fixture()
def own_image_router() -> Iterator[type[Router]]:
    @register_router("test_template")
    class Template(Router):
        level = "image"

        def __init__(self, in_channels: int, num_experts: int, image_size: int) -> None:
            super().__init__(in_channels, num_experts)
            self.template = nn.Parameter(torch.randn(num_experts, in_channels, image_size, image_size))

        @classmethod
        def build(cls, in_channels: int, num_experts: int, image_size: int) -> Router:
            return cls(in_channels, num_experts, image_size)

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bchw,nchw->bn", x, self.template)

    yield Template
    del routers._ROUTERS._entries["test_template"]


def test_an_image_router_of_ones_own(own_image_router: type[Router]) -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8, router="test_template", num_experts=3)
    (own,) = routers_of(model).values()
    assert isinstance(own, own_image_router) and router_parameters(model) == [own.template]
    with record_routing(model) as routings, record_scores(model) as scores:
        model(images(4)).square().sum().backward()
    (chosen,) = (s.argmax(1) for s in scores.values())  # of the normalised image, once
    assert len(routings) == 16 and all(torch.equal(r.expert, chosen) for r in routings.values())
    assert own.template.grad is not None and own.template.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="route_per: the router 'test_template' chooses once for each image"):
        create_model("resnet18", width=8, image_size=8, router="test_template", route_per="block")


def test_a_level_that_is_none_is_refused() -> None:
    class Odd(Router):
        level = "imgae"

    with pytest.raises(ValueError, match="level: expected one of layer, image, got 'imgae'; did you mean image"):
        register_router("test_odd")(Odd)
    assert "test_odd" not in list_routers()


def test_the_linear_router_knows_the_image_size() -> None:
    model = create_model("resnet18", width=8, image_size=16, router="linear")
    assert model.router.linear.weight.shape == (2, 3 * 16 * 16)
    model(images(2, 16))
    with pytest.raises(ValueError, match=r"input: expected images of 16 pixels, got \(8, 8\)"):
        model(images(2, 8))


class Given(Router):
    """Its input is its scores."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def given(scores: Tensor, **options: Any) -> tuple[Given, Tensor]:
    router = Given(scores.shape[1], scores.shape[1])
    router.options = RouterOptions(**options)
    return router, scores.clone().requires_grad_()


def test_temperature_softens_the_gates_gradients_and_leaves_the_choice() -> None:
    scores = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 8.0):
        router, x = given(scores, temperature=temperature)
        routing = router.route(x)
        assert torch.equal(routing.expert, scores.argmax(1))
        assert routing.gate is not None and (routing.gate == 1).all()
        routing.gate.sum().backward()
        p = (scores / temperature).softmax(1)
        own = p.gather(1, routing.expert[:, None])
        chosen = nn.functional.one_hot(routing.expert, 4)
        torch.testing.assert_close(x.grad, own * (chosen - p) / temperature)


def test_noise_moves_choices_in_training_only() -> None:
    scores = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    router, x = given(scores, noise=3.0)
    seen: list[Tensor] = []
    router._observers.append(lambda router, scores, routing: seen.append(scores))
    torch.manual_seed(5)
    first, second = router.route(x).expert, router.route(x).expert
    torch.manual_seed(5)
    assert torch.equal(router.route(x).expert, first)
    for a, b in ((first, second), (first, scores.argmax(1))):
        assert 0.2 < (a != b).float().mean() < 1
    assert all(torch.equal(s, scores) for s in seen)  # a balancing loss sees no noise
    before = torch.get_rng_state()
    assert torch.equal(router.eval().route(x).expert, scores.argmax(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a finite number above 0, got 0.0"),
        ({"temperature": float("inf")}, "temperature: expected a finite number above 0, got inf"),
        ({"temperature": float("nan")}, "temperature: expected a finite number above 0, got nan"),
        ({"noise": -1.0}, "noise: expected a finite number of at least 0, got -1.0"),
        ({"noise": float("nan")}, "noise: expected a finite number of at least 0, got nan"),
        ({"gate": "sofmax"}, "gate: .*got 'sofmax'; did you mean softmax"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterOptions(**options)
    with pytest.raises(ValueError, match=message):
        create_model("resnet18", width=8, image_size=8, **options)


def test_options_are_shown_and_reach_every_router() -> None:
    model = create_model("resnet18", width=8, image_size=8, gate="none", temperature=2.0, noise=0.5)
    assert {r.options for r in routers_of(model).values()} == {RouterOptions("none", 2.0, 0.5)}
    assert LightRouter(5, 3).extra_repr() == "gate='straight_through'"
    assert model.layer1[0].conv1.router.extra_repr() == "gate='none', temperature=2.0, noise=0.5"


def test_the_random_router_draws_anew_for_each_sample() -> None:
    router, _ = built("random", 4)
    x = torch.zeros(4000, 5, 1, 1)
    for training in (True, False):
        torch.manual_seed(0)
        first = router.train(training).route(x).expert
        assert not torch.equal(router.route(x).expert, first)
        # each count is binomial, 1000 with a deviation of 27
        assert (torch.bincount(first, minlength=4) - 1000).abs().max() < 150
        torch.manual_seed(0)
        assert torch.equal(router.route(x).expert, first)


def test_the_fixed_router_sends_all_to_its_expert() -> None:
    model = create_model("resnet18", width=8, image_size=8, router="fixed", num_experts=3).eval()
    only = copy.deepcopy(model)
    for expert in (0, 2):
        for fixed, other in zip(routers_of(model).values(), routers_of(only).values(), strict=True):
            if expert:  # 0 unless set
                fixed.expert = expert  # type: ignore[assignment]
            other.only = expert
        with record_routing(model) as routings:
            logits = model(images(4))
        assert {e for r in routings.values() for e in r.expert.tolist()} == {expert}
        assert torch.equal(only(images(4)), logits)


@pytest.mark.parametrize("name", ["light", "global"])
def test_only_sends_all_to_an_expert_without_a_look(name: str) -> None:
    model = create_model("resnet18", width=8, image_size=8, router=name, num_experts=3)
    for router in routers_of(model).values():
        router.only = 2
    seen: list[Any] = []
    watching = observe_routers(model, lambda *choice: seen.append(choice))
    with record_routing(model) as routings, record_scores(model) as scores, watching:
        model(images(4)).sum().backward()
    assert not scores and not seen
    assert all(r.expert.tolist() == [2] * 4 and r.gate is None for r in routings.values()) and len(routings) == 16
    assert all(p.grad is None for p in router_parameters(model))
    for router in routers_of(model).values():
        router.only = None
    with record_scores(model) as scores:
        model(images(4))
    assert len(scores) == len(routers_of(model))


def test_observers_see_each_choice_and_go_again() -> None:
    model = create_model("resnet18", width=8, image_size=8, temperature=4.0)
    seen: list[tuple[Router, Tensor, Routing]] = []
    raw: dict[nn.Module, Tensor] = {}
    for each in routers_of(model).values():
        each.register_forward_hook(lambda module, args, output: raw.update({module: output}))
    watching = observe_routers(model, lambda *choice: seen.append(choice))
    with record_scores(model) as scores, record_routing(model) as routings, watching:
        model(images(6))
    assert [r for r, _, _ in seen] == list(routers_of(model).values())
    for (router, observed, routing), recorded in zip(seen, scores.values(), strict=True):
        standard = (raw[router] - raw[router].mean(0)) / (raw[router].var(0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(observed, standard / 4)
        assert observed is recorded
        assert observed.requires_grad and torch.equal(routing.expert, routings[router.routes].expert)
    with pytest.raises(KeyError), observe_routers(model, lambda *choice: {}["absent"]):  # type: ignore[misc]
        model(images(2))
    assert not any(r._observers for r in routers_of(model).values())


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
    assert list_routers() == list(COSTS)
    with pytest.raises(ValueError, match=r"router: expected one of light, .*, global, got 'gloabl'; did you mean global"):
        create_model("resnet18", width=8, router="gloabl")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_non_finite_scores_name_the_layer(value: str) -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8)
    with torch.no_grad():
        model.layer2[1].conv1.router.linear.bias[0] = float(value)
    with pytest.raises(NonFiniteRouterError, match=r"router of layer2\.1\.conv1 "):
        model(images(2))


def test_scores_that_a_temperature_takes_out_of_range_are_not_finite() -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8, temperature=1e-30, standardize=False)
    with torch.no_grad():
        model.layer2[1].conv1.router.linear.bias[0] = 1e10
    with pytest.raises(NonFiniteRouterError, match=r"router of layer2\.1\.conv1 "):
        model(images(2))


def test_a_gate_that_is_known_to_diverge_is_named() -> None:
    router, x = given(torch.tensor([[float("nan"), 0.0]]), gate="raw_straight_through")
    with pytest.raises(NonFiniteRouterError, match="'raw_straight_through' is known to diverge"):
        router.route(x)


def test_non_finite_scores_of_the_global_router() -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8, router="global")
    with torch.no_grad():
        model.router.linear.bias[1] = float("nan")
    with pytest.raises(NonFiniteRouterError, match="router of all layers "):
        model(images(2))


@pytest.mark.parametrize("router", ["light", "conv", "linear", "image", "global"])
def test_a_choice_does_not_depend_on_the_rest_of_the_batch(router: str) -> None:
    torch.manual_seed(0)
    model = create_model("resnet18", "moe", width=8, image_size=8, router=router, num_experts=4).eval()
    x = images(12)
    with torch.no_grad():
        with record_scores(model) as scores:
            model(x)
        for name, own in routers_of(model).items():  # otherwise some send all images to one expert
            last: Any = own.conv if router == "conv" else own.linear
            last.bias -= scores[name].mean(0)
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
    router.options, router.norm.eps = RouterOptions(gate), 0.1
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


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("gate", ["straight_through", "softmax"])
def test_standardised_scores_are_folded_into_the_one_launch(pooled: list[Any], gate: str, temperature: float) -> None:
    torch.manual_seed(0)
    router = build_router("light", 5, 3, RouterOptions(gate, temperature)).double()
    x = torch.randn(40, 5, 4, 4, dtype=torch.float64)
    router.route(x + 1)  # running statistics
    router.eval()
    expected = router.route(x)
    assert len(expected.expert.unique()) == 3 and not pooled
    elsewhere = copy.deepcopy(router).to("meta")
    elsewhere.route(x.to("meta"))
    ((_, weight, bias, *_), _) = pooled.pop()
    assert weight.shape == (3, 5) and bias.shape == (3,)
    assert isinstance(router, LightRouter)
    actual = functional.pooled_routing(
        x, *router._as_one_layer(), router.norm.weight, router.norm.bias, eps=router.norm.eps, gate=gate
    )
    assert torch.equal(actual.expert, expected.expert)
    if gate == "softmax":
        assert actual.gate is not None and expected.gate is not None
        torch.testing.assert_close(actual.gate, expected.gate)
    pooled.clear()
    router.train()
    copy.deepcopy(router).to("meta").route(x.to("meta"))
    assert not pooled  # the batch's own statistics


@pytest.mark.parametrize("count", [0, 1, 2])
def test_standardised_scores_of_few_images(count: int) -> None:
    torch.manual_seed(0)
    router = build_router("light", 5, 3, RouterOptions())
    router.route(torch.randn(40, 5, 4, 4))
    before = copy.deepcopy(router.score_norm)
    assert before is not None and router.score_norm is not None
    x = torch.randn(count, 5, 4, 4)
    with torch.no_grad():
        chosen = router.route(x).expert
        if count == 1:  # by the running statistics, which it leaves alone
            assert torch.equal(chosen, before.eval()(router(x)).argmax(1))
            assert torch.equal(router.score_norm.running_mean, before.running_mean)
    assert chosen.shape == (count,)


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


def _alone(router: LightRouter) -> LightRouter:
    router.only = 1
    return router


def _observed(router: LightRouter) -> LightRouter:
    router._observers.append(lambda *choice: None)
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
        _alone,
        _observed,
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


@pytest.mark.parametrize("training", [True, False])
def test_noise_takes_the_light_routers_forward_in_training_only(pooled: list[Any], training: bool) -> None:
    router = LightRouter(5, 3).to("meta").train(training)
    router.options = RouterOptions(noise=1.0)
    router.route(torch.empty(7, 5, 4, 4, device="meta"))
    assert len(pooled) == (0 if training else 1)


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


@pytest.mark.parametrize("arch", ["resnet18", "vgg16_bn", "densenet40"])
def test_channel_means_are_computed_once(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Light routers take those that came with the ReLU before them, and choose and learn as from the features."""
    size = 32 if arch == "vgg16_bn" else 8
    torch.manual_seed(0)
    model = create_model(arch, "moe", width=8, image_size=size).double().to(memory_format=torch.channels_last)
    x = images(4, size).double().contiguous(memory_format=torch.channels_last).requires_grad_()
    given: list[bool] = []
    forward = LightRouter.forward

    def seen(self: LightRouter, x: Tensor, means: Tensor | None = None) -> Tensor:
        given.append(means is not None)
        if means is not None:
            torch.testing.assert_close(means, x.mean((2, 3)))
        return forward(self, x, means)

    def gradients() -> list[Tensor]:
        given.clear()
        parameters = [x, *router_parameters(model)]
        return list(torch.autograd.grad(model(x).square().sum(), parameters))

    monkeypatch.setattr(LightRouter, "forward", seen)
    together = gradients()
    assert any(given) and len(given) == len(routers_of(model))
    monkeypatch.setattr(LightRouter, "reads_means", False)
    apart = gradients()
    assert not any(given)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_a_forward_of_its_own_gets_the_features() -> None:
    class Own(LightRouter):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            assert x.dim() == 4
            return super().forward(x)

    assert not Own.reads_means and LightRouter.reads_means
    model = create_model("resnet18", "moe", width=8, image_size=8)
    for router in routers_of(model).values():
        router.forward = lambda x, own=router: LightRouter.forward(own, x)
    with torch.no_grad():
        assert model(images(2)).shape == (2, 10)
