# SPDX-License-Identifier: Apache-2.0
"""Costs counted against counts by hand, and latency."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from advmoe.cli import main
from advmoe.models import create_model, list_models
from advmoe.profiling import backbone_costs, measure_latency, profile
from advmoe.routers import list_routers
from moe_kernels import ExpertSlices, RoutedConv2d, RoutedLinear, Routing

# ResNet-18 of width 64 on 32×32, r = 0.5, N = 2: millions of parameters without routers, billions of multiply-accumulates
COUNTED = (("dense", 11.17, 0.5554), ("s_dense", 2.80, 0.1393), ("moe", 5.57, 0.1517))


@pytest.mark.parametrize(("kind", "params", "gflops"), COUNTED)
def test_cost_of_resnet18_is_the_counted_one(kind: str, params: float, gflops: float) -> None:
    model = create_model("resnet18", kind)
    cost = profile(model)
    assert cost.pathway_gflops == pytest.approx(gflops, abs=5e-5)
    assert sum(p.numel() for n, p in model.named_parameters() if ".router." not in n) / 1e6 == pytest.approx(
        params, abs=0.005
    )
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.gflops == cost.pathway_gflops + cost.router_gflops
    assert (cost.router_gflops > 0) == (kind == "moe")
    assert sum(layer.macs for layer in cost.layers) / 1e9 == pytest.approx(cost.gflops)


@pytest.mark.parametrize("experts", [1, 2, 16])
def test_more_experts_cost_parameters_but_no_pathway(experts: int) -> None:
    cost = profile(create_model("resnet18", "moe", num_experts=experts, width=16))
    assert cost.pathway_gflops == profile(create_model("resnet18", "moe", num_experts=2, width=16)).pathway_gflops


class Layer(nn.Module):
    """One layer; routed ones get every sample to the last expert, in ``k`` choices."""

    def __init__(self, layer: nn.Module, channels: int, k: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.channels = channels
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :1].expand(-1, self.channels, -1, -1)
        if isinstance(self.layer, (nn.Linear, RoutedLinear)):
            x = x.mean((2, 3))
        if not isinstance(self.layer, (RoutedConv2d, RoutedLinear)):
            return self.layer(x)
        expert = torch.full((len(x), self.k) if self.k else (len(x),), self.layer.num_experts - 1)
        return self.layer(x, Routing(expert, num_experts=self.layer.num_experts).expand())


@pytest.mark.parametrize(
    ("layer", "channels", "k", "macs"),
    [
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), 3, 0, 8 * 8 * 8 * 27),
        (nn.Conv2d(8, 8, 3, padding=1, groups=8), 8, 0, 8 * 16 * 16 * 9),
        (nn.Linear(8, 5), 8, 0, 40),
        (RoutedConv2d(4, 6, 3, padding=1, num_experts=3), 4, 0, 6 * 16 * 16 * 36),
        (RoutedConv2d(8, 8, 3, padding=1, groups=8, num_experts=3), 8, 0, 8 * 16 * 16 * 9),
        (RoutedConv2d(ExpertSlices.windows(8, 0.5, 3), 6, 3, padding=1, num_experts=3), 4, 0, 6 * 16 * 16 * 36),
        (RoutedConv2d(4, 6, 3, padding=1, num_experts=3), 4, 2, 2 * 6 * 16 * 16 * 36),
        (RoutedLinear(8, 5, num_experts=4), 8, 0, 40),
    ],
    ids=["conv", "depthwise", "linear", "routed", "routed_depthwise", "routed_windows", "routed_top_2", "routed_linear"],
)
def test_a_layers_cost_is_what_is_computed(layer: nn.Module, channels: int, k: int, macs: int) -> None:
    cost = profile(Layer(layer, channels, k), image_size=16)
    assert [(c.name, c.macs, c.router) for c in cost.layers] == [("layer", macs, False)]


def test_a_layer_used_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    assert [layer.macs for layer in profile(Twice(), image_size=4).layers] == [16 * 9] * 2


def test_profile_leaves_the_model_as_it_was() -> None:
    model = create_model("resnet18", "moe", width=8, image_size=8).train()
    model.bn1.eval()
    model.linear.weight.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    profile(model, 8)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["linear.weight"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_latency_is_measured_for_each_model_and_modes_are_restored() -> None:
    models = [create_model("resnet18", kind, width=8, image_size=16) for kind in ("moe", "dense")]
    models[0].bn1.eval()
    models[1].eval()
    modes = [[m.training for m in model.modules()] for model in models]
    running = models[0].layer1[0].bn1.running_mean.clone()
    first, second = measure_latency(models, 16, batch_size=2, repeats=4)
    assert 0 < first.low_ms <= first.median_ms <= first.high_ms
    assert (second.batch_size, second.repeats) == (2, 4)
    assert [[m.training for m in model.modules()] for model in models] == modes
    assert torch.equal(models[0].layer1[0].bn1.running_mean, running)
    (single,) = measure_latency(models[:1], 16, repeats=1)
    assert single.low_ms == single.median_ms == single.high_ms


@pytest.mark.parametrize("argument", ["batch_size", "repeats"])
def test_nothing_to_time_is_refused(argument: str) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected at least 1, got 0"):
        measure_latency([nn.Flatten()], **{argument: 0})


# Billions of multiply-accumulates on 32×32 images and 10 classes, at r = 0.5: dense, S-Dense, MoE pathway
REFERENCE = {
    "resnet18": (0.5554, 0.1393, 0.1517),
    "wrn28_10": (5.2433, 1.3109, 1.3109),
    "vgg16_bn": (0.3138, 0.0791, 0.0791),
    "densenet40": (0.0724, 0.0183, 0.0183),
}


def test_costs_of_the_backbones_are_the_reference_ones() -> None:
    costs = {c.arch: c for c in backbone_costs(list(REFERENCE), [0.5], [32])}
    for arch, expected in REFERENCE.items():
        found = costs[arch]
        assert (found.dense, found.s_dense, found.pathway) == pytest.approx(expected, abs=6e-5)
        assert 0 < found.routers < 1e-3 * found.pathway
    with torch.device("meta"):
        assert profile(create_model("resnet18", "moe", router="global")).router_gflops == pytest.approx(0.0406, abs=6e-5)


def convolution(size: int, out: int, inner: int, kernel: int = 3) -> int:
    """Multiply-accumulates of a convolution with a ``size``×``size`` output."""
    return size * size * out * inner * kernel * kernel


def resnet18_by_hand(stem: int, widths: tuple[int, ...], size: int) -> int:
    total, source = convolution(size, stem, 3), stem
    for i, width in enumerate(widths):
        size //= 2 if i else 1
        total += convolution(size, width, source) + 3 * convolution(size, width, width)
        total += convolution(size, width, source, 1) if width != source else 0
        source = width
    return total + 10 * source


def wrn28_10_by_hand(stem: int, widths: tuple[int, ...], size: int) -> int:
    total, source = convolution(size, stem, 3), stem
    for i, width in enumerate(widths):
        size //= 2 if i else 1
        total += convolution(size, width, source) + 7 * convolution(size, width, width)
        total += convolution(size, width, source, 1)
        source = width
    return total + 10 * source


def vgg16_by_hand(widths: tuple[int, ...], size: int) -> int:
    total, source = 0, 3
    for i, (width, count) in enumerate(zip(widths, (2, 2, 3, 3, 3), strict=True)):
        size //= 2 if i else 1
        for _ in range(count):
            total += convolution(size, width, source)
            source = width
    return total + 4 * source * 256 + 256 * 256 + 256 * 10


def densenet40_by_hand(stem: int, growth: int, size: int) -> int:
    total, channels = convolution(size, stem, 3), stem
    for block in range(3):
        for _ in range(6):
            total += convolution(size, 4 * growth, channels, 1) + convolution(size, growth, 4 * growth)
            channels += growth
        if block < 2:
            total += convolution(size, channels // 2, channels, 1)
            channels, size = channels // 2, size // 2
    return total + 10 * channels


@pytest.mark.parametrize(("ratio", "size"), [(0.2, 32), (0.5, 64), (0.8, 32), (1.0, 32)])
def test_costs_of_the_backbones_counted_by_hand(ratio: float, size: int) -> None:
    def scaled(*widths: int) -> tuple[int, ...]:
        return tuple(int(ratio * w) for w in widths)

    resnet, wide, vgg = (64, 128, 256, 512), (160, 320, 640), (64, 128, 256, 512, 512)
    expected = {
        "resnet18": (
            resnet18_by_hand(64, resnet, size),
            resnet18_by_hand(*scaled(64), scaled(*resnet), size),
            resnet18_by_hand(64, scaled(*resnet), size),
        ),
        "wrn28_10": (wrn28_10_by_hand(16, wide, size), *[wrn28_10_by_hand(*scaled(16), scaled(*wide), size)] * 2),
        "vgg16_bn": (vgg16_by_hand(vgg, size), *[vgg16_by_hand(scaled(*vgg), size)] * 2),
        "densenet40": (densenet40_by_hand(24, 12, size), *[densenet40_by_hand(*scaled(24, 12), size)] * 2),
    }
    for cost in backbone_costs(list(expected), [ratio], [size]):
        assert [round(1e9 * v) for v in (cost.dense, cost.s_dense, cost.pathway)] == list(expected[cost.arch]), cost.arch


@pytest.mark.parametrize("experts", [2, 8])
def test_a_pathway_of_windows_costs_what_a_pathway_costs(experts: int) -> None:
    """But for what is not routed and keeps its full width, the first convolution; and no projection at its end."""
    (windows,) = backbone_costs(["resnet18"], [0.5], [32], num_experts=experts, layout="windows")
    partition = resnet18_by_hand(64, (32, 64, 128, 256), 32)
    assert round(1e9 * windows.pathway) == partition - convolution(32, 32, 64, 1)


def test_profile_prints_every_backbone_and_every_router(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--table", "--ratios", "0.5"]) == 0
    table = capsys.readouterr().out
    assert all(arch in table for arch in list_models()) and "0.1517" in table and "0.5554" in table
    assert main(["profile", "--routers", "--image-size", "32"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in list_routers()) and "40.5505" in table
