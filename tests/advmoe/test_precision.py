# SPDX-License-Identifier: Apache-2.0
"""Batches in parts, and bfloat16."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import ATTACK, SMALL, batch, model, small_architecture, tiny
from torch import nn

from advmoe import cli
from advmoe.config import MethodConfig, OptimConfig, RoutingConfig, RunConfig
from advmoe.models import create_model
from advmoe.routers import Router, observe_routers, routers_of
from advmoe.training import train
from advmoe.training.methods import Batch, Method, build_method

NAMES = ("standard", "at", "at_sparse", "advmoe")


def method(name: str, net: nn.Module, routing: RoutingConfig | None = None, **optim: Any) -> Method:
    config = MethodConfig(name, mask_epochs=1 if name == "at_sparse" else 0)
    return build_method(net, config, OptimConfig(lr=0.1, **optim), ATTACK, routing)


def network(name: str) -> nn.Module:
    return model() if name != "at_sparse" else create_model("resnet18", "sparse", image_size=8, width=8)


@pytest.mark.parametrize("name", NAMES)
def test_parts_sum_to_the_mean_over_the_batch(name: str) -> None:
    """In eval mode, where a batch and its parts have the same statistics."""
    torch.manual_seed(0)
    net = network(name).double().eval()
    other = copy.deepcopy(net)
    b = batch(0, 16)
    whole = Batch(b.images.double(), b.labels, b.generator)
    attacked = torch.rand_like(whole.images)
    by_hand, trainer = method(name, other), method(name, net, accumulate=4)
    loss, _ = by_hand._objective(whole, attacked)
    loss.backward()
    optimizer = trainer.optimizers.get("backbone") or next(iter(trainer.optimizers.values()))
    result = trainer._descend(optimizer, trainer._parts(whole), trainer._objective, attacked.split(4))
    assert result.losses["loss"] == pytest.approx(loss.item(), rel=1e-12) and result.count == 16
    compared = 0
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            compared += 1
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)
    assert compared > 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share_attack", [False, True])
def test_forwards_see_parts(name: str, share_attack: bool) -> None:
    if share_attack and name != "advmoe":
        pytest.skip("an option of advmoe")
    net = network(name)
    config = MethodConfig(name, mask_epochs=1 if name == "at_sparse" else 0, share_attack=share_attack)
    trainer = build_method(net, config, OptimConfig(lr=0.1, accumulate=4), ATTACK)
    sizes: set[int] = set()
    net.register_forward_pre_hook(lambda module, args: sizes.add(len(args[0])))
    result = trainer.step([batch(0, 16), batch(1, 16)][: trainer.batches_per_step])
    assert sizes - {1} == {4} and result.count == 16  # a probe of a mask looks at one image


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_with_float32_routers_and_losses(name: str) -> None:
    torch.manual_seed(0)
    net = network(name)
    reference = copy.deepcopy(net)
    trainer = method(name, net, RoutingConfig(balance="switch") if routers_of(net) else None, precision="bfloat16")
    logits, scores = [], []
    net.register_forward_hook(lambda module, args, out: logits.append(out.dtype))

    def observe(router: Router, given: torch.Tensor, routing: Any) -> None:
        scores.append(given.dtype)

    with observe_routers(net, observe):
        losses = trainer.step([batch(0), batch(1)][: trainer.batches_per_step]).losses
    assert set(logits) == {torch.bfloat16} and set(scores) <= {torch.float32}
    assert bool(scores) == bool(routers_of(net))
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    expected = method(name, reference, RoutingConfig(balance="switch") if routers_of(net) else None)
    for key, value in expected.step([batch(0), batch(1)][: expected.batches_per_step]).losses.items():
        assert losses[key] == pytest.approx(value, rel=0.1, abs=0.05)


def test_losses_of_low_precision_are_computed_in_float32() -> None:
    from advmoe.objectives import cross_entropy, kl_divergence, margin_loss

    logits, labels = torch.randn(4, 5).bfloat16(), torch.tensor([0, 1, 2, 3])
    for loss in (cross_entropy(logits, labels), kl_divergence(logits, -logits), margin_loss(logits, labels)):
        assert loss.dtype == torch.float32
    assert cross_entropy(logits.double(), labels).dtype == torch.float64


@pytest.mark.parametrize("name", ["at", "free-at", "fast-at", "advmoe"])
def test_compiled_training_is_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for rounding. By aot_eager: the graphs and their derivatives as inductor gets them, without its compilation."""
    compiled: list[nn.Module] = []

    def compile(self: nn.Module, **options: Any) -> None:
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager", **options)

    monkeypatch.setattr(nn.Module, "compile", compile)
    with small_architecture():
        config = tiny(name)
        config = dataclasses.replace(config, epochs=1, model=dataclasses.replace(config.model, arch=SMALL))
        runs = []
        for wanted in (False, True):
            optim = dataclasses.replace(config.optim, compile=wanted)
            if wanted and name == "advmoe" and torch.__version__ < "2.13":  # it would train the routers alone
                with pytest.raises(ValueError, match=r"compile: expected torch 2\.13"):
                    train(dataclasses.replace(config, optim=optim), tmp_path / "refused", quiet=True)
                return
            run = train(dataclasses.replace(config, optim=optim), tmp_path / str(wanted), quiet=True)
            runs.append(run.metrics()[0])
    torch._dynamo.reset()
    assert len(compiled) == 1
    for key in ("loss", "validation_sa", "validation_ra"):
        assert runs[1][key] == pytest.approx(runs[0][key], rel=1e-4)


def test_what_cannot_be_compiled() -> None:
    for settings, name in (
        ({"routing": RoutingConfig(balance="switch")}, "balance"),
        ({"optim": OptimConfig(compile=True, freeze_unused=True)}, "freeze_unused"),
        ({"method": MethodConfig.as_released()}, "attack_routers"),
    ):
        with pytest.raises(ValueError, match=f"compile: not with {name}, which looks into the model's forwards"):
            RunConfig(**{"optim": OptimConfig(compile=True), **settings})


def test_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="accumulate: expected a divisor of the batch size 128, got 3"):
        RunConfig(optim=OptimConfig(accumulate=3))
    with pytest.raises(ValueError, match="accumulate: expected at least 1, got 0"):
        OptimConfig(accumulate=0)
    with pytest.raises(ValueError, match=r"precision: .*did you mean bfloat16"):
        OptimConfig(precision="bfloat")
    assert cli.main(["train", "--out", "x", "--batch-size", "10", "--accumulate", "4"]) == 2
    assert "accumulate: expected a divisor" in capsys.readouterr().err
