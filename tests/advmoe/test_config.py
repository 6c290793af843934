# SPDX-License-Identifier: Apache-2.0
"""Settings: the paper's recipe as defaults, and a file that says everything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from advmoe.config import AttackConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RoutingConfig, RunConfig


def test_defaults_are_the_papers_recipe() -> None:
    c = RunConfig()
    assert (c.optim.lr, c.optim.momentum, c.optim.weight_decay) == (0.1, 0.9, 5e-4)
    assert (c.epochs, c.batch_size, c.attack.steps, c.method.beta) == (100, 128, None, 6.0)
    assert (c.method.order, c.method.batches, c.method.router_objective) == ("router_first", "two", "trades")
    assert c.model.gate == "straight_through"
    assert (c.method.share_attack, c.method.router_every, c.method.attack_routers) == (False, 1, False)
    assert (c.model.temperature, c.model.noise, c.routing.balance, c.routing.share_epochs) == (1.0, 0.0, "none", None)


def test_as_released_is_what_the_released_code_does() -> None:
    plain, released = MethodConfig(), MethodConfig.as_released(beta=3.0)
    changed = {
        f.name: getattr(released, f.name)
        for f in dataclasses.fields(MethodConfig)
        if getattr(released, f.name) != getattr(plain, f.name)
    }
    assert changed == {
        "order": "backbone_first",
        "batches": "one",
        "router_objective": "pseudo_label",
        "attack_routers": True,
        "beta": 3.0,
    }
    assert (released.router_alpha, released.name) == (6.0, "advmoe")


def test_round_trip(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig(kind="dense", width=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5)),
        data=DataConfig("cifar10", "somewhere", 100),
        attack=AttackConfig(0.1, 0.05, random_start="gaussian"),
        optim=OptimConfig(router_lr=0.01),
        method=MethodConfig("at", "cross_entropy"),
        routing=RoutingConfig("entropy", 0.2, "alike", 2),
        init="somewhere/run",
        epochs=3,
    )
    path = tmp_path / "config.yaml"
    config.save(path)
    assert RunConfig.load(path) == config
    RunConfig().save(path)
    assert RunConfig.load(path) == RunConfig()


def test_every_setting_is_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    RunConfig().save(path)
    values = yaml.safe_load(path.read_text())
    for f in dataclasses.fields(RunConfig):
        room = getattr(RunConfig(), f.name)
        if dataclasses.is_dataclass(room):
            assert list(values[f.name]) == [g.name for g in dataclasses.fields(room)]
        else:
            assert values[f.name] == room


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 5e-4 as text and 1 as a whole number."""
    path = tmp_path / "config.yaml"
    path.write_text("optim: {weight_decay: 5e-4, lr: 1}\nattack: {epsilon: 3e-2}\nmodel: {mean: [0, 5e-1, 0.5]}\n")
    config = RunConfig.load(path)
    assert (config.optim.weight_decay, config.optim.lr, config.attack.epsilon) == (5e-4, 1.0, 0.03)
    assert config.model.mean == (0.0, 0.5, 0.5) and isinstance(config.optim.lr, float)
    assert config.epochs == 100  # what is not said is the default


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", r"setting: expected one of .*got 'epoch'; did you mean epochs"),
        ("model: {widht: 8}", r"model: setting: .*did you mean width"),
        ("model: 3", r"model: expected a mapping of settings, got int"),
        ("epochs: [", r"not YAML"),
        ("method: {name: advmo}", r"method: .*did you mean advmoe"),
        ("method: {order: both}", r"order: expected one of router_first, backbone_first"),
        ("epochs: 0", r"epochs: expected at least 1"),
        ("batch_size: 0", r"batch_size: expected at least 1"),
        ("threads: 0", r"threads: expected at least 1"),
        ("epochs: two", r"epochs: expected int, got 'two'"),
        ("epochs: 2.5", r"epochs: expected int, got 2.5"),
        ("epochs: true", r"epochs: expected int, got True"),
        ("optim: {lr: fast}", r"optim: lr: expected float, got 'fast'"),
        ("optim: {lr: null}", r"optim: lr: expected float, got None"),
        ("optim: {freeze_unused: 1}", r"optim: freeze_unused: expected bool, got 1"),
        ("model: {width: eight}", r"model: width: expected int \| None, got 'eight'"),
        ("model: {mean: [a, b]}", r"model: mean: expected float, got 'a'"),
        ("model: {optim: {}}", r"model: setting: expected one of .*got 'optim'"),
        ("method: {router_objective: pseudo}", r"router_objective: .*did you mean pseudo_label"),
        ("method: {part: router}", r"part: expected one of all, routers, experts, got 'router'; did you mean routers"),
        ("method: {replays: 0}", r"replays: expected at least 1, got 0"),
        ("method: {name: fre_at}", r"method: .*did you mean free-at"),
        ("optim: {power: 0.5}", r"power: without effect with schedule 'cosine'"),
        ("method: {router_every: 0}", r"router_every: expected at least 1, got 0"),
        ("method: {mask_epochs: -1}", r"mask_epochs: expected a finite number of at least 0, got -1"),
        ("method: {name: at_sparse, mask_epochs: 3}\nepochs: 2", r"pretrain_epochs \+ mask_epochs: .* most the 2 epochs"),
        ("routing: {balance: swich}", r"balance: expected one of none, switch, .*did you mean switch"),
        ("routing: {balance_weight: 0.3}", r"balance_weight: without effect with balance 'none'"),
        ("routing: {balance: switch, balance_weight: -1}", r"balance_weight: expected a finite number of at least 0"),
        ("routing: {experts: same}", r"experts: expected one of apart, alike, got 'same'"),
        ("routing: {share_epochs: 5}\nepochs: 5", r"share_epochs: expected less than the 5 epochs, got 5"),
        ("routing: {share_epochs: -1}", r"share_epochs: expected a finite number of at least 0, got -1"),
        ("routing: {share: 1}", r"routing: setting: expected one of .*got 'share'; did you mean share_epochs"),
        ("", r"expected a mapping of settings, got NoneType"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        RunConfig.load(path)
