# SPDX-License-Identifier: Apache-2.0
"""Faults that were found once, by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moe_kernels import ExpertSlices, RoutedConv2d, Routing, functional, ops, use_backend

ROUTING = Routing(torch.tensor([1, 0]), num_experts=2)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [((1, 1), (1, 1), (1, 5), (0, 2), 1), ((7, 7), (3, 3), (3, 3), (50, 50), 50), ((2, 2), (1, 1), (4, 4), (9, 9), 1)],
)
def test_tiles_that_lie_in_the_padding_alone(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: int
) -> None:
    """Once wrote past the end of the copied rows."""
    torch.manual_seed(0)
    layer = RoutedConv2d(3, 4, kernel, stride, padding, dilation, num_experts=2)
    x = torch.randn(2, 3, *size, requires_grad=True)
    y = layer(x, ROUTING)
    weights = layer.weight.unflatten(0, (2, 4))[ROUTING.expert]
    biases = layer.bias.unflatten(0, (2, 4))[ROUTING.expert]
    each = [F.conv2d(x[i : i + 1], weights[i], biases[i], stride, padding, dilation) for i in range(2)]
    expected = torch.cat(each)
    torch.testing.assert_close(y, expected)
    ours = torch.autograd.grad(y.square().sum(), (x, layer.weight))
    theirs = torch.autograd.grad(expected.square().sum(), (x, layer.weight))
    torch.testing.assert_close(ours, theirs)


def test_another_default_device_does_not_move_the_output() -> None:
    """Once allocated outputs on the default device, and wrote through a pointer of another."""
    layer = RoutedConv2d(3, 4, 3, num_experts=2)
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    expected = layer(x, ROUTING)
    with torch.device("meta"):
        y = layer(x, ROUTING)
        y.sum().backward()
        layer.eval()
        packed = layer(x, ROUTING)
    assert y.device.type == "cpu" and torch.equal(y, expected)
    torch.testing.assert_close(packed, expected)


def test_forward_mode_raises_instead_of_dropping_the_tangent() -> None:
    layer = RoutedConv2d(3, 4, 3, num_experts=2, bias=False).requires_grad_(False)
    x = torch.randn(2, 3, 5, 5)

    def run(x: torch.Tensor) -> torch.Tensor:
        return functional.routed_conv2d(x, layer.weight, ROUTING, out_slices=layer.out_slices)

    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(run, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            run(dual)
        for values in ({"input": dual}, {"residual": torch.autograd.forward_ad.make_dual(*torch.ones(2, 2, 4, 3, 3))}):
            arguments = {"input": x, "weight": layer.weight, "routing": ROUTING, "out_slices": layer.out_slices} | values
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                functional.routed_conv2d_fused(**arguments)  # type: ignore[arg-type]


def test_one_channel_keeps_the_format_that_its_strides_tell() -> None:
    """Both formats fit one channel; once the next layer took a contiguous image for channels_last, but not in a trace."""
    first, second = RoutedConv2d(3, 1, 3, num_experts=2), RoutedConv2d(1, 4, 3, num_experts=2)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 7, 7).contiguous(memory_format=layout)
        y = first(x, ROUTING)
        assert y.stride() == torch.empty(y.shape, memory_format=layout).stride()
        assert second(y, ROUTING).is_contiguous(memory_format=layout)
    torch._dynamo.reset()
    both = torch.nn.ModuleList([first, second])
    compiled = torch.compile(lambda x, r: both[1](both[0](x, r), r), fullgraph=True)
    x = torch.randn(2, 3, 7, 7)
    torch.testing.assert_close(compiled(x, ROUTING), second(first(x, ROUTING), ROUTING))


def test_autocast_does_not_take_packed_weights_for_cast_ones() -> None:
    """Once handed float32 blocks, cast to bfloat16, on as they were."""
    layer = RoutedConv2d(16, 16, 3, num_experts=2, bias=False).eval().requires_grad_(False)
    x = torch.randn(2, 16, 6, 6)
    layer(x, ROUTING)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.conv2d(x, layer.weight, ROUTING.expert, None, *layer.geometry, layer._cache.forward, None)
        torch.testing.assert_close(y, layer(x, ROUTING))
    assert y.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_channel_of_a_channels_last_weight(backend: str) -> None:
    """torch 2.13's own float32 convolution reads past such a slice, and the reference handed it one."""
    slices = ExpertSlices(total=2, width=1, starts=(0, 1))
    weight = torch.randn(17, 2, 7, 7).contiguous(memory_format=torch.channels_last)
    x = torch.randn(2, 1, 3, 3)
    with use_backend(backend):
        y = functional.routed_conv2d(
            x, weight, ROUTING, out_slices=ExpertSlices.whole(17), in_slices=slices, stride=(1, 3), padding=(3, 2)
        )
    for i, e in enumerate(ROUTING.expert.tolist()):
        one = F.conv2d(x[i : i + 1].double(), weight[:, e : e + 1].double().contiguous(), None, (1, 3), (3, 2))
        torch.testing.assert_close(y[i : i + 1].double(), one, rtol=1e-4, atol=1e-4)
