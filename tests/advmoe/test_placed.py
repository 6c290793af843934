# SPDX-License-Identifier: Apache-2.0
"""Mixtures in chosen places: the loop over expert modules is the truth."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.attacks import PGD
from advmoe.attacks.routing import RoutingView
from advmoe.config import MethodConfig, ModelConfig, OptimConfig, RoutingConfig
from advmoe.models import create_model
from advmoe.models.layers import Path
from advmoe.models.placed import Mixture, MixtureOfConvolutions
from advmoe.models.resnet import MixtureOfBlocks
from advmoe.objectives import balance_loss
from advmoe.profiling import profile
from advmoe.routers import limited_choice, observe_routers, routers_of
from advmoe.training.methods import Batch, build_method
from moe_kernels import Routing, fuse
from moe_kernels.routing import GATES as ROUTING_GATES

EXPERTS = 4
GATES = ("gap-fc", "conv-gap", "double-conv")


def build(kind: str, arch: str = "resnet18", dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(arch, kind, width=6, num_experts=EXPERTS, image_size=32, **options)
    for name, value in model.state_dict().items():  # affine parameters and statistics unlike those of a new network
        if value.is_floating_point() and value.dim() == 1 and "router" not in name:
            value.copy_(torch.rand_like(value) + 0.5)
    return model.to(dtype)


def mixtures(model: nn.Module) -> dict[str, Mixture]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Mixture)}


def images(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)


def part(state: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
    parts = {name: value.chunk(EXPERTS)[expert] for name, value in state.items()}
    return {name: v.max() if name.endswith("num_batches_tracked") else v for name, v in parts.items()}


class Loop(nn.Module):
    """What the papers' codes have: a list of modules, and each sample through those that were chosen."""

    def __init__(self, mixture: Mixture, experts: list[nn.Module], blocks: bool) -> None:
        super().__init__()
        self.router = copy.deepcopy(mixture.router)
        self.experts = nn.ModuleList(experts)
        self.blocks = blocks

    def forward(self, x: Tensor, *path: Path) -> Tensor:
        scores = self.router.scores(x)
        k = self.router.options.top_k
        p = scores.softmax(1)
        chosen = scores.topk(k, 1).indices
        if k == 1:  # value 1, gradient of the probability
            q = p.gather(1, chosen)
            weights = q + (1 - q).detach()
        else:
            weights = p.gather(1, chosen)
            weights = weights / weights.sum(1, keepdim=True)
        total: Tensor | None = None
        for e, module in enumerate(self.experts):
            weight = (weights * (chosen == e)).sum(1)
            mine = (chosen == e).any(1).nonzero().squeeze(1)
            if not len(mine):
                continue
            y = module(x[mine], Path()) if self.blocks else module(x[mine])
            if total is None:
                total = y.new_zeros(len(x), *y.shape[1:])
            total = total.index_add(0, mine, y * weight[mine].view(-1, 1, 1, 1))
        assert total is not None
        return total


def loop_of(model: nn.Module) -> nn.Module:
    """The same network with lists of ordinary modules."""
    spec = model.spec
    dense = create_model(spec.arch, "dense", width=spec.width, image_size=spec.image_size).double()
    result = copy.deepcopy(model)
    for name, mixture in mixtures(model).items():
        experts = []
        for e in range(EXPERTS):
            module = copy.deepcopy(dense.get_submodule(name))
            module.load_state_dict(part(mixture.experts.state_dict(), e))
            experts.append(module.train(model.training))
        result.set_submodule(name, Loop(mixture, experts, isinstance(mixture, MixtureOfBlocks)))
    return result


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "block": ("block_moe", "resnet18", {}),
    "block k=2": ("block_moe", "resnet18", {"top_k": 2}),
    "block k=4": ("block_moe", "resnet18", {"top_k": 4, "moe_at": ("layer4.1",)}),
    "first block": ("block_moe", "resnet18", {"top_k": 3, "moe_at": ("layer4.0",)}),
    "conv4_x": ("block_moe", "resnet18", {"moe_at": ("layer3.*",), "router": "conv-gap"}),
    "bottleneck": ("block_moe", "resnet50", {"top_k": 2, "moe_at": ("layer4.0", "layer4.2")}),
    "wide": ("block_moe", "wrn50_2", {"moe_at": ("layer4.1",)}),
    "conv": ("conv_moe", "resnet18", {}),
    "conv k=2": ("conv_moe", "resnet18", {"top_k": 2}),
    "with the shortcut": ("conv_moe", "resnet18", {"top_k": 3, "moe_at": ("layer4",)}),
    "one convolution": ("conv_moe", "resnet18", {"moe_at": ("layer4.1.conv2",), "router": "double-conv"}),
    "bottleneck convolutions": ("conv_moe", "resnet50", {"top_k": 2, "moe_at": ("layer4.1.conv?",)}),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_loop_over_expert_modules(case: str, training: bool) -> None:
    kind, arch, options = CASES[case]
    model = build(kind, arch, **options).train(training)
    loop = loop_of(model)
    x, y = images(12).requires_grad_(), images(12).requires_grad_()
    got, expected = model(x), loop(y)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-10)
    theirs = dict(loop.named_parameters())
    for name, mixture in mixtures(model).items():
        for own, value in mixture.router.named_parameters():
            assert value.grad is not None and value.grad.abs().max() > 0
            torch.testing.assert_close(value.grad, theirs[f"{name}.router.{own}"].grad, rtol=1e-7, atol=1e-10)
        for own, value in mixture.experts.named_parameters():
            each = [theirs[f"{name}.experts.{e}" + (f".{own}" if own else "")].grad for e in range(EXPERTS)]
            whole = torch.cat([torch.zeros_like(value.chunk(EXPERTS)[0]) if g is None else g for g in each])
            torch.testing.assert_close(value.grad, whole, rtol=1e-7, atol=1e-9)
    if training:  # running statistics, and those of experts that nobody chose
        for name, mixture in mixtures(model).items():
            for own, buffer in mixture.experts.named_buffers():
                for e in range(EXPERTS):
                    theirs_now = loop.get_buffer(f"{name}.experts.{e}.{own}")
                    torch.testing.assert_close(part({own: buffer}, e)[own], theirs_now, rtol=1e-9, atol=1e-9)


def test_gates_behind_the_batch_norm() -> None:
    model = build("conv_moe", moe_at=("layer4.1.conv1",), top_k=2, gate_after="norm").train()
    block = model.layer4[1]
    x = torch.rand(9, 48, 4, 4, dtype=torch.float64)
    twin = copy.deepcopy(block)
    got = block(x, Path())
    routing = twin.conv1.router.route(x)
    y = twin.bn1(twin.conv1.experts(x, routing.expand()))
    y = F.relu((y.view(9, 2, *y.shape[1:]) * routing.gate[:, :, None, None, None]).sum(1))
    torch.testing.assert_close(got, F.relu(twin.bn2(twin.conv2(y)) + x))


@pytest.mark.parametrize(("arch", "at"), [("resnet18", "conv1"), ("vgg16_bn", "features.0"), ("resnet18", "layer4")])
def test_every_mixture_has_its_gates_behind_the_batch_norm(arch: str, at: str) -> None:
    model = build("conv_moe", arch, moe_at=(at,), gate_after="norm").eval()
    behind: list[Any] = []
    for mixture in mixtures(model).values():
        mixture.register_forward_pre_hook(lambda module, args: behind.append(args[1]))
    model(images(2))
    assert len(behind) == len(mixtures(model)) and all(isinstance(each, nn.BatchNorm2d) for each in behind)


def test_places() -> None:
    names = {
        ("block_moe", None): ["layer4.0", "layer4.1"],
        ("block_moe", ("layer4.1",)): ["layer4.1"],
        ("block_moe", ("layer3", "layer4.0")): ["layer3.0", "layer3.1", "layer4.0"],
        ("conv_moe", None): [f"layer4.{b}.conv{c}" for b in (0, 1) for c in (1, 2)],
        ("conv_moe", ("layer4.0",)): ["layer4.0.conv1", "layer4.0.conv2", "layer4.0.shortcut.0"],
        ("conv_moe", ("*.conv2",)): [f"layer{s}.{b}.conv2" for s in (1, 2, 3, 4) for b in (0, 1)],
    }
    for (kind, at), expected in names.items():
        model = build(kind, moe_at=at)
        assert list(mixtures(model)) == expected
        assert list(routers_of(model)) == [f"{name}.router" for name in expected]
        assert [router.routes for router in routers_of(model).values()] == expected
    assert isinstance(build("conv_moe", "vgg16_bn", moe_at=("features.40",)).features[40], MixtureOfConvolutions)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("block_moe", {"moe_at": ("layer5",)}, "moe_at: block of resnet18: expected one of .*got 'layer5'"),
        ("conv_moe", {"moe_at": ("layer4.1.cnov1",)}, "layer4.1.conv1"),
        ("block_moe", {"moe_at": (3, 4)}, "moe_at: expected patterns of names"),
        ("block_moe", {"moe_at": "layer4"}, "moe_at: expected patterns of names"),
        ("moe", {"moe_at": ("layer4",)}, "moe_at: expected numbers of stages"),
        ("block_moe", {"arch": "vgg16_bn"}, "block_moe takes the ResNets"),
        ("block_moe", {"router": "global"}, "router: the layers of kind block_moe have one each"),
        ("block_moe", {"layout": "windows"}, "layout"),
        ("conv_moe", {"top_k": 5}, "top_k: expected at most the 4 experts"),
        ("conv_moe", {"gate": "conv-gap", "router": "gap-fc"}, "gate: 'conv-gap' is a router"),
        ("conv_moe", {"gate": "gap-cf"}, "gate: .*got 'gap-cf'; did you mean gap-fc"),
        ("block_moe", {"gate_after": "norm"}, "gate_after"),
        ("conv_moe", {"arch": "deit_tiny", "moe_at": ("patch*",), "gate_after": "norm"}, "gate_after: deit_tiny"),
        ("conv_moe", {"arch": "densenet40", "moe_at": ("*.conv2",), "gate_after": "norm"}, "gate_after: densenet40"),
        ("block_moe", {"capacity": 0.5}, "capacity: expected a finite number of at least 1"),
    ],
)
def test_what_does_not_go_is_refused(kind: str, options: dict[str, Any], message: str) -> None:
    arch = options.pop("arch", "resnet18")
    with pytest.raises(ValueError, match=message):
        create_model(arch, kind, width=6, num_experts=EXPERTS, **options)


def test_a_gate_may_be_a_routers_name() -> None:
    assert type(routers_of(build("block_moe", gate="conv-gap"))["layer4.0.router"]).__name__ == "ConvGapRouter"
    config = ModelConfig(kind="conv_moe", gate="double-conv")
    assert (config.router, config.gate) == ("double-conv", "straight_through")
    assert (ModelConfig(kind="block_moe").router, ModelConfig(kind="block_moe", top_k=2).gate) == ("gap-fc", "softmax")
    for kind in ("dense", "moe"):  # also where a gate has no effect a wrong one is a slip
        with pytest.raises(ValueError, match=f"gate: expected one of {', '.join(ROUTING_GATES)}, got 'gap-fc'"):
            ModelConfig(kind=kind, gate="gap-fc")


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", ["block_moe", "conv_moe"])
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_gets_a_gradient(gate: str, kind: str, top_k: int, training: bool) -> None:
    model = build(kind, gate=gate, top_k=top_k).train(training)
    F.cross_entropy(model(images(16)), torch.arange(16) % 10).backward()
    for name, router in routers_of(model).items():
        last = list(router.parameters())[-1]
        assert last.grad is not None and last.grad.abs().max() > 1e-9, name


def test_the_cost_follows_k_and_not_the_experts() -> None:
    def cost(experts: int, k: int, kind: str = "block_moe") -> float:
        return profile(create_model("resnet18", kind, width=8, num_experts=experts, top_k=k)).pathway_gflops

    for kind in ("block_moe", "conv_moe"):
        assert cost(4, 1, kind) == cost(32, 1, kind)
        at = [cost(4, k, kind) for k in (1, 2, 3, 4)]
        steps = [b - a for a, b in itertools.pairwise(at)]
        assert all(step == pytest.approx(steps[0]) and step > 0 for step in steps)
    assert cost(4, 1) == pytest.approx(profile(create_model("resnet18", "dense", width=8)).pathway_gflops)


@pytest.mark.parametrize("kind", ["block_moe", "conv_moe"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_fused_it_is_the_same(kind: str, top_k: int) -> None:
    model = build(kind, dtype=torch.float32, top_k=top_k).eval()
    x = images(5, torch.float32)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(fuse(model, x)(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", ["block_moe", "conv_moe"])
def test_the_softmax_mixture_that_an_attack_follows_is_that_of_the_experts_outputs(kind: str, top_k: int) -> None:
    place = "layer4.1" if kind == "block_moe" else "layer4.1.conv1"
    model = build(kind, moe_at=(place,), top_k=top_k).eval()
    x, y = images(5).requires_grad_(), images(5).requires_grad_()
    with RoutingView(model, "soft") as view:
        got = view.logits(x, torch.arange(5), 5)
    with torch.no_grad():
        torch.testing.assert_close(got, model(x))  # the value is the model's
    loop = loop_of(model)
    for mixture in loop.modules():
        if isinstance(mixture, Loop):
            mixture.router.options = dataclasses.replace(mixture.router.options, top_k=EXPERTS, gate="softmax")
    # the loop over all experts, with the model's own value behind it
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    features: dict[str, Tensor] = {}
    inner = model.get_submodule(place).register_forward_hook(lambda m, i, o: features.update(value=o.detach()))
    model(y.detach())
    inner.remove()
    loop.get_submodule(place).register_forward_hook(lambda m, i, o: o - o.detach() + features["value"])
    (loop(y) * weight).sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-12)
    z = images(5).requires_grad_()
    (model(z) * weight).sum().backward()
    assert (x.grad - z.grad).abs().max() > 1e-3 * x.grad.abs().max()  # which is another than the model's own


# --- capacity -----------------------------------------------------------------------------------------------------------


def greedy(scores: Tensor, top_k: int, capacity: float) -> Tensor:
    """By hand: each sample in turn gets what it wants most of what has room, those of higher scores first; one that has
    all that has room takes another all the same."""
    samples, experts = scores.shape
    room = [max(top_k, -(-round(capacity * samples * top_k * 1000) // (experts * 1000)))] * experts
    expert = torch.full((samples, top_k), -1)
    for choice in range(top_k):
        waiting = set(range(samples))
        while waiting:
            wants: dict[int, list[int]] = {}
            for i in sorted(waiting):
                others = [e for e in range(experts) if e not in expert[i]]
                free = [e for e in others if room[e]]
                best = max(free or others, key=lambda e: (scores[i, e].item(), -e))
                if free:
                    wants.setdefault(best, []).append(i)
                else:
                    expert[i, choice] = best
                    waiting.discard(i)
            for e, those in wants.items():
                for i in sorted(those, key=lambda i: (-scores[i, e].item(), i))[: room[e]]:
                    expert[i, choice] = e
                    waiting.discard(i)
                room[e] = max(0, room[e] - len(those))
    return expert


@pytest.mark.parametrize("capacity", [1.0, 1.25, 2.0])
@pytest.mark.parametrize(("samples", "experts"), [(0, 4), (1, 4), (3, 4), (16, 4), (17, 3), (40, 8)])
def test_no_expert_takes_more_than_its_capacity(samples: int, experts: int, capacity: float) -> None:
    drawn = torch.randn(samples, experts, generator=torch.Generator().manual_seed(samples))
    for scores in (drawn + torch.linspace(2, 0, experts), drawn.round()):  # one is liked most; many are equal
        for k in (1, 2, 3):
            chosen = limited_choice(scores, k, capacity)
            assert chosen.shape == ((samples,) if k == 1 else (samples, k))
            assert torch.equal(chosen.view(samples, k), greedy(scores, k, capacity))
            assert all(len(set(row.tolist())) == k for row in chosen.view(samples, k))
    assert torch.equal(limited_choice(drawn, 2, float(experts)), drawn.topk(2, 1).indices)


def test_scores_of_minus_infinity_have_a_place_too() -> None:
    """The scores of a GPU are not looked at before."""
    low = -float("inf")
    scores = torch.tensor([[0.0, low], [1.0, low], [2.0, low], [low, low]])
    assert limited_choice(scores, 1, 1.0).tolist() == [1, 0, 0, 1]
    assert limited_choice(scores, 2, 1.0).tolist() == [[0, 1], [0, 1], [0, 1], [0, 1]]


def test_capacity_holds_in_training_alone() -> None:
    model = build("block_moe", moe_at=("layer4.1",), capacity=1.0)
    router = routers_of(model)["layer4.1.router"]
    with torch.no_grad():
        router.linear.bias.copy_(torch.tensor([50.0, 0, 0, 0]))  # all want the first
    x = torch.rand(8, 48, 4, 4, dtype=torch.float64)
    assert torch.bincount(router.train().route(x).expert, minlength=EXPERTS).tolist() == [2, 2, 2, 2]
    assert torch.bincount(router.eval().route(x).expert, minlength=EXPERTS).tolist() == [8, 0, 0, 0]


def test_from_scores_takes_another_choice() -> None:
    scores = torch.randn(3, 4, requires_grad=True)
    routing = Routing.from_scores(scores, expert=torch.tensor([3, 0, 1]))
    assert routing.gate is not None and torch.equal(routing.gate, torch.ones(3))
    routing.gate.sum().backward()
    again = scores.detach().requires_grad_()
    again.softmax(1)[torch.arange(3), torch.tensor([3, 0, 1])].sum().backward()
    torch.testing.assert_close(scores.grad, again.grad)
    for wrong in (torch.tensor([0, 1]), torch.tensor([[0], [1], [2]]), torch.tensor([0, 1, 2], dtype=torch.int32)):
        with pytest.raises(ValueError, match="expert: expected int64"):
            Routing.from_scores(scores, expert=wrong)


# --- training -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["block_moe", "conv_moe"])
@pytest.mark.parametrize("balance", ["switch", "entropy", "column_entropy", "variance"])
def test_a_step_adds_the_balance_of_its_own_forward_once(kind: str, balance: str) -> None:
    model = build(kind, dtype=torch.float32)
    config = MethodConfig("at", objective="cross_entropy")
    optim = OptimConfig(lr=0.0, momentum=0.0, weight_decay=0.0)
    routing = RoutingConfig(balance=balance, balance_weight=0.5)
    method = build_method(model, config, optim, PGD(8 / 255, 2 / 255, 1), routing)
    twin = copy.deepcopy(model).train()

    def balance_of(x: Tensor) -> float:
        scores: list[Tensor] = []
        with torch.no_grad(), observe_routers(twin, lambda router, seen, routing: scores.append(seen)):
            twin(x)
        return float(torch.stack([balance_loss(s, balance) for s in scores]).mean())

    attacked: list[Tensor] = []
    run = method._adversarial

    def remember(batch: Batch) -> Tensor:
        attacked.append(run(batch))
        return attacked[-1]

    method._adversarial = remember  # type: ignore[method-assign]
    model.train()
    labels = torch.arange(12) % 10
    result = method.step([Batch(images(12, torch.float32), labels, torch.Generator().manual_seed(0))])
    with torch.no_grad():
        loss = float(F.cross_entropy(copy.deepcopy(twin)(attacked[0]), labels))
    expected = balance_of(attacked[0])
    assert result.losses == pytest.approx({"loss": loss + 0.5 * expected, "balance": expected}, rel=1e-4)


def test_variance_by_hand() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, -1.0]])
    p = scores.softmax(1)
    switch = 2 * ((torch.tensor([2 / 3, 1 / 3])) * p.mean(0)).sum() - 1
    expected = switch + 0.5**0.5 - ((p[:, 0] - p[:, 1]).abs() / 2**0.5).mean()
    torch.testing.assert_close(balance_loss(scores, "variance"), expected)
    alike = torch.zeros(3, 4, requires_grad=True)
    balance_loss(alike, "variance").backward()
    assert torch.isfinite(alike.grad).all()
