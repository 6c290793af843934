# SPDX-License-Identifier: Apache-2.0
"""Analyses against what is known of hand-made models, attacks and records."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from advmoe import analysis
from advmoe.analysis import Finding, Observation, Result, observe
from advmoe.attacks import PGD, AttackResult
from advmoe.data import TensorSplit, stream_generator
from advmoe.evaluation import evaluate
from advmoe.models import create_model, record_routing
from advmoe.routers import record_scores, routers_of
from advmoe.sparse import fix_masks, masked_convolutions, start_search
from moe_kernels import RoutedConv2d, Routing

COUNT = 60
SIZE = 4


class Switches(nn.Module):
    """Whether pixel (1, 1) of channel 0 is bright chooses the first layer's expert, that of channel 1 the second's, and
    that of channel ``reads`` the class."""

    def __init__(self, reads: int = 2) -> None:
        super().__init__()
        self.first = RoutedConv2d(3, 1, 1, bias=False, num_experts=2)
        self.second = RoutedConv2d(3, 1, 1, bias=False, num_experts=2)
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        bright = x[:, :, 1, 1] - 0.5
        for at, layer in enumerate((self.first, self.second)):
            layer(x, Routing((bright[:, at] > 0).long(), num_experts=2))
        return torch.stack([-bright[:, self.reads], bright[:, self.reads]], 1)


@dataclass
class Planned:
    """Sets pixel (1, 1) of the image whose number is written in pixel (0, 0) to what the table says; or, without one,
    that of the channel that the model reads, of every second image to the wrong side, and of image 4 to the right one."""

    table: Tensor | None = None  # bool [n, 3]
    epsilon: float = 0.5

    def describe(self) -> str:
        return "as planned"

    def run(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> AttackResult:
        found = images.clone()
        index = (images[:, 0, 0, 0] * 255).round().long()
        if self.table is not None:
            found[:, :, 1, 1] = self.table[index].float()
        else:
            odd = index % 2 == 1
            found[odd, model.reads, 1, 1] = (1 - labels[odd]).float()
            found[index == 4, model.reads, 1, 1] = labels[index == 4].float()
        return AttackResult(found, torch.zeros(len(images), dtype=torch.bool))


def bits(seed: int) -> Tensor:
    return torch.rand((COUNT, 3), generator=torch.Generator().manual_seed(seed)) < 0.5


def split(clean: Tensor, labels: Tensor) -> TensorSplit:
    images = torch.zeros(COUNT, 3, SIZE, SIZE, dtype=torch.uint8)
    images[:, :, 1, 1] = clean.byte() * 255
    images[:, :, 0, 0] = torch.arange(COUNT)[:, None].byte()
    return TensorSplit(images, labels)


def planned() -> tuple[Observation, Tensor, Tensor, Tensor]:
    """An observation, and what it has to know: clean and attacked bits ``[n, 3]``, labels."""
    clean, attacked, labels = bits(0), bits(1), bits(2)[:, 0].long()
    attacked[:9] = clean[:9]  # of so few bits none would stay as they are
    observed = observe({"it": Switches()}, split(clean, labels), Planned(attacked), batch_size=7)["it"]
    return observed, clean, attacked, labels


def table(finding: Finding) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(finding.csv())))


def require_picture(finding: Finding) -> None:
    data = finding.png(dpi=40)
    assert data.startswith(b"\x89PNG") and len(data) > 2000


def test_dissection_counts_every_image_once() -> None:
    observed, clean, attacked, labels = planned()
    found = analysis.dissection(observed)
    expected: Counter[tuple[int, int]] = Counter()
    hopeless: Counter[tuple[int, int]] = Counter()
    for i in range(COUNT):
        routers = bool(clean[i, 0] != attacked[i, 0] or clean[i, 1] != attacked[i, 1])
        case = int(routers), int(attacked[i, 2] != labels[i])
        expected[case] += 1
        hopeless[case] += int(clean[i, 2] != labels[i])
    rows = table(found)
    got = {(int(r["routers_fooled"]), int(r["prediction_fooled"])): int(r["images"]) for r in rows}
    assert got == expected and len(rows) == 4 and min(got.values()) > 0
    assert sum(got.values()) == COUNT == len(observed)
    assert sum(float(r["share"]) for r in rows) == pytest.approx(1, abs=1e-5)
    assert {(int(r["routers_fooled"]), int(r["prediction_fooled"])): int(r["wrong_clean"]) for r in rows} == hopeless
    right = (clean[:, 2] == labels.bool()) & (attacked[:, 2] == labels.bool())
    assert observed.ra == int(right.sum()) / COUNT
    require_picture(found)


def test_usage_classes_flips_and_entropy_by_loops() -> None:
    observed, clean, attacked, labels = planned()
    for row in table(analysis.usage(observed)):
        at, expert = ["first", "second"].index(row["layer"]), int(row["expert"])
        for name, each in (("clean", clean), ("attacked", attacked)):
            assert float(row[name]) == pytest.approx((each[:, at] == bool(expert)).double().mean().item(), abs=1e-5)
    rows = table(analysis.classes(observed))
    assert len(rows) == 2 * 2 * 2
    for row in rows:
        at, of = ["first", "second"].index(row["layer"]), labels == int(row["class"])
        assert int(row["images"]) == int(of.sum())
        for name, each in (("clean", clean), ("attacked", attacked)):
            share = (each[of, at] == bool(int(row["expert"]))).double().mean().item()
            assert float(row[name]) == pytest.approx(share, abs=1e-5)
    changed = clean != attacked
    flips = {row["layer"]: float(row["images"]) for row in table(analysis.flips(observed))}
    expected = {"first": changed[:, 0], "second": changed[:, 1], "any": changed[:, :2].any(1)}
    assert flips == {name: pytest.approx(each.double().mean().item(), abs=1e-5) for name, each in expected.items()}
    first = table(analysis.entropy(observed))[0]
    share = clean[:, 0].double().mean().item()
    spread = -(share * math.log(share) + (1 - share) * math.log(1 - share)) / math.log(2)
    assert float(first["usage_clean"]) == pytest.approx(spread, abs=1e-5)
    assert first["router_clean"] == ""  # nobody's scores are known
    for make in (analysis.usage, analysis.classes, analysis.flips, analysis.entropy):
        require_picture(make(observed))


def test_transfer_and_epsilons_of_models_with_weaknesses_of_their_own() -> None:
    # each is fooled by its own channel alone, on every second image
    clean = bits(3)[:, :1].expand(-1, 3)
    labels = clean[:, 0].long()
    labels[4] = 1 - labels[4]  # wrong when clean, and right as it is attacked, which is no robustness
    models = {"a": Switches(reads=0), "b": Switches(reads=2)}
    observed = observe(models, split(clean, labels), Planned(), batch_size=16, cross=True)
    found = analysis.transfer(observed)
    got = {(r["attacked_on"], r["judged_by"]): float(r["ra"]) for r in table(found)}
    own, other = (COUNT / 2 - 1) / COUNT, (COUNT - 1) / COUNT
    expected = {("a", "a"): own, ("b", "b"): own, ("a", "b"): other, ("b", "a"): other}
    assert got == {key: pytest.approx(value, abs=1e-5) for key, value in expected.items()}
    assert observed["a"].ra == own and observed["a"].sa == other
    require_picture(found)
    with pytest.raises(ValueError, match="at least two"):
        analysis.transfer({"a": observed["a"]})
    curve = analysis.epsilons({label: [each] for label, each in observed.items()})
    rows = [(r["model"], float(r["epsilon"]), float(r["ra"])) for r in table(curve)]
    assert rows == [(m, e, pytest.approx(v, abs=1e-5)) for m in "ab" for e, v in ((0, other), (0.5, own))]
    require_picture(curve)


def noise(count: int = 20, size: int = 8) -> TensorSplit:
    g = stream_generator("analysis")
    images = torch.randint(0, 256, (count, 3, size, size), generator=g, dtype=torch.uint8)
    return TensorSplit(images, torch.randint(0, 10, (count,), generator=g))


def network(arch: str = "resnet18", **options: object) -> nn.Module:
    """In training mode, with running statistics of some noise."""
    torch.manual_seed(0)
    size = int(options.pop("image_size", 8))  # type: ignore[call-overload]
    model = create_model(arch, **{"kind": "moe", "width": 8, "image_size": size, **options}).train()
    for seed in range(5):
        with torch.no_grad():
            model(torch.rand(16, 3, size, size, generator=stream_generator(seed)))
    return model


def test_an_observation_is_what_the_model_does() -> None:
    """Against evaluate, and against hooks around a forward of all images at once."""
    model, data = network(), noise()
    attack = PGD(0.1, 0.05, 3, random_start=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    observed = observe({"it": model}, data, attack, batch_size=7)["it"]
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    whole = evaluate(model, data, {"pgd": attack}, batch_size=20)
    assert (observed.sa, observed.ra) == (whole.sa, whole.attacks["pgd"].ra)
    images, labels = data.batch(torch.arange(len(data)))
    model.eval()
    for seen, name in ((images, "clean"), (attack(model, images, labels), "attacked")):
        with record_routing(model) as routings, record_scores(model) as scores, torch.no_grad():
            predicted = model(seen).argmax(1)
        assert torch.equal(getattr(observed, name), predicted)
        assert [choice.layers for choice in observed.choices] == [(layer,) for layer in routings]
        for choice in observed.choices:
            assert torch.equal(getattr(choice, name)[:, 0, 0].long(), routings[choice.layers[0]].expert)
            own = scores[f"{choice.layers[0]}.router"]
            if name == "clean":
                assert choice.scores is not None and torch.allclose(choice.scores, own, atol=1e-5)
            assert choice.entropy is not None
            expected = torch.distributions.Categorical(logits=own.double()).entropy()
            assert torch.allclose(choice.entropy[name == "attacked"], expected, atol=1e-4)


def test_layers_of_one_choice_are_one_site() -> None:
    observed = observe({"it": network(router="image")}, noise(), PGD(0.1, 0.1, 1))["it"]
    assert len(observed.choices) == 1 and len(observed.choices[0].layers) == 16
    assert observed.choices[0].name == "layer1.0.conv1 + 15 more"
    windows = observe({"it": network(layout="windows")}, noise(), PGD(0.1, 0.1, 1))["it"]
    assert ("layer2.0.conv2", "layer2.0.shortcut.0") in [choice.layers for choice in windows.choices]


def test_tokens_and_several_experts_each() -> None:
    model = network("vit_small", width=64, num_experts=5, top_k=2, gate="softmax")
    data = noise()
    observed = observe({"it": model}, data, PGD(0.1, 0.1, 1), batch_size=6)["it"]
    with record_routing(model.eval()) as routings, torch.no_grad():
        model(data.batch(torch.arange(20))[0])
    for choice in observed.choices:
        routing = routings[choice.layers[0]]
        assert choice.clean.shape == (20, 5, 2) and choice.scores is None and choice.entropy is not None
        assert torch.equal(choice.clean.long(), routing.expert.view(20, 5, 2).sort(2).values)
        assert choice.entropy[0].shape == (20,)
    rows = table(analysis.flips(observed))
    assert all(float(row["choices"]) <= float(row["images"]) for row in rows) and len(rows) == 7
    shares = [float(row["clean"]) for row in table(analysis.usage(observed)) if row["layer"] == "blocks.1.mlp.fc1"]
    assert len(shares) == 5 and sum(shares) == pytest.approx(1, abs=1e-5)
    assert sum(row[3] for row in analysis.dissection(observed).rows) == 20
    require_picture(analysis.flips(observed))
    with pytest.raises(ValueError, match="same names"):
        analysis.pathways(observed, model, masked())


def test_no_images_no_model_and_no_scores() -> None:
    data = noise()
    with pytest.raises(ValueError, match="at least one of each, got 20 and 0"):
        observe({}, data, PGD(0.1, 0.1, 1))
    with pytest.raises(ValueError, match=r"expected scores \[20, classes\].*got shape \(20, 2\)"):
        observe({"it": Switches()}, data, PGD(0.1, 0.1, 1))
    dense = observe({"it": create_model("resnet18", "dense", width=8, image_size=8)}, data, PGD(0.1, 0.1, 1))["it"]
    for make in (analysis.dissection, analysis.usage, analysis.classes, analysis.flips, analysis.entropy):
        with pytest.raises(ValueError, match="routed layers, got none"):
            make(dense)


def masked(**options: object) -> nn.Module:
    """With random masks."""
    model = create_model("resnet18", **{"kind": "sparse", "width": 8, "image_size": 8, **options})
    start_search(model)
    g = stream_generator("masks")
    for layer in masked_convolutions(model).values():
        layer.scores.data.copy_(torch.rand(layer.scores.shape, generator=g))
    fix_masks(model)
    return model


@pytest.mark.parametrize("options", [{}, {"layout": "windows", "num_experts": 3}, {"num_experts": 4, "ratio": 0.25}])
def test_pathways_by_sets(options: dict) -> None:
    model, sparse = network(**options), masked()
    observed = observe({"it": model}, noise(), PGD(0.1, 0.1, 1))["it"]
    clean, attacked, _, common, left_out = analysis.overlaps(observed, model, sparse)
    masks, layers = masked_convolutions(sparse), dict(model.named_modules())
    windows = "layout" in options
    assert (common, left_out) == ((19, 1) if windows else (16, 4))  # the stem, and projections without experts
    for i, (got, name) in itertools.product(range(20), ((clean, "clean"), (attacked, "attacked"))):
        pathway, mask = set(), set()
        for choice in observed.choices:
            for layer in choice.layers:
                slices = layers[layer].out_slices
                start = slices.starts[int(getattr(choice, name)[i])]
                pathway |= {(layer, channel) for channel in range(start, start + slices.width)}
                mask |= {(layer, channel) for channel, kept in enumerate(masks[layer].mask.tolist()) if kept}
        assert got[i].item() == pytest.approx(len(pathway & mask) / len(pathway | mask), rel=1e-6)
    found = analysis.pathways(observed, model, sparse)
    bars = [row for row in found.rows if row[:2] == ("clean", "density")]
    assert sum((to - start) * value for _, _, start, to, value in bars) == pytest.approx(1)
    assert ("clean", "mean", None, None, pytest.approx(clean.mean().item())) in found.rows
    require_picture(found)


def test_pathways_that_cannot_be_compared() -> None:
    sparse, data = masked(), noise(4)

    def refused(model: nn.Module, against: nn.Module, match: str) -> None:
        observed = observe({"it": model}, data, PGD(0.1, 0.1, 1))["it"]
        with pytest.raises(ValueError, match=match):
            analysis.pathways(observed, model, against)

    model = network()
    refused(network(num_experts=3), sparse, "12 channels of 3 experts of 4: in the partition layout")
    refused(network(width=16), sparse, "expected the 8 channels of the masked layer1.0.conv1, got 16 channels")
    refused(model, create_model("resnet18", "sparse", width=8, image_size=8), "no mask is learned yet")
    refused(model, network(), "expected a run of kind sparse")


def test_one_pathway_for_all_has_no_curve() -> None:
    model = network()
    for router in routers_of(model).values():
        router.only = 0
    observed = observe({"it": model}, noise(), PGD(0.1, 0.1, 1))["it"]
    assert all(choice.entropy is None for choice in observed.choices)
    found = analysis.pathways(observed, model, masked())
    assert next(row for row in found.rows if row[1] == "sd")[4] == pytest.approx(0, abs=1e-12)
    require_picture(found)
    require_picture(analysis.entropy(observed))


def test_the_radius_of_a_linear_router_is_exact() -> None:
    """Up to the radius no step in the worst direction changes the choice, a little beyond it does; nor do random ones."""
    std = (0.2, 0.3, 0.1)
    model = network(router="linear", num_experts=4, temperature=0.7, std=std, image_size=8).double().eval()
    assert model.router.score_norm is not None and model.router.score_norm.running_var.std() > 0
    data = noise(30)
    images = data.batch(torch.arange(30))[0].double()
    observed = observe({"it": model.float()}, data, PGD(0.02, 0.01, 2))["it"]
    weight = analysis.linear_map(model)
    model.double()

    def scores(x: Tensor) -> Tensor:
        with record_scores(model) as each, torch.no_grad():
            model(x)
        return each["router"].detach()

    clean = scores(images)
    chosen = clean.argmax(1)
    radii = analysis.route_radii(weight, clean)
    assert len(chosen.unique()) > 1 and bool((radii > 0).all())
    flipped_by_any = torch.zeros(30, dtype=torch.bool)
    for other in range(4):
        direction = (weight[other] - weight[chosen]).sign().view(30, 3, 8, 8)
        within = images + 0.9999 * radii.view(-1, 1, 1, 1) * direction
        assert torch.equal(scores(within).argmax(1), chosen)
        beyond = images + 1.0001 * radii.view(-1, 1, 1, 1) * direction
        flipped_by_any |= scores(beyond).argmax(1) != chosen
    assert bool(flipped_by_any.all())
    signs = torch.rand(images.shape, generator=stream_generator("signs")).sub(0.5).sign()
    assert torch.equal(scores(images + 0.9999 * radii.view(-1, 1, 1, 1) * signs).argmax(1), chosen)
    found = analysis.radius(observed, model)
    certified = dict(found.rows)
    assert certified[0.02] == pytest.approx((radii > 0.02).double().mean().item()) and certified[0.0] == 1
    assert certified[0.02] <= 1 - observed.flipped().double().mean().item()
    require_picture(found)


def test_experts_of_equal_rows_never_change_places() -> None:
    weight = torch.tensor([[1.0, -2.0], [1.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    radii = analysis.route_radii(weight, torch.tensor([[1.0, 0.5, 0.1]]))
    assert radii.item() == pytest.approx(0.9 / 3)
    assert analysis.route_radii(weight[:2], torch.tensor([[1.0, 0.5]])).item() == math.inf


def test_only_a_linear_router_has_a_radius() -> None:
    with pytest.raises(ValueError, match="got 16: LightRouter"):
        analysis.linear_map(network())
    with pytest.raises(ValueError, match="got 0: none"):
        analysis.linear_map(nn.Linear(1, 1))


def test_history_has_every_epoch_and_loss() -> None:
    lines = [
        {"epoch": 1, "loss": 2.0, "train_sa": 0.2, "validation_sa": 0.3, "validation_ra": 0.1, "expert_usage": {}},
        {"epoch": 2, "router_loss": 1.5, "loss": 1.0, "train_sa": 0.4, "validation_sa": 0.5, "validation_ra": 0.25},
    ]
    found = analysis.history(lines, {1: "experts apart"}, "pgd10")
    assert found.columns == ("epoch", "validation_sa", "validation_ra", "train_sa", "loss", "router_loss")
    assert found.rows == [(1, 0.3, 0.1, 0.2, 2.0, None), (2, 0.5, 0.25, 0.4, 1.0, 1.5)]
    assert "held out" in found.note and "pgd10" in found.note
    require_picture(found)
    with pytest.raises(ValueError, match="at least one epoch"):
        analysis.history([])


def test_stability_says_how_far_each_run_falls() -> None:
    def lines(*robust: float) -> list[dict[str, float]]:
        return [{"epoch": i, "validation_sa": 0.5, "validation_ra": ra} for i, ra in enumerate(robust, start=1)]

    found = analysis.stability({"at": lines(0.2, 0.3, 0.1, 0.25), "rt-er": lines(0.1, 0.2)}, "pgd10")
    assert [row[:4] for row in found.rows[3:5]] == [("at", 4, 0.5, 0.25), ("rt-er", 1, 0.5, 0.1)]
    assert [row[4] for row in found.rows] == pytest.approx([0, 0, 0.2, 0.05, 0, 0])
    assert "pgd10" in found.note and "at 20.0, rt-er 0.0" in found.note
    require_picture(found)
    with pytest.raises(ValueError, match="at least one epoch of at"):
        analysis.stability({"at": []})


def test_reproduced_figures_of_what_is_there() -> None:
    results = [
        Result("d", "ResNet-18", "AT (Dense)", sa=(0.8,), ra=(0.5,)),
        Result("a", "ResNet-18", "AdvMoE", 2, 0.2, sa=(0.7, 0.72), ra=(0.4, 0.44), paper_sa=0.79, paper_ra=0.49),
        Result("b", "ResNet-18", "AdvMoE", 2, 0.5, paper_ra=0.51),
        Result("c", "ResNet-18", "AdvMoE", 8, 0.5),
    ]
    for make in (analysis.fig7, analysis.fig8):
        found = make(results, "a scale")
        rows = {row["recipe"]: row for row in table(found)}
        assert list(rows) == ["d", "a", "b"]  # what neither we nor the paper have is no row
        assert float(rows["a"]["ra"]) == pytest.approx(0.42) and float(rows["a"]["ra_sd"]) == pytest.approx(0.0282843)
        assert (rows["a"]["seeds"], rows["a"]["paper_ra"], rows["b"]["ra"], rows["d"]["ra_sd"]) == ("2", "0.49", "", "")
        assert "2 of 4 recipes done, 1 to 2 seeds" in found.note and "a scale" in found.note
        require_picture(found)
        with pytest.raises(ValueError, match=f"advmoe reproduce {found.name}"):
            make(results[2:])
    bars = analysis.fig3(results, ["AdvMoE", "M3"])
    require_picture(bars)
    with pytest.raises(ValueError, match="advmoe reproduce fig3"):
        analysis.fig3(results, ["M3"])
    lines = [Result(str(e), "ResNet-18", m, epsilon=e, sa=(0.8,), ra=(0.5,)) for e in (0.01, 0.02) for m in "xy"]
    require_picture(analysis.fig2(lines))
