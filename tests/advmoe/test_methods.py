# SPDX-License-Identifier: Apache-2.0
"""What training may be asked for besides the plain methods: routers kept alive, parts, cheaper steps, masks."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    ATTACK,
    SMALL,
    assert_same_run,
    batch,
    interrupt_at,
    model,
    same,
    small_architecture,
    snapshot,
    tiny,
)
from torch import Tensor, nn

from advmoe.attacks import PGD
from advmoe.config import AttackConfig, MethodConfig, ModelConfig, OptimConfig, RoutingConfig, RunConfig
from advmoe.data import load, stream_generator
from advmoe.evaluation import evaluate
from advmoe.models import backbone_parameters, record_routing, router_parameters
from advmoe.objectives import balance_loss, cross_entropy, router_pseudo_label_loss, trades_loss
from advmoe.routers import record_scores, routers_of
from advmoe.sparse import LiveBatchNorm2d, masked_convolutions, score_parameters
from advmoe.training import (
    AT,
    AdvMoE,
    ATSparse,
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
from advmoe.training.methods import Batch, Method, StepResult
from advmoe.training.runs import load_checkpoint
from moe_kernels import RoutedBatchNorm2d, RoutedConv2d


@pytest.fixture(scope="module", autouse=True)
def architecture() -> Iterator[None]:
    with small_architecture():
        yield


def small(**options: Any) -> nn.Module:
    return model(SMALL, **options)


def config(method: MethodConfig | str = "at", kind: str = "moe", **changes: Any) -> RunConfig:
    """Two epochs of three steps of the small architecture; options of the model among the changes."""
    fields = {f.name for f in dataclasses.fields(ModelConfig)}
    options = {name: changes.pop(name) for name in list(changes) if name in fields}
    own = MethodConfig(method) if isinstance(method, str) else method
    changes = {"model": ModelConfig(SMALL, kind, **{"width": 8, **options}), "method": own, **changes}
    return tiny(validation_attack="pgd1", **changes)


def tensors(modules: Iterator[nn.Module] | Sequence[nn.Module]) -> list[Tensor]:
    """Parameters and buffers."""
    return [t for m in modules for t in m.state_dict().values()]


def router_state(m: nn.Module) -> list[Tensor]:
    return tensors(list(routers_of(m).values()))


def backbone_state(m: nn.Module) -> list[Tensor]:
    routers = {id(t) for r in routers_of(m).values() for t in (*r.parameters(), *r.buffers())}
    return [t for t in (*m.parameters(), *m.buffers()) if id(t) not in routers]


# --- what is trained, on what ---


@pytest.mark.parametrize("objective", ["trades", "cross_entropy"])
@pytest.mark.parametrize("kind", ["dense", "s_dense", "sparse", "moe"])
def test_at_trains_every_kind(kind: str, objective: str) -> None:
    m = small(kind=kind)
    attack = ATTACK if objective == "trades" else PGD(0.15, 0.1, 2, loss="ce")
    method = build_method(m, MethodConfig("at", objective), OptimConfig(), attack)
    weights = [p for p in m.parameters() if p.requires_grad]
    before = snapshot(weights)
    outcome = method.step([batch()])
    assert math.isfinite(outcome.losses["loss"]) and outcome.count == 16
    assert not any(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


WITHOUT_EFFECT = [
    ("moe", MethodConfig("at", share_attack=True), {}, "share_attack: a setting of the method advmoe, .* on at"),
    ("moe", MethodConfig("at", router_every=2), {}, "router_every: a setting of the method advmoe"),
    ("moe", MethodConfig("at", mask_epochs=1), {}, "mask_epochs: a setting of the method at_sparse"),
    ("moe", MethodConfig("advmoe", pretrain_epochs=1), {}, "pretrain_epochs: a setting of the method at_sparse"),
    ("moe", MethodConfig("advmoe", part="routers"), {}, "part: a setting of the method at, .* on advmoe"),
    ("sparse", MethodConfig("at_sparse", part="experts", mask_epochs=1), {}, "part: a setting of the method at"),
    ("dense", MethodConfig("at", part="routers"), {}, "part: 'routers' needs a model with trainable routers"),
    ("moe", MethodConfig("advmoe", router_alpha=2.0), {}, "router_alpha: a setting of the router objective pseudo_label"),
    (
        "dense",
        MethodConfig("at"),
        {"routing": RoutingConfig("switch")},
        "routing.balance: a setting of routers, without effect",
    ),
    ("dense", MethodConfig("at"), {"routing": RoutingConfig(experts="alike")}, "routing.experts: a setting of routers"),
    (
        "sparse",
        MethodConfig("at_sparse", mask_epochs=1),
        {"routing": RoutingConfig(share_epochs=1)},
        "routing.share_epochs: a setting of routers",
    ),
    (
        "random",
        MethodConfig("at"),
        {"routing": RoutingConfig("switch")},
        "balance: without effect on routers that have no",
    ),
    ("random", MethodConfig("at"), {"optim": OptimConfig(router_lr=0.1)}, "router_lr: without effect where no router is"),
    ("moe", MethodConfig("at", part="experts"), {"optim": OptimConfig(router_lr=0.1)}, "router_lr: without effect"),
    (
        "moe",
        MethodConfig("at", part="experts"),
        {"routing": RoutingConfig("entropy")},
        "balance: .*without effect with part",
    ),
    ("random", MethodConfig("at", part="routers"), {}, "part: 'routers' needs a model with trainable routers"),
    ("none", MethodConfig("at", part="routers"), {}, "gate: 'none' lets no gradient of the loss reach the routers"),
]


@pytest.mark.parametrize(("kind", "method", "others", "message"), WITHOUT_EFFECT)
def test_settings_without_effect_are_refused(
    kind: str, method: MethodConfig, others: dict[str, Any], message: str
) -> None:
    options = {"random": {"router": "random"}, "none": {"gate": "none"}}.get(kind, {"kind": kind})
    optim = others.get("optim", OptimConfig())
    with pytest.raises(ValueError, match=f"^{message}"):
        build_method(small(**options), method, optim, ATTACK, others.get("routing"))


# --- balancing losses ---


def balances(m: nn.Module, images: Sequence[Tensor], kind: str) -> Tensor:
    """The mean over all choices of these forwards, counted by hand."""
    losses = []
    for each in images:
        with record_scores(m) as scores:
            m(each)
        losses += [balance_loss(s, kind) for s in scores.values()]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", ["standard", "at", "at-ce", "advmoe", "pseudo_label"])
def test_balance_is_part_of_each_loss_that_trains_routers(name: str, temperature: float) -> None:
    m = small(temperature=temperature, num_experts=3).eval()  # the same statistics in both calculations
    routing, optim = RoutingConfig("entropy", 0.25), OptimConfig(lr=0.0)
    b = batch()
    other = copy.deepcopy(m)
    adversarial = ATTACK(other, b.images, b.labels, stream_generator("same"))
    b = dataclasses.replace(b, generator=stream_generator("same"))
    clean, attacked = other(b.images), other(adversarial)
    plain, seen = trades_loss(clean, attacked, b.labels, 6.0), [b.images, adversarial]
    if name == "standard":
        method: Method = Standard(m, MethodConfig("standard"), optim, ATTACK, routing)
        plain, seen = cross_entropy(clean, b.labels), seen[:1]
    elif name.startswith("at"):
        objective = "cross_entropy" if name == "at-ce" else "trades"
        method = AT(m, MethodConfig("at", objective), optim, ATTACK, routing)
        if name == "at-ce":
            plain, seen = cross_entropy(attacked, b.labels), seen[1:]
    else:
        objective = "trades" if name == "advmoe" else "pseudo_label"
        method = AdvMoE(m, MethodConfig(router_objective=objective), optim, ATTACK, routing)
        if name == "pseudo_label":
            with record_scores(other) as scores:
                other(b.images)
                before = dict(scores)
                other(adversarial)
            each = [router_pseudo_label_loss(s, scores[n], b.labels, 6.0, 6.0) for n, s in before.items()]
            plain = torch.stack(each).mean()
    balance = balances(other, seen, "entropy")
    if isinstance(method, AdvMoE):
        losses, key = method._router_phase([b]).losses, "router_loss"
        rest = method._backbone_phase([dataclasses.replace(b, generator=stream_generator("same"))]).losses
        assert set(rest) == {"loss"}  # the upper level trains no router
        assert rest["loss"] == pytest.approx(trades_loss(clean, attacked, b.labels, 6.0).item(), rel=1e-5)
    else:
        losses, key = method.step([b]).losses, "loss"
    assert set(losses) == {key, "balance"} and balance.item() > 0.1
    assert losses["balance"] == pytest.approx(balance.item(), rel=1e-5)
    assert losses[key] == pytest.approx((plain + 0.25 * balance).item(), rel=1e-5)
    (plain + 0.25 * balance).backward()
    for p, expected in zip(router_parameters(m), router_parameters(other), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, rtol=1e-4, atol=1e-6)


def test_balance_trains_routers_that_no_gate_reaches() -> None:
    for name, kind in (("at", AT), ("advmoe", AdvMoE)):
        m = small(gate="none")
        before = snapshot(router_parameters(m))
        method = kind(m, MethodConfig(name), OptimConfig(weight_decay=0.0), ATTACK, RoutingConfig("switch", 1.0))
        method.step([batch()] * method.batches_per_step)
        assert not same(before, router_parameters(m))


@pytest.mark.parametrize("method", [AT, Standard])
def test_routers_that_nothing_would_train_are_refused(method: type[Method]) -> None:
    with pytest.raises(ValueError, match="gate: 'none' lets no gradient of the loss reach the routers"):
        method(small(gate="none"), MethodConfig("at"), OptimConfig(), ATTACK)
    for m, config in ((small(gate="none", router="fixed"), MethodConfig("at")), (small(), MethodConfig("at"))):
        method(m, config, OptimConfig(), ATTACK)
    AT(small(gate="none"), MethodConfig("at", part="experts"), OptimConfig(), ATTACK)


# --- scores of mean 0 and variance 1 ---


@pytest.mark.parametrize("router", ["light", "conv", "global"])
def test_standardised_scores_use_all_experts_whatever_the_router_says(router: str) -> None:
    m = small(router=router, standardize=True, num_experts=2)
    with torch.no_grad():
        for r in routers_of(m).values():
            last: Any = r.conv if router == "conv" else r.linear
            last.bias[1] += 1000.0
    images = batch(count=64).images
    with record_routing(m) as routings:
        m(images).square().sum().backward()
        shares = [r.expert.float().mean().item() for r in routings.values()]
        assert all(0.2 < share < 0.8 for share in shares), shares
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in router_parameters(m))
        for norm in m.modules():
            if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)):
                norm.momentum = None  # the running statistics become those of the next batch
                norm.reset_running_stats()
        m(images)
        m.eval()(images[:1])  # and an image alone gets its expert by them
        alone = {n: r.expert[0].item() for n, r in routings.items()}
        m(images)
        assert alone == {n: r.expert[0].item() for n, r in routings.items()}
        shares = [r.expert.float().mean().item() for r in routings.values()]
    assert all(0.1 < share < 0.9 for share in shares), shares
    norms = [n for n in m.state_dict() if n.endswith("score_norm.running_mean")]
    assert len(norms) == len(routers_of(m))


def test_routers_that_learn_nothing_are_not_standardised() -> None:
    m = small(router="fixed", standardize=True)
    for r in routers_of(m).values():
        r.expert = 1  # type: ignore[assignment]
    with record_routing(m) as routings:
        m(batch().images)
    assert all(r.expert.tolist() == [1] * 16 for r in routings.values())


# --- experts that begin alike, or share an expert at first ---


def experts_of(m: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> list[Tensor]:
    """``[N, ...]``: what belongs to the experts, with the optimisers' state."""
    found = []
    for module in m.modules():
        if isinstance(module, (RoutedConv2d, RoutedBatchNorm2d)):
            count = module.slices.num_experts if isinstance(module, RoutedBatchNorm2d) else module.out_slices.num_experts
            own = (
                [*module.parameters(), *(b for n, b in module.named_buffers())]
                if isinstance(module, RoutedBatchNorm2d)
                else [module.weight]
            )
            for optimizer in optimizers:
                own += [optimizer.state[p]["momentum_buffer"] for p in list(own) if p in optimizer.state]
            found += [t.detach().reshape(count, -1).clone() for t in own]
    return found


def alike(experts: Tensor) -> bool:
    return all(torch.equal(experts[0], e) for e in experts[1:])


@pytest.mark.parametrize("method", ["advmoe", "at", "standard"])
def test_experts_can_begin_alike(method: str) -> None:
    m = small(num_experts=3, bn="per_expert")
    assert not any(alike(e) for e in experts_of(m) if e.shape[1] > 100)
    first = [e[0].clone() for e in experts_of(m)]
    trainer = build_method(m, MethodConfig(method), OptimConfig(), ATTACK, RoutingConfig(experts="alike"))
    assert all(alike(e) for e in experts_of(m))
    assert same(first, [e[0] for e in experts_of(m)])
    trainer.step([batch(0), batch(1)][: trainer.batches_per_step])
    assert not any(alike(e) for e in experts_of(m) if e.shape[1] > 100)


@pytest.mark.parametrize("routing", [RoutingConfig(experts="alike"), RoutingConfig(share_epochs=1)])
def test_windows_cannot_be_alike(tmp_path: Path, routing: RoutingConfig) -> None:
    with pytest.raises(
        ValueError, match=r"experts: only those of layout 'partition' can be made alike; layer1\.0\.conv2 has"
    ):
        train(config(layout="windows", routing=routing), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_gates_that_would_change_a_shared_network_are_refused() -> None:
    with pytest.raises(ValueError, match="share_epochs: a shared expert has no gate, and those of 'softmax'"):
        build_method(small(gate="softmax"), MethodConfig("at"), OptimConfig(), ATTACK, RoutingConfig(share_epochs=1))


@pytest.mark.parametrize("method", [MethodConfig("at"), MethodConfig("advmoe"), MethodConfig.as_released()])
def test_a_shared_expert_is_copied_and_its_copies_go_apart(
    tmp_path: Path, method: MethodConfig, caplog: pytest.LogCaptureFixture
) -> None:
    c = config(method, bn="per_expert", num_experts=3, routing=RoutingConfig("switch", share_epochs=1))
    data = load("digits", None, 96, None, 16, 0)
    run = Run(tmp_path / "run")
    trainer = Trainer(engine.resolve(c, data), run, data, quiet=True)
    run.create(trainer.config)
    weights = trainer.method.optimizers["backbone" if "backbone" in trainer.method.optimizers else "all"]
    routers = snapshot(router_parameters(trainer.model))
    with caplog.at_level(logging.WARNING, logger="advmoe"), record_routing(trainer.model) as routings:
        trainer._train_epoch()
        assert trainer.method.sharing and {e for r in routings.values() for e in r.expert.tolist()} == {0}
        assert same(routers, router_parameters(trainer.model))
        before = experts_of(trainer.model, [weights])
        # only the first has seen images
        assert not any(alike(e) for e in before)
        trainer.method.settle()
        settled = experts_of(trainer.model, [weights])
        assert all(alike(e) for e in settled) and same([e[0] for e in before], [e[0] for e in settled])
        assert len(settled) == 4 * (1 + 1) + 4 * (5 + 2)  # weights with momentum; norms with three buffers
        trainer._finish_epoch()
    assert not caplog.records  # all samples to one expert is what was asked for
    assert not run.checkpoint("best").exists()  # what is to be evaluated routes
    saved = load_checkpoint(run.checkpoint())["model"]
    assert all(torch.equal(v, saved[n]) for n, v in trainer.model.state_dict().items())
    (line,) = run.metrics()
    assert "balance" not in line and "router_loss" not in line
    with record_routing(trainer.model) as routings:
        trainer._train_epoch()
        assert not trainer.method.sharing and {e for r in routings.values() for e in r.expert.tolist()} == {0, 1, 2}
    assert not any(alike(e) for e in experts_of(trainer.model, [weights]) if e.shape[1] > 100)
    assert not same(routers, router_parameters(trainer.model))
    trainer._finish_epoch()
    assert run.metrics()[1]["balance"] != 0
    assert load_checkpoint(run.checkpoint("best"))["epoch"] == 2


@pytest.mark.parametrize("method", ["at", "advmoe"])
@pytest.mark.parametrize("step", [2, 5])
def test_a_run_with_a_shared_expert_resumes_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, step: int
) -> None:
    c = config(method, bn="per_expert", routing=RoutingConfig("column_entropy", share_epochs=1))
    assert_resumes(tmp_path, monkeypatch, c, step)


def assert_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, c: RunConfig, step: int) -> Run:
    """A run broken in this step of its process goes on as if it had not been."""
    kind = {"at": AT, "advmoe": AdvMoE, "standard": Standard, "at_sparse": ATSparse}[c.method.name]
    unbroken = tmp_path / "unbroken"
    whole = Run(unbroken) if unbroken.exists() else train(c, unbroken, quiet=True)
    with monkeypatch.context() as patch:
        interrupt_at(step, kind, patch)
        with pytest.raises(Interrupted):
            train(c, tmp_path / "broken", quiet=True)
    torch.rand(5)  # the process' generator has moved on
    assert_same_run(whole, resume(tmp_path / "broken", quiet=True))
    return whole


@pytest.mark.parametrize(
    "options", [{"router": "random"}, {"noise": 1.0, "standardize": True, "temperature": 2.0}], ids=["random", "noise"]
)
def test_runs_that_draw_resume_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    assert_resumes(tmp_path, monkeypatch, config("standard", **options), 2)


@pytest.mark.parametrize(
    ("method", "options", "expected"),
    [
        ("advmoe", {}, 6),
        ("at", {}, 6),
        ("standard", {"router": "global"}, 6),
        ("advmoe", {"routing": RoutingConfig(share_epochs=2)}, 2),
        ("at", {"routing": RoutingConfig(share_epochs=0)}, 0),
        ("at", {"router": "random"}, 0),
        ("at", {"gate": "softmax"}, 0),
        ("at", {"layout": "windows"}, 0),
        (MethodConfig("at", part="routers"), {}, 0),
        ("at", {"kind": "dense"}, None),
    ],
)
def test_three_quarters_of_the_epochs_are_shared_where_they_can_be(
    method: str | MethodConfig, options: dict[str, Any], expected: int | None
) -> None:
    data = load("digits", None, 96, None, 16, 0)
    c = config(method, **{"routing": RoutingConfig(), "epochs": 8, **options})
    resolved = engine.resolve(c, data)
    assert resolved.routing.share_epochs == expected
    Trainer(resolved, Run("never written"), data, quiet=True)  # which goes with the rest


def test_weights_to_begin_with_bring_their_normalisation(tmp_path: Path) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    start = train(config("standard", epochs=1, mean=mean, std=std), tmp_path / "start", quiet=True)
    data = load("digits", None, 96, None, 16, 0)
    resolved = engine.resolve(config("standard", init=str(start.folder), routing=RoutingConfig()), data)
    assert (resolved.model.mean, resolved.model.std, resolved.routing.share_epochs) == (mean, std, 0)
    own = engine.resolve(config("standard"), data).model
    assert own.mean == data.mean and own.mean != mean


def test_the_attack_in_training_ascends_what_the_objective_descends() -> None:
    data = load("digits", None, 96, None, 16, 0)
    for objective, given, expected in (
        ("trades", None, "kl"),
        ("cross_entropy", None, "ce"),
        ("cross_entropy", "kl", "kl"),
        ("trades", "margin", "margin"),
    ):
        c = config(MethodConfig("at", objective), attack=AttackConfig(loss=given))
        assert engine.resolve(c, data).attack.loss == expected


# --- a part of the network ---


@pytest.mark.parametrize("router", ["light", "global"])
@pytest.mark.parametrize("part", ["routers", "experts"])
def test_a_part_is_trained_and_the_rest_is_as_it_was(part: str, router: str) -> None:
    m = small(router=router, standardize=True)
    m.bn1.eval()  # a mode of its own, which it keeps
    modes = [module.training for module in m.modules()]
    routers, backbone = snapshot(router_state(m)), snapshot(backbone_state(m))
    method = build_method(m, MethodConfig("at", part=part), OptimConfig(), ATTACK)
    for seed in (0, 1):  # the second with momentum
        method.step([batch(seed)])
    moved = backbone_state(m) if part == "experts" else router_state(m)
    rests = router_state(m) if part == "experts" else backbone_state(m)
    before, still = (backbone, routers) if part == "experts" else (routers, backbone)
    assert same(still, rests)
    # but the layer norm's bias, which nothing may reach at first, and the frozen norm's buffers
    assert sum(torch.equal(a, b) for a, b in zip(before, moved, strict=True)) < 0.2 * len(moved)
    assert [module.training for module in m.modules()] == modes
    assert all(p.requires_grad for p in m.parameters())
    parameters = router_parameters(m) if part == "routers" else backbone_parameters(m)
    assert [p is q for p, q in zip(method.optimizers["all"].param_groups[0]["params"], parameters, strict=True)]


def test_the_routers_of_a_part_have_their_own_rate() -> None:
    method = build_method(small(), MethodConfig("at", part="routers"), OptimConfig(0.1, router_lr=0.02), ATTACK)
    assert [g["base_lr"] for g in method.optimizers["all"].param_groups] == [0.02]


def test_routers_and_then_experts_are_made_robust(tmp_path: Path) -> None:
    """θ̄ and θ̿ of the paper's Section 4, from one standard run."""
    start = train(config("standard", epochs=1), tmp_path / "standard", quiet=True)
    first = config(MethodConfig("at", part="routers"), init=str(start.folder), epochs=1)
    routers = train(first, tmp_path / "routers", quiet=True)
    second = config(MethodConfig("at", part="experts"), init=str(routers.checkpoint("last")), epochs=1)
    experts = train(second, tmp_path / "experts", quiet=True)
    states = [load_checkpoint(run.checkpoint())["model"] for run in (start, routers, experts)]
    names = [name for name in states[0] if not name.endswith("num_batches_tracked")]
    inside = [n for n in names if ".router." in n]
    outside = [n for n in names if ".router." not in n]
    assert all(torch.equal(states[0][n], states[1][n]) for n in outside)
    assert all(torch.equal(states[1][n], states[2][n]) for n in inside)
    assert not any(torch.equal(states[1][n], states[2][n]) for n in outside)
    moved = sum(not torch.equal(states[0][n], states[1][n]) for n in inside)
    assert moved >= len(inside) / 2 > 0


# --- weights to begin with ---


def test_init_begins_with_a_runs_weights(tmp_path: Path) -> None:
    start = train(config("standard", epochs=1), tmp_path / "start", quiet=True)
    c = config("standard", epochs=1, optim=OptimConfig(lr=0.0), seed=7, init=str(start.folder))
    run = train(c, tmp_path / "run", quiet=True)
    begun, saved = (load_checkpoint(r.checkpoint())["model"] for r in (start, run))
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    weights = [n for n in begun if not n.endswith(buffers)]
    assert weights and all(torch.equal(begun[n], saved[n]) for n in weights)
    assert RunConfig.load(run.config_path).init == str(start.folder)


def test_init_refuses_what_does_not_fit(tmp_path: Path) -> None:
    start = train(config("standard", epochs=1), tmp_path / "start", quiet=True)
    misfit = r"init: the weights of .*start \(kind moe, width 8\) do not fit this model"
    for changes, message in (
        ({"width": 4}, misfit + r": size mismatch for conv1\.weight: .*$"),
        ({"kind": "dense"}, misfit),
        ({"init": str(tmp_path / "absent")}, "expected a run folder, a checkpoint file or module:function"),
    ):
        c = config("standard", **{"init": str(start.folder), **changes})
        with pytest.raises(RunError, match=message):
            train(c, tmp_path / "run", quiet=True)
        assert not (tmp_path / "run").exists()


def test_a_run_goes_on_when_the_weights_that_it_began_with_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = train(config("standard", epochs=1), tmp_path / "start", quiet=True)
    c = config("standard", init=str(start.folder))
    whole = train(c, tmp_path / "unbroken", quiet=True)
    with monkeypatch.context() as patch:
        interrupt_at(2, Standard, patch)
        with pytest.raises(Interrupted):
            train(c, tmp_path / "broken", quiet=True)
    shutil.rmtree(start.folder)
    assert_same_run(whole, resume(tmp_path / "broken", quiet=True))


def test_rates_are_the_configs_also_for_a_checkpoint_that_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = config("standard", "dense")
    whole = train(c, tmp_path / "unbroken", quiet=True)
    with monkeypatch.context() as patch:
        interrupt_at(2, Standard, patch)
        with pytest.raises(Interrupted):
            train(c, tmp_path / "broken", quiet=True)
    path = tmp_path / "broken" / "last.pt"
    state = load_checkpoint(path)
    for group in state["optimizers"]["all"]["param_groups"]:
        del group["base_lr"]  # as before routers had a group of their own
    torch.save(state, path)
    assert_same_run(whole, resume(tmp_path / "broken", quiet=True))


# --- cheaper steps of AdvMoE ---


def attacks_of(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Clean and attacked images of each attack from now on."""
    seen: list[tuple[Tensor, Tensor]] = []
    original = PGD.run

    def run(self: PGD, net: nn.Module, images: Tensor, *rest: Any, **more: Any) -> Any:
        found = original(self, net, images, *rest, **more)
        seen.append((images, found.images))
        return found

    monkeypatch.setattr(PGD, "run", run)
    return seen


@pytest.mark.parametrize("order", ["router_first", "backbone_first"])
def test_a_shared_attack_is_one_attack_on_one_batch(monkeypatch: pytest.MonkeyPatch, order: str) -> None:
    m = small()
    method = build_method(m, MethodConfig(order=order, share_attack=True), OptimConfig(), ATTACK)
    assert method.batches_per_step == 1
    seen = attacks_of(monkeypatch)
    inputs: list[Tensor] = []
    m.register_forward_pre_hook(lambda module, args: inputs.append(args[0]) if module.training else None)
    routers, backbone = snapshot(router_parameters(m)), snapshot(backbone_parameters(m))
    b = batch()
    outcome = method.step([b])
    ((images, attacked),) = seen
    assert images is b.images
    # clean and attacked images in each level, and no others
    assert [x is b.images for x in inputs] == [True, False] * 2
    assert all(torch.equal(x, attacked) for x in inputs[1::2])
    assert set(outcome.losses) == {"loss", "router_loss"}
    assert not same(routers, router_parameters(m)) and not same(backbone, backbone_parameters(m))


def test_a_run_with_a_shared_attack_draws_one_batch_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = attacks_of(monkeypatch)
    c = config(MethodConfig(share_attack=True), epochs=1)
    run = train(c, tmp_path / "run", quiet=True)
    training = [images for images, _ in seen if len(images) == 32]
    assert len(training) == 3
    assert len(load_checkpoint(run.checkpoint())["batches"]) == 1


def test_routers_are_trained_in_every_third_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[tuple[bool, bool]] = []
    losses: list[float] = []
    seen = attacks_of(monkeypatch)
    attacks: list[int] = []
    original = AdvMoE.step

    def step(self: AdvMoE, batches: Sequence[Batch]) -> StepResult:
        routers, backbone = snapshot(router_parameters(self.model)), snapshot(backbone_parameters(self.model))
        before = len(seen)
        outcome = original(self, batches)
        attacks.append(len(seen) - before)
        now = (router_parameters(self.model), backbone_parameters(self.model))
        moved.append((not same(routers, now[0]), not same(backbone, now[1])))
        losses.append(outcome.losses.get("router_loss", math.nan))
        return outcome

    monkeypatch.setattr(AdvMoE, "step", step)
    # four steps an epoch: it is the run's steps that are counted
    run = train(config(MethodConfig(router_every=3), batch_size=24), tmp_path / "run", quiet=True)
    due = [step % 3 == 0 for step in range(8)]
    assert moved == [(routers, True) for routers in due]
    assert attacks == [2 if routers else 1 for routers in due]
    for line, own in zip(run.metrics(), (losses[:4], losses[4:]), strict=True):
        of_routers = [value for value in own if not math.isnan(value)]
        assert line["router_loss"] == pytest.approx(sum(of_routers) / len(of_routers))


@pytest.mark.parametrize(
    "method",
    [MethodConfig(share_attack=True), MethodConfig(router_every=3), MethodConfig(share_attack=True, router_every=2)],
    ids=["share_attack", "router_every", "both"],
)
def test_cheaper_runs_resume_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: MethodConfig
) -> None:
    assert_resumes(tmp_path, monkeypatch, config(method, batch_size=24), 6)  # in the second epoch


# --- AT (Sparse) ---

PHASES = MethodConfig("at_sparse", pretrain_epochs=1, mask_epochs=1)


def sparse(method: MethodConfig = PHASES, **changes: Any) -> RunConfig:
    return config(method, "sparse", **{"epochs": 3, **changes})


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("sparse")
    train(sparse(), folder / "unbroken", quiet=True)
    return folder


def test_masks_are_learned_in_three_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[tuple[bool, bool, bool]] = []
    rates: list[float] = []
    original = ATSparse.step

    def step(self: ATSparse, batches: Sequence[Batch]) -> StepResult:
        before = [snapshot(p) for p in (self.weights, self.scores, masks(self.model))]
        rates.append(self.optimizers[self.phase].param_groups[0]["lr"])
        outcome = original(self, batches)
        now = (self.weights, self.scores, masks(self.model))
        steps.append(tuple(not same(a, b) for a, b in zip(before, now, strict=True)))  # type: ignore[arg-type]
        return outcome

    monkeypatch.setattr(ATSparse, "step", step)
    run = train(sparse(), tmp_path / "run", quiet=True)
    weights, scores, stored = zip(*steps, strict=True)
    assert weights == (True,) * 3 + (False,) * 3 + (True,) * 3
    assert scores == (False,) * 3 + (True,) * 3 + (False,) * 3
    assert not any(stored)  # outside of phases' ends
    cosine = [0.05 * 0.5 * (1 + math.cos(math.pi * i / 3)) for i in range(3)]
    assert rates == pytest.approx(cosine * 3)
    m, _ = load_model(run.folder, "last")
    for name, conv in masked_convolutions(m).items():
        assert conv.mask.sum() == conv.kept == conv.out_channels // 2, name
        assert set(conv.mask.tolist()) == {0.0, 1.0}


def masks(m: nn.Module) -> list[Tensor]:
    return [conv.mask for conv in masked_convolutions(m).values()]


def test_the_best_is_of_the_last_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter((0.5, 0.9, 0.8, 0.3))
    original = engine.evaluate

    def scripted(*args: Any, **kwargs: Any) -> Any:
        result, ra = original(*args, **kwargs), next(accuracies)
        attacks = {n: dataclasses.replace(a, ra=ra) for n, a in result.attacks.items()}
        return dataclasses.replace(result, attacks=attacks)

    monkeypatch.setattr(engine, "evaluate", scripted)
    method = MethodConfig("at_sparse", pretrain_epochs=1, mask_epochs=2)
    run = train(sparse(method, epochs=4), tmp_path / "run", quiet=True)
    assert [line["validation_ra"] for line in run.metrics()] == [0.5, 0.9, 0.8, 0.3]
    state = load_checkpoint(run.checkpoint("best"))
    assert state["epoch"] == 4 and state["best"] == 0.3


# the first and last step of a phase, and one in it
@pytest.mark.parametrize("step", [2, 4, 5, 6, 7, 8])
def test_a_run_broken_in_any_phase_resumes_to_the_same_bits(
    masked: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    shutil.rmtree(masked / "broken", ignore_errors=True)
    assert_resumes(masked, monkeypatch, sparse(), step)


def test_a_checkpoint_of_the_mask_phase_is_the_network_of_the_moment(tmp_path: Path) -> None:
    data = load("digits", None, 96, None, 16, 0)
    run = Run(tmp_path / "run")
    trainer = Trainer(engine.resolve(sparse(), data), run, data, quiet=True)
    run.create(trainer.config)
    trainer._train_epoch()
    trainer._finish_epoch()
    trainer._train_epoch()
    for conv in masked_convolutions(trainer.model).values():  # as if the last step had changed every mask
        with torch.no_grad():
            conv.scores[conv.current_mask() > 0] = 0.0
    trainer._finish_epoch()
    method = trainer.method
    assert isinstance(method, ATSparse) and method.phase == "mask" and trainer.epoch == 2
    assert not run.checkpoint("best").exists()
    loaded, _ = load_model(run.folder, "last")
    images, _ = data.test.batch(torch.arange(32))
    kept = {name: conv.current_mask() for name, conv in masked_convolutions(trainer.model).items()}
    for name, conv in masked_convolutions(loaded).items():
        assert not conv.searching and torch.equal(conv.mask, kept[name]) and conv.mask.sum() == conv.kept
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), trainer.model.eval()(images))
    for norm in (n for n in loaded.modules() if isinstance(n, LiveBatchNorm2d)):
        assert 0 < norm.alive.sum() < norm.num_features
    attacks = {"attack": PGD(0.15, 0.1, 2)}
    results = [evaluate(net, data.test, attacks, limit=32) for net in (loaded, trainer.model)]
    assert results[0] == results[1]


def test_what_the_masks_keep_stays_as_it_is_in_the_last_phase(tmp_path: Path, masked: Path) -> None:
    data = load("digits", None, 96, None, 16, 0)
    trainer = Trainer(engine.resolve(sparse(), data), Run(tmp_path / "run"), data, quiet=True)
    trainer.run.create(trainer.config)
    for _ in range(2):
        trainer._train_epoch()
        trainer._finish_epoch()
    learned = snapshot(masks(trainer.model))
    scores = snapshot(score_parameters(trainer.model))
    whole = load_checkpoint(masked / "unbroken" / "last.pt")["model"]
    assert same(learned, [v for n, v in whole.items() if n.endswith(".mask")])
    assert same(scores, [v for n, v in whole.items() if n.endswith(".scores")])
    final, _ = load_model(masked / "unbroken", "last")
    activations: dict[str, Tensor] = {}
    for name, norm in final.named_modules():
        if isinstance(norm, LiveBatchNorm2d):
            norm.register_forward_hook(lambda m, args, out, name=name: activations.update({name: out}))
    with torch.no_grad():
        final(data.test.batch(torch.arange(8))[0])
    after = {"conv1": "bn1", "conv2": "bn2", "shortcut.0": "shortcut.1"}
    for name, conv in masked_convolutions(final).items():
        norm_name = next(name.removesuffix(c) + n for c, n in after.items() if name.endswith(c))
        live = activations[norm_name].abs().amax((0, 2, 3)) > 0
        assert torch.equal(live, conv.mask > 0), name


def test_at_sparse_by_pgd_at(tmp_path: Path) -> None:
    run = train(sparse(dataclasses.replace(PHASES, objective="cross_entropy")), tmp_path / "run", quiet=True)
    lines = run.metrics()
    assert all("train_ra" in line and "train_sa" not in line for line in lines) and len(lines) == 3


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("dense", PHASES, "method: at_sparse needs a model of kind sparse; use at for this one"),
        ("moe", PHASES, "method: at_sparse needs a model of kind sparse"),
        ("sparse", MethodConfig("at_sparse"), "mask_epochs: expected at least 1 for at_sparse, got 0"),
    ],
)
def test_at_sparse_needs_masks(kind: str, method: MethodConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_method(small(kind=kind), method, OptimConfig(), ATTACK)


def test_a_mask_over_the_weights_of_a_dense_run(tmp_path: Path) -> None:
    """The paper's robust mask: nothing but the mask is trained, and the best is of that phase."""
    start = train(config("standard", "dense", epochs=1), tmp_path / "dense", quiet=True)
    method = MethodConfig("at_sparse", mask_epochs=1)
    run = train(sparse(method, epochs=1, init=str(start.folder)), tmp_path / "run", quiet=True)
    for name in ("best", "last"):
        m, _ = load_model(run.folder, name)
        assert all(conv.mask.sum() == conv.kept for conv in masked_convolutions(m).values())
    begun = load_checkpoint(start.checkpoint("best"))["model"]
    weights = {n: p for n, p in m.named_parameters() if not n.endswith("scores")}
    assert all(torch.equal(p, begun[n]) for n, p in weights.items()) and len(weights) > 10


# --- as released ---


def test_the_released_codes_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbone first, then the routers on the same batch by their pseudo-labels, each with an attack of its own whose
    second term is the routers' divergence."""
    m = small()
    method = build_method(
        m, MethodConfig.as_released(), OptimConfig(), dataclasses.replace(ATTACK, random_start="gaussian")
    )
    order: list[str] = []
    for name, optimizer in method.optimizers.items():
        optimizer.register_step_pre_hook(lambda *args, name=name: order.append(name))
    divergences: list[bool] = []
    original = PGD.run

    def run(self: PGD, net: nn.Module, images: Tensor, labels: Tensor, generator: Any, extra: Any = None) -> Any:
        divergences.append(extra is not None)
        return original(self, net, images, labels, generator, extra)

    monkeypatch.setattr(PGD, "run", run)
    routers = snapshot(router_parameters(m))
    outcome = method.step([batch()])
    assert order == ["backbone", "router"] and divergences == [True, True] and outcome.count == 16
    assert not same(routers, router_parameters(m))
