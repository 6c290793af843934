# SPDX-License-Identifier: Apache-2.0
"""Backbones: costs, layouts of the released code, and what training asks of a routed model."""

from __future__ import annotations

import copy

import pytest
import torch

from advmoe.models import backbone_parameters, create_model, list_models, record_routing, router_parameters
from advmoe.profiling import measure_latency, profile
from moe_kernels import RoutedConv2d

# key: shape, of the released ResNet-18 at r = 0.5 and N = 2, router apart
RELEASED = {
    "conv1.weight": (64, 3, 3, 3),
    "layer1.0.conv1.weight": (64, 64, 3, 3),
    "layer1.0.conv2.weight": (64, 32, 3, 3),
    "layer1.0.shortcut.0.weight": (32, 64, 1, 1),
    "layer1.1.conv1.weight": (64, 32, 3, 3),
    "layer1.1.conv2.weight": (64, 32, 3, 3),
    "layer2.0.conv1.weight": (128, 32, 3, 3),
    "layer2.0.conv2.weight": (128, 64, 3, 3),
    "layer2.0.shortcut.0.weight": (64, 32, 1, 1),
    "layer2.1.conv1.weight": (128, 64, 3, 3),
    "layer2.1.conv2.weight": (128, 64, 3, 3),
    "layer3.0.conv1.weight": (256, 64, 3, 3),
    "layer3.0.conv2.weight": (256, 128, 3, 3),
    "layer3.0.shortcut.0.weight": (128, 64, 1, 1),
    "layer3.1.conv1.weight": (256, 128, 3, 3),
    "layer3.1.conv2.weight": (256, 128, 3, 3),
    "layer4.0.conv1.weight": (512, 128, 3, 3),
    "layer4.0.conv2.weight": (512, 256, 3, 3),
    "layer4.0.shortcut.0.weight": (256, 128, 1, 1),
    "layer4.1.conv1.weight": (512, 256, 3, 3),
    "layer4.1.conv2.weight": (512, 256, 3, 3),
    "linear.weight": (10, 256),
    "linear.bias": (10,),
}
MULTIPLES = (("dense", 11.17, 0.5554, 0.0), ("s_dense", 2.80, 0.1393, 0.0), ("moe", 5.57, 0.1517, 0.0))


def small(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("resnet18", **{"kind": "moe", "width": 8, "image_size": 16, **options})  # type: ignore[arg-type]


def images(count: int = 6, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("kind", "params", "gflops", "_"), MULTIPLES)
def test_cost_of_resnet18_is_the_counted_one(kind: str, params: float, gflops: float, _: float) -> None:
    cost = profile(create_model("resnet18", kind))
    assert cost.pathway_gflops == pytest.approx(gflops, abs=5e-5)
    assert cost.params / 1e6 == pytest.approx(params, abs=0.01)
    assert cost.gflops == cost.pathway_gflops + cost.router_gflops


def test_global_router_costs_what_the_released_one_does() -> None:
    model = create_model("resnet18", "moe", router="global")
    assert sum(p.numel() for p in router_parameters(model)) == 269_202
    assert profile(model).router_gflops == pytest.approx(0.04055, abs=1e-5)


def test_light_routers_cost_less_than_a_hundredth() -> None:
    cost = profile(create_model("resnet18", "moe", router="light"))
    assert 0 < cost.router_gflops < 0.01 * cost.pathway_gflops


def test_state_dict_has_the_released_shapes() -> None:
    model = create_model("resnet18", "moe", ratio=0.5, num_experts=2)
    own = {k: tuple(v.shape) for k, v in model.state_dict().items() if ".router." not in k}
    weights = {k: v for k, v in own.items() if ".bn" not in k and not k.startswith("bn1") and "shortcut.1" not in k}
    assert weights == RELEASED
    assert own["layer3.0.bn1.running_mean"] == (128,)  # shared by the experts
    assert sum(isinstance(m, RoutedConv2d) for m in model.modules()) == 16


def test_per_expert_batch_norm_has_statistics_for_each() -> None:
    model = small(bn="per_expert", num_experts=3)
    assert model.state_dict()["layer1.0.bn1.running_mean"].shape == (3 * 4,)
    assert model(images()).shape == (6, 10)


@pytest.mark.parametrize("router", ["light", "global"])
@pytest.mark.parametrize("gate", ["straight_through", "softmax", "raw_straight_through", "none"])
@pytest.mark.parametrize("gate_after", ["conv", "norm"])
def test_every_combination_trains(router: str, gate: str, gate_after: str) -> None:
    model = small(router=router, gate=gate, gate_after=gate_after)
    model(images()).square().sum().backward()
    for name, p in model.named_parameters():
        if ".router." in name or name.startswith("router."):
            assert (p.grad is None) == (gate == "none"), name
        else:
            assert p.grad is not None and torch.isfinite(p.grad).all(), name


def test_softmax_gate_of_a_global_router_is_applied_once() -> None:
    model = small(router="global", gate="softmax").eval()
    with record_routing(model) as routings, torch.no_grad():
        gated = model(images())
    assert all(r.gate is None for r in routings.values())
    choice = model.router.route(model.normalize(images()))
    model.router.gate = "none"
    with torch.no_grad():
        plain = model(images())
    bias = model.linear.bias
    torch.testing.assert_close(gated - bias, (plain - bias) * choice.gate[:, None])


def test_global_router_gives_every_layer_one_choice() -> None:
    model = small(router="global")
    with record_routing(model) as routings:
        model(images())
    first, *rest = (r.expert for r in routings.values())
    assert len(rest) == 15 and all(torch.equal(first, other) for other in rest)


def test_record_routing_names_layers_in_order_and_forgets_the_last_forward() -> None:
    model = small()
    with record_routing(model) as routings:
        model(images(6))
        model(images(2))
    names = [n for n, m in model.named_modules() if isinstance(m, RoutedConv2d)]
    assert list(routings) == names
    assert all(r.expert.shape == (2,) for r in routings.values())


def test_router_and_backbone_parameters_are_a_partition() -> None:
    for router in ("light", "global"):
        model = small(router=router)
        routers, backbone = router_parameters(model), backbone_parameters(model)
        assert not {id(p) for p in routers} & {id(p) for p in backbone}
        assert {id(p) for p in [*routers, *backbone]} == {id(p) for p in model.parameters()}
        assert routers


def test_forward_is_re_entrant_and_copies_are_independent() -> None:
    model = small().eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(images())
        other.linear.weight.zero_()
        other(images(3))
        assert torch.equal(model(images()), expected)


def test_one_sample_is_routed_as_in_a_batch() -> None:
    model = small().eval()
    with record_routing(model) as routings, torch.no_grad():
        model(images(6))
        together = {n: r.expert[2].item() for n, r in routings.items()}
        model(images(6)[2:3])
        assert {n: r.expert[0].item() for n, r in routings.items()} == together


def test_compiles_as_one_graph() -> None:
    model = small().eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images()), model(images()))


def test_normalisation_is_inside() -> None:
    torch.manual_seed(0)
    plain = create_model("resnet18", "dense", width=8, image_size=16, normalize=False).eval()
    torch.manual_seed(0)
    inside = create_model("resnet18", "dense", width=8, image_size=16, mean=(0.5,) * 3, std=(0.25,) * 3).eval()
    assert plain.state_dict().keys() == inside.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(inside(images()), plain((images() - 0.5) / 0.25))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "resnet81"}, r"arch: expected one of .*resnet18.*did you mean resnet18"),
        ({"kind": "mo"}, r"kind: .*did you mean moe"),
        ({"router": "lihgt"}, r"router: .*did you mean light"),
        ({"bn": "per-expert"}, r"bn: .*did you mean per_expert"),
        ({"gate": "soft"}, r"gate: .*'soft'"),
        ({"layout": "windows"}, r"layout: expected one of partition"),
        ({"topk": 2}, r"option of kind moe: .*'topk'"),
        ({"kind": "dense", "bn": "shared"}, r"option of kind dense: .*'bn'"),
        ({"ratio": 1.5}, r"ratio: expected 0 < ratio <= 1, got 1.5"),
        ({"num_experts": 0}, r"num_experts: expected at least 1"),
        ({"image_size": 224}, r"image_size: .*8 to 32.*224"),
        ({"mean": (0.5,), "std": (0.0,)}, r"mean, std"),
    ],
)
def test_bad_settings_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**{"arch": "resnet18", "width": 8, **options})  # type: ignore[arg-type]


def test_list_models() -> None:
    assert list_models() == ["resnet18"]


def test_latency_is_measured_for_each_model_and_modes_are_restored() -> None:
    models = [small(), small(kind="dense").eval()]
    first, second = measure_latency(models, 16, batch_size=2, repeats=4)
    assert 0 < first.low_ms <= first.median_ms <= first.high_ms and second.repeats == 4
    assert models[0].training and not models[1].training


def test_profile_counts_a_hand_made_layer() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.linear = torch.nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(x).mean((2, 3)))

    cost = profile(Net(), image_size=16)
    assert [layer.macs for layer in cost.layers] == [8 * 8 * 8 * 27, 40]
    assert cost.params == 8 * 27 + 8 + 45
