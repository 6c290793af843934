# SPDX-License-Identifier: Apache-2.0
"""The scalars of a run's epochs, as TensorBoard itself reads them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from small_runs import assert_same_run, interrupt_at, tiny

from advmoe.config import OptimConfig, RunConfig
from advmoe.training import Interrupted, Run, resume, train
from advmoe.training.methods.adversarial import AT

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
TWO_RATES = OptimConfig(lr=0.05, router_lr=0.02)


def scalars(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag."""
    events = accumulator.EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_every_epochs_metrics_are_there_and_the_weights_are_the_same(tmp_path: Path) -> None:
    run = train(tiny("at", tensorboard=True, optim=TWO_RATES), tmp_path / "with", quiet=True)
    found = scalars(run)
    lines = run.metrics()
    layers = list(lines[0]["router_entropy"])
    assert sorted(found) == sorted(
        ["loss/loss", "accuracy/train_sa", "accuracy/validation_sa", "accuracy/validation_ra", "attack/zero_gradient"]
        + ["routing/flip_rate", "speed/images_per_second", "learning_rate/all_0", "learning_rate/all_1"]
        + [f"router_entropy/{layer}" for layer in layers]
    )
    for tag, key in (
        ("loss/loss", "loss"),
        ("accuracy/validation_ra", "validation_ra"),
        ("routing/flip_rate", "flip_rate"),
    ):
        assert found[tag] == [(line["epoch"], pytest.approx(line[key])) for line in lines]
    assert found[f"router_entropy/{layers[0]}"] == [
        (line["epoch"], pytest.approx(line["router_entropy"][layers[0]])) for line in lines
    ]
    # of an epoch's last step: two and five steps of six are done before those
    cosine = pytest.approx([0.05 * 0.75, 0.05 * 0.0669873], rel=1e-5)
    assert [value for _, value in found["learning_rate/all_0"]] == cosine
    assert found["learning_rate/all_1"][0][1] == pytest.approx(0.02 * 0.75)
    without = train(tiny("at", optim=TWO_RATES), tmp_path / "without", quiet=True)
    assert_same_run(run, without)
    assert not (without.folder / "tensorboard").exists()


def test_a_resumed_run_has_each_point_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt_at(5, AT, patch)
        train(tiny("at", tensorboard=True), tmp_path / "run", quiet=True)
    original = Run.save

    def full(run: Run, state: dict, name: str = "last") -> None:
        if name == "last" and state["epoch"] == 2:
            raise OSError("no space is left")
        original(run, state, name)

    # the points of epoch 2 are written, the checkpoint that knows of them is not
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Run, "save", full)
        resume(tmp_path / "run", quiet=True)
    assert [step for step, _ in scalars(Run(tmp_path / "run"))["loss/loss"]] == [1, 2]
    run = resume(tmp_path / "run", quiet=True)
    assert {tuple(step for step, _ in points) for points in scalars(run).values()} == {(1, 2)}
    assert len(run.metrics()) == 2
    files = sorted((run.folder / "tensorboard").iterdir())
    resume(run.folder, quiet=True)  # nothing is left to train, and to write
    assert sorted((run.folder / "tensorboard").iterdir()) == files and len(files) == 3


def test_a_missing_package_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ValueError, match=r"^tensorboard: expected .*, got .*; pip install tensorboard$"):
        train(tiny("at", tensorboard=True), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_settings_of_older_runs_load(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    tiny("at").save(path)
    text = path.read_text()
    assert "tensorboard: false\n" in text
    path.write_text(text.replace("tensorboard: false\n", ""))
    assert RunConfig.load(path) == tiny("at")
