# SPDX-License-Identifier: Apache-2.0
"""RT-ER, the Dual-Model and JTDMoE; and that nothing of what the released code does wrong comes back."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, assert_same_run, batch, interrupt_at, model, same, small_architecture, snapshot, tiny
from torch import Tensor, nn

from advmoe.attacks import PGD
from advmoe.cli import main
from advmoe.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, RoutingConfig, RunConfig
from advmoe.data import load, stream_generator
from advmoe.evaluation import evaluate
from advmoe.models import DualModel, NetworkMoE, router_parameters
from advmoe.objectives import cross_entropy, kl_divergence, rt_er_loss
from advmoe.training import (
    AT,
    Interrupted,
    Run,
    RunError,
    Standard,
    Trainer,
    build_method,
    engine,
    load_model,
    resume,
    train,
)
from advmoe.training.methods import RTER, Batch, JTDMoE, Method, StepResult

CE = PGD(0.15, 0.1, 2, loss="ce")
ADAM = OptimConfig.cyclic_adam(lr=1e-2, cycle_steps=2)


@pytest.fixture(scope="module", autouse=True)
def architecture() -> Iterator[None]:
    with small_architecture():
        yield


def small(kind: str = "network_moe", **options: Any) -> nn.Module:
    return model(SMALL, **{"kind": kind, "num_experts": 4, "frozen_router": True, **options})


def rter(m: nn.Module, attack: PGD = CE, optim: OptimConfig = ADAM, **settings: Any) -> RTER:
    method = build_method(m, MethodConfig("rt-er", **settings), optim, attack)
    assert isinstance(method, RTER)
    return method


def jtdmoe(m: nn.Module, **settings: Any) -> JTDMoE:
    method = build_method(m, MethodConfig("jtdmoe", **settings), ADAM, CE)
    assert isinstance(method, JTDMoE)
    return method


def config(name: str, kind: str | None = None, **changes: Any) -> RunConfig:
    """Two epochs of three steps of the small architecture."""
    kinds = {"rt-er": "network_moe", "jtdmoe": "dual_moe"}
    settings = changes.pop("settings", {})
    own = ModelConfig(SMALL, kind or kinds.get(name, "network_moe"), num_experts=3, width=8, frozen_router=True)
    method = MethodConfig(name, **settings)
    return tiny(**{"model": own, "method": method, "optim": ADAM, "validation_attack": "pgd1", **changes})


def state(m: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return list(m.state_dict().values())


def adam_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [v for each in optimizer.state.values() for v in each.values()]


# --- the loss ---


@pytest.mark.parametrize("which", ["second", "another", "all"])
def test_the_loss_is_that_of_a_loop_over_samples(which: str) -> None:
    m = small().double().eval()  # the same statistics in both calculations
    assert isinstance(m, NetworkMoE)
    method = rter(m, robust_experts=which, beta=3.0)
    b = batch(count=13)
    b = dataclasses.replace(b, images=b.images.double())
    attacked = method._hardened(b)
    loss, _ = method._robust_objective(b, attacked)
    alone = [m.expert(i) for i in range(4)]
    ranked = m.scores(b.images).argsort(1, descending=True)
    total = cross_entropy(m(attacked.images), b.labels)
    assert len(attacked.apart) == (4 if which == "all" else 1)
    for number, (routing, images) in enumerate(attacked.apart):
        for i, expert in enumerate(routing.expert.tolist()):
            if which == "all":
                assert expert == number
            else:
                rank = ranked[i].tolist().index(expert)
                assert rank == 1 if which == "second" else rank > 0
            f, one = alone[expert], slice(i, i + 1)
            total = total + 3.0 * kl_divergence(f(b.images[one]), f(images[one])) / 13
    assert torch.allclose(loss, total, rtol=1e-9)


def test_another_expert_is_drawn_for_each_image_by_the_batchs_generator() -> None:
    m = small()
    method = rter(m, robust_experts="another")
    drawn = []
    for seed in (0, 0, 1):
        b = dataclasses.replace(batch(count=64), generator=stream_generator(seed))
        drawn.append(method._choices(b)[0].expert)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    ranked = m.scores(batch(count=64).images).argsort(1, descending=True)  # type: ignore[operator]
    ranks = (ranked == drawn[0][:, None]).int().argmax(1)
    assert set(ranks.tolist()) == {1, 2, 3}


def test_each_expert_is_attacked_by_itself() -> None:
    """In float64 and from the image itself: what an ordinary attack on the second expert's own network finds."""
    m = small().double()
    assert isinstance(m, NetworkMoE)
    attack = PGD(0.15, 0.1, 2, loss="ce", random_start=False)
    b = batch(count=24)
    b = dataclasses.replace(b, images=b.images.double())
    method = rter(m, attack)
    ((routing, images),) = method._hardened(b).apart
    for expert in routing.expert.unique().tolist():
        rows = routing.expert == expert
        assert torch.allclose(images[rows], attack(m.expert(expert), b.images[rows], b.labels[rows]), atol=1e-12)
    whole = method._hardened(b).images
    assert torch.allclose(whole, attack(m, b.images, b.labels), atol=1e-12) and not torch.allclose(whole, images)


def test_samples_go_through_the_experts_together() -> None:
    m = small()
    calls: list[int] = []
    m.experts.network.conv1.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))  # type: ignore[union-attr, operator]
    rter(m).step([batch()])
    assert calls == [16] * (2 + 2 + 3)  # two attacks of two steps; attacked, and clean and attacked of the second


def test_the_divergence_is_a_mean_over_the_samples_that_are_there() -> None:
    g = stream_generator(0)
    clean, attacked, logits = (torch.randn(5, 10, generator=g) for _ in range(3))
    labels = torch.arange(5)
    once = rt_er_loss(logits, labels, [(clean, attacked)], 6.0)
    pairs = [(torch.cat([clean] * 2), torch.cat([attacked] * 2))]
    twice = rt_er_loss(torch.cat([logits] * 2), torch.cat([labels] * 2), pairs, 6.0)
    assert torch.allclose(once, twice)
    by_hand = cross_entropy(logits, labels) + 6.0 * kl_divergence(clean, attacked, "sum") / 5
    assert torch.allclose(once, by_hand)
    assert torch.equal(rt_er_loss(logits, labels, []), cross_entropy(logits, labels))


# --- what the released code does wrong ---


@pytest.mark.parametrize("name", ["standard", "at", "rt-er", "jtdmoe"])
def test_statistics_move_in_every_step_of_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its attack leaves the network in eval mode: BatchNorm then rests from an epoch's second step on."""
    seen: list[bool] = []
    classes: dict[str, type[Method]] = {"standard": Standard, "at": AT, "rt-er": RTER, "jtdmoe": JTDMoE}
    cls = classes[name]
    step = cls.step

    def watched(self: Method, batches: Sequence[Batch]) -> StepResult:
        assert all(module.training for module in self.model.modules())
        names = [n for n, _ in self.model.named_buffers() if n.endswith("running_mean")]
        before = snapshot([self.model.get_buffer(n) for n in names])
        result = step(self, batches)
        assert all(module.training for module in self.model.modules())
        seen.extend(not torch.equal(a, self.model.get_buffer(n)) for a, n in zip(before, names, strict=True))
        return result

    monkeypatch.setattr(cls, "step", watched)
    train(config(name, epochs=1), tmp_path / "run", quiet=True)
    assert len(seen) >= 3 * 5 and all(seen)


def test_attacks_begin_inside_the_ball_around_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its start has the mean subtracted: the first gradient is that of a nearly black image, and what is projected onto
    the ball behind it lies at its lower end."""
    m = small()
    starts: list[tuple[Tensor, Tensor]] = []
    gradient = PGD._gradient

    def first(self: PGD, target: Any, x: Tensor, rows: Tensor, extra: Any) -> Any:
        starts.append((x.clone(), target.images[rows]))
        return gradient(self, target, x, rows, extra)

    monkeypatch.setattr(PGD, "_gradient", first)
    b = batch(count=32)
    rter(m).step([dataclasses.replace(b, images=0.3 + 0.4 * b.images)])
    assert len(starts) == 4
    for x, images in (starts[0], starts[2]):  # of the attack on the whole, and of that on the second expert
        moved = x - images
        assert moved.abs().max() <= 0.15 + 1e-6
        assert (moved.abs() > 0.149).float().mean() < 0.02 and moved.mean().abs() < 0.005
        assert 0.08 < moved.std() < 0.09  # uniform: 0.15 / sqrt(3)


class Confident(nn.Module):
    """A wrong label has the probability e-7 or so, and weights are small: in float16 no gradient is left."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 10)
        nn.init.normal_(self.linear.weight, std=1e-3)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.zeros(10, device=x.device)
        bias[0] = 14.0
        return self.linear(x.flatten(1)) + bias


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_attack_under_autocast_has_gradients_with_signs(dtype: torch.dtype) -> None:
    """Its attacks run in float16 without scaling the loss."""
    torch.manual_seed(0)
    m, images, labels = Confident(), torch.rand(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64)
    x = images.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16):
        (lost,) = torch.autograd.grad(cross_entropy(m(x), labels).sum(), x)
    assert (lost == 0).float().mean() > 0.9  # what the test is about
    signs: list[Tensor] = []
    x.register_hook(signs.append)
    plain = CE.run(m, images, labels, stream_generator(0))
    with torch.autocast("cpu", dtype=dtype):
        found = CE.run(m, images, labels, stream_generator(0))
    assert not plain.zero_gradient.any() and not found.zero_gradient.any()
    if dtype == torch.float16:
        assert torch.equal(plain.images, found.images)
    moved = (found.images - plain.images).abs() < 1e-6
    assert moved.float().mean() > 0.9


def test_each_level_of_jtdmoe_moves_its_own_mixture_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second step leaves gradients behind, which the next step's optimiser applies again to the standard mixture."""
    m = small("dual_moe")
    assert isinstance(m, DualModel)
    method = jtdmoe(m)
    parts = {"robust": m.robust, "standard": m.standard}
    order: list[str] = []
    descend = Method._descend

    def watched(self: Method, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> StepResult:
        own = next(name for name, each in self.optimizers.items() if each is optimizer)
        other = "standard" if own == "robust" else "robust"
        still = [*state(parts[other]), *adam_state(self.optimizers[other])]
        before, moved = snapshot(still), snapshot(state(parts[own]))
        result = descend(self, optimizer, *args, **kwargs)
        now = [*state(parts[other]), *adam_state(self.optimizers[other])]
        assert same(before, now)
        assert not any(torch.equal(a, p) for a, p in zip(moved, state(parts[own]), strict=True) if a.dim() > 2)
        order.append(own)
        return result

    monkeypatch.setattr(Method, "_descend", watched)
    for seed in range(3):
        result = method.step([batch(seed)])
        assert set(result.losses) == {"robust_loss", "loss"} and result.count == 16
    assert order == ["robust", "standard"] * 3


@pytest.mark.parametrize("kind", ["network_moe", "dual_moe"])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_wants_a_gradient_is_left_as_it_was(kind: str, frozen: bool) -> None:
    m = small(kind, frozen_router=frozen)
    wanted = [p.requires_grad for p in m.parameters()]
    b = batch()
    (rter(m) if kind == "network_moe" else jtdmoe(m)).step([b])
    assert [p.requires_grad for p in m.parameters()] == wanted and all(wanted) != frozen
    assert not b.images.requires_grad and all(module.training for module in m.modules())


def test_a_frozen_router_rests_and_another_learns() -> None:
    for frozen in (True, False):
        m = small(frozen_router=frozen)
        assert isinstance(m, NetworkMoE) and bool(router_parameters(m)) != frozen
        before = snapshot(list(m.router.parameters()))
        rter(m).step([batch()])
        assert same(before, list(m.router.parameters())) == frozen


# --- the Dual-Model ---


@pytest.mark.parametrize("on", ["logits", "probabilities"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
def test_the_dual_model_mixes_two(on: str, alpha: float) -> None:
    m = small("dual_moe", alpha=alpha, dual_on=on).eval()
    assert isinstance(m, DualModel)
    x = batch().images
    s, r, both = m.standard(x), m.robust(x), m(x)
    if on == "logits":
        assert torch.allclose(both, (1 - alpha) * s + alpha * r, atol=1e-6)
    else:
        mixture = (1 - alpha) * s.softmax(1) + alpha * r.softmax(1)
        assert torch.allclose(both.exp(), mixture, atol=1e-6) and torch.allclose(both.softmax(1), mixture, atol=1e-6)
    assert torch.allclose(both, m.mixed(s, r), atol=1e-6)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(m(x).logsumexp(1).sum() + m(x).square().sum(), x)
    assert torch.isfinite(grad).all() and grad.abs().sum() > 0


def test_at_an_end_only_one_is_computed() -> None:
    for alpha, asked in ((0.0, "standard"), (1.0, "robust")):
        m = small("dual_moe", alpha=alpha)
        seen: list[str] = []
        for name in ("standard", "robust"):
            getattr(m, name).register_forward_hook(lambda *_, name=name, seen=seen: seen.append(name))
        m(batch().images)
        assert seen == [asked]


def test_the_upper_level_is_the_cross_entropy_of_both_on_clean_images() -> None:
    m = small("dual_moe", alpha=0.4)
    assert isinstance(m, DualModel)
    other = copy.deepcopy(m)
    other.robust.eval()
    b = batch()
    method = jtdmoe(m)
    loss, logits = method._dual_objective(b, method._robust_logits(b))
    assert torch.equal(logits, other(b.images)) and torch.equal(loss, cross_entropy(logits, b.labels))


def test_jtdmoe_lowers_both_losses() -> None:
    m = small("dual_moe")
    method = jtdmoe(m)
    b = batch()
    losses = [method.step([dataclasses.replace(b, generator=stream_generator(i))]).losses for i in range(16)]
    for name in ("robust_loss", "loss"):
        assert losses[-1][name] < 0.85 * losses[0][name]


@pytest.fixture(scope="module")
def runs(architecture: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of a standard and a robust mixture and of both together, an epoch each."""
    out = tmp_path_factory.mktemp("runs")
    for name in ("standard", "rt-er", "jtdmoe"):
        train(config(name, epochs=1), out / name, quiet=True)
    return {name: out / name for name in ("standard", "rt-er", "jtdmoe")}


def test_a_run_of_jtdmoe_is_a_run(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["jtdmoe"]
    restored, found = load_model(run)
    assert isinstance(restored, DualModel) and found is not None and restored.alpha == 0.7
    saved = torch.load(run / "best.pt", weights_only=True)
    assert same(list(saved["model"].values()), state(restored)) and set(saved["optimizers"]) == {"robust", "standard"}
    assert set(Run(run).metrics()[0]) >= {"robust_loss", "loss", "train_sa", "validation_sa", "validation_ra"}
    assert found.attack.loss == "ce"
    attacks = [word for name in ("pgd2", "experts2", "router2") for word in ("--attack", name)]
    assert main(["evaluate", str(run), *attacks, "--limit", "64", "--checks", "0"]) == 0
    record = json.loads((run / "evaluation.json").read_text())
    assert list(record["attacks"]) == ["pgd2", "experts2", "router2"]
    assert record["params"] == sum(p.numel() for p in restored.parameters())
    assert record["attacks"]["experts2"]["flip_rate"] is not None
    assert main(["report", str(run), "--limit", "32", "--examples", "1", "--attack", "pgd2"]) == 0
    capsys.readouterr()


def test_a_dual_model_begins_with_two_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    given = {"standard_run": str(runs["standard"]), "robust_run": str(runs["rt-er"])}
    data = load("digits", train_limit=96, validation=16)
    trainer = Trainer(engine.resolve(config("jtdmoe", **given), data), Run(tmp_path), data, quiet=True)
    assert isinstance(trainer.model, DualModel)
    for moe, name in ((trainer.model.standard, "standard"), (trainer.model.robust, "rt-er")):
        assert same(state(load_model(runs[name])[0]), state(moe))
    with pytest.raises(RunError, match=r"robust_run: the weights of .* do not fit"):
        train(config("jtdmoe", robust_run=str(runs["jtdmoe"])), tmp_path / "no", quiet=True)
    with pytest.raises(ValueError, match="standard_run: one of the two MoEs of kind dual_moe"):
        config("rt-er", standard_run="somewhere")


def test_alpha_is_swept_with_attacks_made_anew(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attacked: list[float] = []
    run = PGD.run

    def watched(self: PGD, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        assert isinstance(model, DualModel)
        attacked.append(model.alpha)
        return run(self, model, *args, **kwargs)

    monkeypatch.setattr(PGD, "run", watched)
    two = [str(runs["standard"]), str(runs["rt-er"])]
    out = tmp_path / "sweep"
    assert main(["dual", *two, "--alphas", "1,0.5,0.7", "--attack", "pgd2", "--limit", "48", "--out", str(out)]) == 0
    assert sorted(set(attacked)) == [0.5, 0.7, 1.0]
    records = json.loads((out / "dual.json").read_text())
    with (out / "dual.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["alpha"]) for row in rows] == [0.5, 0.7, 1.0] == [each["alpha"] for each in records]
    assert (out / "dual.png").stat().st_size > 1000
    monkeypatch.undo()
    test, robust = load("digits").test.first(48), load_model(runs["rt-er"])[0]
    alone = evaluate(robust, test, {"pgd2": PGD(0.15, 0.0375, 2, retire=True)})
    assert records[2]["sa"] == alone.sa and records[2]["attacks"]["pgd2"]["ra"] == alone.attacks["pgd2"].ra
    assert main(["dual", *two, "--alphas", "0.5,2", "--out", str(out)]) == 2
    assert "alpha: expected a number from 0 to 1, got 2.0" in capsys.readouterr().err


# --- settings ---


@pytest.mark.parametrize(
    ("kind", "method", "others", "message"),
    [
        ("moe", MethodConfig("rt-er"), {}, "method: rt-er needs a model of kind network_moe"),
        ("dual_moe", MethodConfig("rt-er"), {}, "method: rt-er needs a model of kind network_moe"),
        ("network_moe", MethodConfig("jtdmoe"), {}, "method: jtdmoe needs a model of kind dual_moe"),
        ("network_moe", MethodConfig("advmoe"), {}, "method: advmoe needs a model with trainable routers"),
        ("network_moe", MethodConfig("at", part="routers"), {}, "part: 'routers' needs a model with trainable routers"),
        ("network_moe", MethodConfig("at", robust_experts="all"), {}, "robust_experts: a setting of the methods rt-er"),
        ("network_moe", MethodConfig("rt-er", "cross_entropy"), {}, "objective: without effect on rt-er"),
        ("network_moe", MethodConfig("rt-er", attack_routers=True), {}, "attack_routers: without effect on rt-er"),
        ("network_moe", MethodConfig("rt-er"), {"routing": RoutingConfig("switch")}, "balance: .* or frozen ones"),
        ("network_moe", MethodConfig("rt-er"), {"routing": RoutingConfig(share_epochs=1)}, "share_epochs: rt-er tells"),
        ("network_moe", MethodConfig("rt-er"), {"optim": OptimConfig(router_lr=0.1)}, "router_lr: without effect where"),
        ("one", MethodConfig("rt-er"), {}, "experts: rt-er makes a second one robust; expected at least 2, got 1"),
        ("end", MethodConfig("jtdmoe"), {}, "alpha: at 1 the standard mixture has no part"),
        ("start", MethodConfig("jtdmoe"), {}, "alpha: at 0 the robust mixture has no part"),
    ],
)
def test_what_does_not_go_together_is_refused(
    kind: str, method: MethodConfig, others: dict[str, Any], message: str
) -> None:
    options = {
        "moe": {"kind": "moe", "frozen_router": None},
        "one": {"num_experts": 1},
        "end": {"kind": "dual_moe", "alpha": 1.0},
        "start": {"kind": "dual_moe", "alpha": 0.0},
    }
    given = {k: v for k, v in {**{"kind": kind}, **options.get(kind, {})}.items() if v is not None}
    given = given | ({"kind": "network_moe"} if kind == "one" else {})
    m = model(SMALL, **{"num_experts": 4, **({} if kind == "moe" else {"frozen_router": True}), **given})
    with pytest.raises(ValueError, match=f"^{message}"):
        build_method(m, method, others.get("optim", ADAM), CE, others.get("routing"))


@pytest.mark.parametrize("name", ["standard", "at", "at-ce", "advmoe"], ids=["standard", "trades", "at", "advmoe"])
def test_the_other_methods_train_a_mixture_of_networks(name: str) -> None:
    m = small(frozen_router=False)
    objective = "cross_entropy" if name == "at-ce" else "trades"
    method = build_method(m, MethodConfig(name.removesuffix("-ce"), objective), ADAM, CE)
    before = snapshot(list(m.parameters()))
    result = method.step([batch(), batch(1)][: method.batches_per_step])
    assert math.isfinite(result.losses["loss"])
    assert not any(torch.equal(a, p) for a, p in zip(before, m.parameters(), strict=True))


def test_an_alias_of_the_method_and_its_kind(tmp_path: Path) -> None:
    assert MethodConfig("rt_er").name == "rt-er" and MethodConfig("rt_er") == MethodConfig("rt-er")
    path = tmp_path / "config.yaml"
    both = dataclasses.replace(config("jtdmoe", settings={"robust_experts": "all"}), robust_run="there")
    both.save(path)
    assert RunConfig.load(path) == both
    common = ["--arch", SMALL, "--width", "8", "--experts", "3", "--train-limit", "32", "--epochs", "1"]
    common += ["--batch-size", "16", "--validation-attack", "pgd1", "--optimizer", "adam", "--attack-steps", "1"]
    for method, kind in (("rt_er", "network_moe"), ("jtdmoe", "dual_moe")):
        out = tmp_path / method
        assert main(["train", "--method", method, *common, "--out", str(out)]) == 0
        c = Run(out).config()
        assert c.model.kind == kind and c.optim == OptimConfig.cyclic_adam() and c.attack.loss == "ce"
        assert c.model.router == "linear"  # the kind's default, not that of the command's own default kind


# --- Adam and its cyclic rate ---


def test_the_cyclic_rate_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = RTER.step

    def noted(self: RTER, batches: Sequence[Batch]) -> StepResult:
        rates.append(self.optimizers["all"].param_groups[0]["lr"])
        return step(self, batches)

    monkeypatch.setattr(RTER, "step", noted)
    optim = OptimConfig.cyclic_adam(cycle_steps=4)
    train(config("rt-er", epochs=4, optim=optim), tmp_path / "run", quiet=True)
    parameter = nn.Parameter(torch.zeros(1))
    other = torch.optim.Adam([parameter], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.CyclicLR(other, 5e-5, 1e-4, step_size_up=4, cycle_momentum=False)
    expected = []
    for _ in range(12):
        expected.append(other.param_groups[0]["lr"])
        other.step()
        scheduler.step()
    assert rates == pytest.approx(expected, rel=1e-9) and rates[0] == 5e-5 and rates[4] == pytest.approx(1e-4)
    plain = torch.optim.Adam([parameter], lr=1.0).param_groups[0]
    own = rter(small(), optim=optim).optimizers["all"].param_groups[0]
    assert (own["betas"], own["eps"], own["weight_decay"]) == (plain["betas"], plain["eps"], 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adma"}, "optimizer: .*did you mean adam"),
        ({"schedule": "cyclic", "low_lr": 0.2}, "low_lr: expected one at most lr, 0.1, got 0.2"),
        ({"low_lr": 0.01}, "low_lr: expected one with schedule 'cyclic'"),
        ({"cycle_steps": 0}, "cycle_steps: expected at least 1"),
    ],
)
def test_bad_rates_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)


@pytest.mark.parametrize(("name", "step"), [("rt-er", 2), ("rt-er", 5), ("jtdmoe", 4)])
def test_a_resumed_run_with_adam_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, step: int
) -> None:
    data = DataConfig("digits", train_limit=96, validation=16, shift=2, cutout=3)
    c = config(name, settings={"robust_experts": "another"}, data=data)
    whole = train(c, tmp_path / "whole", quiet=True)
    interrupt_at(step, RTER if name == "rt-er" else JTDMoE, monkeypatch)
    with pytest.raises(Interrupted):
        train(c, tmp_path / "broken", quiet=True)
    monkeypatch.undo()
    assert_same_run(whole, resume(tmp_path / "broken", quiet=True))
