# SPDX-License-Identifier: Apache-2.0
"""Anybody's model with routed convolutions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels import LightRouter, Routing, ScoreNorm, SelfRoutedConv2d, convert


class Block(nn.Module):
    """A residual block as many people write it."""

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding="same", padding_mode="reflect")
        self.down = nn.Conv2d(channels, channels, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.bn1(self.conv1(x)))) + self.down(x))


def own_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Block(8), Block(8, 2), nn.Conv2d(8, 12, 3, groups=4, dilation=2, padding=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5),
    )  # fmt: skip


def images(count: int = 6) -> Tensor:
    return torch.rand(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def routed(model: nn.Module) -> dict[str, SelfRoutedConv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, SelfRoutedConv2d)}


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_model_computes_what_it_did(channels_last: bool) -> None:
    model = own_model()
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = copy.deepcopy(model)
    assert convert(model, 3) is model
    assert list(routed(model)) == ["1.conv1", "1.conv2", "2.conv1", "2.conv2", "2.down", "3"]
    assert model[3].conv.weight.shape == (36, 2, 3, 3) and isinstance(model[0], nn.Conv2d)
    for mode in (True, False):
        model.train(mode)
        before.train(mode)
        torch.testing.assert_close(model(images()), before(images()), rtol=1e-5, atol=1e-6)
    assert model[1].conv1.conv.weight.is_contiguous(memory_format=torch.channels_last) or not channels_last


def test_experts_part_and_routers_learn() -> None:
    model = convert(own_model(), 2)
    x, labels = images(32), torch.arange(32) % 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = {name: m.router.linear.weight.clone() for name, m in routed(model).items()}
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, layer in routed(model).items():
        own, other = layer.conv.weight.chunk(2)
        assert not torch.equal(own, other)
        assert not torch.equal(layer.router.linear.weight, first[name])


def test_a_narrower_network_of_copies() -> None:
    dense = own_model().eval()
    model: Any = convert(copy.deepcopy(dense), 3, ratio=0.5, where=["1.*", "2.conv?"])
    for name, out in (("1.conv1", 4), ("1.conv2", 4), ("2.conv1", 4), ("2.conv2", 8)):  # the last feeds groups
        layer = routed(model)[name]
        assert layer.conv.weight.shape == (3 * out, 4, 3, 3)
        own, *others = layer.conv.weight.chunk(3)
        assert all(torch.equal(own, other) for other in others)
        whole = dense.get_submodule(name).weight
        assert any(
            torch.equal(own[0], whole[k][rows]) for k in range(8) for rows in torch.combinations(torch.arange(8), 4)
        )
    assert model[0].weight.shape == (4, 3, 3, 3) and model[3].weight.shape == (12, 2, 3, 3)
    assert model(images()).shape == (6, 5)
    model(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_router_of_ones_own() -> None:
    class Parity(nn.Module):
        def __init__(self, in_channels: int, num_experts: int) -> None:
            super().__init__()
            self.num_experts = num_experts

        def forward(self, x: Tensor) -> Routing:
            return Routing(torch.arange(len(x)) % self.num_experts, num_experts=self.num_experts)

    model = convert(own_model(), 2, router=Parity, where="1.conv1")
    with torch.no_grad():
        model[1].conv1.conv.weight[8:].zero_()
    y = model[1].conv1(torch.randn(4, 8, 6, 6))
    assert y[0].abs().sum() > 0 and y[1].abs().sum() == 0 and y[2].abs().sum() > 0
    scores = convert(own_model(), 2, router=lambda c, n: LightRouter(c, n), where="1.conv1")
    assert isinstance(scores[1].conv1.router.score_norm, ScoreNorm)


def test_device_dtype_mode_and_what_is_trained() -> None:
    model = own_model().double().eval()
    model[1].conv1.weight.requires_grad_(False)
    convert(model, 2)
    for layer in routed(model).values():
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
        assert not layer.training and not layer.conv.training and not layer.router.score_norm.training
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["1.conv1.conv.weight"]
    model(images().double())
    meta = convert(own_model().to("meta"), 2)
    assert {p.device.type for p in meta.parameters()} == {"meta"}


def test_a_convolution_used_twice_stays_one() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv)
    convert(model, 2, where="*")
    assert model[0] is model[2] and isinstance(model[0], SelfRoutedConv2d)
    single = convert(nn.Conv2d(3, 3, 3), 2, where="")
    assert isinstance(single, SelfRoutedConv2d)


def test_saved_copied_compiled() -> None:
    model = convert(own_model(), 2, where=lambda name, conv: conv.kernel_size == (3, 3) and name != "0").eval()
    other = convert(own_model(), 2, where=lambda name, conv: conv.kernel_size == (3, 3) and name != "0").eval()
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    other.load_state_dict(model.state_dict())
    for again in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(images()), model(images()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()))


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (
            None,
            {"where": "layer9*"},
            r"where: expected to find convolutions, got none with 'layer9\*'; the model has 0, 1.conv1",
        ),
        (
            "branch",
            {"ratio": 0.5},
            r"ratio: to have fewer channels the model must be traceable by torch.fx, and is not \(TraceError",
        ),
        (
            "converted",
            {},
            r"^model: expected nn.Conv2d behind the first, which stays as it is; it has 0, beside 6 that are",
        ),
        ("converted", {"where": "1*"}, r"got none with '1\*'; the model has 0, beside 6 that are routed already"),
        ("subclass", {}, r"where: 1.conv1 cannot be converted: it is a Mine, and"),
        ("lazy", {}, r"where: 1.conv1 cannot be converted: it is a LazyConv2d"),
        ("hook", {}, r"where: 1.conv1 cannot be converted: it has hooks"),
        ("backward hook", {}, r"where: 1.conv1 cannot be converted: it has hooks"),
        ("forward", {}, r"where: 1.conv1 cannot be converted: it has a forward of its own"),
        ("parametrized", {}, r"where: 1.conv1 cannot be converted: it is a ParametrizedConv2d"),
        (None, {"router": "heavy"}, r"router: expected 'light' or a function"),
        (None, {"num_experts": 0}, r"num_experts: expected at least 1, got 0"),
        (None, {"ratio": 1.5, "where": "1.*"}, r"ratio: expected 0 < ratio <= 1, got 1.5"),
    ],
)
def test_refused_and_left_as_it_was(change: str | None, arguments: dict, message: str) -> None:
    class Mine(nn.Conv2d):
        pass

    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    model = own_model()
    if change == "subclass":
        model[1].conv1 = Mine(8, 8, 3, padding=1)
    elif change == "converted":
        convert(model, 2)
    elif change == "branch":
        model.append(Branch())
    elif change == "lazy":
        model[1].conv1 = nn.LazyConv2d(8, 3, padding=1)
    elif change == "hook":
        model[1].conv1.register_forward_hook(lambda *args: None)
    elif change == "backward hook":
        model[1].conv1.register_full_backward_hook(lambda *args: None)
    elif change == "forward":
        model[1].conv1.forward = lambda x: 2 * x
    elif change == "parametrized":
        nn.utils.parametrizations.weight_norm(model[1].conv1)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        convert(model, **{"num_experts": 2, **arguments})
    assert list(model.modules()) == modules
