# SPDX-License-Identifier: Apache-2.0
"""Every architecture in every kind: where it is routed, how wide it is, which router chooses for what, and that it
trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from advmoe.models import create_model, record_routing
from advmoe.models.layers import Path, Projection
from advmoe.routers import record_scores, routers_of
from moe_kernels import RoutedBatchNorm2d, RoutedConv2d

BOTH = ("cifar", "imagenet")
# how many convolutions are routed; the ImageNet ResNets route their projections too
ROUTED = {
    ("resnet18", "cifar"): 16,
    ("resnet18", "imagenet"): 16 + 3,
    ("resnet34", "cifar"): 32,
    ("resnet34", "imagenet"): 32 + 3,
    ("resnet50", "cifar"): 48,
    ("resnet50", "imagenet"): 48 + 4,
    ("wrn28_10", "cifar"): 27,
    ("wrn28_10", "imagenet"): 27,
    ("vgg16_bn", "cifar"): 12,
    ("densenet40", "cifar"): 36,
    ("densenet40", "imagenet"): 36,
}
# parameters as published: kuangliu/pytorch-cifar, torchvision (1000 classes), the papers' rounded ones; VGG: as released
PARAMETERS = {
    ("resnet18", "cifar"): 11_173_962,
    ("resnet34", "cifar"): 21_282_122,
    ("resnet50", "cifar"): 23_520_842,
    ("resnet18", "imagenet"): 11_689_512,
    ("resnet34", "imagenet"): 21_797_672,
    ("resnet50", "imagenet"): 25_557_032,
    ("wrn28_10", "cifar"): 36_479_194,
    ("vgg16_bn", "cifar"): 15_311_818,
    ("densenet40", "cifar"): 176_122,
}
# routers by route_per: layer, block, stage, network
ROUTERS = {
    "resnet18": (16, 8, 4, 1),
    "resnet50": (48, 16, 4, 1),
    "wrn28_10": (27, 12, 3, 1),
    "vgg16_bn": (12, 5, 5, 1),
    "densenet40": (36, 18, 3, 1),
}
ROUTE_PER = ("layer", "block", "stage", "network")
FAMILIES = ("resnet18", "wrn28_10", "vgg16_bn", "densenet40")


def size_of(arch: str, stem: str = "cifar") -> int:
    """Pixels that leave more than one value for each channel at the end."""
    return 64 if stem == "imagenet" else 32 if arch == "vgg16_bn" else 16


def small(arch: str, kind: str = "moe", stem: str = "cifar", **options: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {"width": 8, "image_size": size_of(arch, stem), "stem": stem, **options}
    return create_model(arch, kind, **settings)  # type: ignore[arg-type]


def images(count: int, size: int) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def routed(model: nn.Module) -> dict[str, RoutedConv2d]:
    """All but the projections that follow their block's choice, of the windows layout."""
    following = {id(m) for p in model.modules() if isinstance(p, Projection) for m in p.modules()}
    return {n: m for n, m in model.named_modules() if isinstance(m, RoutedConv2d) and id(m) not in following}


def check_step(model: nn.Module, size: int, count: int = 4) -> None:
    """A step changes all that it should, and leaves everything finite."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    logits = model.train()(images(count, size))
    assert logits.shape == (count, 10) and logits.isfinite().all()
    nn.functional.cross_entropy(logits, torch.arange(count)).backward()
    for name, p in model.named_parameters():
        if name in before:
            assert p.grad is not None and p.grad.isfinite().all(), name
    optimizer.step()
    changed = [name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])]
    assert len(changed) > len(before) / 2
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize(("arch", "stem"), list(PARAMETERS))
def test_dense_networks_have_the_published_numbers_of_parameters(arch: str, stem: str) -> None:
    with torch.device("meta"):
        model = create_model(arch, "dense", 1000 if stem == "imagenet" else 10, 224 if stem == "imagenet" else 32)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch, stem]


@pytest.mark.parametrize("layout", ["partition", "windows"])
@pytest.mark.parametrize(("arch", "stem"), list(ROUTED))
def test_routed_convolutions(arch: str, stem: str, layout: str) -> None:
    with torch.device("meta"):
        model = small(arch, stem=stem, layout=layout, num_experts=3)
        dense = small(arch, "dense", stem)
        scaled = small(arch, "s_dense", stem)
    layers = routed(model)
    assert len(layers) == len(routers_of(model)) == ROUTED[arch, stem]
    ordinary = {name: tuple(v.shape) for name, v in (dense if layout == "windows" else scaled).state_dict().items()}
    for name, layer in layers.items():
        if arch == "densenet40" and layout == "windows":
            continue  # it has compact inputs: test_windows.py
        rows, columns, *kernel = layer.weight.shape
        if layout == "windows":
            assert tuple(layer.weight.shape) == ordinary[f"{name}.weight"], name
        elif name != "layer1.0.conv1":  # behind the stem, which the released code does not scale there
            assert (rows // 3, columns, *kernel) == ordinary[f"{name}.weight"], name


def test_the_stem_follows_the_size_of_the_image() -> None:
    with torch.device("meta"):
        for arch in ("resnet18", "wrn28_10", "densenet40"):
            for size, kernel in ((32, 3), (64, 3), (128, 7), (224, 7)):
                stem = next(m for m in create_model(arch, image_size=size).modules() if isinstance(m, nn.Conv2d))
                assert stem.kernel_size == (kernel, kernel), (arch, size)
            stem = next(
                m for m in create_model(arch, image_size=64, stem="imagenet").modules() if isinstance(m, nn.Conv2d)
            )
            assert stem.kernel_size == (7, 7)


@pytest.mark.parametrize("kind", ["dense", "s_dense", "sparse", "partition", "windows"])
@pytest.mark.parametrize(("arch", "stem"), list(ROUTED))
def test_every_kind_of_every_architecture_trains(arch: str, stem: str, kind: str) -> None:
    options = {"layout": kind} if kind in ("partition", "windows") else {}
    model = small(arch, "moe" if options else kind, stem, width=4, **options)
    check_step(model, size_of(arch, stem))


@pytest.mark.parametrize("ratio", [0.5, 0.3])
@pytest.mark.parametrize(("arch", "stem"), [key for key in ROUTED if key[0] not in ("resnet34", "resnet50")])
def test_a_pathway_of_a_partition_is_a_scaled_network(arch: str, stem: str, ratio: float) -> None:
    """Each expert's rows, taken out, are the weights of kind s_dense."""
    model = small(arch, stem=stem, ratio=ratio, num_experts=3).double().eval()
    scaled = small(arch, "s_dense", stem, ratio=ratio).double().eval()
    # the released ResNets of small images have an unscaled stem: there, what is behind layer1
    front = ("conv1", "bn1", "layer1") if arch == "resnet18" and stem == "cifar" else ()
    own = {n: v for n, v in model.state_dict().items() if ".router." not in n and not n.startswith(front)}
    layers = routed(model)
    x = images(3, size_of(arch, stem)).double()
    if front:
        x = torch.rand(3, scaled.layer2[0].conv1.in_channels, 8, 8, dtype=torch.float64)
    for expert in range(3):
        taken = {n: v.chunk(3)[expert] if n.removesuffix(".weight") in layers else v for n, v in own.items()}
        missing, unexpected = scaled.load_state_dict(taken, strict=False)
        assert not unexpected and all(name.startswith(front) for name in missing)
        for router in routers_of(model).values():
            router.only = expert
        with torch.no_grad():
            outputs = [behind_layer1(net, x) if front else net(x) for net in (model, scaled)]
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)


def behind_layer1(model: nn.Module, x: Tensor) -> Tensor:
    path = Path()
    for stage in (model.layer2, model.layer3, model.layer4):
        x = stage(x, path)
    return model.linear(x.mean((2, 3)))


@pytest.mark.parametrize("layout", ["partition", "windows"])
@pytest.mark.parametrize("route_per", ROUTE_PER)
@pytest.mark.parametrize("arch", list(ROUTERS))
def test_a_router_chooses_for_a_layer_a_block_a_stage_or_the_network(arch: str, route_per: str, layout: str) -> None:
    model = small(arch, width=4, route_per=route_per, layout=layout, router="random", num_experts=4)
    routers = routers_of(model)
    assert len(routers) == ROUTERS[arch][ROUTE_PER.index(route_per)]
    with record_routing(model) as routings, torch.no_grad():
        model.eval()(images(32, size_of(arch)))
    assert set(routings) >= set(routed(model))
    # 32 draws of 4 experts are alike by chance once in 4 ** 32 times
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in routed(model):
        groups.setdefault(tuple(routings[name].expert.tolist()), []).append(name)
    assert len(groups) == len(routers)
    assert sorted(groups.values()) == sorted(expected_groups(arch, route_per, list(routed(model))))
    for name in set(routings) - set(routed(model)):
        last = name.replace("shortcut.0", "conv2" if arch == "resnet18" else "conv3")
        assert torch.equal(routings[name].expert, routings[last].expert), name


def expected_groups(arch: str, route_per: str, names: list[str]) -> list[list[str]]:
    if arch == "vgg16_bn":
        stages = (range(3, 6), range(7, 13), range(14, 23), range(24, 33), range(34, 43))

        def unit(name: str) -> str:
            return str(next(i for i, stage in enumerate(stages) if int(name.split(".")[1]) in stage))
    else:
        # layer1.0.conv1, block1.0.conv1, features.denseblock1.denselayer1.conv1
        parts = {"block": -1, "stage": -2}.get(route_per, 0)

        def unit(name: str) -> str:
            kept = name.replace("shortcut.0", "shortcut").split(".")
            return ".".join(kept[:parts])

    if route_per == "layer":
        return [[name] for name in names]
    if route_per == "network":
        return [names]
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(unit(name), []).append(name)
    return list(groups.values())


@pytest.mark.parametrize("layout", ["partition", "windows"])
@pytest.mark.parametrize("route_per", ROUTE_PER)
@pytest.mark.parametrize(("arch", "stem"), [("resnet18", "imagenet"), *[(arch, "cifar") for arch in FAMILIES]])
def test_routers_of_every_reach_learn(arch: str, stem: str, route_per: str, layout: str) -> None:
    # standardised scores take a bias' gradient away
    model = small(arch, stem=stem, width=4, route_per=route_per, layout=layout, standardize=False)
    check_step(model, size_of(arch, stem))
    for name, router in routers_of(model).items():
        # not the weight's: behind a stem of one channel the normalised mean is always 0
        assert router.linear.bias.grad.any(), name


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_softmax_gate_of_the_network_s_router_is_applied_once(arch: str) -> None:
    model = small(arch, route_per="network", gate="softmax", width=20).eval()
    x = images(4, size_of(arch))
    last = {"resnet18": "linear", "wrn28_10": "fc", "vgg16_bn": "classifier.0", "densenet40": "classifier"}[arch]
    features: list[Tensor] = []
    model.get_submodule(last).register_forward_pre_hook(lambda module, args: features.append(args[0]))
    with record_scores(model) as scores, record_routing(model) as routings, torch.no_grad():
        model(x)
    assert all(r.gate is None for r in routings.values())
    gate, expert = scores["router"].softmax(1).max(1)
    assert gate.max() < 0.99
    for e in (0, 1):
        model.router.only = e
        with torch.no_grad():
            model(x)
    plain = torch.stack(features[1:])[expert, torch.arange(4)]
    torch.testing.assert_close(features[0], gate[:, None] * plain)


@pytest.mark.parametrize(
    ("arch", "moe_at", "prefixes"),
    [
        ("resnet18", (3, 4), ("layer3.", "layer4.")),
        ("resnet50", (1,), ("layer1.",)),
        ("wrn28_10", (2,), ("block2.",)),
        ("wrn28_10", (1, 3), ("block1.", "block3.")),
        # with their BatchNorms
        ("vgg16_bn", (1, 5), tuple(f"features.{i}." for i in (3, 4, 34, 35, 37, 38, 40, 41))),
        ("densenet40", (1, 3), ("features.denseblock1.", "features.denseblock3.")),
    ],
)
@pytest.mark.parametrize("options", [{}, {"bn": "per_expert"}, {"route_per": "stage"}, {"router": "image"}])
def test_only_the_stages_of_moe_at_are_routed(
    arch: str, moe_at: tuple[int, ...], prefixes: tuple[str, ...], options: dict[str, object]
) -> None:
    model = small(arch, width=4, moe_at=moe_at, num_experts=3, **options)
    everywhere = small(arch, width=4, num_experts=3)
    assert list(routed(model)) == [name for name in routed(everywhere) if f"{name}.".startswith(prefixes)]
    assert any(isinstance(m, RoutedBatchNorm2d) for m in model.modules()) == ("bn" in options)
    # a ResNet's stem is not scaled, a Wide ResNet's last BatchNorm belongs to the last stage
    others = ("conv1.", "bn1.", "layer1.0.conv1.", "layer1.0.shortcut.0.") if arch[:6] == "resnet" else ("bn1.",)
    scaled = small(arch, "s_dense", width=4).state_dict()
    for name, value in model.state_dict().items():
        if name in scaled and not name.startswith((*prefixes, *others)):
            assert value.shape == scaled[name].shape, name
    check_step(model, size_of(arch))


@pytest.mark.parametrize("layout", ["partition", "windows"])
@pytest.mark.parametrize(("experts", "ratio"), [(2, 0.1), (5, 0.3), (5, 0.8), (8, 0.6), (10, 0.2), (10, 1.0)])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wrn28_10", "vgg16_bn", "densenet40"])
def test_any_number_of_experts_and_any_ratio_train(arch: str, experts: int, ratio: float, layout: str) -> None:
    model = small(arch, num_experts=experts, ratio=ratio, layout=layout, width=6)
    layers = routed(model)
    assert all(layer.num_experts == experts for layer in layers.values())
    for name, layer in layers.items():
        side = layer.out_slices
        if layout == "windows":
            assert side.width == max(1, int(ratio * side.total)), name
        else:
            assert side.total == experts * side.width, name
    check_step(model, size_of(arch))


def test_the_gradient_of_thinned_out_pixels_keeps_the_memory_format() -> None:
    from advmoe.models.layers import every

    for size in (8, 7):
        x = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last).requires_grad_()
        y = every(x, 2)
        assert torch.equal(y, x[:, :, ::2, ::2])
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert dx.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(dx, torch.autograd.grad(x[:, :, ::2, ::2], x, dy)[0])
    assert every(x, 1) is x
