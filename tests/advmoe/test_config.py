# SPDX-License-Identifier: Apache-2.0
"""Settings: the paper's recipe as defaults, and a file that says everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from advmoe.config import AttackConfig, DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig


def test_defaults_are_the_papers_recipe() -> None:
    c = RunConfig()
    assert (c.optim.lr, c.optim.momentum, c.optim.weight_decay) == (0.1, 0.9, 5e-4)
    assert (c.epochs, c.batch_size, c.attack.steps, c.method.beta) == (100, 128, 2, 6.0)
    assert (c.method.order, c.method.batches, c.method.router_objective) == ("router_first", "two", "trades")
    assert c.model.gate == "straight_through"


def test_round_trip(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig(kind="dense", width=8, mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5)),
        data=DataConfig("cifar10", "somewhere", 100),
        attack=AttackConfig(0.1, 0.05, random_start="gaussian"),
        optim=OptimConfig(router_lr=0.01),
        method=MethodConfig("at", "cross_entropy"),
        epochs=3,
    )
    path = tmp_path / "config.yaml"
    config.save(path)
    assert RunConfig.load(path) == config


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
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        RunConfig.load(path)
