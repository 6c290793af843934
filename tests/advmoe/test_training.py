# SPDX-License-Identifier: Apache-2.0
"""Training: the methods' phases, runs that break and resume, and that it learns."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import ATTACK, assert_same_run, batch, interrupt_at, model, same, snapshot, tiny

from advmoe.attacks import PGD, from_name
from advmoe.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, RoutingConfig, RunConfig
from advmoe.data import load, stream_generator
from advmoe.evaluation import evaluate
from advmoe.models import backbone_parameters, create_model, record_routing, router_parameters
from advmoe.objectives import kl_divergence, trades_loss
from advmoe.routers import Router, record_scores
from advmoe.training import (
    AT,
    AdvMoE,
    Interrupted,
    NonFiniteLossError,
    Run,
    RunError,
    Standard,
    StepError,
    build_method,
    engine,
    load_model,
    resume,
    train,
)
from advmoe.training.methods import Batch, Method, StepResult
from advmoe.training.runs import build_model, load_checkpoint
from moe_kernels import BackendUnavailable, RoutedBatchNorm2d, RoutedConv2d


def test_router_phase_moves_the_routers_only() -> None:
    m = model()
    method = AdvMoE(m, MethodConfig(), OptimConfig(), ATTACK)
    routers, backbone = snapshot(router_parameters(m)), snapshot(backbone_parameters(m))
    method._router_phase([batch()])
    assert not any(torch.equal(a, b) for a, b in zip(routers, router_parameters(m), strict=True) if b.ndim == 2)
    assert same(backbone, backbone_parameters(m))
    assert all(p.requires_grad for p in m.parameters())
    assert all(p.grad is None for p in backbone_parameters(m))


def test_backbone_phase_moves_the_backbone_only() -> None:
    m = model()
    method = AdvMoE(m, MethodConfig(), OptimConfig(), ATTACK)
    routers, backbone = snapshot(router_parameters(m)), snapshot(backbone_parameters(m))
    method._backbone_phase([batch()])
    assert same(routers, router_parameters(m))
    assert not any(torch.equal(a, b) for a, b in zip(backbone, backbone_parameters(m), strict=True))
    assert all(p.requires_grad for p in m.parameters())
    assert all(p.grad is None for p in router_parameters(m))


def test_each_level_attacks_its_own_batch_under_the_routers_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    method = AdvMoE(m, MethodConfig(), OptimConfig(), ATTACK)
    before = snapshot(router_parameters(m))
    seen: list[tuple[Batch, bool]] = []
    two = [batch(0), batch(1)]
    original = PGD.run

    def run(self: PGD, net: torch.nn.Module, images: torch.Tensor, *rest: Any) -> Any:
        (own,) = [b for b in two if b.images is images]
        assert rest[0] is own.labels and rest[1] is own.generator
        seen.append((own, same(before, router_parameters(m))))
        return original(self, net, images, *rest)

    monkeypatch.setattr(PGD, "run", run)
    method.step(two)
    assert [(b is two[0], b is two[1]) for b, _ in seen] == [(True, False), (False, True)]
    assert [old for _, old in seen] == [True, False]  # the upper level sees the routers just trained


def test_router_gradients_are_those_of_trades_through_the_network() -> None:
    m = model().eval()  # so that the two calculations have the same statistics
    method = AdvMoE(m, MethodConfig(), OptimConfig(lr=0.0), ATTACK)
    b = batch()
    other = copy.deepcopy(m)
    adversarial = ATTACK(other, b.images, b.labels, stream_generator("same"))
    loss = trades_loss(other(b.images), other(adversarial), b.labels, 6.0)
    loss.backward()
    result = method._router_phase([dataclasses.replace(b, generator=stream_generator("same"))])
    assert result.losses["router_loss"] == pytest.approx(loss.item(), rel=1e-6)
    for p, expected in zip(router_parameters(m), router_parameters(other), strict=True):
        torch.testing.assert_close(p.grad, expected.grad)


def test_algorithm_1_goes_routers_first_on_a_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []
    for name in ("_router_phase", "_backbone_phase"):

        def phase(self: AdvMoE, parts: Sequence[Batch], attacked: Any = None, name: str = name) -> StepResult:
            assert attacked is None  # each level has an attack of its own
            seen.append((name, sum(part.images.sum().item() for part in parts)))
            return StepResult({"loss" if name == "_backbone_phase" else "router_loss": 1.0}, 0, 0)

        monkeypatch.setattr(AdvMoE, name, phase)
    two = [batch(0), batch(1)]
    sums = [b.images.sum().item() for b in two]
    AdvMoE(model(), MethodConfig(), OptimConfig(), ATTACK).step(two)
    assert seen == [("_router_phase", sums[0]), ("_backbone_phase", sums[1])]
    seen.clear()
    released = AdvMoE(model(), MethodConfig(order="backbone_first", batches="one"), OptimConfig(), ATTACK)
    assert released.batches_per_step == 1
    released.step(two[:1])
    assert seen == [("_backbone_phase", sums[0]), ("_router_phase", sums[0])]


def test_the_two_levels_see_different_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[list[float]] = []

    def step(self: AdvMoE, batches: Sequence[Batch]) -> StepResult:
        sums.append([b.images.sum().item() for b in batches])
        return StepResult({"loss": 1.0, "router_loss": 1.0}, 0, 64)

    monkeypatch.setattr(AdvMoE, "step", step)
    train(tiny(epochs=1), tmp_path / "run", quiet=True)
    assert len(sums) == 3 and all(len(pair) == 2 and pair[0] != pair[1] for pair in sums)


@pytest.mark.parametrize("router", ["light", "global"])
@pytest.mark.parametrize("objective", ["trades", "pseudo_label"])
@pytest.mark.parametrize("attack_routers", [False, True])
def test_the_released_codes_variants_run(router: str, objective: str, attack_routers: bool) -> None:
    m = model(router=router)
    config = MethodConfig(router_objective=objective, attack_routers=attack_routers)
    method = AdvMoE(m, config, OptimConfig(), ATTACK)
    routers = snapshot(router_parameters(m))
    result = method.step([batch(0), batch(1)])
    assert set(result.losses) == {"router_loss", "loss"} and result.count == 16  # images that the backbone is trained on
    assert not same(routers, router_parameters(m))
    assert all(module.training for module in m.modules())


@pytest.mark.parametrize("router", ["light", "global"])
def test_an_attack_on_the_routers_diverges_them_further(router: str) -> None:
    """The released code's second term: with it the routers' scores come to lie further apart."""
    m = model(router=router, num_experts=4).eval()
    with torch.no_grad():
        for r in (r for r in m.modules() if isinstance(r, Router)):
            r.linear.weight.mul_(5)
    apart = []
    for attack_routers in (False, True):
        b = batch(3)
        method = AdvMoE(m, MethodConfig(attack_routers=attack_routers), OptimConfig(), PGD(0.15, 0.05, 8, loss="kl"))
        found = method._adversarial(b)
        with record_scores(m) as scores, torch.no_grad():
            m(b.images)
            clean = dict(scores)
            m(found)
        apart.append(sum(kl_divergence(s, scores[n], "sum").item() for n, s in clean.items()))
    assert apart[1] > 1.1 * apart[0] > 0, apart


@pytest.mark.parametrize("router_lr", [None, 0.01])
def test_at_trains_router_and_backbone_together(router_lr: float | None) -> None:
    m = model()
    method = AT(m, MethodConfig("at"), OptimConfig(router_lr=router_lr), ATTACK)
    routers, backbone = snapshot(router_parameters(m)), snapshot(backbone_parameters(m))
    method.step([batch()])
    assert not same(routers, router_parameters(m)) and not same(backbone, backbone_parameters(m))
    groups = method.optimizers["all"].param_groups
    assert [g["base_lr"] for g in groups] == ([0.1] if router_lr is None else [0.1, 0.01])
    assert {id(p) for p in groups[-1]["params"]} >= {id(p) for p in router_parameters(m)}
    assert sum(len(g["params"]) for g in groups) == len(list(m.parameters()))


def test_pgd_at_is_cross_entropy_on_adversarial_images() -> None:
    m = model(kind="dense")
    attack = PGD(0.15, 0.1, 1, loss="ce", random_start=False)
    b = batch()
    adversarial = attack(m, b.images, b.labels)
    expected = torch.nn.functional.cross_entropy(copy.deepcopy(m)(adversarial), b.labels).item()
    result = AT(m, MethodConfig("at", "cross_entropy"), OptimConfig(), attack).step([b])
    assert result.losses["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bn", [False, True])
def test_experts_nobody_chose_can_be_frozen(bn: bool) -> None:
    for freeze in (False, True):
        m = model(num_experts=8, bn="per_expert" if bn else "shared", image_size=16)
        # weight decay alone moves weights that get no gradient
        method = Standard(m, MethodConfig("standard"), OptimConfig(weight_decay=0.1, freeze_unused=freeze), ATTACK)
        layers = {n: layer for n, layer in m.named_modules() if isinstance(layer, RoutedConv2d)}
        before = {n: layer.weight.detach().clone() for n, layer in layers.items()}
        with record_routing(m) as routings:
            method.step([batch(count=4, size=16)])
        unused_seen = 0
        for name, layer in layers.items():
            used = set(routings[name].expert.tolist())
            for expert in range(8):
                rows = slice(expert * layer.out_channels, (expert + 1) * layer.out_channels)
                moved = not torch.equal(layer.weight[rows], before[name][rows])
                unused_seen += expert not in used
                assert moved == (expert in used or not freeze)
        assert unused_seen > 0
        norms = [(n, norm) for n, norm in m.named_modules() if isinstance(norm, RoutedBatchNorm2d)]
        assert len(norms) == (16 if bn else 0)
        for name, norm in norms:  # the weight starts at 1, and decays
            used = set(routings[name.replace("bn", "conv")].expert.tolist())
            rows = norm.weight.detach().view(8, -1)
            still = {e for e in range(8) if torch.equal(rows[e], torch.ones_like(rows[e]))}
            assert still == ((set(range(8)) - used) if freeze else set())


def test_freezing_holds_against_momentum_too() -> None:
    m = model(num_experts=2, width=4, standardize=False)
    method = AdvMoE(m, MethodConfig(), OptimConfig(lr=0.05, freeze_unused=True), ATTACK)
    layer = m.layer3[0].conv2
    for expert in (0, 1):  # the second step is taken with momentum for expert 0
        with torch.no_grad():
            layer.router.linear.weight.zero_()
            layer.router.linear.bias.copy_(torch.eye(2)[expert] * 1000)
        before = layer.weight.detach().clone().view(2, -1)
        method.step([batch(2 * expert), batch(2 * expert + 1)])
        after = layer.weight.detach().view(2, -1)
        assert torch.equal(after[1 - expert], before[1 - expert]) and not torch.equal(after[expert], before[expert])
    assert method.optimizers["backbone"].state[layer.weight]["momentum_buffer"].view(2, -1)[0].abs().sum() > 0


def test_advmoe_needs_routers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="advmoe needs a model with trainable routers"):
        train(tiny("advmoe", "dense"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_advmoe_needs_gates_that_let_gradients_through() -> None:
    m = model(gate="none")
    with pytest.raises(ValueError, match="gate: 'none' lets no gradient of the loss reach the routers"):
        AdvMoE(m, MethodConfig(), OptimConfig(), ATTACK)
    routers = snapshot(router_parameters(m))
    AdvMoE(m, MethodConfig(router_objective="pseudo_label"), OptimConfig(), ATTACK).step([batch(0), batch(1)])
    assert not same(routers, router_parameters(m))  # that objective needs no gate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_attack": "pgd"}, "attack: expected fgsm, or pgd<steps>"),
        ({"data": DataConfig("digits", validation=0)}, "validation: the best checkpoint is chosen on held-out images"),
        ({"device": "nonsense"}, "device: expected auto or a device that torch can use here, got 'nonsense'"),
        ({"batch_size": 2000}, "batch_size: expected at most the 1294 training images, got 2000"),
    ],
    ids=["attack", "validation", "device", "batch_size"],
)
def test_what_cannot_end_well_does_not_begin(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(tiny(**{"data": DataConfig("digits"), **changes}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_rates_follow_the_cosine_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[tuple[float, float]] = []

    def step(self: AdvMoE, batches: Sequence[Batch]) -> StepResult:
        rates.append(tuple(self.optimizers[n].param_groups[0]["lr"] for n in ("router", "backbone")))  # type: ignore[arg-type]
        return StepResult({"loss": 1.0}, 0, 64)

    monkeypatch.setattr(AdvMoE, "step", step)
    train(tiny(optim=OptimConfig(lr=0.2, router_lr=0.02)), tmp_path / "run", quiet=True)
    cosine = [0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert [r for r, _ in rates] == pytest.approx([0.02 * c for c in cosine])
    assert [b for _, b in rates] == pytest.approx([0.2 * c for c in cosine])


def test_the_test_set_has_no_part_in_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_test(*args: Any) -> Any:
        return dataclasses.replace(load(*args), test=None)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "load", without_test)
    run = train(tiny("at", "dense", epochs=6), tmp_path / "run", quiet=True)
    accuracies = [line["validation_ra"] for line in run.metrics()]
    best = load_checkpoint(run.checkpoint("best"))["epoch"]
    assert best == 1 + accuracies.index(max(accuracies))


@pytest.mark.parametrize("level", [logging.WARNING, logging.INFO])
def test_a_run_is_a_folder(tmp_path: Path, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "level", level)  # log.txt does not depend on how logging is configured
    logging.getLogger("advmoe").manager._clear_cache()  # type: ignore[attr-defined]
    run = train(tiny(), tmp_path / "run", quiet=True)
    assert sorted(p.name for p in run.folder.iterdir()) == [
        "best.pt",
        "config.yaml",
        "last.pt",
        "log.txt",
        "metrics.jsonl",
    ]
    config = RunConfig.load(run.config_path)
    assert config.attack.epsilon == 0.15 and config.model.mean is not None and config.threads is not None
    lines = run.metrics()
    assert [line["epoch"] for line in lines] == [1, 2]
    for key in ("loss", "router_loss", "train_sa", "validation_sa", "validation_ra", "images_per_second", "flip_rate"):
        assert key in lines[0]
    assert len(lines[0]["expert_usage"]) == 16
    state = torch.load(run.checkpoint(), weights_only=True)
    assert state["format"] == 1 and set(state["optimizers"]) == {"router", "backbone"} and len(state["batches"]) == 2
    log = (run.folder / "log.txt").read_text()
    assert [line.split()[4] for line in log.splitlines() if ": loss " in line] == ["1/2:", "2/2:"]
    assert not logging.getLogger("advmoe").handlers
    restored, _ = load_model(run.folder, "last")
    assert all(torch.equal(a, b) for a, b in zip(restored.state_dict().values(), state["model"].values(), strict=True))
    with pytest.raises(RunError, match="holds a run already"):
        train(tiny(), tmp_path / "run", quiet=True)


RELEASED = MethodConfig(order="backbone_first", batches="one", router_objective="pseudo_label", attack_routers=True)


@pytest.mark.parametrize(
    ("config", "step"),
    [
        (tiny(), 2),
        (tiny(), 4),
        (tiny("at", "dense"), 3),  # the last step of an epoch
        (tiny("at", "dense"), 5),
        (tiny("standard", "s_dense"), 1),
        (
            tiny(
                RELEASED.name,
                model=ModelConfig(width=8, router="global", gate_after="norm"),
                optim=OptimConfig(lr=0.05, router_lr=0.01, freeze_unused=True),
            ),
            2,
        ),
    ],
    ids=["advmoe-2", "advmoe-4", "at-3", "at-5", "standard-1", "released-2"],
)
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: RunConfig, step: int
) -> None:
    if config.model.router == "global":
        config = dataclasses.replace(config, method=RELEASED)
    method = {"advmoe": AdvMoE, "at": AT, "standard": Standard}[config.method.name]
    unbroken = train(config, tmp_path / "unbroken", quiet=True)
    with monkeypatch.context() as patch:
        interrupt_at(step, method, patch)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "broken", quiet=True)
    state = load_checkpoint(tmp_path / "broken" / "last.pt")
    assert 3 * state["epoch"] + state["step"] == step  # where it was broken
    torch.rand(5)  # the process' generator has moved on
    assert_same_run(unbroken, resume(tmp_path / "broken", quiet=True))


def test_a_run_broken_twice_and_resumed_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("at", "dense")
    unbroken = train(config, tmp_path / "unbroken", quiet=True)
    for go in (lambda: train(config, tmp_path / "broken", quiet=True), lambda: resume(tmp_path / "broken", quiet=True)):
        with monkeypatch.context() as patch:
            interrupt_at(2, AT, patch)
            with pytest.raises(Interrupted):
                go()
    assert_same_run(unbroken, resume(tmp_path / "broken", quiet=True))


@pytest.mark.parametrize("method", ["standard", "at"])
def test_a_resumed_run_remembers_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """An undefended model is chosen by its SA: its RA is noise."""
    score, other = ("sa", "ra") if method == "standard" else ("ra", "sa")
    accuracies = iter((0.5, 0.9, 0.2, 0.4))
    count = 0
    original = engine.evaluate

    def scripted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1  # the other one grows all the time
        result = original(*args, **kwargs)
        values = {score: next(accuracies), other: count / 100}
        attacks = {n: dataclasses.replace(a, ra=values["ra"]) for n, a in result.attacks.items()}
        return dataclasses.replace(result, sa=values["sa"], attacks=attacks)

    monkeypatch.setattr(engine, "evaluate", scripted)
    with monkeypatch.context() as patch:
        interrupt_at(8, Standard if method == "standard" else AT, patch)  # in the third epoch
        with pytest.raises(Interrupted):
            train(tiny(method, "dense", epochs=4), tmp_path / "run", quiet=True)
    run = resume(tmp_path / "run", quiet=True)
    assert [line[f"validation_{score}"] for line in run.metrics()] == [0.5, 0.9, 0.2, 0.4]
    assert load_checkpoint(run.checkpoint("best"))["epoch"] == 2
    assert load_checkpoint(run.checkpoint())["best"] == 0.9


@pytest.mark.parametrize("epoch", [1, 2])
def test_broken_while_validating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epoch: int) -> None:
    """The epoch's training is in the checkpoint, and is not done again."""
    config = tiny("at", "dense")
    unbroken = train(config, tmp_path / "unbroken", quiet=True)
    count = 0
    original = engine.evaluate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == epoch:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "evaluate", interrupted)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "broken", quiet=True)
    state = load_checkpoint(tmp_path / "broken" / "last.pt")
    assert (state["epoch"], state["step"]) == (epoch - 1, 3)
    assert_same_run(unbroken, resume(tmp_path / "broken", quiet=True))


def test_ctrl_c_twice_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)

    def step(self: Method, batches: Sequence[Batch]) -> StepResult:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("a second Ctrl-C was not heard")

    with monkeypatch.context() as patch:
        patch.setattr(AT, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(tiny("at", "dense"), tmp_path / "run", quiet=True)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(resume(tmp_path / "run", quiet=True).metrics()) == 2


def test_a_background_job_does_not_hear_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with monkeypatch.context() as patch:
            interrupt_at(1, AT, patch)
            assert len(train(tiny("at", "dense"), tmp_path / "run", quiet=True).metrics()) == 2
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    first, again, other = (
        load_checkpoint(train(tiny("at", "dense", epochs=1, seed=s), tmp_path / n, quiet=True).checkpoint())["model"]
        for s, n in ((0, "first"), (0, "again"), (1, "other"))
    )
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    run = train(tiny("standard", "dense"), tmp_path / "run", quiet=True)
    before = {p.name: p.read_bytes() for p in run.folder.iterdir() if p.name != "log.txt"}
    resume(run.folder, quiet=True)
    assert {p.name: p.read_bytes() for p in run.folder.iterdir() if p.name != "log.txt"} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ModelConfig(kind="moe", width=4)},
        {"method": MethodConfig("at")},
        {"method": MethodConfig("advmoe", batches="one")},
    ],
    ids=["model", "optimizers", "batches"],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = train(tiny(epochs=1), tmp_path / "run", quiet=True)
    config = RunConfig.load(run.config_path)
    if "model" in changes:
        changes = {"model": dataclasses.replace(config.model, width=4)}
    dataclasses.replace(config, **changes).save(run.config_path)
    with pytest.raises(RunError, match=r"last\.pt does not fit .*config\.yaml"):
        resume(run.folder, quiet=True)


@pytest.mark.parametrize("torn", ['{"epoch": 2, "lo', "", "\x00\x00"])
def test_a_torn_line_of_metrics_does_not_stop_a_resume(tmp_path: Path, torn: str) -> None:
    run = train(tiny("standard", "dense", epochs=1), tmp_path / "run", quiet=True)
    with run.metrics_path.open("a") as file:
        file.write(torn)
    config = dataclasses.replace(RunConfig.load(run.config_path), epochs=2)
    config.save(run.config_path)
    assert [line["epoch"] for line in resume(run.folder, quiet=True).metrics()] == [1, 2]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    run = train(tiny("standard", "dense", epochs=1), tmp_path / "run", quiet=True)
    run.add_metrics({"epoch": 2, "loss": 0.0})  # written just before a crash
    config = dataclasses.replace(RunConfig.load(run.config_path), epochs=2)
    config.save(run.config_path)
    lines = resume(run.folder, quiet=True).metrics()
    assert [line["epoch"] for line in lines] == [1, 2] and lines[1]["loss"] != 0.0


def test_a_checkpoint_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    run.save({"value": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            run.save({"value": 2})
    assert load_checkpoint(run.checkpoint())["value"] == 1
    run.save({"value": 3})
    assert load_checkpoint(run.checkpoint())["value"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(RunError, match="no such checkpoint"):
        load_checkpoint(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(RunError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(RunError, match=r"written by a newer version of advmoe .format 99, this one's is 1.; update"):
        load_checkpoint(path)
    with pytest.raises(RunError, match="is no run"):
        resume(tmp_path)


def test_a_model_comes_ready_to_be_used_and_only_from_what_was_asked_for(tmp_path: Path) -> None:
    run = train(tiny(epochs=1), tmp_path / "run", quiet=True)
    for source in (run.folder, run.checkpoint("last")):
        assert not any(m.training for m in load_model(source)[0].modules())
    run.checkpoint("best").unlink()
    with pytest.raises(RunError, match=r"best\.pt: it is not there; .*--checkpoint last"):
        load_model(run.folder)
    dataclasses.replace(run.config(), routing=RoutingConfig(share_epochs=3), epochs=4).save(run.config_path)
    with pytest.raises(RunError, match=r"best\.pt: the best is chosen behind the first 3 epochs, which share .*last"):
        load_model(run.folder)
    run.metrics_path.unlink()  # as in one whose first epoch has not been validated
    with pytest.raises(RunError, match=r"best\.pt: no epoch has been validated yet; .*--checkpoint last"):
        load_model(run.folder)
    load_model(run.folder, "last")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    config = tiny("standard", "dense", optim=OptimConfig(lr=1e30))
    with pytest.raises(NonFiniteLossError, match=r"^epoch 1, step [23]: .*(nan|inf); there is no .*A lower --lr"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "last.pt").exists()  # such weights are not saved


@pytest.mark.parametrize(("method", "phase"), [("advmoe", "router_loss"), ("at", "loss")])
def test_a_loss_that_is_not_finite_moves_nothing(monkeypatch: pytest.MonkeyPatch, method: str, phase: str) -> None:
    m = model()
    optim = OptimConfig(weight_decay=0.1)
    trainer = {"advmoe": AdvMoE, "at": AT}[method](m, MethodConfig(method), optim, ATTACK)
    before = snapshot(list(m.parameters()))
    monkeypatch.setattr("advmoe.training.methods.base.trades_loss", lambda c, a, y, b: (c + a).sum() * float("nan"))
    with pytest.raises(NonFiniteLossError, match=f"^{phase} is nan"):
        trainer.step([batch(0), batch(1)][: trainer.batches_per_step])
    assert same(before, list(m.parameters()))


def test_a_gradient_that_is_not_finite_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    trainer = AT(m, MethodConfig("at"), OptimConfig(weight_decay=0.1), ATTACK)
    before = snapshot(list(m.parameters()))
    # sqrt(0): the value is 0, the derivative infinite, and times 0 NaN
    monkeypatch.setattr("advmoe.training.methods.base.trades_loss", lambda c, a, y, b: (c * 0 + a * 0).sum().sqrt())
    with pytest.raises(NonFiniteLossError, match=r"^the gradient of loss \(0\) has the entry nan"):
        trainer.step([batch(0)])
    assert same(before, list(m.parameters()))


def test_a_step_that_its_batch_does_not_allow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: AdvMoE, batches: Sequence[Batch]) -> StepResult:
        raise ValueError("input: expected more than one value per channel")

    monkeypatch.setattr(AdvMoE, "step", step)
    with pytest.raises(StepError, match=r"^epoch 1, step 1: input: expected more .*; there is no checkpoint yet$"):
        train(tiny(), tmp_path / "run", quiet=True)


def test_settings_without_effect_are_refused() -> None:
    dense = create_model("resnet18", "dense", width=8, image_size=8)
    for config, optim, name in (
        (MethodConfig("at", order="backbone_first"), OptimConfig(), "order"),
        (MethodConfig("standard", batches="one"), OptimConfig(), "batches"),
        (MethodConfig("at"), OptimConfig(router_lr=0.1), "router_lr"),
        (MethodConfig("at", attack_routers=True), OptimConfig(), "attack_routers"),
        (MethodConfig("standard", attack_routers=True), OptimConfig(), "attack_routers"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: .*without effect"):
            build_method(dense, config, optim, ATTACK)


@pytest.mark.parametrize(("objective", "key"), [("trades", "train_sa"), ("cross_entropy", "train_ra")])
def test_the_training_accuracy_is_named_for_what_it_is(tmp_path: Path, objective: str, key: str) -> None:
    """PGD-AT sees attacked images alone."""
    config = dataclasses.replace(tiny("at", "dense", epochs=1), method=MethodConfig("at", objective))
    run = train(config, tmp_path / "run", quiet=True)
    assert [k for k in run.metrics()[0] if k.startswith("train_")] == [key]


def test_weights_ruined_by_the_last_step_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have met no loss, and every resume from them would fail in the same place."""
    original = Standard.step

    def step(self: Standard, batches: Sequence[Batch]) -> StepResult:
        result = original(self, batches)
        with torch.no_grad():
            next(self.model.parameters())[0, 0, 0, 0] = torch.inf
        return result

    monkeypatch.setattr(Standard, "step", step)
    config = tiny("standard", "dense", batch_size=96, epochs=1)
    with pytest.raises(NonFiniteLossError, match=r"^epoch 1, end: a weight is (inf|nan) .*there is no checkpoint yet"):
        train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "last.pt").exists()


def test_ctrl_c_after_a_ruinous_step_keeps_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Standard.step
    count = 0

    def step(self: Standard, batches: Sequence[Batch]) -> StepResult:
        nonlocal count
        count += 1
        result = original(self, batches)
        if count == 4:  # the first step of the second epoch
            with torch.no_grad():
                next(self.model.parameters())[0, 0, 0, 0] = torch.inf
            os.kill(os.getpid(), signal.SIGINT)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Standard, "step", step)
        with pytest.raises(NonFiniteLossError, match=r"^epoch 2, step 1: a weight is (inf|nan) .*last checkpoint is"):
            train(tiny("standard", "dense"), tmp_path / "run", quiet=True)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1
    assert len(resume(tmp_path / "run", quiet=True).metrics()) == 2


def test_the_backend_is_asked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_kernels.backends.native._import_error", "no such file")
    with pytest.raises(BackendUnavailable):
        train(tiny(), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_engine_names_the_loss_and_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = AdvMoE.step
    count = 0

    def step(self: AdvMoE, batches: Sequence[Batch]) -> StepResult:
        nonlocal count
        count += 1
        if count == 5:
            raise NonFiniteLossError("router_loss is inf")
        return original(self, batches)

    monkeypatch.setattr(AdvMoE, "step", step)
    with pytest.raises(
        NonFiniteLossError, match=r"^epoch 2, step 2: router_loss is inf; the last checkpoint is .*last\.pt"
    ):
        train(tiny(), tmp_path / "run", quiet=True)
    assert load_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1


def test_a_collapsed_router_is_reported_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = "layer2.0.conv1"

    def build(config: ModelConfig) -> torch.nn.Module:
        model = build_model(config)
        with torch.no_grad():
            model.get_submodule(f"{planted}.router").linear.bias[1] += 1000.0  # its softmax has no gradient any more
        return model

    monkeypatch.setattr("advmoe.training.engine.build_model", build)
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        run = train(tiny(model=ModelConfig(width=8, standardize=False)), tmp_path / "run", quiet=True)
    warnings = [r.getMessage() for r in caplog.records if "one expert takes all samples in" in r.getMessage()]
    lines = run.metrics()
    assert len(warnings) == len(lines) == 2
    for line, said in zip(lines, warnings, strict=True):
        collapsed = [n for n, usage in line["expert_usage"].items() if max(usage) >= 0.999]
        assert said == f"epoch {line['epoch']}: one expert takes all samples in {', '.join(collapsed)}"
        assert planted in collapsed
        assert line["expert_usage"][planted] == [0.0, 1.0] and line["router_entropy"][planted] == 0
        assert all(line["router_entropy"][n] < 0.01 for n in collapsed)
    assert planted in (run.folder / "log.txt").read_text()


def test_balanced_routers_are_not_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Usage just below the line, as evaluation would count it."""
    original = engine.evaluate

    def balanced(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        return dataclasses.replace(result, usage={n: [0.01, 0.99] for n in result.usage})

    monkeypatch.setattr(engine, "evaluate", balanced)
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        run = train(tiny(epochs=1), tmp_path / "run", quiet=True)
    assert not caplog.records
    entropy = run.metrics()[0]["router_entropy"].values()
    assert all(e == pytest.approx(0.056, abs=1e-4) for e in entropy)


def test_one_expert_is_never_a_collapse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        train(tiny(model=ModelConfig(kind="moe", width=8, num_experts=1), epochs=1), tmp_path / "run", quiet=True)
    assert not caplog.records


def learn(folder: Path, method: str, kind: str, epochs: int, seed: int = 0) -> tuple[float, float]:
    """SA and RA (PGD-20) on digits' test images after that many epochs; PGD at the data's own radius of 0.15."""
    config = RunConfig(
        model=ModelConfig(kind=kind, width=16),
        data=DataConfig("digits", validation=20, augment=False),
        optim=OptimConfig(lr=0.05),
        method=MethodConfig(method, beta=2.0),
        epochs=epochs,
        batch_size=32,
        seed=seed,
        validation_attack="pgd1",
    )
    run = train(config, folder, quiet=True)
    lines = run.metrics()
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    trained, _ = load_model(run.folder, "last")
    result = evaluate(trained, load("digits").test, {"pgd20": from_name("pgd20", 0.15)})
    assert result.attacks["pgd20"].zero_gradient < 0.01
    return result.sa, result.attacks["pgd20"].ra


def test_training_converges_on_digits(tmp_path: Path) -> None:
    """Adversarial training keeps SA above 90 % and RA far above an undefended model's.

    Seen: SA 97 to 98 %, RA 63 to 66 %, where the undefended model has SA 96 to 98 % and RA 8 to 18 %.
    """
    plain_sa, plain_ra = learn(tmp_path / "standard", "standard", "dense", 3)
    sa, ra = learn(tmp_path / "at", "at", "dense", 6)
    assert plain_sa > 0.9 and sa > 0.9, (plain_sa, sa)
    assert ra > plain_ra + 0.3, (plain_ra, ra)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", [0, 1])
def test_every_method_converges_on_digits(tmp_path: Path, seed: int) -> None:
    _, plain_ra = learn(tmp_path / "plain", "standard", "dense", 4, seed)
    for method, kind in (("at", "dense"), ("at", "s_dense"), ("at", "moe"), ("advmoe", "moe")):
        sa, ra = learn(tmp_path / f"{method}-{kind}", method, kind, 12, seed)
        assert sa > 0.9 and ra > plain_ra + 0.3, (method, kind, sa, ra, plain_ra)
