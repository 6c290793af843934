# SPDX-License-Identifier: Apache-2.0
"""Adversarial training for free and fast, against loops written out by hand; rates; what is refused."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import SMALL, assert_same_run, batch, interrupt_at, model, same, small_architecture, snapshot, tiny
from torch import Tensor, nn

from advmoe.attacks import PGD, NonFiniteGradientError
from advmoe.cli import main
from advmoe.config import AttackConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RoutingConfig, RunConfig
from advmoe.data import load, stream_generator
from advmoe.models import create_model, router_parameters
from advmoe.objectives import balance_loss
from advmoe.routers import record_scores
from advmoe.training import FastAT, FreeAT, Interrupted, Run, build_method, engine, resume, train
from advmoe.training.methods import Batch, StepResult
from advmoe.training.parallel import World
from advmoe.training.runs import load_checkpoint

EPSILON = 0.15
FREE, FAST = PGD(EPSILON, EPSILON, 1), PGD(EPSILON, 1.25 * EPSILON, 1)
KINDS: dict[str, dict[str, Any]] = {
    "dense": {}, "s_dense": {}, "sparse": {}, "moe": {"num_experts": 3}, "network_moe": {}, "dual_moe": {},
    "block_moe": {"moe_at": ("layer2",)}, "conv_moe": {"moe_at": ("layer2.*.conv*",)},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def architecture() -> Iterator[None]:
    with small_architecture():
        yield


def small(**options: Any) -> nn.Module:
    return model(SMALL, **options)


def free(m: nn.Module, attack: PGD = FREE, optim: OptimConfig | None = None, balance: str = "none", **own: Any) -> FreeAT:
    routing = RoutingConfig(balance) if balance != "none" else None
    method = build_method(m, MethodConfig("free-at", **own), optim or OptimConfig(), attack, routing)
    assert isinstance(method, FreeAT)
    return method


def fast(m: nn.Module, attack: PGD = FAST, balance: str = "none", **own: Any) -> FastAT:
    routing = RoutingConfig(balance) if balance != "none" else None
    method = build_method(m, MethodConfig("fast-at", **own), OptimConfig(), attack, routing)
    assert isinstance(method, FastAT)
    return method


def config(method: MethodConfig | str, kind: str = "moe", **changes: Any) -> RunConfig:
    own = MethodConfig(method) if isinstance(method, str) else method
    changes = {"model": ModelConfig(SMALL, kind, width=8), "method": own, **changes}
    return tiny(validation_attack="pgd1", **changes)


def wide(b: Batch) -> Batch:
    return Batch(b.images.double(), b.labels, b.generator)


# --- free-at ---


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_free_at_is_the_papers_loop(kind: str) -> None:
    """Parameters, BatchNorm's statistics and the perturbation after each of four batches, in float64; a smaller batch
    uses the perturbation's first rows."""
    torch.manual_seed(0)
    m = small(kind=kind).double()
    by_hand = copy.deepcopy(m)
    balance = "entropy" if kind == "moe" else "none"
    step_size, replays = 0.7 * EPSILON, 3
    method = free(m, PGD(EPSILON, step_size, 1), OptimConfig(lr=0.05, momentum=0.8), balance, replays=replays)
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.05, momentum=0.8, weight_decay=5e-4)
    delta = torch.zeros(16, 3, 8, 8, dtype=torch.float64)
    for seed, count in enumerate((16, 16, 11, 16)):
        b = wide(batch(seed, count))
        result = method.step([b])
        losses = []
        for _ in range(replays):
            noise = delta[:count].clone().requires_grad_()
            with record_scores(by_hand) as scores:
                logits = by_hand((b.images + noise).clamp(0, 1))
                loss = F.cross_entropy(logits, b.labels)
                if kind == "moe":
                    loss = loss + 0.1 * torch.stack([balance_loss(s, "entropy") for s in scores.values()]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            assert noise.grad is not None
            delta[:count] = (delta[:count] + step_size * noise.grad.sign()).clamp(-EPSILON, EPSILON)
            losses.append(loss.item())
        assert method.delta is not None
        torch.testing.assert_close(method.delta, delta, rtol=0, atol=1e-12)
        for ours, theirs in zip(m.state_dict().values(), by_hand.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        assert result.losses["loss"] == pytest.approx(sum(losses) / replays, rel=1e-9)
        assert result.count == replays * count
    assert delta.abs().max().item() == EPSILON and (delta.abs() < EPSILON).any()


def test_a_replay_is_one_forward_in_training_mode_within_the_pixel_range() -> None:
    m = small(kind="dense")
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert all(each.training for each in module.modules())
        seen.append(args[0].detach().clone())

    m.register_forward_pre_hook(note)
    b = batch()
    method = free(m, replays=4)
    method.step([b])
    assert len(seen) == 4 and torch.equal(seen[0], b.images)  # the perturbation begins at 0
    assert all(x.min() >= 0 and x.max() <= 1 for x in seen)
    assert (seen[1] - b.images).abs().max().item() == pytest.approx(EPSILON)
    kept = method.delta
    assert kept is not None
    kept = kept.clone()
    method.step([batch(1)])
    assert torch.equal(seen[4], (batch(1).images + kept).clamp(0, 1))  # and goes on with the next batch


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_the_perturbation_is_reset_as_likely_as_asked(probability: float) -> None:
    """At random where between, by the batch's own generator."""
    m = small(kind="dense")
    method = free(m, optim=OptimConfig(lr=0.0), replays=1, reset_noise=probability)
    first: list[Tensor] = []
    m.register_forward_pre_hook(lambda module, args: first.append(args[0].detach().clone()))
    expected = []
    for seed in range(12):
        b = dataclasses.replace(batch(seed, 4), generator=stream_generator("reset", seed))
        expected.append(seed == 0 or torch.rand((), generator=stream_generator("reset", seed)).item() < probability)
        method.step([b])
        assert torch.equal(first[-1], b.images) == expected[-1]
    assert (len(set(expected[1:])) == 2) == (probability == 0.5)


def test_a_larger_batch_adds_rows_and_another_shape_is_refused() -> None:
    method = free(small(kind="dense"), replays=1)
    method.step([batch(0, 8)])
    assert method.delta is not None
    before = method.delta.clone()
    assert torch.equal(method._kept(batch(1, 12))[:8], before) and not method.delta[8:].any()
    with pytest.raises(ValueError, match=r"images: expected \[3, 8, 8\] each, .* of free-at has it, got \[3, 16, 16\]"):
        method.step([batch(0, 8, 16)])


def test_parts_of_a_batch_have_their_own_rows() -> None:
    """In eval mode, where a batch and its parts have the same statistics."""
    torch.manual_seed(0)
    m = small(kind="dense").double().eval()
    other = copy.deepcopy(m)
    whole, parts = free(m, replays=3), free(other, optim=OptimConfig(accumulate=4), replays=3)
    for seed in range(2):
        whole.step([wide(batch(seed))])
        parts.step([wide(batch(seed))])
    assert whole.delta is not None and parts.delta is not None
    torch.testing.assert_close(whole.delta, parts.delta, rtol=0, atol=1e-12)
    for p, q in zip(m.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["free-at", "fast-at"])
def test_the_balancing_loss_is_counted_once(name: str) -> None:
    """In each forward that is trained on, over all routers; robust-sparse-moes' Free-AT counts it twice."""
    m = small(num_experts=3).eval()  # the same statistics in both calculations
    other = copy.deepcopy(m)
    attack, seen = (FREE if name == "free-at" else FAST), []
    m.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    own = MethodConfig(name, replays=1) if name == "free-at" else MethodConfig(name)
    method = build_method(m, own, OptimConfig(lr=0.0), attack, RoutingConfig("switch", 0.25))
    b = batch()
    losses = method.step([b]).losses
    with record_scores(other) as scores:
        logits = other(seen[-1])
        balance = torch.stack([balance_loss(s, "switch") for s in scores.values()]).mean()
    loss = F.cross_entropy(logits, b.labels) + 0.25 * balance
    assert balance.item() > 0.01
    assert losses == pytest.approx({"loss": loss.item(), "balance": balance.item()}, rel=1e-5)
    loss.backward()
    for p, expected in zip(router_parameters(m), router_parameters(other), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-6)


class Flat(nn.Module):
    """A network whose loss is finite and whose gradient towards the images is not."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 10)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))
        return self.linear(means.detach()) + 0 * (means - means.detach()).sqrt().sum(1, keepdim=True)


@pytest.mark.parametrize("name", ["free-at", "fast-at"])
def test_a_gradient_that_is_not_finite_is_no_attack(name: str) -> None:
    m = Flat()
    before = snapshot(list(m.parameters()))
    method = free(m) if name == "free-at" else fast(m)
    with pytest.raises(NonFiniteGradientError, match=r"the gradient of 16 of 16 samples is not finite"):
        method.step([batch()])
    assert same(before, list(m.parameters()))
    if isinstance(method, FreeAT):
        assert method.delta is not None and not method.delta.any()


def test_each_process_goes_on_with_its_own_rows() -> None:
    """Of the perturbation as a checkpoint has it; of two processes and two parts of a batch."""
    whole = torch.rand(16, 3, 8, 8)
    rows = []
    for rank in range(2):
        optim = OptimConfig(accumulate=2)
        method = build_method(small(), MethodConfig("free-at"), optim, FREE, world=World(rank, 2))
        assert isinstance(method, FreeAT)
        method.load_state_dict({"delta": whole})
        assert method.delta is not None
        rows.append(method.delta)
    for delta, starts in zip(rows, ((0, 8), (4, 12)), strict=True):
        assert torch.equal(delta, torch.cat([whole[start : start + 4] for start in starts]))
    alone = free(small())
    alone.load_state_dict({})  # an older checkpoint
    assert alone.delta is None
    alone.load_state_dict({"delta": whole})
    assert alone.delta is not None and torch.equal(alone.delta, whole) and alone.delta is not whole


# --- fast-at ---


@pytest.mark.parametrize("keep_start", [True, False])
def test_fast_at_trains_on_the_papers_images(keep_start: bool) -> None:
    """One gradient at the random start, in eval mode; from there, or, as released, from the image."""
    m = small(kind="moe")
    other = copy.deepcopy(m).eval()
    trained_on: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module.training:
            trained_on.append(args[0].detach().clone())

    m.register_forward_pre_hook(note)
    b = batch()
    g = stream_generator(0)
    torch.rand(16, 3, 8, 8, generator=g), torch.randint(0, 10, (16,), generator=g)  # as batch() draws
    noise = torch.empty(16, 3, 8, 8).uniform_(-EPSILON, EPSILON, generator=g)
    start = (b.images + noise).clamp(0, 1).requires_grad_()
    F.cross_entropy(other(start), b.labels, reduction="sum").backward()
    assert start.grad is not None
    moved = (start if keep_start else b.images).detach() + 1.25 * EPSILON * start.grad.sign()
    expected = torch.minimum(torch.maximum(moved, b.images - EPSILON), b.images + EPSILON).clamp(0, 1)
    fast(m, keep_start=keep_start).step([b])
    (images,) = trained_on
    # a sign may hang on rounding where a gradient is nearly 0
    assert ((images - expected).abs() > 1e-6).float().mean() < 0.001
    inside = ((images - b.images).abs() < EPSILON - 1e-6) & (images > 0) & (images < 1)
    assert bool(inside.any()) == keep_start  # a step of more than epsilon from the image ends on the ball's surface


def test_fast_at_descends_cross_entropy_on_these_images() -> None:
    torch.manual_seed(0)
    m = small(kind="moe").double()
    other = copy.deepcopy(m)
    b = wide(batch())
    images = FAST.run(other, b.images, b.labels, stream_generator("same")).images
    result = fast(m).step([dataclasses.replace(b, generator=stream_generator("same"))])
    loss = F.cross_entropy(other(images), b.labels)
    loss.backward()
    assert result.losses == {"loss": pytest.approx(loss.item(), rel=1e-12)} and result.count == 16
    for p, q in zip(m.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_a_step_from_the_image_is_of_one_step_alone() -> None:
    assert "the step from the image" in PGD(0.1, 0.1, 1, keep_start=False).describe()
    with pytest.raises(ValueError, match="keep_start: False is of one step, got 2"):
        PGD(0.1, 0.1, 2, keep_start=False)
    with pytest.raises(ValueError, match="keep_start: False is without effect where random_start is False"):
        PGD(0.1, 0.1, 1, random_start=False, keep_start=False)


# --- both ---


@pytest.mark.parametrize("name", ["free-at", "fast-at"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_trained(kind: str, name: str) -> None:
    m = small(kind=kind, **KINDS[kind])
    method = build_method(m, MethodConfig(name), OptimConfig(), FREE if name == "free-at" else FAST)
    weights = [p for p in m.parameters() if p.requires_grad]
    before = snapshot(weights)
    losses = [method.step([batch(seed)]).losses["loss"] for seed in range(2)]
    assert all(math.isfinite(loss) for loss in losses)
    moved = [not torch.equal(a, b) for a, b in zip(before, weights, strict=True)]
    assert sum(moved) > 0.9 * len(moved)


@pytest.mark.parametrize("name", ["free-at", "fast-at"])
def test_both_learn_what_they_see(name: str) -> None:
    """The loss on one batch falls; in bfloat16 as in float32 at first."""
    first = {}
    for precision in ("float32", "bfloat16"):
        m = small()
        attack = PGD(0.05, 0.05, 1)
        optim = OptimConfig(lr=0.05, precision=precision)
        method = build_method(m, MethodConfig(name), optim, attack)
        losses = [method.step([dataclasses.replace(batch(), generator=stream_generator(i))]).losses for i in range(16)]
        assert losses[-1]["loss"] < 0.9 * losses[0]["loss"]
        first[precision] = losses[0]["loss"]
        assert {p.dtype for p in m.parameters()} == {torch.float32}
    assert first["bfloat16"] == pytest.approx(first["float32"], rel=0.1)


@pytest.mark.parametrize(
    ("method", "attack", "message"),
    [
        (MethodConfig("at", replays=2), FAST, "replays: a setting of the method free-at, without effect on at"),
        (MethodConfig("fast-at", reset_noise=0.5), FAST, "reset_noise: a setting of the method free-at"),
        (MethodConfig("free-at", keep_start=False), FREE, "keep_start: a setting of the method fast-at"),
        (MethodConfig("free-at", "cross_entropy"), FREE, "objective: without effect on free-at"),
        (MethodConfig("free-at", attack_routers=True), FREE, "attack_routers: without effect on rt-er, jtdmoe, free-at"),
        (MethodConfig("free-at"), PGD(0.1, 0.1, 2), "attack.steps: free-at takes one step along a gradient, got 2"),
        (MethodConfig("fast-at"), PGD(0.1, 0.1, 7), "attack.steps: fast-at takes one step"),
        (MethodConfig("fast-at"), PGD(0.1, 0.1, 1, loss="kl"), "attack.loss: fast-at attacks by cross-entropy, got 'kl'"),
        (MethodConfig("free-at"), PGD(0.1, 0.1, 1, random_start="gaussian"), "attack.random_start: without effect on"),
    ],
)
def test_what_has_no_effect_is_refused(method: MethodConfig, attack: PGD, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        build_method(small(), method, OptimConfig(), attack)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replays": 0}, "replays: expected at least 1, got 0"),
        ({"reset_noise": 1.5}, "reset_noise: expected a number from 0 to 1, got 1.5"),
        ({"reset_noise": math.nan}, "reset_noise: expected a number from 0 to 1, got nan"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MethodConfig("free-at", **settings)


def test_attacks_of_a_run_by_default() -> None:
    data = load("digits", None, 96, None, 16, 0)
    for name, step_size in (("free_at", 0.12), ("fast_at", 0.15)):
        c = engine.resolve(config(name, attack=AttackConfig(0.12)), data)
        assert c.method.name == name.replace("_", "-")
        assert (c.attack.loss, c.attack.steps) == ("ce", 1) and c.attack.step_size == pytest.approx(step_size)
        assert engine.resolve(config(name, attack=AttackConfig(step_size=0.02)), data).attack.step_size == 0.02
        for steps in (2, 7):  # which are refused
            assert engine.resolve(config(name, attack=AttackConfig(steps=steps)), data).attack.steps == steps
    assert engine.resolve(config("at", attack=AttackConfig(0.12)), data).attack.steps == 2


# --- runs ---


@pytest.mark.parametrize("step", [2, 5])
@pytest.mark.parametrize(
    "method",
    [MethodConfig("free-at", replays=2, reset_noise=0.3), MethodConfig("fast-at", keep_start=False)],
    ids=["free-at", "fast-at"],
)
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: MethodConfig, step: int
) -> None:
    optim = OptimConfig(lr=0.05, nesterov=True, schedule="polynomial")
    c = config(method, optim=optim, data=DataConfig("digits", train_limit=96, validation=16, color_jitter=0.3))
    whole = train(c, tmp_path / "whole", quiet=True)
    interrupt_at(step, FreeAT if method.name == "free-at" else FastAT, monkeypatch)
    with pytest.raises(Interrupted):
        train(c, tmp_path / "broken", quiet=True)
    monkeypatch.undo()
    resumed = resume(tmp_path / "broken", quiet=True)
    assert_same_run(whole, resumed)
    if method.name == "free-at":
        one, two = (load_checkpoint(r.checkpoint())["method"]["delta"] for r in (whole, resumed))
        assert torch.equal(one, two) and one.shape == (32, 3, 8, 8) and one.abs().max() > 0


def test_a_run_without_its_perturbation_would_end_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would not see if the perturbation did not matter."""
    c = config(MethodConfig("free-at", replays=2))
    whole = train(c, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        interrupt_at(2, FreeAT, patch)
        with pytest.raises(Interrupted):
            train(c, tmp_path / "broken", quiet=True)
    monkeypatch.setattr(FreeAT, "load_state_dict", lambda self, state: None)
    with pytest.raises(AssertionError):
        assert_same_run(whole, resume(tmp_path / "broken", quiet=True))


def noted_rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of every step that SGD makes from now on."""
    rates: list[float] = []
    step = torch.optim.SGD.step

    def noted(self: torch.optim.SGD, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    return rates


@pytest.mark.parametrize("schedule", ["cosine", "polynomial", "cyclic"])
def test_the_rate_counts_steps_of_the_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str) -> None:
    """Three replays of six batches: 18 steps, each with a rate of its own, to the end of the schedule."""
    rates = noted_rates(monkeypatch)
    optim = OptimConfig(lr=0.02, schedule=schedule, cycle_steps=5)
    train(config(MethodConfig("free-at", replays=3), "dense", optim=optim), tmp_path / "run", quiet=True)
    if schedule == "cosine":
        expected = [0.5 * (1 + math.cos(math.pi * i / 18)) for i in range(18)]
    elif schedule == "polynomial":
        expected = [(1 - i / 18) ** 0.9 for i in range(18)]
    else:
        expected = [0.5 + 0.5 * (1 - abs(i % 10 - 5) / 5) for i in range(18)]
    assert rates == pytest.approx([0.02 * e for e in expected])


def test_the_polynomial_rate_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = noted_rates(monkeypatch)
    optim = OptimConfig(lr=0.03, schedule="polynomial", power=2.0)
    train(config("fast-at", "dense", optim=optim), tmp_path / "run", quiet=True)
    rates = list(noted)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.03)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(other, total_iters=6, power=2.0)
    expected = []
    for _ in range(6):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        scheduler.step()
    assert rates == pytest.approx(expected, rel=1e-9)


def test_nesterov_is_the_optimisers() -> None:
    """Two steps of the same gradients, by hand: v <- m v + g; p <- p - lr (g + m v)."""
    m = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).double()
    method = build_method(m, MethodConfig("standard"), OptimConfig(0.1, momentum=0.7, nesterov=True), FAST)
    weight, velocity = m[1].weight.detach().clone(), torch.zeros(10, 192, dtype=torch.float64)
    for seed in range(2):
        method.step([wide(batch(seed))])
        assert isinstance(m[1].weight.grad, Tensor)
        decayed = m[1].weight.grad + 5e-4 * weight
        velocity = 0.7 * velocity + decayed
        weight -= 0.1 * (decayed + 0.7 * velocity)
        torch.testing.assert_close(m[1].weight.detach(), weight, rtol=1e-10, atol=1e-12)
    sparse = create_model(SMALL, "sparse", image_size=8, width=8)
    masks = build_method(sparse, MethodConfig("at_sparse", mask_epochs=1), OptimConfig(nesterov=True), FAST)
    assert all(group["nesterov"] for o in masks.optimizers.values() for group in o.param_groups)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nesterov": True, "optimizer": "adam"}, "nesterov: needs optimizer 'sgd', got 'adam'"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov: needs a momentum above 0"),
        ({"power": 2.0}, "power: without effect with schedule 'cosine'"),
        ({"power": -1.0, "schedule": "polynomial"}, "power: expected a finite number of at least 0, got -1"),
        ({"schedule": "polynomal"}, "schedule: .*did you mean polynomial"),
    ],
)
def test_bad_rates_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)


def test_the_command(tmp_path: Path) -> None:
    common = (
        f"--arch {SMALL} --kind conv_moe --moe-at layer2.*.conv* --width 8 --train-limit 32 --epochs 1 --batch-size 16 "
        "--validation-attack pgd1 --balance entropy --nesterov --schedule polynomial --power 0.8 --color-jitter 0.3"
    )
    for name, options, expected in (
        ("free_at", "--replays 2 --reset-noise 0.1", MethodConfig("free-at", replays=2, reset_noise=0.1)),
        ("fast-at", "--drop-start --epsilon 0.1 --step-size 0.1", MethodConfig("fast-at", keep_start=False)),
    ):
        out = tmp_path / name
        assert main(["train", "--method", name, *options.split(), *common.split(), "--out", str(out)]) == 0
        c = Run(out).config()
        assert c.method == expected and c.optim == OptimConfig(nesterov=True, schedule="polynomial", power=0.8)
        assert c.data.color_jitter == 0.3 and c.attack.loss == "ce"
        assert RunConfig.load(out / "config.yaml") == c
        assert set(Run(out).metrics()[0]) >= {"loss", "balance", "train_ra", "validation_ra"}


def test_the_method_is_asked_for_its_state_after_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays are within a step: Ctrl-C in the middle of them lets the batch end."""
    counts: list[int] = []
    step = FreeAT.step

    def counted(self: FreeAT, batches: Sequence[Batch]) -> StepResult:
        result = step(self, batches)
        counts.append(result.count)
        return result

    monkeypatch.setattr(FreeAT, "step", counted)
    run = train(config(MethodConfig("free-at", replays=2), "dense", epochs=1), tmp_path / "run", quiet=True)
    assert counts == [64, 64, 64] and load_checkpoint(run.checkpoint())["step"] == 0
