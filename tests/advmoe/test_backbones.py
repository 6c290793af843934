# SPDX-License-Identifier: Apache-2.0
"""Every architecture in every kind: where it is routed, how wide it is, which router chooses for what, and that it
trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from advmoe.models import create_model, record_routing
from advmoe.routers import routers_of
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
    return {name: m for name, m in model.named_modules() if isinstance(m, RoutedConv2d)}


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
    assert not any("conv1" == name or "linear" in name for name in layers)


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
    options = {"ratio": ratio, "num_experts": 3, "normalize": False}
    if arch == "resnet18" and stem == "cifar":
        options["moe_at"] = (2, 3, 4)  # the released ResNet does not scale the stem of this one; see below
    model = small(arch, stem=stem, **options).double().eval()
    scaled = small(arch, "s_dense", stem, ratio=ratio, normalize=False).double().eval()
    x = images(3, size_of(arch, stem)).double()
    layers = routed(model)
    own = {name: v for name, v in model.state_dict().items() if ".router." not in name}
    if "moe_at" in options:
        own = {name: v for name, v in own.items() if not name.startswith(("conv1", "bn1", "layer1"))}
    for expert in range(3):
        taken = {name: v.chunk(3)[expert] if name.removesuffix(".weight") in layers else v for name, v in own.items()}
        missing, unexpected = scaled.load_state_dict(taken, strict=False)
        assert not unexpected and all(name.startswith(("conv1", "bn1", "layer1")) for name in missing)
        for router in routers_of(model).values():
            router.only = expert
        with torch.no_grad():
            if "moe_at" in options:
                stream = torch.rand(3, scaled.layer1[0].conv1.out_channels, 8, 8, dtype=torch.float64)
                outputs = [run_stages(net, stream) for net in (model, scaled)]
            else:
                outputs = [net(x) for net in (model, scaled)]
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)


def run_stages(model: nn.Module, x: Tensor) -> Tensor:
    """What is behind layer1."""
    from advmoe.models.layers import Path

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
    assert list(routings) and set(routings) == set(routed(model))
    # 32 draws of 4 experts are alike by chance once in 4 ** 32 times
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, routing in routings.items():
        groups.setdefault(tuple(routing.expert.tolist()), []).append(name)
    assert len(groups) == len(routers)
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, expected_groups(arch, route_per, list(routings))))


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
    model = small(arch, stem=stem, width=4, route_per=route_per, layout=layout)
    check_step(model, size_of(arch, stem))
    for name, router in routers_of(model).items():
        assert router.linear.weight.grad.any(), name


@pytest.mark.parametrize("arch", FAMILIES)
def test_a_softmax_gate_of_the_network_s_router_is_applied_once(arch: str) -> None:
    model = small(arch, route_per="network", gate="softmax").eval()
    x = images(4, size_of(arch))
    seen: list[Tensor] = []
    last = {"resnet18": "linear", "wrn28_10": "fc", "vgg16_bn": "classifier.0", "densenet40": "classifier"}[arch]
    model.get_submodule(last).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with record_routing(model) as routings, torch.no_grad():
        model(x)
        assert all(r.gate is None for r in routings.values())
        choices: list[Tensor] = []
        handle = model.router.register_forward_hook(
            lambda module, args, scores: choices.append(scores.softmax(1).amax(1))
        )
        model(x)
        handle.remove()
        model.router.only = 0
        for e in (0, 1):
            model.router.only = e
            model(x)
    expert = next(iter(routings.values())).expert
    assert (expert == 1).all()  # of the last forward; the first chose by the scores
    gated, plain = seen[1], torch.stack(seen[2:])
    chosen = torch.stack([plain[:, i] * choices[0][i] for i in range(4)], 1)
    assert all(min((gated[i] - chosen[e, i]).abs().max() for e in (0, 1)) < 1e-5 for i in range(4))


@pytest.mark.parametrize(
    ("arch", "moe_at", "prefixes"),
    [
        ("resnet18", (3, 4), ("layer3", "layer4")),
        ("resnet50", (1,), ("layer1",)),
        ("wrn28_10", (2,), ("block2",)),
        ("wrn28_10", (1, 3), ("block1", "block3")),
        ("vgg16_bn", (1, 5), ("features.3", "features.34", "features.37", "features.40")),
        ("densenet40", (1, 3), ("features.denseblock1", "features.denseblock3")),
    ],
)
@pytest.mark.parametrize("options", [{}, {"bn": "per_expert"}, {"route_per": "stage"}, {"router": "image"}])
def test_only_the_stages_of_moe_at_are_routed(
    arch: str, moe_at: tuple[int, ...], prefixes: tuple[str, ...], options: dict[str, object]
) -> None:
    model = small(arch, width=4, moe_at=moe_at, num_experts=3, **options)
    everywhere = small(arch, width=4, num_experts=3)
    assert list(routed(model)) == [name for name in routed(everywhere) if name.startswith(prefixes)]
    scaled = small(arch, "s_dense", width=4).state_dict()
    norms = sum(isinstance(m, RoutedBatchNorm2d) for m in model.modules())
    assert (norms > 0) == ("bn" in options)
    for name, value in model.state_dict().items():
        if name.startswith(prefixes) or "router" in name or name not in scaled:
            continue
        if arch == "resnet18" or arch == "resnet50" or not name.startswith(("layer1.0", "conv1", "bn1")):
            outer = name.startswith(("layer1.0.conv1", "layer1.0.shortcut.0", "conv1", "bn1")) and arch[:3] == "res"
            assert outer or value.shape == scaled[name].shape, name
    check_step(model, size_of(arch))


@pytest.mark.parametrize("layout", ["partition", "windows"])
@pytest.mark.parametrize(("experts", "ratio"), [(2, 0.1), (5, 0.3), (5, 0.8), (8, 0.6), (10, 0.2), (10, 1.0)])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wrn28_10", "vgg16_bn", "densenet40"])
def test_any_number_of_experts_and_any_ratio_train(arch: str, experts: int, ratio: float, layout: str) -> None:
    model = small(arch, num_experts=experts, ratio=ratio, layout=layout, width=6)
    layers = routed(model)
    assert all(layer.num_experts == experts for layer in layers.values())
    widths = {layer.out_slices.width / layer.out_slices.total for layer in layers.values()}
    if layout == "partition":
        assert widths == {1 / experts}
    else:
        assert all(
            width <= ratio or layer.out_slices.width == 1 for layer, width in zip(layers.values(), widths, strict=False)
        )
    check_step(model, size_of(arch))
