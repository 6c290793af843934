# SPDX-License-Identifier: Apache-2.0
"""A router that has collapsed, or whose scores are no numbers, is reported while the epoch goes on, and by name."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import ATTACK, SMALL, batch, model, small_architecture, tiny
from torch import Tensor, nn

from advmoe.attacks import NonFiniteGradientError
from advmoe.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, RoutingConfig, RunConfig
from advmoe.routers import FixedRouter, NonFiniteRouterError, Router, RouterOptions, routers_of
from advmoe.training import Method, NonFiniteLossError, Standard, StepResult, build_method, train
from advmoe.training.methods import Batch
from advmoe.training.parallel import World
from advmoe.training.runs import build_model
from advmoe.training.watch import RouterWatch


@pytest.fixture(scope="module", autouse=True)
def architecture() -> Iterator[None]:
    with small_architecture():
        yield


class Given(Router):
    """Its input is its scores."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Net(nn.Module):
    """Two routers that are told what to choose."""

    def __init__(self, num_experts: int = 3, first: type[Router] = Given) -> None:
        super().__init__()
        self.routers = nn.ModuleList([first(num_experts, num_experts), Given(num_experts, num_experts)])
        for i, router in enumerate(self.routers):
            router.routes = f"layer{i}"  # type: ignore[assignment]

    def forward(self, *choices: Sequence[int]) -> None:
        for router, choice in zip(self.routers, choices, strict=True):
            count = router.num_experts
            router.route(nn.functional.one_hot(torch.tensor(choice), count).float())  # type: ignore[operator,arg-type]


BALANCED = (0, 1, 2, 1)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def steps(watch: RouterWatch, net: Net, *choices: Sequence[int], start: int = 0, count: int = 50) -> int:
    for position in range(start, start + count):
        with watch.watching(position):
            net(*choices)
    return start + count


def test_a_collapsed_router_is_reported_within_fifty_steps_and_once(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    watch = RouterWatch(net)
    said = "the router of layer1 has collapsed: expert 2 took 100.0 % of the samples of 5 steps"
    end = steps(watch, net, BALANCED, [2] * 4)
    assert warnings_of(caplog) == [f"step 41: {said}"]
    end = steps(watch, net, BALANCED, [2] * 4, start=end, count=100)
    assert len(warnings_of(caplog)) == 1
    end = steps(watch, net, BALANCED, BALANCED, start=end)  # recovered
    end = steps(watch, net, BALANCED, [2] * 4, start=end)
    assert warnings_of(caplog) == [f"step 41: {said}", f"step {end - 9}: {said}"]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([[2.0, 0, 1], [1.0, 0, 2]], "experts 0, 2 took 100.0 %"),
        ([[2.0, 0, 1], [2.0, 1, 0]], None),  # one expert takes all, but not the same two
    ],
)
def test_of_several_choices_the_same_ones_are_a_collapse(
    caplog: pytest.LogCaptureFixture, scores: list[list[float]], said: str | None
) -> None:
    router = Given(3, 3)
    router.options = RouterOptions(gate="softmax", top_k=2)
    watch = RouterWatch(router)
    for position in range(50):
        with watch.watching(position):
            router.route(torch.tensor(scores))
    assert [said in each if said else False for each in warnings_of(caplog)] == ([True] if said else [])


def test_as_many_choices_as_experts_cannot_collapse(caplog: pytest.LogCaptureFixture) -> None:
    router = Given(2, 2)
    router.options = RouterOptions(gate="softmax", top_k=2)
    watch = RouterWatch(router)
    for position in range(50):
        with watch.watching(position):
            router.route(torch.tensor([[1.0, 0.0]]))
    assert not warnings_of(caplog)


def test_a_resumed_run_is_watched_from_where_it_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    steps(RouterWatch(net), net, [0] * 4, BALANCED, start=1033)
    (said,) = warnings_of(caplog)
    assert said.startswith("step 1081: the router of layer0 has collapsed: expert 0")


@pytest.mark.parametrize("choices", [(0, 1, 2, 1), (0,) * 499 + (1,)], ids=["balanced", "nearly"])
def test_a_router_that_uses_two_experts_is_not_reported(caplog: pytest.LogCaptureFixture, choices: Sequence[int]) -> None:
    net = Net()
    steps(RouterWatch(net), net, choices, choices, count=100)
    assert not warnings_of(caplog)


def test_collapse_is_counted_over_all_watched_steps(caplog: pytest.LogCaptureFixture) -> None:
    """One expert a batch is no collapse as long as batches differ."""
    net = Net()
    watch = RouterWatch(net)
    for position in range(100):
        with watch.watching(position):
            net([position // 10 % 3] * 4, BALANCED)
    assert not warnings_of(caplog)


class Beside(World):
    """The other process sends all samples of both routers to expert 1."""

    def total(self, counts: Tensor) -> Tensor:
        return counts + torch.tensor([0, 4, 0, 0, 4, 0])


def test_collapse_is_counted_over_all_processes(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    steps(RouterWatch(net, Beside(0, 2)), net, [0] * 4, [1] * 4)
    (said,) = warnings_of(caplog)
    assert "layer1 has collapsed: expert 1 took 100.0 %" in said


def test_what_cannot_collapse_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    net = Net(num_experts=1)
    steps(RouterWatch(net), net, [0] * 4, [0] * 4)
    net = Net(first=FixedRouter)  # type: ignore[type-abstract]
    steps(RouterWatch(net), net, [1] * 4, BALANCED)
    assert not warnings_of(caplog)


def test_what_is_not_training_is_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    watch = RouterWatch(net)
    steps(watch, net.eval(), [2] * 4, [2] * 4)  # an attack's forwards, say
    net.train()
    for router in net.routers:
        router.only = 0  # type: ignore[assignment]
    steps(watch, net, [2] * 4, [2] * 4)  # experts are shared
    assert not warnings_of(caplog)
    assert not any(router._observers for router in routers_of(net).values())


@pytest.mark.parametrize("trained", ["routers", "experts"])
def test_a_part_that_rests_is_watched(caplog: pytest.LogCaptureFixture, trained: str) -> None:
    net = Net()
    net.train(trained == "experts")
    for router in net.routers:
        router.train(trained == "routers")
    steps(RouterWatch(net), net, BALANCED, [0] * 4)
    assert len(warnings_of(caplog)) == 1


def test_a_failed_step_leaves_no_observer() -> None:
    net = Net()
    with pytest.raises(KeyError), RouterWatch(net).watching(0):
        raise KeyError
    assert not any(router._observers for router in routers_of(net).values())


def forced(name: str, expert: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs begin with this layer's router preferring that expert so much."""

    def build(config: ModelConfig) -> nn.Module:
        built = build_model(config)
        with torch.no_grad():
            built.get_submodule(f"{name}.router").linear.bias[expert] += value  # type: ignore[operator]
        return built

    monkeypatch.setattr("advmoe.training.engine.build_model", build)


def config(**changes: Any) -> RunConfig:
    """One epoch of 60 steps of standard training."""
    options = {"data": DataConfig("digits", train_limit=480, validation=16), "epochs": 1, "batch_size": 8, **changes}
    return tiny("standard", **{"model": ModelConfig(SMALL, width=4), "validation_attack": "pgd1", **options})


def test_a_run_reports_within_the_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced("layer2.0.conv1", 1, 1000.0, monkeypatch)
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        asked = config(optim=OptimConfig(lr=0.001), model=ModelConfig(SMALL, width=4, standardize=False))
        run = train(asked, tmp_path / "run", quiet=True)
    own = [said for said in warnings_of(caplog) if "layer2.0.conv1" in said]
    assert (
        own[0] == "step 41: the router of layer2.0.conv1 has collapsed: expert 1 took 100.0 % of the samples of 5 steps"
    )
    assert len(own) == 2 and own[1].startswith("epoch 1: one expert takes all samples in ")
    assert own[0] in (run.folder / "log.txt").read_text()


@pytest.mark.parametrize(("experts", "expected"), [(3, True), (2, False)])
def test_a_run_reports_the_same_two_of_three_experts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, experts: int, expected: bool
) -> None:
    place = "layer2.0.conv1"
    forced(place, experts - 1, -1000.0, monkeypatch)
    model = ModelConfig(SMALL, "conv_moe", width=4, num_experts=experts, top_k=2, moe_at=(place,))
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        train(config(optim=OptimConfig(lr=0.001), model=model), tmp_path / "run", quiet=True)
    own = warnings_of(caplog)
    assert len(own) == 2 * expected
    if expected:
        assert own[0].startswith(f"step 41: the router of {place} has collapsed: experts 0, 1 took 100.0 %")
        assert own[1] == f"epoch 1: 2 experts take all samples in {place}.experts"


@pytest.mark.parametrize("router", ["fixed", "random"])
def test_a_router_of_an_ablation_is_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture, router: str) -> None:
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        train(config(model=ModelConfig(SMALL, width=4, router=router)), tmp_path / "run", quiet=True)
    assert not warnings_of(caplog)


def test_a_shared_expert_is_not_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        train(config(epochs=2, routing=RoutingConfig(share_epochs=1)), tmp_path / "run", quiet=True)
    before = [s for s in warnings_of(caplog) if s.startswith("epoch 1:") or int(s.split()[1].rstrip(":")) <= 60]
    assert not before


# --- scores that are no numbers ---


@pytest.mark.parametrize("method", ["standard", "at", "advmoe"])
def test_a_router_that_is_not_finite_stops_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    forced("layer2.0.conv2", 0, float("nan"), monkeypatch)
    wrong = r"^epoch 1, step 1: the router of layer2\.0\.conv2 gave scores that are not finite; .*no checkpoint yet"
    with pytest.raises(NonFiniteRouterError, match=wrong):
        train(config(method=MethodConfig(method)), tmp_path / "run", quiet=True)


@pytest.mark.parametrize("error", [NonFiniteLossError, NonFiniteGradientError])
@pytest.mark.parametrize("broken", [True, False])
def test_a_router_is_named_where_only_the_loss_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[RuntimeError], broken: bool
) -> None:
    """As on a device, where a choice does not look at the scores: there the loss is the first to be looked at."""

    def step(self: Method, batches: Sequence[Batch]) -> StepResult:
        if broken:
            router = self.model.get_submodule("layer1.0.conv2.router")
            with torch.no_grad():
                router.linear.bias[0] = float("inf")  # type: ignore[index,union-attr]
        raise error("loss is nan")

    monkeypatch.setattr(Standard, "step", step)
    expected = NonFiniteRouterError if broken else error
    what = r"the router of layer1\.0\.conv2 gave scores" if broken else "loss is nan"
    with pytest.raises(expected, match=f"^epoch 1, step 1: {what}"):
        train(config(), tmp_path / "run", quiet=True)


def test_looking_for_the_router_leaves_the_model_as_it_was() -> None:
    m = model(SMALL, bn="per_expert", router="global")
    before = {n: v.clone() for n, v in m.state_dict().items()}
    seen: list[bool] = []
    m.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    RouterWatch(m).require_finite(batch().images)
    assert seen == [True]  # as the step that failed
    assert all(torch.equal(v, before[n]) for n, v in m.state_dict().items())
    assert all(module.training for module in m.modules()) and all(p.requires_grad for p in m.parameters())


def test_watching_changes_nothing() -> None:
    """Nor does it get in the way of a balancing loss, which observes the same choices."""
    losses = []
    for position in (0, 1):  # watched, and not
        m = model(SMALL)
        method = build_method(m, MethodConfig("at"), OptimConfig(), ATTACK, RoutingConfig("switch"))
        watch = RouterWatch(m)
        for seed in (0, 1):
            with watch.watching(position):
                losses.append(method.step([batch(seed)]).losses)
    assert losses[:2] == losses[2:] and "balance" in losses[0]
