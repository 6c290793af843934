# SPDX-License-Identifier: Apache-2.0
"""The contract on CUDA tensors: values and every gradient against a float64 loop on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
from on_device import DEVICE, assert_close_in_norm, check, choice, compare, images, net, no_synchronisation, on_device
from oracle import LAYOUTS, NAMED, Case, named, partition, whole, windows
from torch import Tensor

from moe_kernels import ExpertSlices, RoutedBatchNorm2d, RoutedConv2d, RoutedLinear, Routing, functional, use_backend

pytestmark = pytest.mark.gpu

ARITHMETIC = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}


@pytest.fixture(params=list(ARITHMETIC))
def arithmetic(request: pytest.FixtureRequest) -> tuple[torch.dtype, bool]:
    """The dtype, and whether float32 is multiplied as tf32: by the switch that nn.Conv2d obeys."""
    dtype, tf32 = ARITHMETIC[request.param]
    torch.backends.cudnn.allow_tf32 = tf32  # the fixture around every test puts it back
    return dtype, tf32


@named()
def test_equals_the_loop(case: Case, arithmetic: tuple[torch.dtype, bool]) -> None:
    dtype, tf32 = arithmetic
    check(replace(case, dtype=dtype), tf32)


# Layers of ResNet-18 at r = 0.5: the widest image, a stride, tiles of several samples. A batch that no tile divides.
_REAL = Case(partition(32, 2), whole(64), batch=37, padding=(1, 1), size=(32, 32), bias=False, layout="channels_last")
REAL = {
    "64->32@32": _REAL,
    "32->64@32 stride 2": replace(_REAL, out_slices=partition(64, 2), in_slices=whole(32), stride=(2, 2)),
    "256->256@4": replace(_REAL, out_slices=partition(256, 2), in_slices=whole(256), size=(4, 4)),
}


@pytest.mark.parametrize("case", list(REAL.values()), ids=list(REAL))
def test_layers_of_resnet18(case: Case, arithmetic: tuple[torch.dtype, bool]) -> None:
    dtype, tf32 = arithmetic
    check(replace(case, dtype=dtype), tf32)


# Widths that matrix instructions like, where the named cases have few channels.
_WIDE = Case(windows(48, 0.5, 3), windows(64, 0.5, 3), batch=9, padding=(1, 1), dtype=torch.bfloat16)
WIDE = {
    "windows on both sides": _WIDE,
    "own choice of the input": replace(_WIDE, own_in_routing=True),
    "top 2": replace(_WIDE, top_k=2),
    "top 2, one choice a side": replace(_WIDE, top_k=2, own_in_routing=True),
    "one sample": replace(_WIDE, batch=1),
    "no samples": replace(_WIDE, batch=0),
    "more experts than samples": replace(_WIDE, out_slices=partition(16, 40), in_slices=whole(32)),
    "groups": replace(_WIDE, out_slices=partition(64, 3), in_slices=whole(32), groups=4),
    "depthwise": replace(_WIDE, out_slices=partition(32, 3), in_slices=whole(32), groups=32),
    "odd channels": replace(_WIDE, out_slices=partition(33, 3), in_slices=whole(17)),
    "7x7, stride 2": replace(_WIDE, kernel=(7, 7), stride=(2, 2), padding=(3, 3), size=(15, 14)),
    "dilation": replace(_WIDE, dilation=(2, 3), padding=(2, 3), size=(9, 9)),
    "stride 3, no padding": replace(_WIDE, stride=(3, 2), padding=(0, 0), size=(10, 9)),
    "1x1": replace(_WIDE, kernel=(1, 1), padding=(0, 0)),
}


@pytest.mark.parametrize("case", list(WIDE.values()), ids=list(WIDE))
def test_every_kind_of_layer_with_wide_channels(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, weight_layout: str) -> None:
    check(replace(_WIDE, layout=layout, weight_layout=weight_layout))


def test_many_samples_in_many_groups() -> None:
    """More samples than one program of the plan takes, and pairs of experts as groups."""
    case = replace(_WIDE, batch=1300, kernel=(1, 1), padding=(0, 0), size=(2, 2), own_in_routing=True)
    check(replace(case, out_slices=windows(32, 0.5, 7), in_slices=windows(24, 0.5, 5)))


def test_epilogue_in_one_pass() -> None:
    case = replace(_WIDE, top_k=1)
    values = on_device(oracle.numbers(case))
    arguments: dict[str, Any] = {
        "out_slices": case.out_slices,
        "in_slices": case.in_slices,
        "scale": values.scale,
        "shift": values.shift,
        "residual": values.residual,
        "relu": True,
        **case.convolution,
    }
    with torch.no_grad():
        y = functional.routed_conv2d_fused(values.x, values.weight, values.routing(case), values.bias, **arguments)
        with use_backend("reference"):
            expected = functional.routed_conv2d_fused(
                values.x, values.weight, values.routing(case), values.bias, **arguments
            )
    assert_close_in_norm(y, expected, 1e-2)
    assert (y >= 0).all() and (y > 0).any()


@pytest.mark.parametrize("tokens", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(tokens: int | None, dtype: torch.dtype) -> None:
    """A routed linear layer is the 1×1 convolution of an image with a row for each token."""
    case = Case(windows(20, 0.5, 3), windows(48, 0.5, 3), batch=7, kernel=(1, 1), size=(tokens or 1, 1), dtype=dtype)
    values = oracle.numbers(case)
    expected, magnitude = oracle.truth(case, values)
    values = on_device(values)
    layer = RoutedLinear(case.in_slices, case.out_slices, device=DEVICE, dtype=dtype)
    assert values.bias is not None and layer.bias is not None
    with torch.no_grad():
        layer.weight.copy_(values.weight[:, :, 0, 0])
        layer.bias.copy_(values.bias)
    x = values.x.detach().squeeze(3).transpose(1, 2).requires_grad_()  # [B, T, in]
    y = layer(x if tokens else x.squeeze(1), values.routing(case))
    y = y if tokens else y.unsqueeze(1)
    leaves = [x, layer.weight, layer.bias, values.gate]
    dx, dw, db, dgate = torch.autograd.grad(y, leaves, values.grad.squeeze(3).transpose(1, 2))  # type: ignore[arg-type]
    actual = {"output": y.transpose(1, 2)[..., None], "input": dx.transpose(1, 2)[..., None]}
    compare(case, {**actual, "weight": dw[:, :, None, None], "bias": db, "gate": dgate}, expected, magnitude)


SIDES = {"partition": (16, 3), "windows": (windows(32, 0.5, 3), None)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("side", list(SIDES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_batch_norm(dtype: torch.dtype, side: str, layout: torch.memory_format) -> None:
    """Against the same layer in torch's own operators, in float64 on the CPU: training, then eval."""
    features, num_experts = SIDES[side]
    layer = RoutedBatchNorm2d(features, num_experts, device=DEVICE)  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    truth = copy.deepcopy(layer).cpu().double()
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for expert in ([0, 1, 2, 0, 1, 1, 0], [2, 2, 0, 0, 0, 2, 2], None):
        if expert is None:
            layer.eval()
            truth.eval()
        which = torch.tensor(expert or [1, 0, 1, 2, 2, 2, 0])
        x = (torch.randn(7, 16, 5, 6) * 2 + 1).to(dtype).contiguous(memory_format=layout)
        dy = torch.randn(7, 16, 5, 6).to(dtype)
        results = []
        for module, device, wide in ((layer, DEVICE, dtype), (truth, torch.device("cpu"), torch.float64)):
            leaf = x.to(device, wide).requires_grad_()
            with use_backend("reference" if module is truth else "auto"):
                y = module(leaf, Routing(which.to(device), num_experts=3))
                grads = torch.autograd.grad(y, [leaf, module.weight, module.bias], dy.to(device, wide))
            results.append((y, *grads))
        assert results[0][0].dtype == dtype and results[0][0].is_contiguous(memory_format=layout)
        for name, actual, expected in zip(("output", "input", "weight", "bias"), *results, strict=True):
            assert_close_in_norm(actual, expected, bound, name)
        for name in ("running_mean", "running_var"):  # of the values as they came, in float32
            assert_close_in_norm(getattr(layer, name), getattr(truth, name), 1e-5, name)
        assert torch.equal(layer.num_batches_tracked.cpu(), truth.num_batches_tracked)


def test_eval_packs_the_weight_and_follows_it() -> None:
    """The kept form of the weight gives the bits that the weight itself gives, also after a step of an optimizer."""
    layer = RoutedConv2d(16, 32, 3, padding=1, num_experts=3, device=DEVICE)
    x, routing = images(), choice(0, 1, 2, 0, 1, 1)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(layer.eval()(x, routing), layer.train()(x, routing))
            layer.eval()(x, routing)
        layer.weight.grad = torch.randn_like(layer.weight)
        torch.optim.SGD([layer.weight], lr=0.1).step()  # in eval mode: the kept form must not survive it


def test_a_routing_changed_in_place_is_seen() -> None:
    """The plan that a Routing keeps is that of its values, not of its address."""
    model, x = net(router=False), images()
    expert = torch.tensor([0, 1, 2, 0, 1, 1], device=DEVICE)
    routing = Routing(expert, num_experts=3)
    first = model(x, routing)
    expert.copy_(torch.tensor([2, 2, 0, 1, 0, 0], device=DEVICE))
    model.norm.reset_running_stats()
    assert torch.equal(model(x, routing), model(x, Routing(expert.clone(), num_experts=3)))
    assert not torch.equal(model(x, routing), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_twice(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    x, target = images(37, 16, dtype), torch.randint(10, (37,), device=DEVICE)
    seen = []
    for _ in range(2):
        again = copy.deepcopy(model)
        leaf = x.clone().requires_grad_()
        torch.nn.functional.cross_entropy(again(leaf), target).backward()
        found = {name: p.grad for name, p in again.named_parameters()}
        seen.append({**found, **dict(again.named_buffers()), "input": leaf.grad})
    for name, value in seen[0].items():
        assert value is not None and torch.equal(value, seen[1][name]), name


def test_permuting_samples_permutes_outputs() -> None:
    """Bit for bit, although tiles then hold other rows: images of 4×4 share a tile."""
    model = net(norm=False, router=False)
    expert = torch.randint(3, (37,), device=DEVICE)
    order = torch.randperm(37, device=DEVICE)
    for size in (8, 16):
        x, dy = images(37, size), torch.randn(37, 10, device=DEVICE)
        results: list[tuple[Tensor, Tensor]] = []
        for which in (torch.arange(37, device=DEVICE), order):
            leaf = x[which].contiguous(memory_format=torch.channels_last).requires_grad_()
            y = model(leaf, Routing(expert[which], num_experts=3))
            results.append((y, torch.autograd.grad(y, leaf, dy[which])[0]))
        for whole_batch, permuted in zip(*results, strict=True):
            assert torch.equal(whole_batch[order], permuted)


def test_two_half_batches_equal_the_whole() -> None:
    model, x = net(norm=False, router=False), images(24)
    expert = torch.randint(3, (24,), device=DEVICE)
    halves = [model(x[half], Routing(expert[half], num_experts=3)) for half in (slice(0, 12), slice(12, 24))]
    whole_batch = model(x, Routing(expert, num_experts=3))
    torch.testing.assert_close(torch.cat(halves), whole_batch, rtol=1e-5, atol=1e-5)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"one CUDA device: {torch.cuda.get_device_name()}")
    for name in ("windows", "own choice of the input", "top 2"):
        check(replace(NAMED[name], dtype=torch.float32), device=torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0


def test_kernels_run_on_the_current_stream() -> None:
    """Behind what was queued there: an input that is written late is read late."""
    layer = RoutedConv2d(16, ExpertSlices.windows(64, 0.5, 3), 3, padding=1, device=DEVICE)
    x, routing = images(32), Routing(torch.arange(32, device=DEVICE) % 3, num_experts=3)
    expected = layer(x, routing)
    torch.cuda.synchronize()
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    with torch.cuda.stream(stream), no_synchronisation():
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        late.copy_(x)
        y = layer(late, routing)
    stream.synchronize()
    assert torch.equal(y, expected)
