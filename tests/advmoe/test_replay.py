# SPDX-License-Identifier: Apache-2.0
"""A number that is not finite: it stops the run, its first place is named, and advmoe replay makes the step again."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    ATTACK,
    SMALL,
    after,
    assert_same_run,
    batch,
    model,
    same,
    small_architecture,
    snapshot,
    spoil,
    tiny,
)  # fmt: skip
from torch import nn

from advmoe import files
from advmoe.cli import main
from advmoe.config import MethodConfig, ModelConfig, OptimConfig, RoutingConfig, RunConfig
from advmoe.training import NonFiniteLossError, Run, RunError, build_method, engine, faults, resume, train
from advmoe.training.faults import NON_FINITE, Probe, require_finite_state
from advmoe.training.replay import replay
from advmoe.training.runs import build_model, load_checkpoint


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with small_architecture():
        yield


def config(name: str = "advmoe", /, **changes: Any) -> RunConfig:
    return tiny(name, **{"model": ModelConfig(SMALL, width=4), "validation_attack": "pgd1", **changes})


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["advmoe", "at", "standard", "free-at", "fast-at"])
def test_a_planted_fault_is_named_and_made_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
    precision: str,
    backward: bool,
) -> None:
    """In the third step: of AdvMoE, in its second phase, when the routers have been moved already."""
    layer = "layer2.0.conv2"
    forwards = {"advmoe": 10, "at": 4, "standard": 2, "free-at": 5, "fast-at": 2}[method]
    spoil(layer, backward, monkeypatch, after(forwards))
    more = {"method": MethodConfig(method, replays=2)} if method == "free-at" else {}
    asked = config(
        method, epochs=1, optim=OptimConfig(lr=0.05, precision=precision), routing=RoutingConfig(share_epochs=0), **more
    )
    run = Run(tmp_path / "run")
    with pytest.raises(NON_FINITE) as stopped:
        train(asked, run.folder, quiet=True)
    said = str(stopped.value)
    assert said.startswith("epoch 1, step 3: ") and f"advmoe replay {run.folder}" in said
    # what follows it in a backward are the gradients of its weight and at its router
    what = (
        rf"the gradient (of|at the output of) {layer}\."
        if backward
        else rf"the output of {layer}, forward .* \(1 NaN and 0 inf"
    )
    assert re.search(f"First not finite: {what}", said), said
    fault = load_checkpoint(run.fault_path)
    assert (fault["state"]["epoch"], fault["state"]["step"]) == (0, 2)
    assert [len(each) for each in fault["indices"]] == [32] * (2 if method == "advmoe" else 1)
    assert not run.checkpoint().exists()
    before = run.fault_path.read_bytes()
    assert main(["replay", str(run.folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("epoch 1, step 3, on images\n") and out.endswith("reproduced\n")
    assert len(re.findall(f"first not finite: {what}", out)) == 2 and "before it:" in out
    assert run.fault_path.read_bytes() == before
    # without the fault it is a step like any other
    monkeypatch.setattr(engine, "build_model", build_model)
    assert main(["replay", str(run.folder)]) == 1
    assert "not reproduced:\n  the step went through" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["advmoe", "at", "free-at", "at_sparse"])
def test_the_state_that_is_kept_is_the_one_before_the_step(tmp_path: Path, method: str) -> None:
    """Made from it, the step gives what it gave in the run, bit for bit."""
    plain = {"free-at": "dense", "at_sparse": "sparse"}.get(method, "moe")
    changes = {"method": MethodConfig(method, mask_epochs=1)} if method == "at_sparse" else {}
    kind = ModelConfig(SMALL, plain, width=4, **({"noise": 0.5} if plain == "moe" else {}))
    asked = config(method, model=kind, epochs=1, **changes)
    states: list[Any] = []
    finish = engine.Trainer._finish_epoch

    def kept(self: engine.Trainer) -> None:
        states.append((self, faults._copied(self.before.state(), None), faults._copied(self.state_dict(), None)))
        finish(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Trainer, "_finish_epoch", kept)
        train(asked, tmp_path / "run", quiet=True)
    ((trainer, before, behind),) = states
    assert before["step"] == 2
    copy = faults._copied(before, None)
    seen = faults.attempt(trainer, before)
    assert seen.error is None and seen.where is None
    trainer.method.settle()
    assert not same(list(before["model"].values()), list(trainer.model.state_dict().values()))
    assert same(list(behind["model"].values()), list(trainer.model.state_dict().values()))
    for name, optimizer in trainer.method.optimizers.items():
        found = [v for s in optimizer.state_dict()["state"].values() for v in s.values() if torch.is_tensor(v)]
        assert same(
            [v for s in behind["optimizers"][name]["state"].values() for v in s.values() if torch.is_tensor(v)], found
        )
    assert torch.equal(torch.get_rng_state(), behind["torch_rng"])
    # what was given is as it was
    assert same(list(faults._tensors(copy)), list(faults._tensors(before)))


def test_looking_and_copying_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(config(epochs=1), tmp_path / "first", quiet=True)
    monkeypatch.setattr(faults.StateBefore, "take", lambda self, trainer: None)
    assert_same_run(first, train(config(epochs=1), tmp_path / "second", quiet=True))


def test_a_later_fault_keeps_the_checkpoint_and_a_new_run_drops_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil("layer1.0.conv1", False, monkeypatch, after(9))
    run = Run(tmp_path / "run")
    plain = ModelConfig(SMALL, "dense", width=4)
    with pytest.raises(
        NonFiniteLossError, match=r"^epoch 2, step 2: loss is nan; the last checkpoint is .*last\.pt\. A lo"
    ):
        train(config("at", model=plain), run.folder, quiet=True)
    assert load_checkpoint(run.checkpoint())["epoch"] == 1
    assert replay(run.folder).reproduced
    with pytest.raises(NonFiniteLossError, match=r"^epoch 2, step 2: "):  # resumed it is there again
        resume(run.folder, quiet=True)
    run.config_path.unlink()
    monkeypatch.setattr(engine, "build_model", build_model)
    train(config("at", model=plain, epochs=1), run.folder, quiet=True)
    assert not run.fault_path.exists()


@pytest.mark.parametrize(
    ("place", "expected"),
    [("weight", "layer1.0.conv1.weight"), ("buffer", "bn1.running_var"), ("momentum", "momentum_buffer of")],
)
def test_what_only_a_checkpoint_would_show_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, expected: str
) -> None:
    """Statistics that training does not read, and a weight that has met no loss."""

    class Ruinous(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            super().step()
            with torch.no_grad():
                if place == "weight":
                    net[0].get_parameter("layer1.0.conv1.weight")[0, 0, 0, 0] = torch.inf
                elif place == "buffer":
                    net[0].get_buffer("bn1.running_var")[0] = torch.inf
                else:
                    next(iter(self.state.values()))["momentum_buffer"][0, 0, 0, 0] = torch.nan

    net: list[nn.Module] = []

    def build(config: ModelConfig) -> nn.Module:
        net[:] = [build_model(config)]
        return net[0]

    monkeypatch.setattr(engine, "build_model", build)
    monkeypatch.setattr(torch.optim, "SGD", Ruinous)
    run = Run(tmp_path / "run")
    with pytest.raises(NonFiniteLossError, match=f"^epoch 1, end: a weight is (inf|nan) .*{expected}.*no checkpoint yet"):
        train(config("at", batch_size=96), run.folder, quiet=True)
    done = replay(run.folder)
    assert done.reproduced and expected in str(done.now.where) and str(done.now.where).endswith(", after the step")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_layer_swallows_a_weight_that_is_not_finite(precision: str, kind: str, value: float) -> None:
    names = [name for name, _ in model(SMALL, kind=kind, width=4).named_parameters()]
    for name in names:
        m = model(SMALL, kind=kind, width=4)
        with torch.no_grad():
            weight = m.get_parameter(name)
            (weight[..., 1, 1] if weight.shape[-2:] == (3, 3) else weight).view(-1)[:] = value  # each expert's
        method = build_method(m, MethodConfig("at"), OptimConfig(precision=precision), ATTACK)
        before = snapshot(list(m.parameters()))
        with pytest.raises(NON_FINITE):
            method.step([batch()])
        assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, m.parameters(), strict=True)), name


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["advmoe", "at", "standard", "free-at", "fast-at"])
def test_a_weights_gradient_alone_stops_the_step(precision: str, method: str) -> None:
    """The loss is finite, and so is every attack's gradient."""
    m = model(SMALL, width=4)
    plain = {"loss": "ce", "steps": 1} if method.endswith("-at") else {}
    trainer = build_method(
        m, MethodConfig(method), OptimConfig(precision=precision), dataclasses.replace(ATTACK, **plain)
    )
    weight = m.get_parameter("layer2.0.conv1.weight")
    handle = weight.register_hook(lambda g: g.index_put((torch.tensor([0]),), torch.tensor(torch.inf, dtype=g.dtype)))
    before = snapshot([weight])
    probe = Probe(m)
    with (
        pytest.raises(NonFiniteLossError, match=r"^the gradient of loss \([0-9.]+\) has the entry inf"),
        probe.watching(),
    ):
        trainer.step([batch(0), batch(1)][: trainer.batches_per_step])
    handle.remove()
    assert probe.first is not None and probe.first.startswith("the gradient of layer2.0.conv1.weight (0 NaN and ")
    assert same(before, [weight])


def test_a_square_of_adam_that_overflows_is_found() -> None:
    """Its weight would never move again, and no loss would show it."""
    m = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(m.parameters())
    m(torch.full((1, 2), 1e25)).sum().backward()
    optimizer.step()
    assert all(torch.isfinite(p).all() for p in m.parameters())
    with pytest.raises(NonFiniteLossError, match="exp_avg_sq of weight"):
        require_finite_state(m, {"all": optimizer})


def test_what_is_not_there_or_not_the_same_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(tmp_path)]) == 2
    assert "fault.pt: there is no such file: the run kept no step" in capsys.readouterr().err
    spoil("layer1.0.conv1", False, monkeypatch, after(3))
    run = Run(tmp_path / "run")
    with pytest.raises(NonFiniteLossError):
        train(config("at", model=ModelConfig(SMALL, "dense", width=4)), run.folder, quiet=True)
    spoil("layer2.0.conv1", False, monkeypatch, after(3))
    assert main(["replay", str(run.folder)]) == 1
    assert (
        "the first value that is not finite is in another place: the output of layer2.0.conv1" in capsys.readouterr().out
    )
    fault = load_checkpoint(run.fault_path)
    fault.pop("format")
    monkeypatch.setattr(engine, "build_model", build_model)
    run.save_fault({**fault, "digests": ["00"], "torch": "1.0"})
    done = replay(run.folder)
    assert len(done.differences) == 3 and "the images of these numbers are others" in done.differences[1]
    run.save_fault({k: v for k, v in fault.items() if k != "state"})
    with pytest.raises(RunError, match=r"fault\.pt: state: expected a checkpoint, got None"):
        replay(run.folder)
    for name, value in (
        ("threads", 0), ("threads", "x"), ("threads", 10**6), ("message", "\x1b[2J"), ("where", 3), ("indices", ["a"]),
        ("processes", None), ("config", []), ("error", 3),
    ):  # fmt: skip
        run.save_fault({**fault, name: value})
        with pytest.raises(RunError, match=rf"fault\.pt: {name}: expected "):
            replay(run.folder)
    for name, value in (("epoch", "x"), ("torch_rng", "x"), ("batches", [3]), ("sums", {3: 1.0})):
        run.save_fault({**fault, "state": {**fault["state"], name: value}})
        with pytest.raises(RunError, match=rf"fault\.pt: {name}: expected "):
            replay(run.folder)
    run.save_fault({**fault, "state": {k: v for k, v in fault["state"].items() if k != "seconds"}})
    with pytest.raises(RunError, match=r"fault\.pt does not fit"):
        replay(run.folder)


def test_a_full_disk_does_not_hide_the_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil("layer1.0.conv1", False, monkeypatch, after(3))
    folder = tmp_path / "run"
    folder.mkdir()
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    opened = files.open_own
    monkeypatch.setattr(
        files,
        "open_own",
        lambda name, flags: os.open("/dev/full", os.O_WRONLY) if "fault" in str(name) else opened(name, flags),
    )
    with pytest.raises(
        NonFiniteLossError, match=r"loss is nan; .* layer1\.0\.conv1, .*The step is not kept: .*fault\.pt cannot"
    ):
        train(config("at", model=ModelConfig(SMALL, "dense", width=4)), folder, quiet=True)
