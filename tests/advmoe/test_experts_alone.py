# SPDX-License-Identifier: Apache-2.0
"""Experts alone, the classes that go to them and their use over the epochs, of mixtures in chosen places."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, small_architecture, tiny
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from advmoe import analysis
from advmoe.analysis import Finding, experts_alone, fixed_experts, layer_routers, observe
from advmoe.attacks import PGD
from advmoe.config import ModelConfig
from advmoe.data import TensorSplit, stream_generator
from advmoe.evaluation import evaluate, wilson
from advmoe.models import create_model, record_routing
from advmoe.report.analyses import _followed, analyze
from advmoe.routers import Router, only_expert, routers_of
from advmoe.training import Run, train
from moe_kernels import RoutedLinear

EXPERTS = 3
ATTACK = PGD(0.05, 0.02, 3)


def model(kind: str = "block_moe", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet18", kind, width=4, num_experts=EXPERTS, image_size=16, **options).eval()


def noise(count: int = 20, size: int = 16) -> TensorSplit:
    g = stream_generator("experts alone")
    images = torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)
    return TensorSplit(images, torch.randint(0, 10, (count,), generator=g))


def table(found: Finding) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(found.csv())))


@pytest.mark.parametrize(("kind", "top_k"), [("block_moe", 1), ("block_moe", 2), ("conv_moe", 1), ("conv_moe", 2)])
def test_the_sweep_is_routing_fixed_by_hand_and_an_attack_on_that(kind: str, top_k: int) -> None:
    network, split = model(kind, top_k=top_k), noise()
    sweep = fixed_experts(network, split, ATTACK, batch_size=8, seed=3)
    places = [f"layer4.{b}" for b in (0, 1)]
    places = places if kind == "block_moe" else [f"{place}.conv{c}" for place in places for c in (1, 2)]
    assert [(each.layer, each.expert) for each in sweep.alone] == [(name, e) for name in places for e in range(EXPERTS)]
    different = set()
    for each in sweep.alone[-2 * EXPERTS :]:
        router = routers_of(network)[f"{each.layer}.router"]
        router.only = each.expert
        right, robust, losses = [], [], []
        for start in range(0, len(split), 8):
            x, y = split.batch(torch.arange(start, min(start + 8, len(split))))
            found = ATTACK.run(network, x, y, stream_generator(3, "analyze", start)).images
            with torch.no_grad():
                right.append(network(x).argmax(1) == y)
                robust.append(right[-1] & (network(found).argmax(1) == y))
                losses.append(cross_entropy(network(found), y, reduction="none"))
        router.only = None
        assert torch.equal(each.right, torch.cat(right)) and torch.equal(each.robust, torch.cat(robust))
        assert each.loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
        different.add(round(each.loss, 6))
    assert len(different) == 2 * EXPERTS  # else nothing was fixed
    assert all(router.only is None for router in routers_of(network).values())


@pytest.mark.parametrize("top_k", [1, 2])
def test_shares_are_the_gates(top_k: int) -> None:
    network, split = model(top_k=top_k), noise()
    sweep = fixed_experts(network, split, ATTACK)
    seen: dict[str, Tensor] = {}
    x, _ = split.batch(torch.arange(len(split)))
    for router in routers_of(network).values():
        router._observers.append(lambda router, scores, routing: seen.__setitem__(router.routes, scores))
    with torch.no_grad():
        network(x)
    for each in sweep.alone:
        assert each.layer is not None
        chosen = seen[each.layer].topk(top_k, 1).indices
        assert each.share == pytest.approx(float((chosen == each.expert).any(1).double().mean()))
    assert sum(each.share or 0 for each in sweep.alone) == pytest.approx(2 * top_k)


def test_the_gated_row_is_an_evaluation() -> None:
    network, split = model(), noise(40)
    x, _ = split.batch(torch.arange(40))
    with torch.no_grad():  # labels that it gets right, mostly
        split = TensorSplit(split.images, torch.where(torch.arange(40) % 4 == 0, split.labels, network(x).argmax(1)))
    attack = PGD(0.01, 0.004, 3, random_start=False)
    expected = evaluate(network, split, {"pgd": attack}, batch_size=16)
    row = table(experts_alone({"a": fixed_experts(network, split, attack, ["layer4.1"], batch_size=16)}))[0]
    outcome = expected.attacks["pgd"]
    assert 0 < outcome.ra < expected.sa < 1
    figures = [float(row[name]) for name in ("sa", "sa_low", "sa_high", "ra", "ra_low", "ra_high")]
    assert figures == pytest.approx([expected.sa, *expected.sa_interval, outcome.ra, *outcome.interval], rel=1e-5)
    assert (row["expert"], row["layer"], row["robust"], row["images"]) == ("gated", "", "", "40")


class OneIsPerfect(nn.Module):
    """A layer of two experts behind each other's back: the second reads the class where no attack reaches it, the first
    gives class 0; the gate takes the first."""

    def __init__(self) -> None:
        super().__init__()

        class First(Router):
            def forward(self, x: Tensor) -> Tensor:
                return x.new_tensor([1.0, 0.0]).expand(len(x), 2)

        self.head = nn.Module()
        self.head.router = First(3, 2)
        self.head.router.routes = "head"
        self.head.linear = RoutedLinear(1, 2, num_experts=2)
        with torch.no_grad():
            self.head.linear.weight.copy_(torch.tensor([[0.0], [0.0], [-9.0], [9.0]]))
            self.head.linear.bias.copy_(torch.tensor([1.0, 0, 0, 0]))

    def forward(self, x: Tensor) -> Tensor:
        routing = self.head.router.route(x)
        return self.head.linear(x[:, :1, 0, 0] - 0.5, routing)


def test_a_perfect_expert_is_marked_robust() -> None:
    labels = torch.arange(20) % 2
    images = (labels[:, None, None, None] * 255).expand(-1, 3, 2, 2).to(torch.uint8).contiguous()
    found = experts_alone({"a": fixed_experts(OneIsPerfect(), TensorSplit(images, labels), ATTACK, ["head"])})
    gated, first, second = table(found)
    assert (gated["ra"], first["ra"], second["ra"]) == ("0.5", "0.5", "1")
    assert (first["robust"], second["robust"]) == ("0", "1") and (first["share"], second["share"]) == ("1", "0")
    assert float(second["p"]) == pytest.approx(2**-10, rel=1e-4) and first["p"] == "1"
    assert [float(second[end]) for end in ("ra_low", "ra_high")] == pytest.approx(wilson(20, 20), rel=1e-5)
    assert "gated model's: 1 of 2" in found.note and found.png()[:4] == b"\x89PNG"


def test_a_router_is_as_before_also_behind_an_error() -> None:
    network = model()
    router = routers_of(network)["layer4.1.router"]
    router.only = 2
    with pytest.raises(RuntimeError, match="stop"), only_expert(router, 1):
        assert router.only == 1
        raise RuntimeError("stop")
    assert router.only == 2
    router.only = None
    with pytest.raises(ValueError, match=r"expert: expected one of 0 \.\. 2, got 3"), only_expert(router, 3):
        pass

    class Fails(PGD):
        def run(self, model: nn.Module, *args: Any, **options: Any) -> Any:
            if any(router.only is not None for router in routers_of(model).values()):
                raise RuntimeError("stop")
            return super().run(model, *args, **options)

    with pytest.raises(RuntimeError, match="stop"):
        fixed_experts(network, noise(4), Fails(0.05, 0.02, 1))
    assert all(router.only is None for router in routers_of(network).values())


def test_which_layers() -> None:
    assert list(layer_routers(model())) == ["layer4.0", "layer4.1"]
    assert list(layer_routers(model("conv_moe"), ["layer4.1", "*.0.conv2"])) == [
        "layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2",
    ]  # fmt: skip
    moe = model("moe")
    assert list(layer_routers(moe, ["layer1.0"])) == ["layer1.0.conv1", "layer1.0.conv2"]
    with pytest.raises(ValueError, match="--layers says which"):
        layer_routers(moe)
    with pytest.raises(ValueError, match=r"expected one of layer4\.0, layer4\.1, got 'layer5'"):
        layer_routers(model(), ["layer5"])
    for other in (model("moe", router="global"), model("moe", route_per="network"), model("dense")):
        with pytest.raises(ValueError, match="whose layers have routers of their own"):
            layer_routers(other, ["layer1"])
    with pytest.raises(ValueError, match="at least one model"):
        experts_alone({})


@pytest.mark.parametrize(("kind", "top_k"), [("block_moe", 1), ("block_moe", 2), ("conv_moe", 2)])
def test_classes_by_loops(kind: str, top_k: int) -> None:
    """Of k choices each class's row sums to 1 over the experts, by the scores that the routers gave."""
    network, split = model(kind, top_k=top_k), noise(30)
    observed = observe({"": network}, split, ATTACK, batch_size=16)[""]
    found = analysis.classes(observed)
    assert [choice.name.split(" ")[0] for choice in observed.choices] == (
        ["layer4.0.conv1", "layer4.1.conv1"]
        if kind == "block_moe"
        else [f"layer4.{b}.conv{c}" for b in (0, 1) for c in (1, 2)]
    )
    for choice in observed.choices:
        assert choice.scores is not None and choice.clean.shape == (30, 1, top_k)
        mine = {(int(r["class"]), int(r["expert"])): r for r in table(found) if r["layer"] == choice.layers[0]}
        for label in set(observed.labels.tolist()):
            rows = [i for i in range(30) if observed.labels[i] == label]
            counts = [0] * EXPERTS
            for i in rows:
                for e in choice.scores[i].topk(top_k).indices.tolist():
                    counts[e] += 1
            for e, count in enumerate(counts):
                assert float(mine[label, e]["clean"]) == pytest.approx(count / (top_k * len(rows)), abs=1e-5)
    assert found.png()[:4] == b"\x89PNG"


def test_collapse_by_hand() -> None:
    lines = [
        {"epoch": 1, "expert_usage": {"a.conv1": [0.5, 0.5], "a.conv2": [0.5, 0.5], "b": [0.25, 0.25, 0.5]}},
        {"epoch": 2},
        {"epoch": 3, "expert_usage": {"a.conv1": [0.0, 1.0], "a.conv2": [0.0, 1.0], "b": [1.0, 0.0, 0.0]}},
    ]
    found = analysis.collapse(lines, {"a.conv1": "a", "a.conv2": "a", "b": "b"}, {1: "later"})
    entropy = 1.5 * math.log(2) / math.log(3)
    expected = [
        ("a.conv1", 1, 2, 1.0, 0.5, 0), ("b", 1, 3, entropy, 0.5, 2),
        ("a.conv1", 3, 2, 0.0, 1.0, 1), ("b", 3, 3, 0.0, 1.0, 0),
    ]  # fmt: skip
    for row, wanted in zip(found.rows, expected, strict=True):
        assert row[:3] == wanted[:3] and row[3:] == pytest.approx(wanted[3:])
    assert len(analysis.collapse(lines).rows) == 6 and found.png()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="lines with expert_usage"):
        analysis.collapse([{"epoch": 1}])


# --- of runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """``block``, N = 3, ``conv``, N = 4 with top_k 2, and ``moe``."""
    folder, threads = tmp_path_factory.mktemp("experts"), torch.get_num_threads()
    with small_architecture():
        for name, kind, options in (
            ("block", "block_moe", {"num_experts": 3, "moe_at": ("layer2",)}),
            ("conv", "conv_moe", {"num_experts": 4, "top_k": 2, "moe_at": ("layer2.*.conv*",)}),
            ("moe", "moe", {}),
        ):
            train(tiny("at", kind, model=ModelConfig(SMALL, kind, width=4, **options)), folder / name, quiet=True)
        torch.set_num_threads(threads)
        yield folder


def test_a_run_has_its_layers_use_on_record(runs: Path) -> None:
    for name, count, layers in (("block", 3, ["layer2.0.experts.conv1"]), ("conv", 4, ["layer2.0.conv1.experts"])):
        for line in Run(runs / name).metrics():
            usage = line["expert_usage"]
            assert layers[0] in usage
            assert all(len(u) == count and sum(u) == pytest.approx(1, abs=1e-3) for u in usage.values())
            if name == "conv":  # of two choices one expert takes half at most
                assert all(max(u) <= 0.5 + 1e-4 for u in usage.values())
        found = analyze([runs / name], only=["collapse"], device="cpu")
        rows = table(found.written[0].finding)
        assert [(row["epoch"], row["layer"]) for row in rows if row["layer"] == layers[0]] == [
            ("1", layers[0]), ("2", layers[0]),
        ]  # fmt: skip
        assert len(rows) == (2 if name == "block" else 4)  # a router each
        top = [max(line["expert_usage"][layers[0]]) for line in Run(runs / name).metrics()]
        assert [float(row["top"]) for row in rows if row["layer"] == layers[0]] == pytest.approx(top)


def test_layers_that_lie_beside_their_router_are_shown_each() -> None:
    torch.manual_seed(0)
    for arch, options, alone in (
        ("vgg16_bn", {"route_per": "stage"}, 12),
        ("resnet18", {"layout": "windows"}, 19),  # three of them shortcuts, which follow their block's last choice
        ("resnet18", {"route_per": "block"}, 8),
        ("resnet18", {"route_per": "network"}, 1),
        ("resnet18", {"router": "global"}, 1),
    ):
        network = create_model(arch, "moe", width=4, num_experts=EXPERTS, **options).eval()
        with record_routing(network) as recorded, torch.no_grad():
            network(torch.rand(2, 3, 32, 32))
        layers = [name for name in recorded if name != "linear"]
        routers = {router.routes for router in routers_of(network).values()}
        assert len({_followed(layer, routers) for layer in layers}) == alone


def test_the_command(runs: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"attack": "pgd2", "limit": 30, "device": "cpu"}
    one = analyze([runs / "block"], only=["experts_alone", "epsilons"], **settings)
    assert {path.name for each in one.written for path in each.paths} >= {"experts_alone.csv", "experts_alone.png"}
    rows = {each.finding.name: table(each.finding) for each in one.written}
    gated = rows["experts_alone"][0]  # the attack that the other analyses have too
    assert (gated["sa"], gated["ra"]) == (rows["epsilons"][0]["ra"], rows["epsilons"][-1]["ra"])
    assert len(rows["experts_alone"]) == 1 + 3
    both = analyze([runs / n for n in ("block", "conv", "moe")], tmp_path, only=["experts_alone"], **settings)
    (joint,) = both.written
    assert joint.source is None and joint.paths[0] == tmp_path / "experts_alone.csv"
    assert [(row["model"], row["experts"]) for row in table(joint.finding) if row["expert"] == "2"] == [
        ("block", "3"), ("conv", "4"), ("conv", "4"),
    ]  # fmt: skip
    assert [(s.source, "--layers says which" in s.reason) for s in both.skipped] == [("moe", True)]
    named = analyze([runs / "moe"], only=["experts_alone"], layers=["layer1"], **settings)
    assert {row["layer"] for row in table(named.written[0].finding)} == {"", "layer1.0.conv1", "layer1.0.conv2"}
    for only in (None, ["collapse"]):
        with pytest.raises(ValueError, match="layers: of experts_alone"):
            analyze([runs / "moe"], only=only, layers=["layer1"], **settings)
    unasked = analyze([runs / "block"], **settings)
    assert any(s.name == "experts_alone" and "--only experts_alone" in s.reason for s in unasked.skipped)
