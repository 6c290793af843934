# SPDX-License-Identifier: Apache-2.0
"""fuse(): equal to the model in eval mode, whatever it is made of; what it refuses, and what it says of itself."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_kernels
from moe_kernels import (
    ExpertSlices,
    FusedModel,
    LightRouter,
    RoutedBatchNorm2d,
    RoutedConv2d,
    RoutedLinear,
    Routing,
    SelfRoutedConv2d,
    convert,
    fuse,
    use_backend,
)
from moe_kernels.functional import routed_conv2d_fused
from moe_kernels.inference.recording import Buffer, Step, plan_memory

BATCHES = (1, 3, 17)


def _settled(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """In eval mode, with statistics and affine parameters that are no ones and zeros."""
    torch.manual_seed(1)
    for module in model.modules():
        for name in ("weight", "bias"):
            value = getattr(module, name, None)
            if isinstance(value, nn.Parameter) and value.dim() == 1:
                nn.init.uniform_(value, 0.5, 1.5)
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean, 0, 0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model.eval().to(dtype)


def _assert_equal(model: nn.Module, fused: FusedModel, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    for batch in BATCHES:
        for channels_last in (False, True):
            x = torch.randn(batch, *size, dtype=dtype)
            if channels_last and x.dim() == 4:
                x = x.contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                expected, got = model(x), fused(x)
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


class _Net(nn.Module):
    """The parts of a residual network, with what a subclass changes."""

    def __init__(self, num_experts: int = 3, gate: str = "straight_through") -> None:
        super().__init__()
        self.gate = gate
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.norm0 = nn.BatchNorm2d(20)
        self.router = LightRouter(20, num_experts)
        self.conv1 = RoutedConv2d(20, 33, 3, stride=2, padding=1, num_experts=num_experts)
        self.norm1 = nn.BatchNorm2d(33)
        self.conv2 = RoutedConv2d(33, 33, 3, padding=1, bias=False, num_experts=num_experts)
        self.norm2 = RoutedBatchNorm2d(33, num_experts)
        self.shortcut = nn.Conv2d(20, 33, 1, stride=2, bias=False)
        self.norm3 = nn.BatchNorm2d(33)
        self.head = nn.Linear(33, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        routing = Routing.from_scores(self.router(x), gate=self.gate)
        y = F.relu(self.norm1(self.conv1(x, routing)))
        y = self.norm2(self.conv2(y, routing), routing)
        y = F.relu(y + self.norm3(self.shortcut(x)))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("gate", ["straight_through", "softmax", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_residual_network_is_one_program_of_convolutions_and_routers(gate: str, dtype: torch.dtype) -> None:
    model = _settled(_Net(gate=gate), dtype=dtype)
    fused = fuse(model, torch.randn(2, 3, 9, 9, dtype=dtype))
    assert fused.fallbacks == ()
    _assert_equal(model, fused, (3, 9, 9), dtype)
    steps = {step.operation for step in fused.profile(torch.randn(2, 3, 9, 9, dtype=dtype))}
    # no BatchNorm, no ReLU and no sum is left of its own; the router's scores are standardised by a copy
    of_gate = {"softmax", "gather"} if gate == "softmax" else set()
    assert steps == {"load", "convolution", "mean", "norm", "linear", "copy", "argmax", "store"} | of_gate


def test_every_so_manieth_pixel_of_a_pointwise_convolution_is_a_stride() -> None:
    class Thinned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 7, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.avg_pool2d(x[:, :, ::2, ::3], 1, (2, 1)))

    model = Thinned().eval()
    for size in ((3, 9, 9), (3, 8, 7)):
        fused = fuse(model, torch.randn(1, *size))
        _assert_equal(model, fused, size)
        assert [s.operation for s in fused.profile(torch.randn(1, *size))] == ["load", "convolution", "store"]


def test_images_are_given_in_the_memory_format_of_the_input() -> None:
    model = _settled(convert(nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 6, 3)), 2))
    fused = fuse(model, torch.randn(1, 3, 9, 9))
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 9, 9).contiguous(memory_format=layout)
        assert fused(x).is_contiguous(memory_format=layout) and model(x).is_contiguous(memory_format=layout)


class _Windows(nn.Module):
    """Both sides sliced, by different choices; statistics shared where windows overlap; a classifier over windows."""

    def __init__(self) -> None:
        super().__init__()
        wide = ExpertSlices.windows(24, 0.5, 4)
        self.one, self.other = LightRouter(3, 4), LightRouter(12, 4)
        self.conv1 = RoutedConv2d(3, wide, 3, padding=1)
        self.norm1 = RoutedBatchNorm2d(wide)
        self.conv2 = RoutedConv2d(wide, wide, 3, padding=2, dilation=2)
        self.norm2 = RoutedBatchNorm2d(wide)
        self.head = RoutedLinear(wide, 40)

    def forward(self, x: Tensor) -> Tensor:
        first = Routing.from_scores(self.one(x))
        y = F.relu(self.norm1(self.conv1(x, first), first))
        second = Routing.from_scores(self.other(y))
        z = F.relu(self.norm2(self.conv2(y, second, first), second))
        return self.head(z.mean((2, 3)), second)


class _PreActivation(nn.Module):
    """BatchNorm and ReLU before the convolutions, read by several; channels side by side; each expert's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.router = LightRouter(16, 2)
        self.norm1, self.norm2 = nn.BatchNorm2d(16), RoutedBatchNorm2d(6, 2)
        self.conv1 = RoutedConv2d(16, 6, 1, num_experts=2)
        self.conv2 = RoutedConv2d(6, 6, 3, padding=1, num_experts=2)
        self.norm3 = nn.BatchNorm2d(28)
        self.mix = nn.Conv2d(28, 64, 3, padding=1, groups=2)
        self.head = nn.Linear(64 * 4, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        activated = F.relu(self.norm1(x))
        routing = Routing.from_scores(self.router(activated))
        y = self.conv1(activated, routing)
        z = self.conv2(F.relu(self.norm2(y, routing)), routing)
        together = torch.cat([torch.cat([x, y], 1), z], 1)
        pooled = F.max_pool2d(F.relu(self.norm3(together)), 3, 2, 1)
        mixed = F.adaptive_avg_pool2d(F.avg_pool2d(self.mix(pooled), 2, 2, 1), 2 if pooled.shape[2] == 6 else 1)
        return self.head(mixed.expand(-1, -1, 2, 2).flatten(1))


class _Mixture(nn.Module):
    """Two experts a sample, combined at the end of a block: what no program knows, between what it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(3, 4)
        self.conv1, self.conv2 = (RoutedConv2d(c, 8, 3, padding=1, num_experts=4) for c in (3, 8))
        self.norm = RoutedBatchNorm2d(8, 4)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        routing = Routing.from_scores(self.router(x.mean((2, 3))), top_k=2, gate="softmax")
        inner = routing.expand()
        y = self.norm(self.conv1(x, inner), inner).relu()
        return self.head(routing.combine(self.conv2(y, inner)))


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = SelfRoutedConv2d(RoutedConv2d(3, 8, 3, padding="same", num_experts=2), LightRouter(3, 2))
        self.norm, self.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(8, 8, 3, padding="same")

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv(x)))
        z = self.conv2(y)
        z += y
        z[:, 0] = 1.5
        z *= 2
        return z


class _Shapes(nn.Module):
    """Vectors in every shape, between what is known and what is not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 5, 1), nn.Linear(5, 40)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.sin(x.mean((2, 3))[:, None, None, :])  # [B, 1, 1, 3]
        y = self.one(rows.permute(0, 3, 1, 2))  # [B, 5, 1, 1]
        z = torch.sin(self.two(y.flatten(1)).reshape(-1, 1, 40, 1))
        return z.squeeze(3).transpose(1, 2).relu() - 1  # [B, 40, 1]


class _Constants(nn.Module):
    """Images normalised, scaled and shifted by numbers and by constants for each channel, gated for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1))
        self.conv = RoutedConv2d(3, 8, 3, num_experts=2)
        self.norm = nn.GroupNorm(2, 8)
        self.router = nn.Linear(3, 2)
        self.squeeze = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = 1 - 2 * (x - self.mean) / 0.7
        y = self.norm(self.conv(x, Routing.from_scores(self.router(x.mean((2, 3))))))
        y = y * self.squeeze(y.mean((2, 3))).relu()[:, :, None, None]
        return F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2)) + 0.5


@pytest.mark.parametrize(
    "make, size, fallbacks",
    [
        (_Windows, (3, 8, 8), set()),
        (_PreActivation, (3, 9, 9), {"expand"}),
        (_Mixture, (3, 6, 6), None),
        (_InPlace, (3, 7, 7), None),
        (_Constants, (3, 9, 7), set()),
        (_Shapes, (3, 5, 5), {"sin"}),
    ],
)
def test_other_networks(make: Callable[[], nn.Module], size: tuple[int, ...], fallbacks: set[str] | None) -> None:
    model = _settled(make())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = fuse(model, torch.randn(1, *size))
    _assert_equal(model, fused, size)
    if fallbacks is not None:
        assert {f.operation for f in fused.fallbacks} == fallbacks
    else:
        assert fused.fallbacks


def test_a_converted_model() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.Conv2d(16, 40, 3, 2, 1),
        nn.BatchNorm2d(40), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Dropout(), nn.Flatten(), nn.Linear(40 * 4, 50),
        nn.ReLU(), nn.Linear(50, 4),
    )  # fmt: skip
    model = _settled(convert(model, 3))
    fused = fuse(model, torch.randn(4, 3, 9, 9))
    assert not fused.fallbacks
    _assert_equal(model, fused, (3, 9, 9))


class _Written(nn.Module):
    """One small forward, whatever it is, on modules that it may use."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.run = run
        self.c = RoutedConv2d(3, 8, 3, padding=1, num_experts=2)
        self.r = LightRouter(3, 2)
        self.d, self.e = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.line, self.wide, self.one = nn.Linear(8, 4), nn.Linear(8, 40), nn.Linear(8, 1)
        self.norm1, self.norm_1d, self.group = nn.BatchNorm2d(1), nn.BatchNorm1d(1), nn.GroupNorm(1, 1)
        self.norm8 = nn.BatchNorm2d(8)
        self.register_buffer("three", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)

    def route(self, x: Tensor, gate: str = "softmax") -> Routing:
        return Routing.from_scores(self.r(x), gate=gate)


def _gate_in_cat(s: _Written, x: Tensor) -> Any:
    r = s.route(x)
    y = s.c(x, r)
    return torch.cat([y.mean((2, 3)), r.gate.unsqueeze(1)], 1), y  # type: ignore[union-attr]


def _gate_after_cat(s: _Written, x: Tensor) -> Any:
    r = s.route(x)
    together = torch.cat([r.gate.unsqueeze(1), x.mean((2, 3))], 1)  # type: ignore[union-attr]
    return together, s.c(x, r)


def _mutated_copy(s: _Written, x: Tensor) -> Any:
    a = s.d(x)
    b = a.clone()
    a[:, :4] = 0
    return a.relu(), b.relu()


def _mutated_input_of_a_convolution(s: _Written, x: Tensor) -> Any:
    a = s.d(x)
    y = s.e(a)
    a[:, :4] = 0
    return y.relu(), a


def _mutated_view(s: _Written, x: Tensor) -> Any:
    a = s.d(x)
    a.flatten(1).add_(1)
    return a


def _dropout_gives_its_argument(s: _Written, x: Tensor) -> Any:
    a = s.d(x)
    b = F.dropout(a, 0.5, False)
    b += 1
    return a + b


def _shuffle(s: _Written, x: Tensor) -> Any:
    y = s.d(x)
    return s.e(y.view(x.shape[0], 2, 4, 8, 8).transpose(1, 2).contiguous().view(x.shape[0], 8, 8, 8))


def _constants(s: _Written, x: Tensor) -> Any:
    return s.line(s.d(x).mean((2, 3))), None, 3, s.three


@pytest.mark.parametrize(
    "run",
    [
        _gate_in_cat,
        _gate_after_cat,
        _mutated_copy,
        _mutated_input_of_a_convolution,
        _mutated_view,
        _dropout_gives_its_argument,
        _shuffle,
        _constants,
        lambda s, x: s.line(s.d(x)),  # a linear layer of rows of pixels
        lambda s, x: s.wide(s.d(x)),
        lambda s, x: s.one(s.d(x).mean((2, 3))).expand(-1, 5) * 2,
        lambda s, x: s.one(s.d(x).mean((2, 3))) * s.three,
        lambda s, x: s.d((x[:, :1] - s.three.view(1, 3, 1, 1)) / 2),  # from one channel to three
        lambda s, x: s.norm1(x[:, :1, :, :1]).relu(),
        lambda s, x: s.norm_1d(s.d(x).mean((2, 3)).unsqueeze(1)).relu(),
        lambda s, x: s.group(x[:, :1, :, :1]),
        lambda s, x: s.d(x)[:, :1, :, :1].mean((2, 3)),
        lambda s, x: F.max_pool2d(s.d(x).mean((2, 3))[:, None, :, None], (2, 1)),
        lambda s, x: F.avg_pool2d(s.d(x).mean((2, 3))[:, None, None, :], (1, 2)),
        lambda s, x: F.adaptive_avg_pool2d(s.d(x)[:, :1], (1, 4)),
        lambda s, x: torch.sin(x[:, :1, :, :1])[:, :, ::2],
        lambda s, x: torch.cat([torch.sin(x[:, :1, :1]), x[:, 1:2, :1].cos()], 1),
        lambda s, x: F.pad(torch.sin(x[:, :1, :, :1]), (0, 0, 0, 0, 1, 1)),
        lambda s, x: s.route(x, "none").expert.unsqueeze(1).expand(-1, 4),
        lambda s, x: F.batch_norm(
            s.d(x), s.norm8.running_mean, s.norm8.running_var, weight=x.mean((0, 2, 3))[0].expand(8)
        ),
        lambda s, x: torch.einsum("bchw,c->bhw", s.d(x), torch.ones(8)),
        lambda s, x: (s.d(x) + s.d(x), torch.cat([s.d(x)] * 2, 1)),
    ],
)
def test_models_that_would_mislead_it(run: Callable[[Any, Tensor], Any]) -> None:
    torch.manual_seed(3)
    model = _settled(_Written(run))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = fuse(model, torch.randn(2, 3, 8, 8))
    for batch in (1, 5, 33):
        x = torch.randn(batch, 3, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_dropout_that_is_meant_stays() -> None:
    model = _settled(_Written(lambda s, x: F.dropout(s.d(x), 0.5, True)))
    with pytest.warns(UserWarning, match="dropout"):
        fused = fuse(model, torch.randn(2, 3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    dropped = (fused(x) == 0).float().mean()
    assert 0.4 < float(dropped) < 0.6 and not fused(x).equal(fused(x))


def test_choices_from_outside_are_checked() -> None:
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.line = RoutedBatchNorm2d(3, 4), nn.Linear(3, 6)

        def forward(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
            return self.norm(x * 2, Routing(index, num_experts=4)), self.line(x.mean((2, 3))).gather(1, index[:, None])

    model = _settled(Given())
    x, index = torch.randn(3, 3, 5, 5), torch.tensor([0, 3, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = fuse(model, (x, index))
    torch.testing.assert_close(fused(x, index), model(x, index))
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        fused(x, torch.tensor([0, 9, 1]))


def test_a_returned_constant_is_the_callers() -> None:
    fused = fuse(_settled(_Written(lambda s, x: (s.d(x), s.three))), torch.randn(2, 3, 8, 8))
    x = torch.randn(1, 3, 8, 8)
    fused(x)[1].zero_()
    assert fused(x)[1].tolist() == [1.0, 2.0, 3.0]


def test_depthwise_convolutions_are_left_to_torch_with_their_norm_in_their_weights() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, 1, 1, groups=24), nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 8, 1),
        nn.Conv2d(8, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8),
    )  # fmt: skip
    model = _settled(convert(model, 2, where="4"))
    with pytest.warns(UserWarning, match="conv2d of 1: many groups"):
        fused = fuse(model, torch.randn(1, 3, 9, 9))
    _assert_equal(model, fused, (3, 9, 9))
    steps = [s.operation for s in fused.profile(torch.randn(2, 3, 9, 9))]
    assert steps.count("conv2d") == 1 and "batch_norm" not in steps


def test_the_function_with_its_own_epilogue() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(12, 3, 3, 3))
            self.scale, self.shift = nn.Parameter(torch.randn(12)), nn.Parameter(torch.randn(6))
            self.router = LightRouter(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            routing = Routing.from_scores(self.router(x))
            slices = ExpertSlices.partition(6, 2)
            y = routed_conv2d_fused(
                x, self.weight, routing, out_slices=slices, scale=self.scale, shift=self.shift.repeat(2)
            )
            return routed_conv2d_fused(
                x, self.weight, routing, out_slices=slices, shift=self.shift, residual=y, relu=True
            )  # fmt: skip

    model = Model().eval()
    fused = fuse(model, torch.randn(1, 3, 6, 6))
    assert not fused.fallbacks
    _assert_equal(model, fused, (3, 6, 6))


def test_several_inputs_and_results() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = RoutedConv2d(3, 4, 3, num_experts=2)

        def forward(self, x: Tensor, expert: Tensor) -> dict[str, Any]:
            y = self.conv(x, Routing(expert, num_experts=2))
            return {"y": y, "also": (y.mean((2, 3)), expert, x)}

    model = Model().eval()
    fused = fuse(model, (torch.randn(2, 3, 5, 5), torch.zeros(2, dtype=torch.int64)))
    x, expert = torch.randn(5, 3, 5, 5), torch.tensor([0, 1, 1, 0, 1])
    torch.testing.assert_close(fused(x, expert), model(x, expert))
    with pytest.raises(ValueError, match="inputs: expected batches of one size"):
        fused(x, expert[:3])
    with pytest.raises(TypeError, match="expected 2, got 1"):
        fused(x)
    with pytest.raises(ValueError, match="expert index 2 of sample 4"):
        fused(x, torch.tensor([0, 1, 1, 0, 2]))


def test_what_it_does_not_know_is_named_and_computed_all_the_same() -> None:
    class Wave(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(x)

    model = _settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Wave(), nn.Conv2d(4, 4, 3)))
    with pytest.warns(UserWarning, match="1 operations run as torch's own: sin of 2: no native kernel"):
        fused = fuse(model, torch.randn(1, 3, 9, 9))
    assert [(f.operation, f.module, f.reason) for f in fused.fallbacks] == [("sin", "2", "no native kernel")]
    assert "sin of 2" in repr(fused) and "2 programs" in repr(fused)
    _assert_equal(model, fused, (3, 9, 9))
    assert [s.operation for s in fused.profile(torch.randn(1, 3, 9, 9))].count("sin") == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_for_any_number_of_threads_and_parts(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _settled(_Net())
    x = torch.randn(37, 3, 9, 9)
    expected = fuse(model, x)(x)
    torch.set_num_threads(threads)
    for chunk in (1, 5, 64):
        monkeypatch.setattr("moe_kernels.inference.fused._CHUNK", chunk)
        fused = fuse(model, x)
        assert fused(x).equal(expected)
        assert fused(x[:7]).equal(expected[:7])  # all threads on each layer
        assert fused(x[:0]).shape == (0, 10)


@pytest.mark.parametrize("late", [1, 4, 16, 64])
def test_the_same_bits_where_heavy_layers_take_more_samples_together(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _settled(_Net())
    x = torch.randn(37, 3, 9, 9)
    expected = fuse(model, x)(x)
    monkeypatch.setattr("moe_kernels.inference.recording.HEAVY", 1)
    monkeypatch.setattr("moe_kernels.inference.recording.LATE_CHUNK", late)
    monkeypatch.setattr("moe_kernels.inference.fused._CHUNK", 4)
    fused = fuse(model, x)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert fused(x).equal(expected)
        assert fused(x[:7]).equal(expected[:7])
    torch.set_num_threads(1)
    assert (fused.memory(37) > fused.memory(4)) == (late > 4)


def test_calls_of_several_threads_do_not_disturb_each_other() -> None:
    model = _settled(_Net())
    fused = fuse(model, torch.randn(1, 3, 9, 9))
    inputs = [torch.randn(n, 3, 9, 9) for n in (1, 4, 9, 20)]
    expected = [fused(x) for x in inputs]
    results: list[list[Tensor]] = [[] for _ in inputs]

    def work(index: int) -> None:
        results[index] = [fused(inputs[index]) for _ in range(10)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(y.equal(e) for e, ys in zip(expected, results, strict=True) for y in ys)


def test_memory_of_a_call_is_that_of_the_largest_layers_of_a_part_of_the_batch() -> None:
    fused = fuse(_settled(_Net()), torch.randn(1, 3, 9, 9))
    one = fused.memory(1)
    # the stem's result and the first convolution's, the image or the second's beside them
    assert 4 * 81 * 20 <= one <= 4 * (81 * 20 + 2 * 25 * 33 + 81 * 3) + 4096
    torch.set_num_threads(2)
    assert fused.memory(1000) <= 2 * 16 * one


def test_autocast_and_lazy_signs_do_not_reach_into_it() -> None:
    class Wave(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.again = RoutedConv2d(3, 4, 3, num_experts=2), nn.Conv2d(4, 4, 3)
            self.router = LightRouter(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x, Routing.from_scores(self.router(x)))
            return self.again(torch.matmul(y, torch.ones(y.shape[3], y.shape[3])))

    model = Wave().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = fuse(model, torch.randn(1, 3, 9, 9))
    x = torch.randn(4, 3, 9, 9)
    expected = fused(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(x).equal(expected)
    signed = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert signed.is_neg() and fused(signed).equal(expected)


def test_it_is_a_copy_of_the_models_values() -> None:
    model = _settled(_Net())
    x = torch.randn(3, 3, 9, 9)
    fused = fuse(model, x)
    before = fused(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert fused(x).equal(before)
    assert not fuse(model, x)(x).equal(before)


def test_nan_is_refused_by_routers_and_stays_elsewhere() -> None:
    model = _settled(_Net())
    fused = fuse(model, torch.randn(1, 3, 9, 9))
    with pytest.raises(ValueError, match="NaN"):
        fused(torch.full((9, 3, 9, 9), math.nan))
    assert bool(torch.isfinite(fused(torch.randn(9, 3, 9, 9))).all())
    dense = fuse(
        _settled(nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2))),
        torch.randn(1, 3, 6, 6),
    )
    x = torch.randn(2, 3, 6, 6)
    x[1] = math.nan
    assert dense(x).isnan().flatten(1).all(1).tolist() == [False, True]


def test_refusals() -> None:
    model = _Net()
    x = torch.randn(2, 3, 9, 9)
    with pytest.raises(ValueError, match=r"eval mode, call model.eval\(\) first; the model"):
        fuse(model, x)
    model = _settled(model)
    model.norm1.train()
    with pytest.raises(ValueError, match="norm1 is in training mode"):
        fuse(model, x)
    model.eval()
    with pytest.raises(TypeError, match="example_input: expected a tensor or a tuple of tensors, got list"):
        fuse(model, [x])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one sample"):
        fuse(model, x[:0])
    fused = fuse(model, x)
    with pytest.raises(ValueError, match=r"expected \[B, 3, 9, 9\] of torch.float32 on cpu .* got \[2, 3, 8, 9\]"):
        fused(x[:, :, 1:])
    with pytest.raises(ValueError, match=r"torch\.float64"):
        fused(x.double())
    with pytest.raises(RuntimeError, match="no backward"):
        fused(x.requires_grad_())
    with torch.no_grad():
        fused(x)
    with pytest.raises(ValueError, match="for inference"):
        fused.train()
    assert fused.eval() is fused and not fused.training
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="neither saved nor copied"):
            copied(fused)  # type: ignore[operator]


def test_models_that_cannot_be_traced() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    class Batch(nn.Module):
        def __init__(self, ask: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.ask = ask

        def forward(self, x: Tensor) -> Tensor:
            return 2 * x if self.ask(x) else -x

    x = torch.randn(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"model: torch.export cannot trace it \(.*"):
        fuse(Branches().eval(), x)
    asked: list[Callable[[Tensor], Any]] = [
        len,
        lambda x: x.shape[0] == 1,
        lambda x: x.shape[0] > 4,
        lambda x: x.shape[0] < 100,
        lambda x: x.shape[0] % 2,
        lambda x: x.shape[0] == 7,
    ]
    for ask in asked:
        with pytest.raises(ValueError, match=r"depends on the size of the batch|cannot trace"):
            fuse(Batch(ask).eval(), x)
    for model in (_Written(lambda s, x: s.d(x).mean((2, 3)).squeeze()), _Written(lambda s, x: s.d(x).squeeze(0))):
        with pytest.raises(ValueError, match="for a single sample it is another one"):
            fuse(model.eval(), torch.randn(2, 3, 8, 8))
    assert fuse(Batch(lambda x: x.shape[1] > 2).eval(), x)(x).equal(2 * x)


@pytest.fixture(params=["reference", "cuda_sim", "bfloat16"])
def without_programs(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Where nothing is native, and the folded graph runs as torch's operators: as on a CUDA device."""
    if request.param == "bfloat16":
        yield torch.bfloat16
        return
    reason = moe_kernels.available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    with moe_kernels.use_backend(request.param):
        yield torch.float32


@pytest.mark.parametrize("make", [_Net, _Windows, _PreActivation, _Mixture, _InPlace, _Constants])
def test_the_folded_graph_without_programs(make: Callable[[], nn.Module], without_programs: torch.dtype) -> None:
    dtype = without_programs
    size = (3, 8, 8) if make is _Windows else (3, 9, 9)
    model = _settled(make(), dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = fuse(model, torch.randn(1, *size, dtype=dtype))
    assert "0 programs" in repr(fused) and bool(fused.fallbacks) == (make is _InPlace)
    if dtype is torch.float32:
        _assert_equal(model, fused, size, dtype)
        return
    # scores that differ in their last digit may lead elsewhere: most samples agree
    x = torch.randn(64, *size, dtype=dtype)
    with torch.no_grad():
        expected, got = model(x).float(), fused(x).float()
    close = ((expected - got).abs().flatten(1).amax(1) <= 5e-2 * expected.abs().amax()).float().mean()
    assert float(close) >= 0.75


def test_the_router_is_one_call_where_the_backend_has_a_kernel_for_it() -> None:
    from moe_kernels.inference.capture import capture
    from moe_kernels.inference.folding import fold, route

    captured = capture(_settled(_Net()), (torch.randn(2, 3, 9, 9),))
    fold(captured, dense=False, routers=True)
    targets = [node.target for node in captured.graph.nodes if node.op == "call_function"]
    assert targets.count(route) == 1
    assert not {torch.ops.aten.layer_norm.default, torch.ops.aten.batch_norm.default} & set(targets)


@pytest.mark.parametrize("seed", range(20))
def test_buffers_in_use_together_do_not_overlap(seed: int) -> None:
    draw = random.Random(seed)
    buffers = [Buffer(draw.randint(1, 2000)) for _ in range(30)]
    for child in draw.sample(range(15, 30), 6):
        buffers[child].parent = buffers[child - 15], 0
    written: list[Buffer] = []
    steps = []
    for buffer in buffers:
        reads = tuple(draw.sample(written, min(len(written), draw.randint(0, 3))))
        steps.append(Step("", None, reads, buffer, lambda program: None))  # type: ignore[arg-type]
        written.append(buffer)
    total = plan_memory(steps)
    roots = {id(b.root()[0]): b.root()[0] for b in buffers}
    alive: dict[int, list[int]] = {
        key: [i for i, s in enumerate(steps) for b in (*s.reads, s.writes) if b is not None and b.root()[0] is root]
        for key, root in roots.items()
    }
    for key, a in roots.items():
        assert a.offset % 64 == 0 and a.offset >= 0 and a.offset + a.bytes <= total
        for other, b in roots.items():
            together = min(alive[key]) <= max(alive[other]) and min(alive[other]) <= max(alive[key])
            if a is not b and together:
                assert a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
    assert total < sum(-(-root.bytes // 64) * 64 for root in roots.values())


class _Several(nn.Module):
    """Takes its images by ``*images``, behind one by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, first: Tensor, *images: Tensor) -> Tensor:
        y = self.conv(first)
        for x in images:
            y = y + self.conv(x)
        return y


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_positional_arguments(count: int) -> None:
    model, images = _Several().eval(), tuple(torch.randn(2, 3, 6, 6) for _ in range(count))
    fused = fuse(model, images)
    for size in (1, 5):
        given = [torch.randn(size, 3, 6, 6) for _ in images]
        torch.testing.assert_close(fused(*given), model(*given))


def test_a_dtype_without_kernels_is_told() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval().bfloat16(), torch.randn(2, 3, 6, 6).bfloat16()
    with pytest.warns(UserWarning, match="whole model runs as torch's own operators .torch.bfloat16"):
        fused = fuse(model, x)
    torch.testing.assert_close(fused(x), model(x))
    with use_backend("reference"), pytest.warns(UserWarning, match="backend 'reference'"):
        fuse(model.float(), x.float())


@pytest.mark.parametrize("move", ["half", "double", "bfloat16"])
def test_a_fused_model_stays_where_it_is(move: str) -> None:
    fused = fuse(nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 6, 6))
    with pytest.raises(TypeError, match=r"stays of torch\.float32 on cpu; take the model that it was made of to torch\."):
        getattr(fused, move)()
    assert fused.to("cpu").float() is fused


def test_what_is_no_model_to_fuse() -> None:
    model, x = nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 6, 6)
    for other in (fuse(model, x), functools.partial(model)):
        with pytest.raises(TypeError, match=r"expected an nn\.Module that is not fused yet, got (FusedModel|partial)"):
            fuse(other, x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected torch\.float32 as the model's parameters, got torch\.float64"):
        fuse(model, x.double())
