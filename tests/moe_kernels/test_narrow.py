# SPDX-License-Identifier: Apache-2.0
"""Fewer channels, the same function of those that are left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels.narrow import narrow


class Net(nn.Module):
    """Whatever ``forward`` does with these layers."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def residual(m: Any, x: Tensor) -> Tensor:
    x = F.relu(m.bn(m.stem(x)))
    x = x + m.b(F.relu(m.a(x)))
    x = torch.cat([x, m.c(x)], 1)
    return m.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def net() -> Net:
    torch.manual_seed(0)
    return Net(
        residual, stem=nn.Conv2d(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), a=nn.Conv2d(8, 10, 3, padding=1, bias=False),
        b=nn.Conv2d(10, 8, 1), c=nn.Conv2d(8, 6, 3, padding=1, groups=1), head=nn.Linear(14 * 4, 5),
    )  # fmt: skip


def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def zero_out(model: nn.Module, channels: dict[str, set[int]]) -> None:
    """Makes these output channels 0 wherever they are written, so that nothing is lost with them."""
    with torch.no_grad():
        for name, out in channels.items():
            module: Any = model.get_submodule(name)
            for channel in out:
                module.weight[channel] = 0
                if module.bias is not None:
                    module.bias[channel] = 0


def test_what_is_left_computes_what_it_did() -> None:
    """Channels that are zero are those of no importance; without them the output is the same."""
    model = net().eval()
    stream, inner, last = {0, 3, 5, 6}, {1, 2, 4, 7, 9}, {0, 1, 5}
    zero_out(model, {"stem": stream, "bn": stream, "a": inner, "b": stream, "c": last})
    expected = model(images())
    result = narrow(model, 0.5)
    assert result is model
    assert model.stem.weight.shape == (4, 3, 3, 3) and model.bn.num_features == 4 and model.bn.running_var.shape == (4,)
    assert model.a.weight.shape == (5, 4, 3, 3) and model.b.weight.shape == (4, 5, 1, 1)
    assert model.c.weight.shape == (3, 4, 3, 3) and model.head.weight.shape == (5, (4 + 3) * 4)
    assert (model.b.in_channels, model.b.out_channels, model.head.in_features) == (5, 4, 28)
    torch.testing.assert_close(model(images()), expected, rtol=1e-5, atol=1e-6)


def test_importance_of_ones_own() -> None:
    model = net()
    rows = model.a.weight.detach().clone()
    narrow(model, 0.2, importance=lambda conv: torch.arange(conv.out_channels, dtype=torch.float32))
    stem_kept = 1
    assert model.a.weight.shape == (2, stem_kept, 3, 3)
    assert torch.equal(model.a.weight, rows[8:, 7:8])  # the last channels of each


def test_ratio_1_changes_nothing() -> None:
    model = net()
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    narrow(model, 1.0)
    for name, p in model.named_parameters():
        assert p is before[name][0] and torch.equal(p, before[name][1])


def test_depthwise_follows_and_grouped_stays() -> None:
    model = Net(
        lambda m, x: m.last(m.grouped(m.point(m.depth(m.stem(x))))),
        stem=nn.Conv2d(3, 8, 1), depth=nn.Conv2d(8, 8, 3, groups=8), point=nn.Conv2d(8, 6, 1),
        grouped=nn.Conv2d(6, 6, 3, groups=3), last=nn.Conv2d(6, 4, 1),
    )  # fmt: skip
    narrow(model, 0.5)
    assert model.depth.weight.shape == (4, 1, 3, 3) and (model.depth.groups, model.depth.in_channels) == (4, 4)
    assert model.point.weight.shape == (6, 4, 1, 1)  # what groups read keeps its width
    assert model.grouped.weight.shape == (6, 2, 3, 3)
    assert model.last.out_channels == 4  # the output
    assert model(images()).shape == (2, 4, 4, 4)


def excite(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head((x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))).mean([2, 3]))


def scaled(m: Any, x: Tensor) -> Tensor:
    return m.head((m.stem(x) * m.scale).mean((2, 3)))


def shuffled(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = x.view(x.shape[0], 2, 4, 8, 8).transpose(1, 2).reshape(x.shape[0], 8, 8, 8)
    return m.head(m.more(x).mean((2, 3)))


def strided(m: Any, x: Tensor) -> Tensor:
    x = m.stem(x)
    return m.head((x[:, :, ::2, ::2] + m.down(x)).flatten(2).mean(2))


@pytest.mark.parametrize(
    ("forward", "widths"),
    [
        (excite, {"stem": 4, "down": 2, "up": 4, "head": 4}),
        (scaled, {"stem": 8, "head": 8}),  # a parameter has the width too
        (shuffled, {"stem": 8, "more": 4, "head": 4}),  # not understood: left wide
        (strided, {"stem": 8, "down": 8, "head": 8}),
    ],
)
def test_graphs(forward: Callable[[Any, Tensor], Tensor], widths: dict[str, int]) -> None:
    layers: dict[str, nn.Module] = {"stem": nn.Conv2d(3, 8, 3, padding=1), "head": nn.Linear(8, 5)}
    if forward is excite:
        layers |= {"down": nn.Conv2d(8, 4, 1), "up": nn.Conv2d(4, 8, 1)}
    elif forward is shuffled:
        layers |= {"more": nn.Conv2d(8, 8, 1)}
    elif forward is strided:
        layers |= {"down": nn.Conv2d(8, 8, 1, 2)}
    model = Net(forward, **layers)
    if forward is scaled:
        model.scale = nn.Parameter(torch.rand(8, 1, 1))
    if forward in (scaled, strided):
        layers["other"] = model.other = nn.Conv2d(3, 4, 1)
    if forward in (scaled, strided):
        with pytest.raises(ValueError, match="no channels of the model can be left out"):
            narrow(model, 0.5)
    else:
        narrow(model, 0.5)
    for name, width in widths.items():
        layer: Any = getattr(model, name)
        assert (layer.in_features if isinstance(layer, nn.Linear) else layer.out_channels) == width, name
    assert model(images()).shape == (2, 5)


def doubled(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    return m.head(m.wide(torch.cat([y, y], 1)).mean((2, 3)))


def attended(m: Any, x: Tensor) -> Tensor:
    y = m.stem(x)
    return m.head(m.wide(torch.cat([torch.sigmoid(m.one(y)) * y, y], 1)).mean((2, 3)))


def by_pixel(m: Any, x: Tensor) -> Tensor:
    return m.head(m.wide(m.stem(x).repeat(1, 2, 1, 1)).flatten(2).mean(2))


def last_dim(m: Any, x: Tensor) -> Tensor:
    return m.head(m.stem(x)).mean((1, 2))


def data_of(m: Any, x: Tensor) -> Tensor:
    return m.head(m.wide(torch.cat([m.stem(x).data, m.stem(x)], 1)).mean((2, 3)))


@pytest.mark.parametrize("forward", [doubled, attended, by_pixel, last_dim, data_of])
@pytest.mark.parametrize("normed", [False, True])
def test_whatever_it_does_the_network_still_runs(forward: Callable[[Any, Tensor], Tensor], normed: bool) -> None:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 8, 3, padding=1)
    if normed:
        stem = nn.utils.weight_norm(stem)
    model = Net(
        forward, stem=stem, one=nn.Conv2d(8, 1, 1), wide=nn.Conv2d(16, 8, 1), head=nn.Linear(8, 5),
        other=nn.Conv2d(3, 4, 1),
    )  # fmt: skip
    shape = model(images()).shape
    try:
        narrow(model, 0.5)
    except ValueError as error:
        assert "no channels of the model can be left out" in str(error)
    assert model(images()).shape == shape
    if normed:
        assert model.stem.out_channels == 8


def test_a_layer_called_twice() -> None:
    model = Net(
        lambda m, x: m.head(m.twice(m.twice(m.stem(x))).mean((2, 3))),
        stem=nn.Conv2d(3, 8, 1), twice=nn.Conv2d(8, 8, 3, padding=1), head=nn.Linear(8, 2),
    )  # fmt: skip
    narrow(model, 0.25)
    assert model.twice.weight.shape == (2, 2, 3, 3) and model(images()).shape == (2, 2)


def test_meta_and_channels_last() -> None:
    model = net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    meta = copy.deepcopy(model).to("meta")
    narrow(model, 0.5)
    narrow(meta, 0.5)
    assert model.a.weight.is_contiguous(memory_format=torch.channels_last)
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}


def test_refused() -> None:
    with pytest.raises(ValueError, match="ratio: expected 0 < ratio <= 1, got 0"):
        narrow(net(), 0)
    with pytest.raises(ValueError, match="ratio: no channels of the model can be left out"):
        narrow(nn.Conv2d(3, 8, 3), 0.5)
