# SPDX-License-Identifier: Apache-2.0
"""The same inputs give the same bits: for any number of threads, and again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracle import Case, arrange, numbers, partition, run, whole, windows
from torch import Tensor

from moe_kernels import RoutedBatchNorm2d, RoutedConv2d, RoutedLinear, Routing, use_backend


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _same_bits(function: Callable[[], tuple[Tensor, ...]], threads: tuple[int, ...] = (1, 2, 3)) -> None:
    results = []
    for number in (*threads, threads[-1]):  # and twice with the same number
        torch.set_num_threads(number)
        results.append(function())
    for number, result in zip(threads[1:], results[1:], strict=False):
        for position, (a, b) in enumerate(zip(results[0], result, strict=True)):
            assert torch.equal(a, b), f"result {position}: other bits with {number} threads than with {threads[0]}"
    assert all(torch.equal(a, b) for a, b in zip(results[-1], results[-2], strict=True))


# large enough for every torch operator around to be split among threads (from 32768 elements on)
CASES = {
    "3x3": Case(partition(32, 2), whole(16), padding=(1, 1), size=(24, 24), batch=8),
    "one image": Case(partition(32, 2), whole(16), padding=(1, 1), size=(48, 48), batch=1),
    "one channel": Case(partition(1, 2), whole(3), padding=(1, 1), size=(256, 256), batch=1),
    "one channel of many images": Case(partition(1, 2), whole(2), padding=(1, 1), size=(64, 64), batch=16),
    "three channels": Case(partition(3, 2), whole(2), padding=(1, 1), size=(192, 192), batch=2),
    "1x1": Case(partition(40, 3), whole(24), kernel=(1, 1), size=(20, 20), batch=6),
    "odd": Case(partition(31, 3), whole(17), padding=(1, 1), size=(25, 23), batch=5),
    "stride": Case(partition(32, 2), whole(32), padding=(1, 1), stride=(2, 2), size=(32, 32), batch=5),
    "stem": Case(partition(16, 2), whole(3), kernel=(7, 7), padding=(3, 3), stride=(2, 2), size=(64, 64), batch=2),
    "windows": Case(windows(64, 0.5, 3), windows(48, 0.5, 3), padding=(1, 1), size=(20, 20), batch=6),
    "many rows of windows": Case(windows(512, 0.5, 4), windows(16, 0.5, 4), kernel=(1, 1), size=(2, 2), batch=160),
    "depthwise": Case(partition(32, 2), whole(32), groups=32, padding=(1, 1), size=(24, 24), batch=4),
    "top 2": Case(partition(32, 3), whole(16), padding=(1, 1), size=(24, 24), batch=4, top_k=2),
    "deep": Case(partition(128, 2), whole(128), padding=(1, 1), size=(4, 4), batch=16),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", list(CASES))
def test_convolution_has_the_same_bits_for_any_number_of_threads(name: str, layout: str) -> None:
    """Forward and the gradients of input, weight, bias and gate."""
    case = replace(CASES[name], layout=layout, dtype=torch.float32)
    values = numbers(case)
    values.grad = arrange(values.grad, layout)
    with use_backend("cpu"):

        def function() -> tuple[Tensor, ...]:
            y = run(case, values)
            return (y, *torch.autograd.grad(y, list(values.leaves().values()), values.grad))

        _same_bits(function)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_have_the_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    for name in ("3x3", "three channels", "windows", "top 2"):
        case = replace(CASES[name], layout="channels_last", dtype=dtype)
        values = numbers(case)
        with use_backend("cpu"):

            def function(case: Case = case, values: Any = values) -> tuple[Tensor, ...]:
                y = run(case, values)
                return (y, *torch.autograd.grad(y, list(values.leaves().values()), values.grad))

            _same_bits(function)


@pytest.mark.parametrize("gate", ["straight_through", "softmax"])
def test_gradient_of_the_scores_has_the_same_bits_for_any_number_of_threads(gate: str) -> None:
    layer = RoutedConv2d(8, 16, 3, padding=1, num_experts=4)
    x, scores = torch.randn(8, 8, 32, 32), torch.randn(8, 4, requires_grad=True)
    dy = torch.randn(8, 16, 32, 32)

    def function() -> tuple[Tensor, ...]:
        y = layer(x, Routing.from_scores(scores, gate=gate))
        return (y, *torch.autograd.grad(y, (scores, layer.weight), dy))

    _same_bits(function)


def test_eval_mode_has_the_same_bits_for_any_number_of_threads() -> None:
    layer = RoutedConv2d(16, 48, 3, padding=1, num_experts=4).eval()
    x, routing = torch.randn(4, 16, 24, 24, requires_grad=True), Routing(torch.tensor([3, 1, 0, 3]), num_experts=4)
    dy = torch.randn(4, 48, 24, 24)

    def function() -> tuple[Tensor, ...]:
        layer.clear_cache()
        y = layer(x, routing)
        return (y, *torch.autograd.grad(y, x, dy))

    _same_bits(function)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "num_experts"),
    [((16, 32, 16, 16), 3), ((8, 1, 128, 128), 2), ((2, 3, 192, 192), 2), ((64, 64, 4, 4), 4), ((4096, 16, 1, 1), 2)],
    ids=str,
)
def test_batch_norm_has_the_same_bits_for_any_number_of_threads(
    shape: tuple[int, ...], num_experts: int, layout: torch.memory_format
) -> None:
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    dy = torch.randn(shape).contiguous(memory_format=layout)
    routing = Routing(torch.arange(shape[0]) % num_experts, num_experts=num_experts)

    def function() -> tuple[Tensor, ...]:
        layer = RoutedBatchNorm2d(shape[1], num_experts)
        y = layer(x, routing)
        grads = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
        assert layer.running_mean is not None and layer.running_var is not None
        return (y, *grads, layer.running_mean, layer.running_var)

    _same_bits(function)


@pytest.mark.parametrize(("total", "batch", "size"), [(48, 16, 12), (512, 256, 2)])
def test_batch_norm_of_windows_has_the_same_bits_for_any_number_of_threads(total: int, batch: int, size: int) -> None:
    slices = windows(total, 0.5, 5)
    shape = (batch, slices.width, size, size)
    x, dy = torch.randn(shape, requires_grad=True), torch.randn(shape)
    routing = Routing(torch.arange(batch) % 5, num_experts=5)

    def function() -> tuple[Tensor, ...]:
        layer = RoutedBatchNorm2d(slices)
        y = layer(x, routing)
        return (y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy))

    _same_bits(function)


def test_linear_of_windows_has_the_same_bits_for_any_number_of_threads() -> None:
    layer = RoutedLinear(16, windows(512, 0.5, 4))
    x, dy = torch.randn(256, 16), torch.randn(256, 256)
    routing = Routing(torch.arange(256) % 4, num_experts=4)
    _same_bits(lambda: torch.autograd.grad(layer(x, routing), (layer.weight, layer.bias), dy))


def test_linear_has_the_same_bits_for_any_number_of_threads() -> None:
    layer = RoutedLinear(64, 48, num_experts=3)
    x, dy = torch.randn(6, 200, 64, requires_grad=True), torch.randn(6, 200, 48)
    gate = torch.rand(6, requires_grad=True)
    routing = Routing(torch.arange(6) % 3, gate, num_experts=3)

    def function() -> tuple[Tensor, ...]:
        y = layer(x, routing)
        return (y, *torch.autograd.grad(y, (x, layer.weight, layer.bias, gate), dy))

    _same_bits(function)
