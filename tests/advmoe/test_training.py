# SPDX-License-Identifier: Apache-2.0
"""Training: the methods' phases, runs that break and resume, and that it learns."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from advmoe.attacks import PGD, from_name
from advmoe.config import AttackConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from advmoe.data import load, stream_generator
from advmoe.evaluation import evaluate
from advmoe.models import backbone_parameters, create_model, record_routing, router_parameters
from advmoe.training import AT, AdvMoE, NonFiniteLossError, Run, RunError, Standard, load_model, resume, train
from advmoe.training.engine import Interrupted
from advmoe.training.methods import Batch, Method, StepResult
from advmoe.training.runs import load_checkpoint
from moe_kernels import RoutedConv2d

ATTACK = PGD(0.15, 0.1, 2, loss="kl")


def tiny(method: str = "advmoe", kind: str = "moe", **changes: Any) -> RunConfig:
    config = RunConfig(
        model=ModelConfig(kind=kind, width=8),
        data=DataConfig("digits", train_limit=96, validation=16),
        optim=OptimConfig(lr=0.05),
        method=MethodConfig(method),
        epochs=2,
        batch_size=32,
        validation_attack="pgd2",
    )
    return dataclasses.replace(config, **changes)


def batch(seed: int = 0, count: int = 16) -> Batch:
    g = stream_generator(seed)
    return Batch(torch.rand(count, 3, 8, 8, generator=g), torch.randint(0, 10, (count,), generator=g), g)


def model(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("resnet18", **{"kind": "moe", "width": 8, "image_size": 8, **options}).train()


def snapshot(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in parameters]


def same(before: list[torch.Tensor], parameters: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_router_phase_moves_the_routers_only() -> None:
    m = model()
    method = AdvMoE(m, MethodConfig(), OptimConfig(), ATTACK)
    routers, backbone = snapshot(router_parameters(m)), snapshot(backbone_parameters(m))
    method._router_phase(batch())
    assert not same(routers, router_parameters(m)) and same(backbone, backbone_parameters(m))
    assert all(p.requires_grad for p in m.parameters())
    assert all(p.grad is None for p in backbone_parameters(m))


def test_backbone_phase_moves_the_backbone_only() -> None:
    m = model()
    method = AdvMoE(m, MethodConfig(), OptimConfig(), ATTACK)
    routers, backbone = snapshot(router_parameters(m)), snapshot(backbone_parameters(m))
    method._backbone_phase(batch())
    assert same(routers, router_parameters(m)) and not same(backbone, backbone_parameters(m))
    assert all(p.grad is None for p in router_parameters(m))


def test_algorithm_1_goes_routers_first_on_a_batch_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, float]] = []
    for name in ("_router_phase", "_backbone_phase"):

        def phase(self: AdvMoE, batch: Batch, name: str = name) -> StepResult:
            seen.append((name, batch.images.sum().item()))
            return StepResult({}, 0, 0)

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
    assert set(result.losses) == {"router_loss", "loss"} and result.count == 32
    assert not same(routers, router_parameters(m))
    assert all(module.training for module in m.modules())


def test_at_trains_router_and_backbone_together() -> None:
    m = model()
    method = AT(m, MethodConfig("at"), OptimConfig(), ATTACK)
    routers, backbone = snapshot(router_parameters(m)), snapshot(backbone_parameters(m))
    method.step([batch()])
    assert not same(routers, router_parameters(m)) and not same(backbone, backbone_parameters(m))


def test_pgd_at_is_cross_entropy_on_adversarial_images() -> None:
    m = model(kind="dense")
    attack = PGD(0.15, 0.1, 1, loss="ce", random_start=False)
    b = batch()
    adversarial = attack(m, b.images, b.labels)
    expected = torch.nn.functional.cross_entropy(copy.deepcopy(m)(adversarial), b.labels).item()
    result = AT(m, MethodConfig("at", "cross_entropy"), OptimConfig(), attack).step([b])
    assert result.losses["loss"] == pytest.approx(expected, rel=1e-5)


def test_experts_nobody_chose_can_be_frozen() -> None:
    for freeze in (False, True):
        m = model(num_experts=8)
        # weight decay alone moves weights that get no gradient
        method = Standard(m, MethodConfig("standard"), OptimConfig(weight_decay=0.1, freeze_unused=freeze), ATTACK)
        layers = {n: layer for n, layer in m.named_modules() if isinstance(layer, RoutedConv2d)}
        before = {n: layer.weight.detach().clone() for n, layer in layers.items()}
        with record_routing(m) as routings:
            method.step([batch(count=4)])
        unused_seen = 0
        for name, layer in layers.items():
            used = set(routings[name].expert.tolist())
            for expert in range(8):
                rows = slice(expert * layer.out_channels, (expert + 1) * layer.out_channels)
                moved = not torch.equal(layer.weight[rows], before[name][rows])
                unused_seen += expert not in used
                assert moved == (expert in used or not freeze)
        assert unused_seen > 0


def test_advmoe_needs_routers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="advmoe needs a model with trainable routers"):
        train(tiny("advmoe", "dense"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_run_is_a_folder(tmp_path: Path) -> None:
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
    assert "epoch 2/2" in (run.folder / "log.txt").read_text()
    restored, _ = load_model(run.folder, "last")
    assert all(torch.equal(a, b) for a, b in zip(restored.state_dict().values(), state["model"].values(), strict=True))
    with pytest.raises(RunError, match="holds a run already"):
        train(tiny(), tmp_path / "run", quiet=True)


def interrupt_at(step: int, method: type[Method], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of that step of the process."""
    original = method.step
    count = 0

    def interrupted(self: Method, batches: Sequence[Batch]) -> StepResult:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batches)

    monkeypatch.setattr(method, "step", interrupted)


@pytest.mark.parametrize(("method", "kind", "step"), [("advmoe", "moe", 2), ("advmoe", "moe", 4), ("at", "dense", 5)])
def test_a_resumed_run_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, kind: str, step: int
) -> None:
    config = tiny(method, kind)
    unbroken = train(config, tmp_path / "unbroken", quiet=True)
    with monkeypatch.context() as patch:
        interrupt_at(step, AdvMoE if method == "advmoe" else AT, patch)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "broken", quiet=True)
    torch.rand(5)  # the process' generator has moved on
    broken = resume(tmp_path / "broken", quiet=True)
    first, second = (torch.load(r.checkpoint(), weights_only=True) for r in (unbroken, broken))
    for a, b in zip(first["model"].values(), second["model"].values(), strict=True):
        assert torch.equal(a, b)
    timing = ("images_per_second", "seconds")
    strip = [[{k: v for k, v in line.items() if k not in timing} for line in r.metrics()] for r in (unbroken, broken)]
    assert strip[0] == strip[1]
    assert not list(broken.folder.glob("*.tmp"))


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


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    with pytest.raises(RunError, match="no such checkpoint"):
        load_checkpoint(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(RunError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    torch.save({"format": 99}, path)
    with pytest.raises(RunError, match="expected a checkpoint of format 1, got 99"):
        load_checkpoint(path)
    with pytest.raises(RunError, match="is no run"):
        resume(tmp_path)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    config = tiny("standard", "dense", optim=OptimConfig(lr=1e30))
    with pytest.raises(NonFiniteLossError, match=r"loss is (nan|inf) at epoch 1, step [23]"):
        train(config, tmp_path / "run", quiet=True)


def test_a_collapsed_router_is_reported_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        run = train(tiny(model=ModelConfig(kind="moe", width=8, num_experts=2)), tmp_path / "run", quiet=True)
    for line in run.metrics():
        collapsed = {n for n, usage in line["expert_usage"].items() if max(usage) >= 0.999}
        said = [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"epoch {line['epoch']}: one expert")]
        assert bool(said) == bool(collapsed)
        assert all(name in said[0] for name in collapsed)
        assert all(line["router_entropy"][n] < 0.01 for n in collapsed)


def test_one_expert_is_never_a_collapse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        train(tiny(model=ModelConfig(kind="moe", width=8, num_experts=1), epochs=1), tmp_path / "run", quiet=True)
    assert not caplog.records


def test_training_converges_on_digits(tmp_path: Path) -> None:
    """Adversarial training keeps SA above 90 % and RA far above an undefended model's."""
    found = {}
    for method, epochs in (("standard", 4), ("at", 20)):
        config = RunConfig(
            model=ModelConfig(kind="dense", width=16),
            data=DataConfig("digits", validation=50, augment=False),
            attack=AttackConfig(),
            optim=OptimConfig(lr=0.05),
            method=MethodConfig(method, beta=1.5),
            epochs=epochs,
            batch_size=64,
            validation_attack="pgd2",
        )
        run = train(config, tmp_path / method, quiet=True)
        trained, _ = load_model(run.folder, "last")
        test = load("digits").test.first(200)
        result = evaluate(trained, test, {"pgd20": from_name("pgd20", 0.15)})
        found[method] = (result.sa, result.attacks["pgd20"].ra)
        assert all(json.dumps(line) for line in run.metrics())
    (plain_sa, plain_ra), (sa, ra) = found["standard"], found["at"]
    assert plain_sa > 0.9 and sa > 0.9, found
    assert ra > plain_ra + 0.2, found
