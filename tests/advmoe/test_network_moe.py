# SPDX-License-Identifier: Apache-2.0
"""Mixtures of whole networks: the loop over their experts is the truth."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmoe import cli
from advmoe.attacks import AGAINST, PGD
from advmoe.attacks.routing import RoutingView
from advmoe.config import MethodConfig, ModelConfig, OptimConfig
from advmoe.deployment import export_program
from advmoe.models import NetworkMoE, create_model, list_models, record_routing, router_parameters
from advmoe.profiling import profile
from advmoe.routers import routers_of
from advmoe.training import load_model
from advmoe.training.methods import Batch, build_method
from advmoe.training.methods.base import tie_experts, unused_frozen
from moe_kernels import Routing, fuse

EXPERTS = 3
WIDTHS = {"deit_tiny": 16, "vit_small": 16, "wrn28_10": 20, "resnet50": 4, "densenet40": 6, "vgg16_bn": 4}


def build(arch: str = "resnet18", size: int = 8, **options: Any) -> NetworkMoE:
    torch.manual_seed(0)
    size = 16 if arch == "vgg16_bn" else size
    options = {"num_experts": EXPERTS, "width": WIDTHS.get(arch, 6), "image_size": size, **options}
    model = create_model(arch, "network_moe", **options)
    assert isinstance(model, NetworkMoE)
    for name, value in model.state_dict().items():  # statistics and affine parameters that are not those of a new network
        if value.is_floating_point() and ".bn" in name + ".bn" and value.dim() == 1 and not name.startswith("router"):
            value.add_(0.3 * torch.rand(value.shape))
    return model


def batch(model: NetworkMoE, count: int = 9, seed: int = 1) -> Tensor:
    """Images of different colours, for the router."""
    generator = torch.Generator().manual_seed(seed)
    size = model.spec.image_size
    x = torch.rand(count, 3, size, size, generator=generator) * torch.rand(count, 3, 1, 1, generator=generator)
    return x.to(next(model.parameters()).dtype)


def looped(model: NetworkMoE, experts: list[nn.Module], x: Tensor, routing: Routing) -> Tensor:
    """Each expert's network on the images that chose it, mixed as the model says."""
    chosen = routing.expert.reshape(len(x), -1)
    gates = torch.ones(chosen.shape, dtype=x.dtype) if routing.gate is None else routing.gate.reshape(chosen.shape)
    total: Any = torch.zeros(len(x), model.spec.num_classes, dtype=x.dtype)
    for e, expert in enumerate(experts):
        rows, place = (chosen == e).nonzero(as_tuple=True)
        if len(rows):
            y = expert(x[rows])
            y = y.softmax(1) if model.spec.mix == "probabilities" else y
            total = total.index_add(0, rows, gates[rows, place][:, None] * y)
    return total.log() if model.spec.mix == "probabilities" else total


def compare_with_the_loop(model: NetworkMoE, rtol: float = 1e-9) -> None:
    x = batch(model).requires_grad_()
    twin = x.detach().clone().requires_grad_()
    experts = [model.expert(i) for i in range(model.num_experts)]
    routing = model.route(twin)
    assert len(routing.expert.unique()) > 1
    y, expected = model(x), looped(model, experts, twin, routing)
    torch.testing.assert_close(y, expected, rtol=rtol, atol=1e-12)
    weights = torch.randn(y.shape, dtype=y.dtype)
    own = [x, *model.experts.parameters(), *model.router.parameters()]
    names = [
        "images",
        *(n for n, _ in model.experts.network.named_parameters()),
        *("router" for _ in model.router.parameters()),
    ]
    theirs = [dict(e.named_parameters()) for e in experts]
    found = torch.autograd.grad((y * weights).sum(), own, materialize_grads=True)
    parts = [p for e in theirs for p in e.values()]
    wanted = torch.autograd.grad(
        (expected * weights).sum(), [twin, *model.router.parameters(), *parts], materialize_grads=True
    )
    of = dict(zip(map(id, [twin, *model.router.parameters(), *parts]), wanted, strict=True))
    rest = iter(model.router.parameters())
    for name, gradient in zip(names, found, strict=True):
        if name == "images":
            other = of[id(twin)]
        elif name == "router":
            other = of[id(next(rest))]
        else:
            other = torch.cat([of[id(e[name])] for e in theirs])
        scale = float(other.abs().max())
        assert float((gradient - other).abs().max()) <= 1e-7 * scale + 1e-12, name


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("arch", list_models())
def test_equal_to_the_loop_over_experts(arch: str, top_k: int) -> None:
    """Values and all gradients, in training with each expert's own batch statistics, and in eval mode."""
    model = build(arch, top_k=top_k).double()
    compare_with_the_loop(model.train())
    compare_with_the_loop(model.eval())


@pytest.mark.parametrize(
    "options", [{"top_k": EXPERTS}, {"top_k": 2, "mix": "probabilities"}, {"gate": "softmax"}], ids=str
)
def test_other_mixtures_equal_the_loop(options: dict[str, Any]) -> None:
    compare_with_the_loop(build(**options).double().train())


def test_the_mixture_of_probabilities() -> None:
    model = build(top_k=EXPERTS, mix="probabilities").double().eval()
    x = batch(model)
    shares = model.scores(x).softmax(1)
    mixture = sum(shares[:, [i]] * model.expert(i)(x).softmax(1) for i in range(EXPERTS))
    torch.testing.assert_close(model(x).exp(), mixture)
    torch.testing.assert_close(model(x).softmax(1), mixture)
    one = build(mix="probabilities").double().eval()
    torch.testing.assert_close(one(x).exp(), looped(one, [one.expert(i) for i in range(EXPERTS)], x, one.route(x)).exp())
    # a share of 0 has no logarithm, and no gradient that is not finite
    for p in model.router.parameters():
        p.data.mul_(1e4)
    y = model(x)
    gradients = torch.autograd.grad(y.logsumexp(1).sum() + y[:, 0].sum(), list(model.parameters()))
    assert all(bool(g.isfinite().all()) for g in gradients)


def test_statistics_are_those_of_an_experts_own_samples() -> None:
    model = build().double().train()
    x = batch(model)
    routing = Routing(torch.tensor([0, 0, 2, 0, 2, 0, 2, 2, 0]), num_experts=EXPERTS)
    experts = [model.expert(i) for i in range(EXPERTS)]
    model(x, routing)
    for i in (0, 2):
        experts[i](x[routing.expert == i])
    for i in range(EXPERTS):
        for (name, now), then in zip(model.expert(i).state_dict().items(), experts[i].state_dict().values(), strict=True):
            torch.testing.assert_close(now, then, msg=f"{name} of expert {i}")


def test_one_expert_for_all_and_back_again() -> None:
    model = build("densenet40").eval()
    x = batch(model)
    for i in range(EXPERTS):
        torch.testing.assert_close(model(x, Routing(torch.full((9,), i), num_experts=EXPERTS)), model.expert(i)(x))
    again = NetworkMoE.from_experts([model.expert(i) for i in range(EXPERTS)], top_k=2)
    own = model.experts.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in again.experts.state_dict().items())
    assert not again.training and again.router.options.gate == "softmax"
    other = build("densenet40").train()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    before = torch.get_rng_state()
    model.expert(0)
    assert torch.equal(before, torch.get_rng_state())


def test_one_choice_for_all_layers() -> None:
    model = build().eval()
    x = batch(model)
    assert list(routers_of(model)) == ["router"] and model.scores(x).shape == (9, EXPERTS)
    with record_routing(model) as routings:
        model(x)
    convolutions = [n for n, m in model.experts.network.named_modules() if "Conv2d" in type(m).__name__]
    assert list(routings) == [f"experts.network.{n}" for n in convolutions]
    assert not any(isinstance(m, nn.Conv2d | nn.Linear | nn.BatchNorm2d) for m in model.experts.modules())
    assert all(torch.equal(r.expert, model.route(x).expert) for r in routings.values())


@pytest.mark.parametrize("arch", ["resnet18", "deit_tiny"])
def test_costs_are_those_of_the_chosen_networks(arch: str) -> None:
    one = profile(build(arch).expert(0), 8)
    for top_k in (1, 2):
        model = build(arch, top_k=top_k)
        cost = profile(model, 8)
        assert cost.pathway_gflops == pytest.approx(top_k * one.gflops)
        assert cost.router_gflops == pytest.approx(3 * 8 * 8 * EXPERTS / 1e9)
        assert cost.params == EXPERTS * one.params + sum(p.numel() for p in model.router.parameters())


LATER = [pytest.param(arch, marks=pytest.mark.nightly) for arch in ("wrn28_10", "densenet40", "deit_tiny")]


@pytest.mark.parametrize("arch", ["resnet18", "vgg16_bn", *LATER])
def test_fused(arch: str) -> None:
    model = build(arch, size=16).eval()
    x = batch(model, 5)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore" if arch in ("deit_tiny", "vgg16_bn") else "error")
        fused = fuse(model, x[:2])
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    if arch not in ("deit_tiny", "vgg16_bn"):  # whose pools to more pixels than there are have no kernel
        assert not fused.fallbacks and "1 programs" in fused.extra_repr()


def test_several_choices_fused_run_as_torchs_operators() -> None:
    model = build(top_k=2).eval()
    x = batch(model, 5)
    with torch.no_grad(), pytest.warns(UserWarning, match="operations run as torch's own"):
        torch.testing.assert_close(fuse(model, x[:2])(x), model(x), rtol=1e-4, atol=1e-5)


def test_compiled() -> None:
    model = build(size=16).double().train()
    x = batch(model)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    twin = copy.deepcopy(model)
    y, expected = whole(x), twin(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"top_k": 2, "mix": "probabilities"}, marks=pytest.mark.nightly)], ids=str
)
def test_exported(options: dict[str, Any]) -> None:
    model = build(**options).eval()
    program = export_program(model, batch(model, 1))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(batch(model, 3)), model(batch(model, 3)))


# --- attacks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"frozen_router": True}], ids=str)
@pytest.mark.parametrize("against", list(AGAINST))
def test_attacks_leave_the_model_as_it_was(against: str, options: dict[str, Any]) -> None:
    model = build(**options).train()
    images = batch(model)
    labels = model.eval()(images).argmax(1)
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = PGD(0.1, 0.05, 2, against=against)(model, images, labels, torch.Generator().manual_seed(0))
    assert (found - images).abs().max() <= 0.1 + 1e-6 and not torch.equal(found, images)
    assert all(m.training for m in model.modules()) and not any(m._forward_hooks for m in model.modules())
    assert not model.router._observers and model.router.replayed is None
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.router.parameters()] == [not options.get("frozen_router")] * 2


@pytest.mark.parametrize("top_k", [1, 2])
def test_experts_are_attacked_with_the_clean_routing_and_judged_without(top_k: int) -> None:
    """RA-E: the attack's forwards go by the clean choices; what it counts as found fools the whole model."""
    model = build(top_k=top_k).eval()
    images = batch(model, 24)
    labels = model(images).argmax(1)
    clean = model.route(images)
    seen: list[Tensor] = []
    handle = model.experts.register_forward_pre_hook(lambda m, args: seen.append(args[1].expert.view(-1, top_k)))
    attack = PGD(0.3, 0.1, 4, against="experts", random_start=False)
    found = attack(model, images, labels)
    handle.remove()
    assert len(seen) >= 5 and all(torch.equal(s, clean.expert.view(-1, top_k)) for s in seen[:5])
    assert not torch.equal(model.route(found).expert, clean.expert)  # moved so far that the router would not have it so
    with torch.no_grad():
        held = model(found, clean).argmax(1)
        assert (held != labels).float().mean() > 0.5
        assert not torch.equal(held, model(found).argmax(1))


def test_the_router_is_attacked() -> None:
    """RA-R moves more choices than an attack on the prediction, against one whose gates lead to it nothing."""
    model = build(frozen_router=True).eval()
    images = batch(model, 32)
    labels = model(images).argmax(1)
    clean = model.route(images).expert
    changed = {}
    for against in ("prediction", "router", "flip"):
        found = PGD(0.05, 0.02, 6, against=against)(model, images, labels, torch.Generator().manual_seed(0))
        changed[against] = int((model.route(found).expert != clean).sum())
    assert changed["router"] > changed["prediction"] and changed["flip"] > changed["prediction"]


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_soft_attack_follows_the_mixture_of_the_networks(top_k: int) -> None:
    model = build(top_k=top_k).double().eval()
    soft = build(top_k=EXPERTS).double().eval()
    soft.load_state_dict(model.state_dict())
    x, rows = batch(model).requires_grad_(), torch.arange(9)
    with RoutingView(model, "soft") as view:
        y = view.logits(x, rows, 9)
    torch.testing.assert_close(y, model(x))
    expected = torch.autograd.grad(soft(x).square().sum(), x)[0]
    assert not torch.allclose(torch.autograd.grad(model(x).square().sum(), x)[0], expected)
    weights = 2 * soft(x).detach()  # of the mixture's own values: the output's are the model's
    torch.testing.assert_close(torch.autograd.grad((y * weights).sum(), x)[0], expected)


# --- training -----------------------------------------------------------------------------------------------------------


def test_a_frozen_router_stays_as_it_was_drawn() -> None:
    model = build(size=16, frozen_router=True)
    assert (model.router.options.gate, model.router.score_norm, router_parameters(model)) == ("none", None, [])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    method = build_method(model, MethodConfig("at"), OptimConfig(lr=0.1), PGD(0.1, 0.05, 1, loss="kl"))
    images = batch(model, 12)
    method.step([Batch(images, torch.arange(12) % 10, torch.Generator().manual_seed(0))])
    for name, value in model.state_dict().items():
        if name.startswith("router"):
            assert torch.equal(value, before[name])
    assert not torch.equal(model.experts.network.conv1.weight, before["experts.network.conv1.weight"])
    with pytest.raises(ValueError, match="method: advmoe needs a model with trainable routers"):
        build_method(model, MethodConfig("advmoe"), OptimConfig(), PGD(0.1, 0.05, 1, loss="kl"))


@pytest.mark.parametrize("arch", ["resnet18", "deit_tiny"])
def test_experts_tied_and_unused_ones_left_alone(arch: str) -> None:
    """Of transformers class token, positions and LayerNorms too."""
    model = build(arch).train()
    x = batch(model)
    with unused_frozen(model, True), torch.no_grad():
        model(x, Routing(torch.tensor([0, 2] * 4 + [0]), num_experts=EXPERTS))
        before = [model.expert(i).state_dict() for i in range(EXPERTS)]
        for p in model.experts.parameters():
            p.add_(1)
    for i in range(EXPERTS):
        now = dict(model.expert(i).named_parameters())
        assert all(torch.equal(value, before[i][name]) == (i == 1) for name, value in now.items())
    tie_experts(model)
    model.eval()
    outputs = [model.expert(i)(x) for i in range(EXPERTS)]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


def test_the_commands(tmp_path: Path) -> None:
    common = [
        "train",
        "--kind",
        "network_moe",
        "--experts",
        "3",
        "--width",
        "4",
        "--data",
        "digits",
        "--train-limit",
        "96",
    ]
    common += ["--epochs", "1", "--batch-size", "32", "--attack-steps", "1"]
    options = {"at": ["--top-k", "2", "--mix", "probabilities"], "standard": ["--frozen-router", "--arch", "densenet40"]}
    for method, more in options.items():
        assert cli.main([*common, "--method", method, *more, "--out", str(tmp_path / method)]) == 0
    model, config = load_model(tmp_path / "at")
    assert isinstance(model, NetworkMoE) and config is not None
    assert (config.model.router, config.model.gate, config.routing.share_epochs) == ("linear", "softmax", 0)
    assert (model.spec.mix, model.router.options.top_k) == ("probabilities", 2)
    attacks = [a for name in ("pgd2", "experts2", "router2", "soft2", "apgd-ce") for a in ("--attack", name)]
    for method in options:
        run = str(tmp_path / method)
        assert cli.main(["evaluate", run, *attacks, "--limit", "12", "--checks", "0"]) == 0
        assert cli.main(["export", run, "--out", str(tmp_path / f"{method}.safetensors")]) == 0
        record = json.loads((tmp_path / method / "evaluation.json").read_text())
        assert {"experts2", "router2"} <= set(json.dumps(record).replace('"', " ").split())
    assert cli.main(["profile", "--kind", "network_moe", "--width", "4", "--batch-size", "1", "--repeats", "1"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "windows"}, "layout: the experts of kind network_moe have weights of their own"),
        ({"mix": "scores"}, "mix: expected one of logits, probabilities"),
        (
            {"gate": "softmax", "mix": "probabilities"},
            "gate: of probabilities, the softmax gate of a single choice cancels",
        ),
        ({"top_k": 4}, "top_k: expected at most the 3 experts, got 4"),
        ({"bn": "shared"}, "option of kind network_moe: .* got 'bn'"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_other_refusals() -> None:
    model = build()
    with pytest.raises(IndexError, match="expert: expected 0 to 2, got 3"):
        model.expert(3)
    with pytest.raises(ValueError, match=r"models\[1\]: expected the form of the first"):
        NetworkMoE.from_experts([model.expert(0), build(width=8).expert(0)])
    with pytest.raises(ValueError, match="models: expected networks of create_model, kind dense"):
        NetworkMoE.from_experts([model])
    assert ModelConfig().mix == "logits"
