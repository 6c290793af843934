# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions that the CPU computes by Winograd's algorithm: when, equal to the loop in float64 within the bound
that direct sums keep, and with what is special to it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import Case, assert_within, check, numbers, partition, run, truth, whole, windows
from torch import Tensor, nn

from moe_kernels import LightRouter, RoutedBatchNorm2d, RoutedConv2d, Routing, functional, fuse, ops
from moe_kernels.backends import cpu

_DIRECT, _WINOGRAD = 0, 1


def _case(out: int, red: int, size: tuple[int, int], **more: Any) -> Case:
    return Case(partition(out, 2), whole(red), padding=(1, 1), size=size, dtype=torch.float32, **more)


def _forms(case: Case) -> tuple[int, int]:
    weight = numbers(case).weight
    return cpu.CpuBackend().packed_form(weight, _geometry(case), case.size)


def _geometry(case: Case) -> Any:
    c = case.convolution
    return functional.Conv2dGeometry.of(
        case.out_slices, case.in_slices, c["stride"], c["padding"], c["dilation"], c["groups"]
    )


# what is special: tiles that hang over the edge, images that a register tile crosses, panels that are not full, channels
# of several blocks, the padding's width, more tasks than a thread's
CASES = {
    "the smallest": _case(32, 16, (8, 8)),
    "odd rows": _case(32, 16, (7, 10)),
    "odd columns": _case(16, 32, (10, 7)),
    "odd both": _case(48, 48, (9, 11), batch=5),
    "half a panel": _case(16, 64, (8, 8)),
    "a panel and a half": _case(48, 16, (8, 9)),
    "narrow": _case(3, 16, (16, 4)),
    "no padding": replace(_case(32, 32, (10, 12)), padding=(0, 0)),
    "wide padding": replace(_case(32, 32, (6, 6)), padding=(2, 2)),
    "padding of one side": replace(_case(32, 32, (8, 10)), padding=(2, 0)),
    "many images": _case(32, 32, (8, 8), batch=19),
    "a large image": _case(16, 16, (40, 36), batch=2),
    "deep": _case(64, 160, (8, 8), batch=4),
    "windows of both sides": Case(
        windows(64, 0.5, 3), windows(96, 0.5, 3), padding=(1, 1), size=(8, 8), batch=5, dtype=torch.float32
    ),
    "sides chosen apart": Case(
        partition(16, 3), windows(64, 0.5, 4), padding=(1, 1), size=(8, 10), batch=5, own_in_routing=True,
        dtype=torch.float32,
    ),
    "groups": _case(32, 32, (8, 8), groups=2),
    "two choices": _case(32, 16, (8, 8), batch=4, top_k=2),
    "channels_last": _case(32, 32, (8, 8), layout="channels_last", weight_layout="channels_last"),
    "parts of larger tensors": _case(32, 32, (8, 8), layout="sliced_channels_last", weight_layout="sliced"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_loop(name: str, dtype: torch.dtype) -> None:
    case = replace(CASES[name], dtype=dtype)
    assert _forms(case)[0] == _WINOGRAD
    check(case)


@pytest.mark.parametrize(
    "case",
    [
        _case(32, 16, (7, 9)),  # too few pixels
        _case(32, 16, (1, 64)),  # more products than direct sums, which leave the padding out
        _case(32, 24, (8, 8)),
        replace(_case(32, 16, (8, 8)), stride=(2, 2)),
        replace(_case(32, 16, (8, 8)), stride=(1, 2)),
        replace(_case(32, 16, (8, 8)), dilation=(2, 2), padding=(2, 2)),
        replace(_case(32, 16, (8, 8)), kernel=(5, 5), padding=(2, 2)),
        replace(_case(32, 16, (8, 8)), kernel=(1, 3), padding=(0, 1)),
        replace(_case(32, 16, (8, 8)), dtype=torch.float64),
    ],
)
def test_other_convolutions_stay_direct(case: Case) -> None:
    assert _forms(case)[0] == _DIRECT
    check(case)


def test_forward_and_backward_choose_apart() -> None:
    assert _forms(_case(24, 32, (8, 8))) == (_WINOGRAD, _DIRECT)
    assert _forms(_case(32, 24, (8, 8))) == (_DIRECT, _WINOGRAD)


def _errors(case: Case, environment: str) -> tuple[float, float]:
    """Norm-wise relative errors of output and input gradient, in a process of its own."""
    code = """
import torch
from test_winograd import CASES, _rounding
print(*_rounding(CASES["deep"]))
"""
    here = os.path.dirname(__file__)
    out = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "MOE_KERNELS_WINOGRAD": environment, "PYTHONPATH": here},
        cwd=os.path.dirname(os.path.dirname(here)), check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    return float(out[0]), float(out[1])


def _rounding(case: Case) -> tuple[float, float]:
    values = numbers(case)
    expected, _ = truth(case, values)
    y = run(case, values)
    (dx,) = torch.autograd.grad(y, values.x, values.grad)
    pairs = ((y.detach(), expected["output"]), (dx, expected["input"]))
    return tuple(float((a.double() - e).norm() / e.norm()) for a, e in pairs)  # type: ignore[return-value]


def test_it_rounds_about_as_direct_sums_do_and_can_be_forbidden() -> None:
    winograd, direct = _errors(CASES["deep"], "1"), _errors(CASES["deep"], "0")
    for mine, theirs in zip(winograd, direct, strict=True):
        assert mine != theirs  # two algorithms
        assert mine < 3 * theirs < 3e-6


def test_another_value_of_the_switch_is_refused() -> None:
    code = "import torch, moe_kernels as m; l = m.RoutedConv2d(16, 16, 3, num_experts=2, padding=1)\n" + (
        "l(torch.zeros(1, 16, 8, 8), m.Routing(torch.tensor([0]), num_experts=2))"
    )
    environment = {**os.environ, "MOE_KERNELS_WINOGRAD": "yes"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "MOE_KERNELS_WINOGRAD=yes must be 0 or 1" in done.stderr


def test_an_epilogue_follows_it() -> None:
    case = _case(48, 32, (7, 10), batch=5)
    values = numbers(case)
    with torch.no_grad():
        y = functional.routed_conv2d_fused(
            values.x, values.weight, values.routing(case), values.bias, out_slices=case.out_slices,
            scale=values.scale, shift=values.shift, residual=values.residual, relu=True, padding=1,
        )  # fmt: skip
        expected, magnitude = truth(case, values)
        start = torch.tensor([case.out_slices.starts[int(e)] for e in values.expert])
        channels = start[:, None] + torch.arange(case.out_slices.width)
        scale, shift = (t.double()[channels][:, :, None, None] for t in (values.scale, values.shift))
        result = expected["output"] * scale + shift + values.residual.double()
        bound = magnitude["output"] * scale.abs() + shift.abs() + values.residual.double().abs()
    assert_within(y, result.relu(), bound, case.terms_forward + 3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_reaches_no_other_pixel(value: float) -> None:
    layer = RoutedConv2d(16, 8, 3, num_experts=2, padding=1).eval()
    x = torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    routing = Routing(torch.tensor([0, 1, 0]), num_experts=2)
    with torch.no_grad():
        clean = layer(x, routing)
        x[1, 3, 4, 5] = value
        y = layer(x, routing)
    reached = torch.zeros(3, 8, 8, 8, dtype=torch.bool)
    reached[1, :, 3:6, 4:7] = True
    assert torch.equal(~y.isfinite(), reached)
    assert torch.equal(y[~reached], clean[~reached])


def test_the_cache_of_packed_weights_follows_the_images_size() -> None:
    layer = RoutedConv2d(16, 16, 3, num_experts=2, padding=1).eval()
    routing = Routing(torch.tensor([0, 1]), num_experts=2)
    for size, form in ((8, _WINOGRAD), (2, _DIRECT), (3, _DIRECT), (12, _WINOGRAD)):
        before = layer._cache
        x = torch.randn(2, 16, size, size)
        with torch.no_grad():
            y = layer(x, routing)
        weight = layer.weight.chunk(2)
        bias = layer.bias.chunk(2)
        expected = torch.cat([F.conv2d(x[i : i + 1], weight[i], bias[i], padding=1) for i in (0, 1)])
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert layer._cache.form[0] == form and layer._cache.size == (size, size)
        same_form = before is not None and before.form == layer._cache.form
        assert (before is not None and before.forward is layer._cache.forward) == same_form


def test_weights_packed_for_another_size_are_refused() -> None:
    case = _case(32, 32, (8, 8))
    values, g = numbers(case), _geometry(case)
    small = cpu.CpuBackend().pack(values.weight.detach(), g, (2, 2), False)
    with torch.no_grad(), pytest.raises(ValueError, match="packed: "):
        ops.call(ops.conv2d, values.x, values.weight, values.expert, None, g, small, None, None)


def test_a_samples_result_does_not_depend_on_its_batch() -> None:
    layer = RoutedConv2d(32, 32, 3, num_experts=2, padding=1)
    x = torch.randn(9, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    expert = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1])
    with torch.no_grad():
        together = layer(x, Routing(expert, num_experts=2))
        alone = torch.cat([layer(x[i : i + 1], Routing(expert[i : i + 1], num_experts=2)) for i in range(9)])
    assert torch.equal(together, alone)


class _PreActivation(nn.Module):
    """What several convolutions read behind a BatchNorm and ReLU that is not written out, with padding that stays 0."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.router = LightRouter(32, 2)
        self.norm: nn.Module = RoutedBatchNorm2d(32, 2) if own else nn.BatchNorm2d(32)
        self.own = own
        self.first, self.second = (RoutedConv2d(32, 40, 3, num_experts=2, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        routing = Routing.from_scores(self.router(x))
        y = F.relu(self.norm(x, routing) if self.own else self.norm(x))
        return torch.cat([x, self.first(y, routing), self.second(y, routing)], 1)


@pytest.mark.parametrize("own", [False, True])
def test_a_prologue_before_it(own: bool) -> None:
    torch.manual_seed(0)
    model = _PreActivation(own).eval()
    for values in (model.norm.running_mean, model.norm.running_var, model.norm.weight, model.norm.bias):
        assert isinstance(values, Tensor)
        nn.init.uniform_(values, 0.5, 1.5)
    fused = fuse(model, torch.randn(1, 3, 9, 8))
    assert "1 program" in repr(fused) and not fused.fallbacks
    x = torch.randn(6, 3, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
