# SPDX-License-Identifier: Apache-2.0
"""Backbones: the layout of the released code, and what training asks of a routed model."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from advmoe.models import backbone_parameters, create_model, list_models, record_routing, router_parameters
from advmoe.models.base import register_model
from advmoe.models.layers import Path
from moe_kernels import RoutedBatchNorm2d, RoutedConv2d, Routing

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


def small(**options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model("resnet18", **{"kind": "moe", "width": 8, "image_size": 16, **options})  # type: ignore[arg-type]


def images(count: int = 6, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def along(routing: Routing) -> Path:
    """A path on which all layers ahead take this choice."""
    path = Path()
    path.choice = routing
    return path


def test_state_dict_has_the_released_shapes() -> None:
    model = create_model("resnet18", "moe", ratio=0.5, num_experts=2)
    own = {k: tuple(v.shape) for k, v in model.state_dict().items() if ".router." not in k}
    weights = {k: v for k, v in own.items() if ".bn" not in k and not k.startswith("bn1") and "shortcut.1" not in k}
    assert weights == RELEASED
    assert own["layer3.0.bn1.running_mean"] == (128,)  # shared by the experts
    assert sum(isinstance(m, RoutedConv2d) for m in model.modules()) == 16


def test_widths_are_truncated_and_experts_multiply_rows() -> None:
    state = small(width=9, ratio=0.3, num_experts=3).state_dict()
    assert state["conv1.weight"].shape == (9, 3, 3, 3)
    assert state["layer1.0.conv1.weight"].shape == (3 * 2, 9, 3, 3)  # int(0.3 * 9) = 2
    assert state["layer2.0.conv1.weight"].shape == (3 * 5, 2, 3, 3)  # int(0.3 * 18) = 5
    assert small(width=2, ratio=0.1).state_dict()["layer1.0.conv1.weight"].shape == (2, 2, 3, 3)  # at least 1


def test_experts_are_initialised_alike() -> None:
    model = small(width=32, num_experts=8)
    for layer in (m for m in model.modules() if isinstance(m, RoutedConv2d)):
        expected = (2 / (layer.out_channels * 9)) ** 0.5  # by the fan-out of one expert
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.1)


def test_per_expert_batch_norm_equals_the_shared_one_with_equal_statistics() -> None:
    shared, own = small(num_experts=3).eval(), small(bn="per_expert", num_experts=3).eval()
    state = shared.state_dict()
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in state if "running_" in n]:
        state[name].uniform_(0.5, 1.5, generator=generator)
    routed = {f"{n}." for n, m in own.named_modules() if isinstance(m, RoutedBatchNorm2d)}
    assert len(routed) == 16
    own.load_state_dict(
        {
            k: v.repeat(3) if any(k.startswith(n) for n in routed) and v.ndim else v.expand_as(own.state_dict()[k])
            for k, v in state.items()
        }
    )
    with torch.no_grad():
        torch.testing.assert_close(own(images()), shared(images()))


def test_per_expert_batch_norm_keeps_the_statistics_of_an_expert_without_samples() -> None:
    model = small(bn="per_expert", num_experts=2)
    layer = model.layer2[1]
    with torch.no_grad():
        layer.conv1.router.linear.weight.zero_()
        layer.conv1.router.linear.bias.copy_(torch.tensor([1.0, 0.0]))
    assert layer.bn1.running_mean.shape == (2 * 8,)
    model(images())
    assert (layer.bn1.running_mean[:8] != 0).all() and (layer.bn1.running_mean[8:] == 0).all()
    assert (layer.bn1.running_var[8:] == 1).all()


@pytest.mark.parametrize("gate_after", ["conv", "norm"])
def test_a_gate_before_a_batch_norm_of_its_own_gets_no_gradient(gate_after: str) -> None:
    """The normalisation cancels a factor that all values share: the reason for gate_after="norm"."""
    model = small(router="global", bn="per_expert", gate="softmax", gate_after=gate_after).train()
    expert = torch.tensor([0, 0, 0, 1])  # sample 3 is alone with its expert
    gate = torch.full((4,), 0.7, requires_grad=True)
    x = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    y = model.layer1[1](x, along(Routing(expert, gate, num_experts=2)))
    (y * weights).sum().backward()
    several, alone = gate.grad[:3].abs().max().item(), gate.grad[3].abs().item()
    assert several > 1.0
    assert alone > 1.0 if gate_after == "norm" else alone < 0.01


@pytest.mark.parametrize(("stem", "stage", "index"), [("cifar", "layer1", 1), ("imagenet", "layer2", 0)])
def test_a_gate_after_the_norm_multiplies_what_the_norm_gives(stem: str, stage: str, index: int) -> None:
    """That of a routed projection too, which the ImageNet form has."""
    block = getattr(small(router="global", gate="softmax", gate_after="norm", stem=stem).eval(), stage)[index]
    generator = torch.Generator().manual_seed(0)
    for name, value in block.state_dict().items():
        if name.endswith(("bias", "1.running_mean")):
            value.normal_(generator=generator)
    expert, gate = torch.tensor([0, 1, 1]), torch.tensor([0.9, 0.6, 0.5])
    x = torch.randn(3, 4, 16, 16, generator=generator)
    routing = Routing(expert, num_experts=2)
    g = gate.view(3, 1, 1, 1)
    with torch.no_grad():
        y = torch.relu(g * block.bn1(block.conv1(x, routing)))
        shortcut = x if stem == "cifar" else g * block.shortcut[1](block.shortcut[0](x, routing))
        expected = torch.relu(g * block.bn2(block.conv2(y, routing)) + shortcut)
        torch.testing.assert_close(block(x, along(Routing(expert, gate, num_experts=2))), expected)


@pytest.mark.parametrize("bn", ["shared", "per_expert"])
def test_straight_through_gates_change_no_value(bn: str) -> None:
    with torch.no_grad():
        outputs = [
            small(gate=gate, bn=bn, gate_after=after).eval()(images())
            for gate in ("none", "straight_through", "raw_straight_through")
            for after in ("conv", "norm")
        ]
    assert all(torch.equal(out, outputs[0]) for out in outputs)


def test_every_parameter_of_the_default_models_gets_a_gradient() -> None:
    for kind in ("dense", "s_dense", "moe"):
        model = small(kind=kind)
        model(images()).square().sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters()), kind


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
    model.router.options = dataclasses.replace(model.router.options, gate="none")
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


def test_a_layer_that_the_last_forward_left_out_is_not_recorded() -> None:
    model = small()

    class Sometimes(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x) if len(x) > 2 else x

    net = Sometimes()
    with record_routing(net) as routings:
        net(images(6))
        assert len(routings) == 16
        net(images(2))
        assert not routings


def test_router_and_backbone_parameters_are_a_partition() -> None:
    for router in ("light", "global"):
        model = small(router=router)
        routers, backbone = router_parameters(model), backbone_parameters(model)
        assert not {id(p) for p in routers} & {id(p) for p in backbone}
        assert {id(p) for p in [*routers, *backbone]} == {id(p) for p in model.parameters()}
        assert routers


def test_copies_are_independent() -> None:
    model = small().eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(images())
        assert torch.equal(other(images()), expected)
        for p in other.parameters():
            p.zero_()
        assert torch.equal(model(images()), expected)
        assert not torch.equal(other(images()), expected)
    assert {id(p) for p in router_parameters(other)}.isdisjoint(id(p) for p in model.parameters())


@pytest.mark.parametrize("router", ["light", "global"])
def test_interleaved_forwards_do_not_disturb_each_other(router: str) -> None:
    """Nothing of a forward is kept on a module: in the middle of one, another model and the same one run."""
    model, other = small(router=router).eval(), small(router=router, num_experts=3).eval()
    with torch.no_grad():
        expected, others = model(images(6)), other(images(3))
        inside: list[torch.Tensor] = []

        def intrude(*_: object) -> None:
            if not inside:
                inside.append(torch.empty(0))  # once: the model runs itself
                inside.extend((other(images(3)), model(images(2))))

        handle = model.layer2[0].conv2.register_forward_pre_hook(intrude)
        assert torch.equal(model(images(6)), expected)
        handle.remove()
        assert torch.equal(inside[1], others)
        torch.testing.assert_close(inside[2], model(images(2)))


def test_state_dict_round_trip() -> None:
    model = small(bn="per_expert").eval()
    torch.manual_seed(9)
    other = create_model("resnet18", width=8, image_size=16, bn="per_expert").eval()
    with torch.no_grad():
        assert not torch.equal(other(images()), model(images()))
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(images()), model(images()))


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
        ({"arch": "wrn2810"}, r"arch: expected one of densenet40, .*wrn28_10.*did you mean wrn28_10"),
        ({"kind": "mo"}, r"kind: .*did you mean moe"),
        ({"router": "lihgt"}, r"router: .*did you mean light"),
        ({"bn": "per-expert"}, r"bn: .*did you mean per_expert"),
        ({"gate": "soft"}, r"gate: .*'soft'"),
        ({"layout": "window"}, r"layout: expected one of partition, windows, .*did you mean windows"),
        ({"route_per": "stages"}, r"route_per: expected one of layer, block, .*did you mean stage"),
        ({"stem": "image-net"}, r"stem: .*did you mean imagenet"),
        ({"gate_after": "norms"}, r"gate_after: .*did you mean norm"),
        ({"temprature": 2.0}, r"option of kind moe: .*'temprature'; did you mean temperature"),
        ({"route_per": "block", "router": "global"}, r"route_per: the router 'global' chooses once .*'block'"),
        ({"route_per": "stage", "gate": "softmax"}, r"gate: 'softmax' multiplies through"),
        ({"moe_at": (1, 5)}, r"moe_at: expected stages from 1 to 4 of resnet18, got \(1, 5\)"),
        ({"moe_at": ()}, r"moe_at: expected stages from 1 to 4 of resnet18, got \(\)"),
        ({"moe_at": (1,), "layout": "windows"}, r"moe_at: .*layout 'partition'"),
        ({"topk": 2}, r"option of kind moe: .*'topk'"),
        ({"kind": "dense", "bn": "shared"}, r"option of kind dense: .*'bn'"),
        ({"ratio": 1.5}, r"ratio: expected 0 < ratio <= 1, got 1.5"),
        ({"num_experts": 0}, r"num_experts: expected at least 1"),
        ({"width": 0}, r"width: expected at least 1, got 0"),
        ({"image_size": 4}, r"image_size: resnet18 .*from 8 pixels on; got 4"),
        ({"arch": "wrn28_10", "image_size": 4}, r"image_size: wrn28_10 .*from 8 pixels on; got 4"),
        ({"arch": "densenet40", "image_size": 8, "stem": "imagenet"}, r"image_size: .*from 16 pixels on; got 8"),
        ({"arch": "vgg16_bn", "image_size": 8}, r"image_size: vgg16_bn pools four times, from 16 .*; got 8"),
        ({"arch": "vgg16_bn", "stem": "imagenet"}, r"stem: vgg16_bn has none for ImageNet"),
        ({"arch": "wrn28_10", "gate_after": "norm"}, r"gate_after: wrn28_10 .*expected 'conv'"),
        ({"arch": "densenet40", "gate_after": "norm"}, r"gate_after: densenet40 .*expected 'conv'"),
        ({"mean": (0.5,), "std": (0.0,)}, r"mean, std"),
    ],
)
def test_bad_settings_raise(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**{"arch": "resnet18", "width": 8, **options})  # type: ignore[arg-type]


def test_list_models() -> None:
    cnns = ["densenet40", "resnet18", "resnet34", "resnet50", "vgg16_bn", "wrn28_10", "wrn50_2"]
    assert sorted(list_models()) == sorted([*cnns, "deit_tiny", "vit_small"])
    with pytest.raises(ValueError, match="arch: 'resnet18' is registered already"):
        register_model("resnet18")(lambda spec: torch.nn.Identity())
