# SPDX-License-Identifier: Apache-2.0
"""The operators of torch.library: opcheck, FLOPs, autocast, and what a backward pays for."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import NAMED, CallCounter, Case, Numbers, named, numbers, partition, whole, windows
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moe_kernels import RoutedBatchNorm2d, RoutedConv2d, RoutedLinear, Routing, functional, ops, use_backend
from moe_kernels.geometry import Conv2dGeometry

# --- opcheck ---


def _arguments(case: Case, values: Numbers) -> tuple[Any, ...]:
    """expert of both sides and the geometry, as the operators take them"""
    g = Conv2dGeometry.of(
        case.out_slices, case.in_slices, case.stride, case.padding, case.dilation, case.groups
    )._replace(samples_per_input=case.top_k)
    inner = values.expert if values.in_expert is None else values.in_expert
    out_expert = values.expert.reshape(-1) if g.num_out else None
    in_expert = inner.reshape(-1) if g.num_in else None
    lists = (list(a) if isinstance(a, tuple) else a for a in g)
    return (out_expert, in_expert, *lists)


def _operator_calls(case: Case, requires_grad: bool) -> list[tuple[Any, tuple[Any, ...]]]:
    """Each of the four operators with arguments."""
    values = numbers(case)
    x, w = values.x.detach(), values.weight.detach()
    dy = torch.randn(case.virtual, case.out_slices.width, *case.out_size, dtype=case.dtype)
    if case.layout == "channels_last":
        dy = dy.contiguous(memory_format=torch.channels_last)
    b, gate = torch.randn(case.out_slices.total, dtype=case.dtype), torch.randn(case.virtual, dtype=case.dtype)
    scale, shift = torch.randn(2, case.out_slices.width, dtype=case.dtype)
    residual = torch.randn_like(dy)
    for t in (x, w, dy, b, gate, scale, shift, residual):
        t.requires_grad_(requires_grad)
    rest = _arguments(case, values)
    return [
        (ops.conv2d, (x, w, *rest)),
        (ops.conv2d_grad_input, (dy, w, *rest, list(case.size))),
        (ops.conv2d_grad_weight, (dy, x, *rest, list(w.shape))),
        (ops.conv2d_fused, (x, w, *rest, b, gate, scale, shift, residual, True)),
        (ops.conv2d_fused, (x, w, *rest, None, None, None, None, None, False)),
        (ops.conv2d_grad_weight, (dy, x, *rest, list(w.shape), True)),
    ]


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@named("channels_last")
def test_opcheck_of_schema_and_fake(backend: str, case: Case, layout: str, requires_grad: bool) -> None:
    for op, args in _operator_calls(replace(case, layout=layout, batch=2), requires_grad):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    "case", [NAMED["partition"], NAMED["channels_last"], NAMED["top 2"]], ids=["contiguous", "channels_last", "top 2"]
)
def test_opcheck(case: Case, requires_grad: bool) -> None:
    """All of opcheck, with a trace of forward and backward of dynamic shape."""
    for op, args in _operator_calls(replace(case, batch=2), requires_grad)[:4]:
        torch.library.opcheck(op, args)


@pytest.mark.nightly
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@named("channels_last")
def test_opcheck_long(backend: str, case: Case, layout: str, requires_grad: bool) -> None:
    for op, args in _operator_calls(replace(case, layout=layout, batch=2), requires_grad):
        torch.library.opcheck(op, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_opcheck_of_other_dtypes(dtype: torch.dtype) -> None:
    case = Case(partition(3, 2), whole(2), batch=2, dtype=dtype)
    values = numbers(case)
    torch.library.opcheck(
        ops.conv2d,
        (values.x, values.weight, *_arguments(case, values)),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_opcheck_with_packed_weights() -> None:
    layer = RoutedConv2d(4, 6, 3, num_experts=2).eval().requires_grad_(False)
    x = torch.randn(3, 4, 5, 5)
    layer(x, Routing(torch.tensor([1, 0, 1]), num_experts=2))
    assert layer._cache is not None
    lists = [list(a) if isinstance(a, tuple) else a for a in layer.geometry]
    args = (x, layer.weight.detach(), torch.tensor([1, 0, 1]), None, *lists)
    for requires_grad in (False, True):
        x.requires_grad_(requires_grad)
        torch.library.opcheck(ops.conv2d, (*args, layer._cache.forward, layer._cache.grad_input))
        fused = (layer.bias.detach(), None, None, None, None, True)
        torch.library.opcheck(ops.conv2d_fused, (*args, *fused, layer._cache.forward))


@pytest.mark.parametrize("profiled", [True, False])
def test_the_forwards_packed_weights_alone(profiled: bool) -> None:
    """The dispatcher leaves out a last argument that equals its default."""
    layer = RoutedConv2d(5, 6, 3, num_experts=3, bias=False).eval()
    x, expert = torch.randn(4, 5, 6, 6), torch.tensor([2, 0, 1, 0])
    with torch.no_grad():
        dy = torch.randn_like(layer(x, Routing(expert, num_experts=3)))
    assert layer._cache is not None and layer._cache.forward is not None
    given = (dy, layer.weight.detach(), expert, None, *layer.geometry, [6, 6])
    with torch.autograd.profiler.profile(enabled=profiled):
        dx = ops.conv2d_grad_input(*given, layer._cache.forward)
    assert torch.equal(dx, ops.conv2d_grad_input(*given))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@named("channels_last")
def test_fake_outputs_are_as_the_real_ones(backend: str, case: Case, layout: str) -> None:
    """Shape, dtype, strides of the meta device are those of the CPU: forward and backward."""
    for op, args in _operator_calls(replace(case, layout=layout, dtype=torch.float32), requires_grad=False):
        real = op(*args)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride()), str(op)


def test_the_weights_gradient_has_the_weights_memory_format(backend: str) -> None:
    """As nn.Conv2d's: an optimizer would otherwise work on mixed strides."""
    layer = RoutedConv2d(4, 6, 3, num_experts=2)
    x, routing = torch.randn(3, 4, 5, 5), Routing(torch.tensor([0, 1, 0]), num_experts=2)
    (plain,) = torch.autograd.grad(layer(x, routing).square().sum(), layer.weight)
    assert plain.is_contiguous()
    layer.to(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(layer(x, routing).square().sum(), layer.weight)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(grad, plain, rtol=1e-5, atol=1e-5)


def test_the_way_past_the_dispatcher_has_the_bits_of_the_way_through(backend: str) -> None:
    """Eager calls go straight to the backend; under the profiler, which must see the operators, they do not."""
    layer = RoutedConv2d(4, 6, 3, num_experts=2)
    x, scores = torch.randn(3, 4, 5, 5, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    leaves = [x, scores, *layer.parameters()]

    def step() -> list[Tensor]:
        y = layer(x, Routing.from_scores(scores))
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        with torch.no_grad():
            return [y, *grads, *second, layer(x, Routing.from_scores(scores))]

    direct = step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        through = step()
    assert all(torch.equal(a, b) for a, b in zip(direct, through, strict=True))
    seen = {event.key for event in profile.key_averages()}
    assert {"moe_kernels::conv2d", "moe_kernels::conv2d_grad_input", "moe_kernels::conv2d_grad_weight"} <= seen


# --- FLOPs ---


def _flops(function: Any) -> tuple[int, int]:
    with FlopCounterMode(display=False) as forward:
        y = function()
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("input_requires_grad", [True, False])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"stride": 2, "padding": 1}, {"groups": 2}, {"dilation": 2, "bias": False}],
    ids=str,
)
def test_flops_equal_those_of_conv2d_of_one_expert(kwargs: dict[str, Any], input_requires_grad: bool) -> None:
    routed, plain = RoutedConv2d(4, 6, 3, num_experts=5, **kwargs), nn.Conv2d(4, 6, 3, **kwargs)
    x = torch.randn(7, 4, 8, 9, requires_grad=input_requires_grad)
    routing = Routing(torch.tensor([0, 1, 2, 3, 4, 4, 4]), num_experts=5)
    forward, backward = _flops(lambda: routed(x, routing))
    expected = _flops(lambda: plain(x))
    assert forward == expected[0] > 0
    # torch counts a grouped convolution's weight gradient as if it had no groups; each gradient costs what forward does
    assert backward == (expected[1] if "groups" not in kwargs else (1 + input_requires_grad) * forward) > 0


def test_flops_of_windows_top_k_linear_and_inference() -> None:
    x = torch.randn(4, 6, 8, 8)
    routing = Routing(torch.tensor([0, 1, 2, 0]), num_experts=3)
    plain = _flops(lambda: nn.Conv2d(3, 5, 3)(x[:, :3].clone().requires_grad_()))
    layer = RoutedConv2d(windows(6, 0.5, 3), windows(10, 0.5, 3), 3)
    assert _flops(lambda: layer(x[:, :3].clone().requires_grad_(), routing)) == plain
    two = Routing(torch.tensor([[0, 1], [1, 2], [2, 0], [0, 1]]), num_experts=3)
    assert _flops(lambda: layer(x[:, :3].clone().requires_grad_(), two)) == (2 * plain[0], 2 * plain[1])
    for training in (True, False):
        layer.train(training)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(x[:, :3], routing)
            functional.routed_conv2d_fused(
                x[:, :3], layer.weight, routing, out_slices=layer.out_slices, in_slices=layer.in_slices, relu=True
            )
        assert counter.get_total_flops() == 2 * plain[0]
    linear, single = RoutedLinear(6, 5, num_experts=3), nn.Linear(6, 5)
    tokens = torch.randn(4, 7, 6, requires_grad=True)
    assert _flops(lambda: linear(tokens, routing)) == _flops(lambda: single(tokens))


# --- autocast ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", ["none", "softmax", "straight_through"])
def test_autocast_casts_before_autograd(backend: str, dtype: torch.dtype, gate: str) -> None:
    """The result and the gradients of casting by hand; parameters keep float32 gradients."""
    layer = RoutedConv2d(5, 6, 3, num_experts=3)
    x, scores = torch.randn(4, 5, 6, 6, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    routing = Routing.from_scores(scores, gate=gate)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x, routing)
    assert y.dtype == dtype
    by_hand = functional.routed_conv2d(
        x.to(dtype), layer.weight.to(dtype), routing, layer.bias.to(dtype), out_slices=layer.out_slices
    )
    assert torch.equal(y, by_hand)
    leaves = [x, layer.weight, layer.bias] + ([] if gate == "none" else [scores])
    dy = torch.randn(y.shape).to(dtype)
    grads, expected = (torch.autograd.grad(t, leaves, dy, retain_graph=True) for t in (y, by_hand))
    for a, e in zip(grads, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, e)


def test_autocast_saves_the_cast_tensors(backend: str) -> None:
    """The graph of the convolution lies under the cast: what is kept for the backward is of half the size."""
    layer = RoutedConv2d(5, 6, 3, num_experts=3)
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t)
    with torch.autocast("cpu"), hooks:
        layer(torch.randn(4, 5, 6, 6, requires_grad=True), Routing(torch.tensor([0, 1, 2, 0]), num_experts=3))
    assert torch.bfloat16 in saved and torch.float32 not in saved


def test_autocast_of_the_functional_form_takes_mixed_dtypes_as_conv2d(backend: str) -> None:
    x, w, b = torch.randn(2, 3, 5, 5).bfloat16(), torch.randn(8, 3, 3, 3), torch.randn(8)
    routing = Routing(torch.tensor([1, 0]), num_experts=2)
    with torch.autocast("cpu"):
        assert F.conv2d(x, w, b).dtype == torch.bfloat16
        y = functional.routed_conv2d(x, w, routing, b, out_slices=partition(4, 2))
        fused = functional.routed_conv2d_fused(x, w, routing, b, out_slices=partition(4, 2))
    assert y.dtype == fused.dtype == torch.bfloat16
    assert torch.equal(y, functional.routed_conv2d(x, w.bfloat16(), routing, b.bfloat16(), out_slices=partition(4, 2)))


def test_backward_under_autocast_has_the_bits_of_one_outside(backend: str) -> None:
    layer = RoutedConv2d(5, 6, 3, num_experts=3)
    x, routing = torch.randn(4, 5, 6, 6, requires_grad=True), Routing(torch.tensor([0, 1, 2, 0]), num_experts=3)
    leaves = [x, *layer.parameters()]
    with torch.autocast("cpu"):
        y = layer(x, routing)
        inside = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    outside = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_autocast_of_an_operator(backend: str) -> None:
    case = Case(partition(3, 2), whole(2), batch=2, dtype=torch.float32)
    values = numbers(case)
    rest = _arguments(case, values)
    with torch.autocast("cpu"):
        for op, more in ((ops.conv2d, ()), (ops.conv2d_fused, (values.bias, None, None, None, None, False))):
            assert op(values.x, values.weight, *rest, *more).dtype == torch.bfloat16


def test_autocast_leaves_float64_alone(backend: str) -> None:
    layer = RoutedConv2d(5, 6, 3, num_experts=3, dtype=torch.float64)
    routing = Routing(torch.tensor([0, 1]), num_experts=3)
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    expected = layer(x, routing)
    with torch.autocast("cpu"):
        assert torch.equal(layer(x, routing), expected)


def test_autocast_of_a_small_network(backend: str) -> None:
    layers = nn.ModuleList(
        [RoutedConv2d(3, 8, 3, num_experts=2), RoutedBatchNorm2d(8, 2), RoutedConv2d(8, 4, 3, num_experts=2)]
    )
    head = RoutedLinear(4, 3, num_experts=2)
    x, routing = torch.randn(6, 3, 8, 8), Routing(torch.tensor([0, 1, 1, 0, 1, 0]), num_experts=2)
    outputs = {}
    for enabled in (True, False):
        modules, last = copy.deepcopy(layers), copy.deepcopy(head)
        with torch.autocast("cpu", enabled=enabled):
            y = x
            for module in modules:
                y = module(y, routing)
            logits = last(y.mean((2, 3)), routing)
        logits.float().sum().backward()
        assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in modules.parameters())
        outputs[enabled] = logits.float()
    assert (outputs[True] - outputs[False]).norm() / outputs[False].norm() < 0.05


# --- a backward computes only what is asked ---


def _network() -> tuple[nn.ModuleList, Any]:
    layers = nn.ModuleList(
        [
            RoutedConv2d(3, 4, 3, padding=1, num_experts=2),
            RoutedConv2d(4, 4, 3, padding=1, num_experts=2, bias=False),
            RoutedConv2d(4, 2, 1, num_experts=2),
        ]
    )

    def forward(x: Tensor, routing: Routing) -> Tensor:
        for layer in layers:
            x = layer(x, routing).tanh()
        return x.square().sum()

    return layers, forward


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("gate", ["none", "straight_through", "softmax"])
def test_an_attack_pays_for_no_weight_gradient(calls: CallCounter, training: bool, gate: str) -> None:
    layers, forward = _network()
    layers.train(training)
    assert all(p.requires_grad for p in layers.parameters())
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    routing = Routing.from_scores(torch.randn(4, 2, requires_grad=True), gate=gate)
    (dx,) = torch.autograd.grad(forward(x, routing), x)
    assert calls["grad_weight"] == 0
    assert calls["grad_input"] == 3
    with use_backend("reference"):
        torch.testing.assert_close(dx, torch.autograd.grad(forward(x, routing), x)[0], rtol=1e-4, atol=1e-5)


def test_an_attack_through_the_router_pays_for_no_weight_gradient(calls: CallCounter) -> None:
    _, forward = _network()
    router = nn.Linear(75, 2)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    routing = Routing.from_scores(router(x.flatten(1)))
    torch.autograd.grad(forward(x, routing), x)
    assert calls["grad_weight"] == 0 and calls["grad_input"] == 3


def test_an_attack_with_inputs_argument_of_backward(calls: CallCounter) -> None:
    layers, forward = _network()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    forward(x, Routing(torch.tensor([0, 1, 1, 0]), num_experts=2)).backward(inputs=[x])
    assert x.grad is not None and layers[0].weight.grad is None
    assert calls["grad_weight"] == 0 and calls["grad_input"] == 3


def test_training_pays_for_no_gradient_of_the_image(calls: CallCounter) -> None:
    layers, forward = _network()
    forward(torch.randn(4, 3, 5, 5), Routing(torch.tensor([0, 1, 1, 0]), num_experts=2)).backward()
    assert calls["grad_weight"] == 3 and calls["grad_input"] == 2
    assert all(p.grad is not None for p in layers.parameters())


def test_only_the_last_layers_weight_is_asked(calls: CallCounter) -> None:
    layers, forward = _network()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    loss = forward(x, Routing(torch.tensor([0, 1, 1, 0]), num_experts=2))
    torch.autograd.grad(loss, layers[2].weight)
    assert calls["grad_weight"] == 1 and calls["grad_input"] == 0


def test_frozen_parameters_cost_nothing(calls: CallCounter) -> None:
    layers, forward = _network()
    layers.requires_grad_(False)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    forward(x, Routing(torch.tensor([0, 1, 1, 0]), num_experts=2)).backward()
    assert calls["grad_weight"] == 0 and calls["grad_input"] == 3


def test_only_the_gates_gradient_asked(calls: CallCounter) -> None:
    layers, forward = _network()
    layers.requires_grad_(False)
    scores = torch.randn(4, 2, requires_grad=True)
    forward(torch.randn(4, 3, 5, 5), Routing.from_scores(scores)).backward()
    assert scores.grad is not None and (scores.grad != 0).any()
    assert calls["grad_weight"] == 0 and calls["grad_input"] == 2


def test_a_double_backward_computes_only_what_is_asked(calls: CallCounter) -> None:
    """The gradient penalty |d loss / d x|^2 of one linear layer, with respect to the weight alone."""
    layer = RoutedConv2d(3, 4, 3, num_experts=2, bias=False)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = layer(x, Routing(torch.tensor([0, 1, 1, 0]), num_experts=2))
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
    assert calls == {"forward": 1, "grad_input": 1}
    torch.autograd.grad(dx.square().sum(), layer.weight)
    assert calls == {"forward": 1, "grad_input": 1, "grad_weight": 1}


def test_no_call_of_the_library_where_no_gradient_is_needed(calls: CallCounter) -> None:
    layer = RoutedConv2d(3, 4, 3, num_experts=2)
    routing = Routing(torch.tensor([0, 1]), num_experts=2)
    with torch.no_grad():
        y = layer(torch.randn(2, 3, 5, 5), routing)
    assert calls == {"forward": 1} and not y.requires_grad and y.grad_fn is None
