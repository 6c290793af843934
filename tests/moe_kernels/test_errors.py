# SPDX-License-Identifier: Apache-2.0
"""Bad input raises ValueError or TypeError that names the argument, what came and what was expected."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import BACKENDS, CallCounter, partition, whole, windows
from processes import python
from torch import Tensor

from moe_kernels import ExpertSlices, RoutedBatchNorm2d, RoutedConv2d, RoutedLinear, Routing, functional, ops

B = 4
X = torch.randn(B, 3, 6, 6)
W = torch.randn(8, 3, 3, 3)
BIAS = torch.randn(8)
EXPERT = torch.tensor([1, 0, 1, 1])
ROUTING = Routing(EXPERT, num_experts=2)
OUT = partition(4, 2)
TOP2 = Routing(torch.zeros(B, 2, dtype=torch.int64), num_experts=2)
TOP3 = Routing(torch.zeros(B, 3, dtype=torch.int64), num_experts=2)


def _call(**changes: Any) -> Callable[[], Any]:
    """A good call of the functional form, made bad."""
    arguments = {"input": X, "weight": W, "routing": ROUTING, "bias": BIAS, "out_slices": OUT, **changes}
    return lambda: functional.routed_conv2d(**arguments)


def _fused(**changes: Any) -> Callable[[], Any]:
    arguments = {"input": X, "weight": W, "routing": ROUTING, "bias": BIAS, "out_slices": OUT, **changes}
    return lambda: functional.routed_conv2d_fused(**arguments)


def _sliced(**changes: Any) -> Callable[[], Any]:
    """The same with a sliced input side."""
    weight = torch.randn(8, 6, 3, 3)
    return _call(weight=weight, in_slices=partition(3, 2), **changes)


def _conv(*arguments: Any, **kwargs: Any) -> Callable[[], Any]:
    return lambda: RoutedConv2d(*arguments, **kwargs)


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "input dimensions": (_call(input=X[0]), ValueError, r"input: expected shape \[B, C, H, W\], got \(3, 6, 6\)"),
    "input type": (_call(input=[1.0]), TypeError, r"input: expected a tensor, got list"),
    "module's input type": (
        lambda: RoutedConv2d(3, 8, 3, num_experts=2)(X.numpy(), ROUTING),
        TypeError,
        r"input: expected a tensor, got ndarray",
    ),
    "linear's input type": (
        lambda: RoutedLinear(3, 8, num_experts=2)([1.0], ROUTING),
        TypeError,
        r"input: expected a tensor, got list",
    ),
    "input channels": (
        _call(input=X[:, :2], in_slices=whole(3)),
        ValueError,
        r"input: expected 3 channels, got 2 in shape \(4, 2, 6, 6\)",
    ),
    "input dtype": (_call(input=X.long()), TypeError, r"input: expected one of torch\.float32, .*, got torch\.int64"),
    "input too small": (
        _call(input=X[..., :2]),
        ValueError,
        r"input: the padded size 2 of axis 3 is smaller than the kernel's reach 3",
    ),
    "input too small for dilation": (
        _call(dilation=(3, 1)),
        ValueError,
        r"input: the padded size 6 of axis 2 is smaller than the kernel's reach 7",
    ),
    "weight dtype": (
        _call(weight=W.double()),
        TypeError,
        r"weight: expected the input's dtype torch\.float32, got torch\.float64",
    ),
    "bias dtype": (
        _call(bias=BIAS.bfloat16()),
        TypeError,
        r"bias: expected the input's dtype torch\.float32, got torch\.bfloat16",
    ),
    "weight device": (_call(weight=W.to("meta")), ValueError, r"weight: expected the input's device cpu, got meta"),
    "bias device": (_call(bias=BIAS.to("meta")), ValueError, r"bias: expected the input's device cpu, got meta"),
    "routing device": (
        _call(routing=Routing(EXPERT.to("meta"), num_experts=2)),
        ValueError,
        r"routing: expected the input's device cpu, got meta",
    ),
    "weight shape": (
        _call(weight=W[:7]),
        ValueError,
        r"weight: expected shape \[8, 3, kh, kw\], got \(7, 3, 3, 3\) \(out_slices\.total=8, in_slices\.total=3, groups",
    ),
    "weight dimensions": (
        _call(weight=W[..., 0]),
        ValueError,
        r"weight: expected shape \[8, 3, kh, kw\], got \(8, 3, 3\)",
    ),
    "bias shape": (_call(bias=BIAS[:4]), ValueError, r"bias: expected shape \[8\], got \(4,\)"),
    "routing type": (_call(routing=EXPERT), TypeError, r"routing: expected a Routing, got Tensor"),
    "routing batch": (
        _call(routing=Routing(EXPERT[:3], num_experts=2)),
        ValueError,
        r"routing: expected a routing of batch size 4 as the input's, got 3",
    ),
    "routing of a multiple of the batch": (
        _call(routing=Routing(EXPERT.repeat(2), num_experts=2)),
        ValueError,
        r"routing: expected a routing of batch size 4 as the input's, got 8",
    ),
    "expanded routing batch": (
        _call(routing=TOP2.expand(), input=X[:3]),
        ValueError,
        r"routing: expected a routing of batch size 3 as the input's, got 8 \(2 choices a sample\)",
    ),
    "routing experts": (
        _call(routing=Routing(EXPERT, num_experts=3)),
        ValueError,
        r"routing: expected a choice among 2 experts, got one among 3",
    ),
    "in_routing type": (
        _sliced(in_routing=EXPERT),
        TypeError,
        r"in_routing: expected a Routing, got Tensor",
    ),
    "in_routing batch": (
        _sliced(in_routing=Routing(EXPERT[:2], num_experts=2)),
        ValueError,
        r"in_routing: expected a routing of batch size 4 as the input's, got 2",
    ),
    "in_routing experts": (
        _sliced(in_routing=Routing(EXPERT, num_experts=3)),
        ValueError,
        r"in_routing: expected a choice among 2 experts, got one among 3",
    ),
    "in_routing of more choices": (
        _sliced(in_routing=TOP2),
        ValueError,
        r"in_routing: expected 4 choices as the routing's, or one a sample, got 8",
    ),
    "in_routing expanded": (
        _sliced(in_routing=TOP2.expand()),
        ValueError,
        r"in_routing: expected 4 choices as the routing's, or one a sample, got 8",
    ),
    "in_routing of other choices": (
        _sliced(routing=TOP2, in_routing=TOP3),
        ValueError,
        r"in_routing: expected 8 choices as the routing's, or one a sample, got 12",
    ),
    "in_routing of fewer choices": (
        _sliced(routing=Routing(torch.zeros(B, 4, dtype=torch.int64), num_experts=2), in_routing=TOP2),
        ValueError,
        r"in_routing: expected 16 choices as the routing's, or one a sample, got 8",
    ),
    "out_slices type": (_call(out_slices=8), TypeError, r"out_slices: expected ExpertSlices, got int"),
    "in_slices type": (_call(in_slices=3), TypeError, r"in_slices: expected ExpertSlices, got int"),
    "groups type": (_call(groups=1.0), TypeError, r"groups: expected an integer, got 1\.0"),
    "groups": (_call(groups=0), ValueError, r"groups: expected at least 1, got 0"),
    "groups that do not divide": (_call(groups=2), ValueError, r"groups: 2 does not divide in_channels = 3"),
    "groups of windows": (
        _call(out_slices=windows(8, 0.7, 3), groups=3),
        ValueError,
        r"groups: 3 groups need a whole input side and a partition",
    ),
    "stride type": (_call(stride=1.5), TypeError, r"stride: expected an integer or a pair of integers, got 1\.5"),
    "stride": (_call(stride=(1, 0)), ValueError, r"stride: expected at least 1, got \(1, 0\)"),
    "padding": (_call(padding=-1), ValueError, r"padding: expected at least 0, got \(-1, -1\)"),
    "dilation": (_call(dilation=0), ValueError, r"dilation: expected at least 1, got \(0, 0\)"),
    "dilation of three": (_call(dilation=(1, 1, 1)), TypeError, r"dilation: expected an integer or a pair of integers"),
    "scale shape": (_fused(scale=torch.ones(5)), ValueError, r"scale: expected shape \[4\] or \[8\], got \(5,\)"),
    "shift shape": (_fused(shift=torch.ones(4, 1)), ValueError, r"shift: expected shape \[4\] or \[8\], got \(4, 1\)"),
    "scale and shift": (
        _fused(scale=torch.ones(4), shift=torch.ones(8)),
        ValueError,
        r"shift: expected the shape of scale, \(4,\), got \(8,\)",
    ),
    "residual shape": (
        _fused(residual=torch.ones(4, 4, 4, 1)),
        ValueError,
        r"residual: expected the output's shape \(4, 4, 4, 4\), got \(4, 4, 4, 1\)",
    ),
    "residual shape with gradient": (
        _fused(weight=W.clone().requires_grad_(), residual=torch.ones(4, 1, 4, 4)),
        ValueError,
        r"residual: expected the output's shape \(4, 4, 4, 4\), got \(4, 1, 4, 4\)",
    ),
    "residual shape of top 2": (
        _fused(routing=TOP2, residual=torch.ones(8, 4, 4, 4)),
        ValueError,
        r"residual: expected the output's shape \(4, 4, 4, 4\), got \(8, 4, 4, 4\)",
    ),
    "residual dtype": (
        _fused(residual=torch.ones(4, 4, 4, 4, dtype=torch.float64)),
        TypeError,
        r"residual: expected the input's dtype torch\.float32, got torch\.float64",
    ),
    "residual dtype of top 2": (
        _fused(routing=TOP2, residual=torch.ones(4, 4, 4, 4, dtype=torch.float64)),
        TypeError,
        r"residual: expected the input's dtype torch\.float32, got torch\.float64",
    ),
    "residual device": (
        _fused(residual=torch.ones(4, 4, 4, 4, device="meta")),
        ValueError,
        r"residual: expected the input's device cpu, got meta",
    ),
    "scale device": (
        _fused(scale=torch.ones(4, device="meta")),
        ValueError,
        r"scale: expected the input's device cpu, got meta",
    ),
    "scale of top 2": (
        _fused(routing=TOP2, scale=torch.ones(8)),
        ValueError,
        r"scale: expected shape \[4\] where choices are summed \(k = 2\), got \(8,\)",
    ),
    # modules
    "num_experts missing": (
        _conv(3, 4, 3),
        TypeError,
        r"num_experts: expected an integer, or ExpertSlices as in_channels or out_channels; got None",
    ),
    "num_experts type": (
        _conv(3, 4, 3, num_experts="2"),
        TypeError,
        r"num_experts: expected an integer or None, got '2'",
    ),
    "num_experts zero": (_conv(3, 4, 3, num_experts=0), ValueError, r"num_experts: expected at least 1, got 0"),
    "num_experts of slices": (
        _conv(3, windows(8, 0.5, 3), 3, num_experts=2),
        ValueError,
        r"num_experts: expected 3 as the slices have, got 2",
    ),
    "in_channels type": (
        _conv(3.0, 4, 3, num_experts=2),
        TypeError,
        r"in_channels: expected an integer or ExpertSlices, got 3\.0",
    ),
    "out_channels": (_conv(3, 0, 3, num_experts=2), ValueError, r"out_channels: expected at least 1, got 0"),
    "slices with groups": (
        _conv(4, windows(8, 0.5, 2), 3, groups=2),
        ValueError,
        r"groups: only integers for in_channels and out_channels go with groups > 1, got groups=2",
    ),
    "groups and in_channels": (
        _conv(3, 4, 3, groups=2, num_experts=2),
        ValueError,
        r"groups: 2 does not divide in_channels = 3",
    ),
    "groups and out_channels": (
        _conv(4, 3, 3, groups=2, num_experts=2),
        ValueError,
        r"groups: 2 does not divide out_channels = 3",
    ),
    "kernel_size": (_conv(3, 4, 0, num_experts=2), ValueError, r"kernel_size: expected at least 1, got \(0, 0\)"),
    "kernel_size type": (
        _conv(3, 4, "3", num_experts=2),
        TypeError,
        r"kernel_size: expected an integer or a pair of integers, got '3'",
    ),
    "padding word": (
        _conv(3, 4, 3, padding="full", num_experts=2),
        ValueError,
        r"padding: expected integers, 'same' or 'valid', got 'full'",
    ),
    "padding same with stride": (
        _conv(3, 4, 3, 2, "same", num_experts=2),
        ValueError,
        r"padding: 'same' needs stride 1, got stride=\(2, 2\)",
    ),
    "padding of a module": (
        _conv(3, 4, 3, 1, (0, -1), num_experts=2),
        ValueError,
        r"padding: expected at least 0, got \(0, -1\)",
    ),
    "padding_mode": (
        _conv(3, 4, 3, padding_mode="mirror", num_experts=2),
        ValueError,
        r"padding_mode: expected one of zeros, reflect, replicate, circular, got 'mirror'",
    ),
    "in_features": (lambda: RoutedLinear(0, 4, num_experts=2), ValueError, r"in_features: expected at least 1, got 0"),
    "linear num_experts": (
        lambda: RoutedLinear(3, 4),
        TypeError,
        r"num_experts: expected an integer, or ExpertSlices as in_features or out_features; got None",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_raises(name: str, backend: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)  # those of GPUs answer with NaN
@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("bad", [2, 5, -1, 2**40, -(2**63)])
def test_an_expert_out_of_range_raises(backend: str, bad: int, needs_grad: bool) -> None:
    expert = EXPERT.clone()
    expert[2] = bad
    routing = Routing(expert, num_experts=2)
    message = rf"routing: expert index {bad} of sample 2 is outside 0 \.\. 1"
    w = W.clone().requires_grad_(needs_grad)
    for call in (
        _call(routing=routing, weight=w),
        _fused(routing=routing, weight=w, relu=True),
        _call(routing=routing, weight=w, bias=None),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    layer = RoutedConv2d(3, 4, 3, num_experts=2)
    for training in (True, False):
        with pytest.raises(ValueError, match=message):
            layer.train(training)(X, routing)
    with pytest.raises(ValueError, match=message):
        RoutedLinear(3, 4, num_experts=2)(X[:, :, 0, 0], routing)
    made_by = Routing(expert, num_experts=2)
    with pytest.raises(ValueError, match=f"in_{message}"):
        _sliced(in_routing=made_by)()


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)  # those of GPUs answer with NaN
@pytest.mark.parametrize("bad", [3, -1])
def test_an_expert_out_of_range_raises_for_windows(backend: str, bad: int) -> None:
    layer = RoutedConv2d(3, windows(7, 0.5, 3), 3)
    with pytest.raises(ValueError, match=rf"routing: expert index {bad} of sample 3 is outside 0 \.\. 2"):
        layer(X, Routing(torch.tensor([0, 1, 2, bad]), num_experts=3))


@pytest.mark.parametrize("backend", BACKENDS, indirect=True)  # those of GPUs answer with NaN
@pytest.mark.parametrize("bad", [2, -1])
def test_an_expert_out_of_range_raises_in_each_operator(backend: str, bad: int) -> None:
    """At the operator, so that a compiled or exported graph raises as well."""
    expert = torch.tensor([0, bad, 1, 0])
    geometry = [[], [], 2, 0, 4, 3, [1, 1], [0, 0], [1, 1], 1, 1]
    dy = torch.randn(B, 4, 4, 4)
    for call in (
        lambda: ops.conv2d(X, W, expert, None, *geometry),
        lambda: ops.conv2d_fused(X, W, expert, None, *geometry, BIAS, None, None, None, None, False),
        lambda: ops.conv2d_grad_input(dy, W, expert, None, *geometry, [6, 6]),
        lambda: ops.conv2d_grad_weight(dy, X, expert, None, *geometry, [8, 3, 3, 3]),
    ):
        with pytest.raises(ValueError, match=rf"expert index {bad} of sample 1 is outside 0 \.\. 1"):
            call()


@pytest.mark.parametrize("count", [None, 0, 3, 5, 8])
def test_operators_given_another_number_of_choices_raise(backend: str, count: int | None) -> None:
    """The kernels read one index for each sample; they must not read past the last one."""
    expert = None if count is None else torch.zeros(count, dtype=torch.int64)
    geometry = [[], [], 2, 0, 4, 3, [1, 1], [0, 0], [1, 1], 1, 1]
    dy = torch.randn(B, 4, 4, 4)
    for call in (
        lambda: ops.conv2d(X, W, expert, None, *geometry),
        lambda: ops.conv2d_fused(X, W, expert, None, *geometry, BIAS, None, None, None, None, False),
        lambda: ops.conv2d_grad_input(dy, W, expert, None, *geometry, [6, 6]),
        lambda: ops.conv2d_grad_weight(dy, X, expert, None, *geometry, [8, 3, 3, 3]),
    ):
        with pytest.raises(ValueError, match=rf"out_expert: expected 4 choices, one a sample, got {count}"):
            call()


def _geometry(**changes: Any) -> list[Any]:
    """Of X [4, 3, 6, 6] and W [8, 3, 3, 3], two experts of four channels."""
    return list((GEOMETRY | changes).values())


GEOMETRY = {
    "out_starts": [], "in_starts": [], "num_out": 2, "num_in": 0, "out_width": 4, "in_width": 3, "stride": [1, 1],
    "padding": [0, 0], "dilation": [1, 1], "groups": 1, "samples_per_input": 1,
}  # fmt: skip
ONE_EACH = torch.tensor([0, 1, 1, 0])
DY = torch.randn(B, 4, 4, 4)


def _op(op: Any, *first: Any, expert: Any = ONE_EACH, rest: Any = (), **changes: Any) -> Callable[[], Tensor]:
    return lambda: op(*first, expert, None, *_geometry(**changes), *rest)


def _fused_op(**changes: Any) -> Callable[[], Tensor]:
    values = {"bias": None, "gate": None, "scale": None, "shift": None, "residual": None, "relu": False} | changes
    return _op(ops.conv2d_fused, X, W, rest=values.values())


OPERATOR_ERRORS: dict[str, tuple[Callable[[], Tensor], str]] = {
    "fewer rows": (_op(ops.conv2d, X, W[:7]), "weight: expected 8 as size of axis 0"),
    "more rows": (_op(ops.conv2d, X, torch.randn(9, 3, 3, 3)), "weight: expected 8 as size of axis 0"),
    "fewer rows than the windows": (_op(ops.conv2d, X, W[:6], out_starts=[0, 3]), "weight: expected at least 7 as size"),
    "fewer columns": (_op(ops.conv2d, X, W[:, :2]), "weight: expected 3 as size of axis 1"),
    "weight of three dimensions": (_op(ops.conv2d, X, W[0]), "weight: expected four dimensions"),
    "input of three dimensions": (_op(ops.conv2d, X[0], W), "input: expected four dimensions"),
    "no pixel in the kernel": (_op(ops.conv2d, X, W[..., :0]), "weight: expected a kernel of at least one pixel"),
    "channels": (_op(ops.conv2d, X[:, :2], W), "input: expected 3 channels"),
    "dtype": (_op(ops.conv2d, X, W.double()), "weight: expected the dtype of input, torch.float32, got torch.float64"),
    "integers": (_op(ops.conv2d, X.int(), W.int()), "input: expected one of"),
    "dtype of the choices": (_op(ops.conv2d, X, W, expert=ONE_EACH.int()), "out_expert: expected int64"),
    "small image": (_op(ops.conv2d, X[..., :2], W), "input: expected at least the kernel's reach"),
    "negative start": (_op(ops.conv2d, X, W, out_starts=[-1, 0]), "out_starts: expected at least 0"),
    "starts": (_op(ops.conv2d, X, W, out_starts=[0]), "out_starts: expected none or 2"),
    "stride": (_op(ops.conv2d, X, W, stride=[1, 0]), "stride: expected at least 1"),
    "groups": (_op(ops.conv2d, X, W, groups=0), "groups: expected at least 1"),
    "groups of a sliced input": (
        _op(ops.conv2d, X[:, :2], W[:, :2], in_width=2, num_in=2, groups=2),
        "groups: 2 groups need a whole input side",
    ),
    "choices an input": (_op(ops.conv2d, X, W, samples_per_input=0), "samples_per_input: expected at least 1"),
    "grad_input channels": (_op(ops.conv2d_grad_input, DY[:, :3], W, rest=[[6, 6]]), "grad: expected the output's shape"),
    "grad_input size": (_op(ops.conv2d_grad_input, DY, W, rest=[[7, 6]]), "grad: expected the output's shape"),
    "grad_input weight": (_op(ops.conv2d_grad_input, DY, W[:4], rest=[[6, 6]]), "weight: expected 8 as size of axis 0"),
    "grad_input dtype": (_op(ops.conv2d_grad_input, DY.double(), W, rest=[[6, 6]]), "weight: expected the dtype of grad"),
    "grad_weight rows": (_op(ops.conv2d_grad_weight, DY, X, rest=[[7, 3, 3, 3]]), "weight: expected 8 as size of axis 0"),
    "grad_weight columns": (
        _op(ops.conv2d_grad_weight, DY, X, rest=[[8, 5, 3, 3]]),
        "weight: expected 3 as size of axis 1",
    ),
    "grad_weight batch": (
        _op(ops.conv2d_grad_weight, DY, X[:3], rest=[[8, 3, 3, 3]]),
        "grad: expected the output's shape",
    ),
    "bias": (_fused_op(bias=BIAS[:4]), "bias: expected shape"),
    "gate": (_fused_op(gate=torch.ones(3)), "gate: expected shape"),
    "scale": (_fused_op(scale=torch.ones(3)), "scale: expected shape"),
    "shift": (_fused_op(scale=torch.ones(4), shift=torch.ones(8)), "shift: expected the shape of scale"),
    "residual": (_fused_op(residual=DY[..., :3]), "residual: expected the output's shape"),
    "dtype of the residual": (_fused_op(residual=DY.half()), "residual: expected the input's dtype"),
}


@pytest.mark.parametrize("path", ["eager", "no_grad", "inference_mode", "profiler"])
@pytest.mark.parametrize("name", OPERATOR_ERRORS)
def test_operators_called_by_themselves_check_their_tensors(name: str, path: str) -> None:
    """They hand pointers to the kernels, and anybody can call torch.ops.moe_kernels."""
    context: Any = {
        "eager": contextlib.nullcontext,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "profiler": torch.profiler.profile,
    }[path]
    call, message = OPERATOR_ERRORS[name]
    with context(), pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_op(ops.conv2d, X, W, expert=ONE_EACH.to("meta")), "out_expert: expected the device of input"),
        (_fused_op(bias=BIAS.to("meta")), "bias: expected the device of input"),
    ],
)
def test_operators_called_by_themselves_check_devices(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_operators_called_by_themselves_check_before_a_gradient() -> None:
    for x, w in ((X.clone().requires_grad_(), W[:7]), (X, W[:7].clone().requires_grad_())):
        with pytest.raises(ValueError, match="weight: expected 8 as size of axis 0"):
            ops.conv2d(x, w, ONE_EACH, None, *_geometry())


def test_an_expert_out_of_range_raises_in_a_compiled_graph() -> None:
    torch._dynamo.reset()
    layer = RoutedConv2d(3, 4, 3, num_experts=2)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(X, ROUTING)
    with pytest.raises(ValueError, match=r"expert index 2 of sample 0 is outside 0 \.\. 1"):
        compiled(X, Routing(torch.tensor([2, 0, 0, 0]), num_experts=2))
    torch._dynamo.reset()


def test_a_bad_call_computes_nothing(calls: CallCounter) -> None:
    for name in ("input channels", "routing batch", "in_routing of other choices", "residual shape", "residual dtype"):
        with pytest.raises((ValueError, TypeError)):
            BAD[name][0]()
    assert not calls


@pytest.mark.parametrize("gate", [None, 2.0])
def test_a_routing_of_one_choice_in_two_dimensions(backend: str, gate: float | None) -> None:
    """[B, 1] is [B]."""
    gates = None if gate is None else torch.full((B, 1), gate, requires_grad=True)
    flat = Routing(EXPERT, None if gates is None else gates[:, 0], num_experts=2)
    square = Routing(EXPERT[:, None], gates, num_experts=2)
    for needs_grad in (True, False):
        w = W.clone().requires_grad_(needs_grad)
        for make in (_call, _fused):
            y = make(weight=w, routing=square)()
            assert torch.equal(y, make(weight=w, routing=flat)())
        with torch.no_grad():
            assert torch.equal(_fused(weight=w, routing=square, relu=True)(), _fused(weight=w, routing=flat, relu=True)())
    fixed = None if gates is None else gates.detach()
    scaled = {"weight": W.clone().requires_grad_(), "scale": torch.randn(8)}
    assert torch.equal(
        _fused(routing=Routing(EXPERT[:, None], fixed, num_experts=2), **scaled)(),
        _fused(routing=Routing(EXPERT, None if fixed is None else fixed[:, 0], num_experts=2), **scaled)(),
    )


def test_slices_as_given_are_kept() -> None:
    """A whole side on both ends needs no choice, and takes any."""
    slices = ExpertSlices.whole(4)
    y = functional.routed_conv2d(X, W[:4], Routing(EXPERT, num_experts=9), out_slices=slices)
    torch.testing.assert_close(y, torch.nn.functional.conv2d(X, W[:4]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("weight", (4, 3, 3, 3), r"weight: expected shape \[8, 3, 3, 3\], got \[4, 3, 3, 3\]"),
        ("weight", (8, 2, 3, 3), r"weight: expected shape \[8, 3, 3, 3\], got \[8, 2, 3, 3\]"),
        ("weight", (8, 3, 1, 1), r"weight: expected shape \[8, 3, 3, 3\], got \[8, 3, 1, 1\]"),
        ("bias", (4,), r"bias: expected shape \[8\], got \[4\]"),
    ],
    ids=str,
)
def test_a_parameter_of_another_shape_raises(
    backend: str, name: str, shape: tuple[int, ...], message: str, mode: str
) -> None:
    """A dense layer's weight put into a routed one, or pruned: kernels would read past its end."""
    layer = RoutedConv2d(3, 4, 3, num_experts=2).train(mode == "train")
    routing = Routing(EXPERT, num_experts=2)
    with torch.set_grad_enabled(mode != "no_grad"):
        with pytest.raises(ValueError, match=message):
            torch.func.functional_call(layer, {name: torch.randn(shape)}, (X, routing))
        setattr(layer, name, torch.nn.Parameter(torch.randn(shape)))
        with pytest.raises(ValueError, match=message):
            layer(X, routing)


def test_a_linear_weight_of_another_shape_raises() -> None:
    layer = RoutedLinear(3, 4, num_experts=2)
    layer.weight = torch.nn.Parameter(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"weight: expected shape \[8, 3\], got \[4, 3\]"):
        layer(torch.randn(4, 3), Routing(EXPERT, num_experts=2))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16], ids=str)
def test_a_routing_converted_with_a_tree_of_tensors_raises(backend: str, dtype: torch.dtype) -> None:
    routing = torch.utils._pytree.tree_map(lambda t: t.to(dtype), Routing(EXPERT, EXPERT / 2, num_experts=2))
    layer = RoutedConv2d(3, 4, 3, num_experts=2)
    with pytest.raises(TypeError, match=f"routing: expected expert to be int64, got {dtype}"):
        layer(X, routing)


def test_a_layer_without_a_weight_raises() -> None:
    layer = RoutedConv2d(3, 4, 3, num_experts=2).eval()
    layer.weight = None
    with pytest.raises(ValueError, match=r"weight: expected shape \[8, 3, 3, 3\], got None"):
        layer(X, Routing(EXPERT, num_experts=2))


def test_a_batch_norm_without_channels_raises() -> None:
    with pytest.raises(ValueError, match="num_features: expected at least 1, got 0"):
        RoutedBatchNorm2d(0, 4)


@pytest.mark.skipif("ASAN_OPTIONS" in os.environ, reason="AddressSanitizer ends a process that is out of memory")
def test_memory_that_cannot_be_had_is_a_memory_error() -> None:
    """There is room for the output, for the packed weights of all experts there is none; afterwards all is well."""
    code = """
import resource
import torch
from moe_kernels import RoutedConv2d, Routing
torch.set_num_threads(1)
layer = RoutedConv2d(512, 512, 3, num_experts=2, padding=1).requires_grad_(False)
x, routing = torch.randn(64, 512, 4, 4), Routing(torch.arange(64) % 2, num_experts=2)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (6 << 20), resource.RLIM_INFINITY))
try:
    layer(x, routing)
except MemoryError as error:
    print(type(error).__name__)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(*layer(x, routing).shape)
"""
    assert python(code).split() == ["MemoryError", "64", "512", "4", "4"]
