# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts out of a dense network, ours and others'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from other_models import build
from small_runs import ATTACK, batch
from torch import nn

import advmoe
from advmoe import cli
from advmoe.attacks import PGD
from advmoe.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, RoutingConfig, RunConfig
from advmoe.data import load
from advmoe.evaluation import evaluate
from advmoe.models import backbone_parameters, create_model, record_routing, router_parameters, upcycle
from advmoe.profiling import profile
from advmoe.routers import Router, routers_of
from advmoe.training import Run
from advmoe.training.engine import resolve
from advmoe.training.methods import build_method
from advmoe.training.runs import build_model, load_model
from moe_kernels import RoutedConv2d, SelfRoutedConv2d, convert

OURS = {"resnet18": 8, "resnet50": 8, "wrn28_10": 10, "vgg16_bn": 4, "densenet40": 8}
OTHERS = ["resnet", "se_resnet", "wide_resnet", "densenet"]
PYTORCHCV = ["resnet20_cifar10", "preresnet20_cifar10", "densenet40_k12_cifar10", "seresnet20_cifar10"]


def ours(arch: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model(arch, "dense", image_size=16, width=OURS[arch], **options)


def others(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name not in PYTORCHCV:
        return build(name)
    try:  # it wants torchvision, which not every torch has a fitting one of
        from pytorchcv.model_provider import get_model
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"pytorchcv cannot be imported: {error}")
    return get_model(name)


def images(count: int = 4, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def settle(model: nn.Module) -> nn.Module:
    """BatchNorms of a network that has seen something."""
    model.train()
    with torch.no_grad():
        for seed in range(3):
            model(torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))
    return model.eval()


@pytest.mark.parametrize("arch", OURS)
def test_ratio_1_computes_what_the_dense_network_did(arch: str) -> None:
    dense = ours(arch).eval()
    model = advmoe.upcycle(dense, 3)
    convolutions = [m for m in dense.modules() if isinstance(m, nn.Conv2d)]
    routed = [m for m in model.modules() if isinstance(m, RoutedConv2d)]
    assert len(routed) == len(convolutions) - 1 == len(routers_of(model))
    assert routed[0].weight.shape[0] == 3 * convolutions[1].out_channels
    torch.testing.assert_close(model(images()), dense(images()), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, SelfRoutedConv2d) for m in dense.modules())  # a copy


@pytest.mark.parametrize("arch", OURS)
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_a_pathway_costs_what_s_dense_does(arch: str, ratio: float) -> None:
    dense = ours(arch)
    model = upcycle(dense, 2, ratio)
    with torch.device("meta"):
        scaled = create_model(arch, "s_dense", image_size=16, width=OURS[arch], ratio=ratio)
    assert profile(model, 16).pathway_gflops == pytest.approx(profile(scaled, 16).gflops, rel=0.25)
    assert model(images()).shape == (4, 10)


@pytest.mark.parametrize("arch", ["resnet18", "vgg16_bn", "densenet40"])
def test_experts_begin_alike(arch: str) -> None:
    """Whatever the routers choose, it is the narrowed network."""
    one, four = (upcycle(ours(arch), n, 0.5).eval() for n in (1, 4))
    torch.testing.assert_close(four(images()), one(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*OTHERS, *(pytest.param(name, marks=pytest.mark.nightly) for name in PYTORCHCV)])
@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_networks_not_ours(name: str, ratio: float) -> None:
    dense = settle(others(name))
    model = upcycle(dense, 2, ratio)
    x = images(2, 32)
    assert model(x).shape == dense(x).shape
    if ratio == 1:
        torch.testing.assert_close(model(x), dense(x), rtol=1e-3, atol=1e-4)
    else:
        cost, whole = profile(model, 32), profile(dense, 32)
        assert cost.pathway_gflops < 0.4 * whole.gflops
    with record_routing(model) as routings:
        result = evaluate(model, _split(), {"pgd": PGD(8 / 255, 2 / 255, 2)}, batch_size=8)
    assert routings and set(result.usage) == set(routings)


def _split() -> Any:
    from advmoe.data import TensorSplit

    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (8, 3, 32, 32), generator=g, dtype=torch.uint8)
    return TensorSplit(pixels, torch.randint(0, 10, (8,), generator=g))


@pytest.mark.parametrize(("name", "where"), [("resnet", "layer?.*.conv?"), ("wide_resnet", ["block*", "conv1"])])
def test_convert_on_networks_not_ours(name: str, where: str | list[str]) -> None:
    """moe_kernels alone, with patterns of their names."""
    dense = settle(others(name))
    x = images(2, 32)
    expected = dense(x)
    model = convert(dense, 3, where=where)
    assert model is dense and sum(isinstance(m, SelfRoutedConv2d) for m in model.modules()) > 7
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("method", ["at", "advmoe"])
def test_methods_train_it(method: str) -> None:
    model = upcycle(ours("resnet18"), 3, 0.5)
    assert all(isinstance(router, Router) for router in routers_of(model).values())
    assert {r.routes for r in routers_of(model).values()} >= {"layer1.0.conv1", "layer2.0.shortcut.0"}
    assert len(router_parameters(model)) + len(backbone_parameters(model)) == len(list(model.parameters()))
    trainer = build_method(model, MethodConfig(method), OptimConfig(lr=0.01), ATTACK, RoutingConfig(balance="switch"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.train()
    trainer.step([batch(0, size=16)] * trainer.batches_per_step)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if "router.norm" not in name)


def test_a_vision_transformer() -> None:
    torch.manual_seed(0)
    dense = create_model("deit_tiny", "dense", image_size=16, width=32).eval()
    for m in dense.modules():
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.2)
    model = upcycle(dense, 3)
    torch.testing.assert_close(model(images()), dense(images()), rtol=1e-4, atol=1e-5)
    both = upcycle(dense, 3, top_k=2, gate="softmax")
    torch.testing.assert_close(both(images()), dense(images()), rtol=1e-4, atol=1e-5)
    half = upcycle(dense, 3, 0.5)
    fc1 = half.blocks[1].mlp.fc1.weight.chunk(3)
    assert fc1[0].shape == (64, 32) and torch.equal(fc1[0], fc1[2])
    kept = {tuple(row.tolist()) for row in fc1[0]}
    assert kept < {tuple(row.tolist()) for row in dense.blocks[1].mlp.fc1.weight}


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match="router: each layer of an upcycled model has its own, of level layer; got 'image'"
    ):
        upcycle(ours("resnet18"), 2, router="image")
    with pytest.raises(ValueError, match="top_k: convolutions take one expert each, got 2"):
        upcycle(ours("resnet18"), 2, top_k=2, gate="softmax")
    with pytest.raises(ValueError, match="ratio: expected 0 < ratio <= 1, got 2"):
        upcycle(create_model("deit_tiny", "dense", image_size=8, width=16), 2, 2)
    with pytest.raises(ValueError, match="dense_model: expected one of kind dense, got 's_dense'"):
        upcycle(create_model("deit_tiny", "s_dense", image_size=8, width=16), 2)
    with pytest.raises(ValueError, match="layout: the experts of kind upcycled have weights of their own"):
        create_model("resnet18", "upcycled", layout="windows")
    with pytest.raises(ValueError, match=r"option of kind upcycled: .*got 'bn'"):
        create_model("resnet18", "upcycled", bn="shared")


def test_the_command_goes_on_from_a_dense_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--arch", "resnet18", "--width", "8", "--data", "digits", "--train-limit", "96", "--epochs", "1",
              "--batch-size", "32", "--validation-attack", "pgd1", "--attack-steps", "1"]  # fmt: skip
    dense, run = tmp_path / "dense", tmp_path / "run"
    assert cli.main(["train", "--method", "at", "--kind", "dense", *common, "--out", str(dense)]) == 0
    more = ["--kind", "upcycled", "--experts", "4", "--ratio", "0.5", "--init", str(dense), *common]
    assert cli.main(["train", "--method", "advmoe", *more, "--lr", "0", "--out", str(run)]) == 0
    assert json.loads((run / "metrics.jsonl").read_text())["expert_usage"]
    model, _ = load_model(run)
    expected = upcycle(load_model(dense)[0], 4, 0.5)
    own, others_ = model.state_dict(), expected.state_dict()
    assert set(own) == set(others_)
    weights = [n for n in own if n.endswith("conv.weight")]
    assert weights and all(torch.equal(own[n], others_[n]) for n in weights)
    assert cli.main(["evaluate", str(run), "--checks", "0", "--attack", "pgd1", "--limit", "16"]) == 0
    assert "GFLOPs" in capsys.readouterr().out


def test_experts_are_shared_at_first_unless_they_were_apart(tmp_path: Path) -> None:
    """What upcycling makes are copies, which learn as one again before they part."""
    data = load("digits")
    small = {"num_classes": 10, "image_size": 8}
    for kind in ("dense", "upcycled"):
        config = RunConfig(ModelConfig("resnet18", kind, width=4, **small), DataConfig("digits"))
        run = Run(tmp_path / kind)
        run.create(config)
        run.save({"model": build_model(config.model).state_dict()}, "best")
    for init, shared in ((None, 3), ("dense", 3), ("upcycled", 0)):
        folder = None if init is None else str(tmp_path / init)
        config = RunConfig(ModelConfig("resnet18", "upcycled", width=4), DataConfig("digits"), epochs=4, init=folder)
        assert resolve(config, data).routing.share_epochs == shared
