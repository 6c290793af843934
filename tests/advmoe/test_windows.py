# SPDX-License-Identifier: Apache-2.0
"""The windows layout against networks written in plain torch, which take their weights out of the dense network's.

``W`` of the dense network is cut to ``W[S_e, S_e']``: rows of the window of the layer's own expert, columns of that of
the expert that wrote its input. A residual stream has the channels of a window, added position by position.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.models import create_model, record_routing
from advmoe.routers import routers_of
from moe_kernels import RoutedConv2d

WHOLE = slice(None)
RATIO = 0.5
EXPERTS = 3  # three halves overlap
ARCHS = [
    ("resnet18", "cifar"),
    ("resnet18", "imagenet"),
    ("wrn28_10", "cifar"),
    ("wrn28_10", "imagenet"),
    ("vgg16_bn", "cifar"),
    ("densenet40", "cifar"),
]
MORE = [("resnet34", "cifar"), ("resnet50", "cifar"), ("resnet50", "imagenet"), ("densenet40", "imagenet")]


class Network:
    """A network of the dense one's weights for samples that share their choices.

    Args:
        state: by the dense network's names, in float64; in training mode the running statistics are moved in place.
        choice: the expert of each convolution, by name.
    """

    def __init__(
        self,
        arch: str,
        stem: str,
        state: dict[str, Tensor],
        choice: dict[str, int],
        training: bool,
        ratio: float,
        experts: int,
    ) -> None:
        self.arch, self.imagenet = arch, stem == "imagenet"
        self.state, self.choice, self.training = state, choice, training
        self.ratio, self.experts = ratio, experts

    def window(self, name: str) -> slice:
        """Of what the convolution writes."""
        total = len(self.state[f"{name}.weight"])
        width = max(1, int(self.ratio * total))
        start = round(self.choice[name] * (total - width) / (self.experts - 1)) if self.experts > 1 else 0
        return slice(start, start + width)

    def conv(self, name: str, x: Tensor, rows: slice = WHOLE, columns: slice = WHOLE, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"][rows, columns]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    def norm(self, name: str, x: Tensor, channels: slice = WHOLE) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{name}.{key}"][channels] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(x, mean, var, weight, bias, self.training)

    def linear(self, name: str, x: Tensor, channels: slice = WHOLE) -> Tensor:
        """``channels`` of those that the layer reads, of each of which it may have several columns."""
        weight = self.state[f"{name}.weight"]
        if channels != WHOLE:
            positions = x.shape[1] // (channels.stop - channels.start)
            weight = weight.view(len(weight), -1, positions)[:, channels].flatten(1)
        return F.linear(x, weight, self.state[f"{name}.bias"])

    def __call__(self, x: Tensor) -> Tensor:
        forward: dict[str, Callable[[Tensor], Tensor]] = {
            "resnet18": self.resnet, "resnet34": self.resnet, "resnet50": self.resnet,
            "wrn28_10": self.wide_resnet, "vgg16_bn": self.vgg, "densenet40": self.densenet,
        }  # fmt: skip
        return forward[self.arch](x)

    def resnet(self, x: Tensor) -> Tensor:
        depth = 3 if self.arch == "resnet50" else 2
        x = F.relu(self.norm("bn1", self.conv("conv1", x, stride=2 if self.imagenet else 1)))
        if self.imagenet:
            x = F.max_pool2d(x, 3, 2, 1)
        here = WHOLE
        for stage, count in enumerate((2, 2, 2, 2) if self.arch == "resnet18" else (3, 4, 6, 3), start=1):
            for i in range(count):
                name = f"layer{stage}.{i}"
                stride = 2 if stage > 1 and i == 0 else 1
                y, source = x, here
                for j in range(1, depth + 1):
                    rows = self.window(f"{name}.conv{j}")
                    y = self.conv(f"{name}.conv{j}", y, rows, source, stride if j == depth - 1 else 1)
                    y = self.norm(f"{name}.bn{j}", y, rows)
                    y, source = F.relu(y) if j < depth else y, rows
                if f"{name}.shortcut.0.weight" in self.state:
                    # routed with the ImageNet stem; else it follows the block's output
                    rows = self.window(f"{name}.shortcut.0") if self.imagenet else source
                    x = self.norm(f"{name}.shortcut.1", self.conv(f"{name}.shortcut.0", x, rows, here, stride), rows)
                elif here == WHOLE:
                    x = x[:, source]
                x, here = F.relu(y + x), source
        return self.linear("linear", x.mean((2, 3)), here)

    def wide_resnet(self, x: Tensor) -> Tensor:
        x = self.conv("conv1", x, stride=2 if self.imagenet else 1)
        if self.imagenet:
            x = F.max_pool2d(F.relu(self.norm("bn0", x)), 3, 2, 1)
        here = WHOLE
        for stage in (1, 2, 3):
            for i in range(4):
                name = f"block{stage}.{i}"
                stride = 2 if stage > 1 and i == 0 else 1
                y = F.relu(self.norm(f"{name}.bn1", x, here))
                if i == 0:
                    x = self.conv(f"{name}.convShortcut", y, self.window(f"{name}.convShortcut"), here, stride)
                inner, out = self.window(f"{name}.conv1"), self.window(f"{name}.conv2")
                y = F.relu(self.norm(f"{name}.bn2", self.conv(f"{name}.conv1", y, inner, here, stride), inner))
                x, here = self.conv(f"{name}.conv2", y, out, inner) + x, out
        return self.linear("fc", F.relu(self.norm("bn1", x, here)).mean((2, 3)), here)

    def vgg(self, x: Tensor) -> Tensor:
        index, here = 0, WHOLE
        for stage, count in enumerate((2, 2, 3, 3, 3)):
            if stage:
                x, index = F.max_pool2d(x, 2), index + 1
            for _ in range(count):
                rows = self.window(f"features.{index}") if index else WHOLE
                y = self.conv(f"features.{index}", x, rows, here)
                x, here = F.relu(self.norm(f"features.{index + 1}", y, rows)), rows
                index += 3
        x = F.relu(self.linear("classifier.0", F.adaptive_avg_pool2d(x, 2).flatten(1), here))
        return self.linear("classifier.4", F.relu(self.linear("classifier.2", x)))

    def densenet(self, x: Tensor) -> Tensor:
        """Its inputs are the compact channels of what came before, side by side."""
        x = self.conv("features.conv0", x, stride=2 if self.imagenet else 1)
        if self.imagenet:
            x = F.max_pool2d(F.relu(self.norm("features.norm0", x)), 3, 2, 1)
        for block in (1, 2, 3):
            for i in range(1, 7):
                name = f"features.denseblock{block}.denselayer{i}"
                inner, out = self.window(f"{name}.conv1"), self.window(f"{name}.conv2")
                y = self.conv(f"{name}.conv1", F.relu(self.norm(f"{name}.norm1", x)), inner)
                y = self.conv(f"{name}.conv2", F.relu(self.norm(f"{name}.norm2", y, inner)), out, inner)
                x = torch.cat([x, y], 1)
            if block < 3:
                name = f"features.transition{block}"
                x = F.avg_pool2d(self.conv(f"{name}.conv", F.relu(self.norm(f"{name}.norm", x))), 2)
        return self.linear("classifier", F.relu(self.norm("features.norm_final", x)).mean((2, 3)))


def size_of(arch: str, stem: str) -> int:
    return {"imagenet": 32, "cifar": 16 if arch in ("vgg16_bn", "wrn28_10") else 8}[stem]


def windows(arch: str, stem: str = "cifar", **options: object) -> nn.Module:
    """In float64 and eval mode, with values everywhere that a mistake would change."""
    torch.manual_seed(0)
    settings = {"width": 8, "ratio": RATIO, "num_experts": EXPERTS, "layout": "windows", **options}
    size = size_of(arch, stem)
    # the reference has no routers, and so no statistics of scores
    plain = {"stem": stem, "normalize": False, "standardize": False}
    model = create_model(arch, image_size=size, **plain, **settings)  # type: ignore[arg-type]
    for name, value in model.state_dict().items():
        if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif value.ndim == 1 and name.endswith(("bias", "running_mean")):
            value.normal_(0, 0.2)
        elif value.ndim == 2 and ".router." not in name:
            value.normal_(0, 0.5)
    return model.double().eval()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all but the routers'; weights take gradients of their own."""
    trained = dict(model.named_parameters())
    state = {name: v.detach().clone() for name, v in model.state_dict().items() if "router" not in name}
    return {name: v.requires_grad_(name in trained) for name, v in state.items()}


def images(arch: str, stem: str, count: int) -> Tensor:
    size = size_of(arch, stem)
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=generator).requires_grad_()


def same(got: object, expected: object, message: str | None = None) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10, msg=message and (lambda m: f"{message}: {m}"))


def compare(
    model: nn.Module, x: Tensor, logits: Tensor, reference: Tensor, state: dict[str, Tensor], expert: str = ""
) -> None:
    """Logits, and the gradients of input and weights: to 1e-10 of the largest, as deep networks in training mode have
    some of thousands, which cancel."""
    assert reference.std() > 0.01
    same(logits, reference, expert)
    weights = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    own = {name: p for name, p in model.named_parameters() if name in state}
    got = torch.autograd.grad((logits * weights).sum(), [x, *own.values()])
    expected = torch.autograd.grad((reference * weights).sum(), [x, *(state[name] for name in own)])
    assert expected[0].abs().max() > 1e-4
    for name, a, b in zip(("input", *own), got, expected, strict=True):
        scale = b.abs().max().clamp_min(1)
        same(a / scale, b / scale, f"{expert} {name}")


def agree(model: nn.Module, expert: int) -> dict[str, int]:
    for router in routers_of(model).values():
        router.only = expert
    return {name: expert for name, module in model.named_modules() if isinstance(module, RoutedConv2d)}


def disagree(model: nn.Module, count: int) -> None:
    """Each router gives each of ``count`` samples to an expert of its own choice, whatever the sample."""
    generator = torch.Generator().manual_seed(3)
    for router in routers_of(model).values():
        scores = torch.randn(count, router.num_experts, dtype=torch.float64, generator=generator)
        router.forward = lambda x, scores=scores: scores  # type: ignore[method-assign]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("arch", "stem"), [*ARCHS, *MORE])
def test_where_all_routers_agree_it_is_a_part_of_the_dense_network(arch: str, stem: str, training: bool) -> None:
    model = windows(arch, stem).train(training)
    x = images(arch, stem, 4)
    for expert in range(EXPERTS):
        choice, state = agree(model, expert), weights_of(model)
        network = Network(arch, stem, state, choice, training, RATIO, EXPERTS)
        logits, reference = model(x), network(x)
        compare(model, x, logits, reference, state, f"expert {expert}")
        if training:  # statistics moved alike, and those of no channel outside the window
            for name, value in model.state_dict().items():
                if "running_" in name:
                    same(value, state[name].detach(), name)


@pytest.mark.parametrize(("arch", "stem"), [*ARCHS, *MORE])
def test_where_routers_disagree_it_is_a_loop_over_the_samples(arch: str, stem: str) -> None:
    count = 5
    model = windows(arch, stem)
    disagree(model, count)
    x = images(arch, stem, count)
    with record_routing(model) as routings:
        logits = model(x)
    experts = {name: routing.expert.tolist() for name, routing in routings.items()}
    for name, router in routers_of(model).items():
        assert experts[name.removesuffix(".router")] == router(x).argmax(1).tolist()
    assert len({tuple(chosen) for chosen in experts.values()}) > len(experts) / 2
    compare_to_loop(model, arch, stem, x, logits, experts)


def compare_to_loop(
    model: nn.Module, arch: str, stem: str, x: Tensor, logits: Tensor, experts: dict[str, list[int]]
) -> None:
    state = weights_of(model)
    reference = torch.cat(
        [
            Network(arch, stem, state, {n: e[i] for n, e in experts.items()}, False, RATIO, EXPERTS)(x[i : i + 1])
            for i in range(len(x))
        ]
    )
    compare(model, x, logits, reference, state)


@pytest.mark.parametrize("route_per", ["block", "stage", "network"])
@pytest.mark.parametrize(("arch", "stem"), ARCHS)
def test_routers_of_a_longer_reach_against_the_loop(arch: str, stem: str, route_per: str) -> None:
    """Which layers share a choice is test_backbones.py's."""
    model = windows(arch, stem, route_per=route_per)
    disagree(model, 4)
    x = images(arch, stem, 4)
    with record_routing(model) as routings:
        logits = model(x)
    compare_to_loop(model, arch, stem, x, logits, {name: r.expert.tolist() for name, r in routings.items()})


@pytest.mark.parametrize(("arch", "stem"), [*ARCHS, *MORE])
def test_the_weights_are_those_of_the_dense_network(arch: str, stem: str) -> None:
    """Whatever N and r: the same names and shapes. DenseNet's inputs are compact; its are only with r = 1."""
    size = size_of(arch, stem)
    with torch.device("meta"):
        dense = create_model(arch, "dense", width=8, image_size=size, stem=stem).state_dict()
        for experts, ratio in ((2, 1.0), (1, 1.0), (3, 0.5), (10, 0.3)):
            if arch == "densenet40" and ratio < 1:
                continue
            options = {"width": 8, "image_size": size, "stem": stem, "num_experts": experts, "ratio": ratio}
            model = create_model(arch, layout="windows", **options)  # type: ignore[arg-type]
            own = {name: v for name, v in model.state_dict().items() if "router" not in name}
            counted = {name for name in own if name.endswith("num_batches_tracked")}  # by channel, where r < 1
            assert list(own) == list(dense)
            assert all(v.shape == dense[n].shape for n, v in own.items() if n not in counted or ratio == 1)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize(("arch", "stem"), [*ARCHS, *MORE])
def test_ratio_one_is_the_dense_network(arch: str, stem: str, experts: int) -> None:
    model = windows(arch, stem, ratio=1.0, num_experts=experts)
    dense = create_model(arch, "dense", width=8, image_size=size_of(arch, stem), stem=stem, normalize=False).double()
    dense.load_state_dict({name: v for name, v in model.state_dict().items() if "router" not in name})
    disagree(model, 4)
    x = images(arch, stem, 4)
    for training in (False, True):
        model.train(training)
        dense.train(training)
        logits, reference = model(x), dense(x)
        compare(model, x, logits, reference, dict(dense.named_parameters()))


@pytest.mark.parametrize("arch", ["resnet18", "wrn28_10", "vgg16_bn", "densenet40"])
def test_one_expert_is_the_first_window(arch: str) -> None:
    model = windows(arch, num_experts=1)
    state, x = weights_of(model), images(arch, "cifar", 3)
    network = Network(arch, "cifar", state, agree(model, 0), False, RATIO, 1)
    compare(model, x, model(x), network(x), state)


def test_what_an_expert_learns_moves_the_windows_that_overlap_its_own() -> None:
    """Three halves: the middle one shares channels with both others, which share none."""
    model = windows("resnet18").train()
    agree(model, 0)
    x = images("resnet18", "cifar", 4)
    model(x).square().sum().backward()
    grad = model.layer2[1].conv2.weight.grad  # windows of 16 channels: 0:8, 4:12, 8:16
    assert grad[:8, :8].ne(0).any() and not grad[8:].any() and not grad[:, 8:].any()
