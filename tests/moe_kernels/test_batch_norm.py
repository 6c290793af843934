# SPDX-License-Identifier: Apache-2.0
"""RoutedBatchNorm2d against one nn.BatchNorm2d for each expert."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracle import windows
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from moe_kernels import ExpertSlices, RoutedBatchNorm2d, Routing

N, C = 3, 4


def _routing(expert: list[int], num_experts: int = N) -> Routing:
    return Routing(torch.tensor(expert, dtype=torch.int64), num_experts=num_experts)


def _pair(**kwargs: Any) -> tuple[RoutedBatchNorm2d, list[nn.BatchNorm2d]]:
    """A routed layer and the plain ones that hold the same values."""
    routed = RoutedBatchNorm2d(C, N, dtype=torch.float64, **kwargs)
    plain = [nn.BatchNorm2d(C, dtype=torch.float64, **kwargs) for _ in range(N)]
    if routed.affine:
        nn.init.normal_(routed.weight)
        nn.init.normal_(routed.bias)
        with torch.no_grad():
            for e, layer in enumerate(plain):
                layer.weight.copy_(routed.weight[e * C : e * C + C])
                layer.bias.copy_(routed.bias[e * C : e * C + C])
    return routed, plain


def _by_loop(plain: list[nn.BatchNorm2d], x: Tensor, expert: list[int]) -> Tensor:
    y = torch.zeros_like(x)
    for e, layer in enumerate(plain):
        mask = torch.tensor(expert) == e
        if mask.any():
            y = y.index_put((mask,), layer(x[mask]))
    return y


def _assert_same_statistics(routed: RoutedBatchNorm2d, plain: list[nn.BatchNorm2d]) -> None:
    for name in ("running_mean", "running_var"):
        expected = torch.cat([getattr(layer, name) for layer in plain])
        torch.testing.assert_close(getattr(routed, name), expected, rtol=1e-13, atol=1e-13)
    counts = torch.stack([layer.num_batches_tracked for layer in plain]).repeat_interleave(C)
    assert torch.equal(routed.num_batches_tracked, counts)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "kwargs",
    [{}, {"affine": False}, {"momentum": None}, {"momentum": 0.3, "eps": 0.1}, {"track_running_stats": False}],
    ids=str,
)
def test_equals_batch_norm_of_each_expert(kwargs: dict[str, Any], layout: torch.memory_format) -> None:
    routed, plain = _pair(**kwargs)
    experts = [[0, 1, 2, 1, 0, 2], [1, 1, 0, 1, 1, 0], [2, 2, 2, 2, 2, 2]]
    for expert in experts:  # training, three batches
        x = (torch.randn(6, C, 3, 5, dtype=torch.float64) * 3 + 7).contiguous(memory_format=layout).requires_grad_()
        y, expected = routed(x, _routing(expert)), _by_loop(plain, x, expert)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        assert y.is_contiguous(memory_format=layout)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        torch.testing.assert_close(dx, torch.autograd.grad(expected, x, dy, retain_graph=True)[0], rtol=1e-10, atol=1e-11)
        if routed.affine:
            dw, db = torch.autograd.grad(y, (routed.weight, routed.bias), dy)
            parameters = [layer.weight for layer in plain] + [layer.bias for layer in plain]
            grads = torch.autograd.grad(expected, parameters, dy, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(dw, torch.cat(grads[:N]), rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(db, torch.cat(grads[N:]), rtol=1e-11, atol=1e-11)
    if routed.track_running_stats:
        _assert_same_statistics(routed, plain)
    routed.eval()
    for layer in plain:
        layer.eval()
    x = torch.randn(6, C, 3, 5, dtype=torch.float64, requires_grad=True)
    y, expected = routed(x, _routing(experts[0])), _by_loop(plain, x, experts[0])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(t, x, dy)[0] for t in (y, expected)), rtol=1e-10, atol=1e-11)
    if routed.track_running_stats:
        _assert_same_statistics(routed, plain)  # eval changes nothing


def test_an_expert_without_samples_keeps_its_running_statistics() -> None:
    layer = RoutedBatchNorm2d(C, N)
    layer(torch.randn(4, C, 3, 3), _routing([0, 1, 2, 1]))
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(4, C, 3, 3) + 5, _routing([0, 2, 2, 0]))
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        after, old = layer.state_dict()[name].view(N, C), before[name].view(N, C)
        assert torch.equal(after[1], old[1])
        assert (after[0] != old[0]).all() and (after[2] != old[2]).all()


def test_no_samples_at_all() -> None:
    layer = RoutedBatchNorm2d(C, N)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(0, C, 3, 3, requires_grad=True)
    y = layer(x, _routing([]))
    assert y.shape == x.shape
    y.sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(N * C))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_one_value_per_channel_in_training_raises_naming_the_expert() -> None:
    layer = RoutedBatchNorm2d(C, N)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"expected more than one value per channel .*, got one for expert 1 \("):
        layer(torch.randn(3, C, 1, 1), _routing([2, 1, 2]))
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())
    layer(torch.randn(3, C, 1, 2), _routing([2, 1, 2]))  # two pixels are two values
    layer.eval()
    layer(torch.randn(3, C, 1, 1), _routing([2, 1, 2]))
    without = RoutedBatchNorm2d(C, N, track_running_stats=False).eval()  # uses the batch's, as nn.BatchNorm2d
    with pytest.raises(ValueError, match="got one for expert 1"):
        without(torch.randn(3, C, 1, 1), _routing([2, 1, 2]))


def test_one_value_in_a_channel_names_the_expert_that_has_it() -> None:
    layer = RoutedBatchNorm2d(ExpertSlices(total=3, width=2, starts=(0, 1, 1)))
    with pytest.raises(ValueError, match=r"got one for expert 1 \("):
        layer(torch.randn(4, 2, 1, 1), _routing([0, 0, 0, 1]))


def test_statistics_are_shared_where_windows_overlap() -> None:
    slices = windows(6, 0.5, 4)
    assert slices.starts == (0, 1, 2, 3)
    layer = RoutedBatchNorm2d(slices, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    expert = [0, 1, 3, 1, 0]
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64) * 2 + 1
    y = layer(x, _routing(expert, 4))
    values: list[list[Tensor]] = [[] for _ in range(6)]
    for i, e in enumerate(expert):
        for c in range(3):
            values[slices.starts[e] + c].append(x[i, c])
    for channel, parts in enumerate(values):
        both = torch.stack(parts)
        mean, var = both.mean(), both.var(unbiased=False)
        torch.testing.assert_close(layer.running_mean[channel], 0.1 * mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.running_var[channel], 0.9 + 0.1 * both.var(), rtol=1e-12, atol=1e-12)
        for i, e in enumerate(expert):
            c = channel - slices.starts[e]
            if 0 <= c < 3:
                expected = (x[i, c] - mean) / torch.sqrt(var + 1e-5) * layer.weight[channel] + layer.bias[channel]
                torch.testing.assert_close(y[i, c], expected, rtol=1e-10, atol=1e-11)


def test_whole_slices_are_plain_batch_norm() -> None:
    routed = RoutedBatchNorm2d(ExpertSlices.whole(C), dtype=torch.float64)
    plain = nn.BatchNorm2d(C, dtype=torch.float64)
    x = torch.randn(5, C, 4, 4, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(routed(x, _routing([0, 1, 2, 1, 0])), plain(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routed.running_var, plain.running_var, rtol=1e-13, atol=0)
    torch.testing.assert_close(routed.running_mean, plain.running_mean, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("training", [True, False])
def test_double_backward(training: bool) -> None:
    layer = RoutedBatchNorm2d(2, 2, dtype=torch.float64, momentum=0.0).train(training)
    x = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    routing = _routing([0, 1, 1, 0], 2)

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": w, "bias": b}, (x, routing))

    assert gradcheck(function, (x, w, b))
    assert gradgradcheck(function, (x, w, b), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_input_with_float32_parameters(dtype: torch.dtype) -> None:
    """As nn.BatchNorm2d under autocast: statistics in float32, the output in the input's dtype."""
    x = (torch.randn(8, C, 5, 5) * 2 + 3).to(dtype)
    expert = [0, 1, 2, 1, 0, 2, 2, 2]
    routed, full = RoutedBatchNorm2d(C, N), RoutedBatchNorm2d(C, N)
    y, expected = routed(x, _routing(expert)), full(x.float(), _routing(expert))
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(routed.running_var, full.running_var) and routed.running_var.dtype == torch.float32


def test_large_means_lose_no_variance() -> None:
    """The variance is of centred values: E[x^2] - E[x]^2 would be all rounding here."""
    x = torch.randn(8, C, 6, 6) + 1000
    layer, plain = RoutedBatchNorm2d(C, 1), nn.BatchNorm2d(C, dtype=torch.float64)
    y = layer(x, _routing([0] * 8, 1))
    torch.testing.assert_close(y.double(), plain(x.double()), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.running_var.double(), plain.running_var, rtol=1e-4, atol=0)


def test_expanded_top_k_routing() -> None:
    layer = RoutedBatchNorm2d(C, N)
    routing = Routing(torch.tensor([[0, 1], [1, 2], [1, 0]]), num_experts=N)
    x = torch.randn(6, C, 3, 3)
    expected = copy.deepcopy(layer)(x, _routing([0, 1, 1, 2, 1, 0]))
    assert torch.equal(layer(x, routing.expand()), expected)


def test_state_dict_repr_pickle_deepcopy_reset() -> None:
    layer = RoutedBatchNorm2d(C, N)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert shapes == dict.fromkeys(names, (N * C,))
    assert list(shapes) == list(nn.BatchNorm2d(C).state_dict())
    assert repr(layer) == (
        "RoutedBatchNorm2d(4, num_experts=3, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True)"
    )
    assert "slices=ExpertSlices(total=6, width=3" in repr(RoutedBatchNorm2d(windows(6, 0.5, 3)))
    x, routing = torch.randn(6, C, 3, 3), _routing([0, 1, 2, 0, 1, 2])
    layer(x, routing)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(again(x, routing), copy.deepcopy(layer)(x, routing))
    other = RoutedBatchNorm2d(C, N)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.eval()(x, routing), copy.deepcopy(layer).eval()(x, routing))
    layer.reset_running_stats()
    assert torch.equal(layer.running_mean, torch.zeros(N * C)) and torch.equal(layer.running_var, torch.ones(N * C))
    assert torch.equal(layer.num_batches_tracked, torch.zeros(N * C, dtype=torch.int64))
    empty = RoutedBatchNorm2d(C, N, affine=False, track_running_stats=False)
    assert not empty.state_dict()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((C, None), TypeError, "num_experts: expected an integer, or ExpertSlices as num_features; got None"),
        ((windows(6, 0.5, 3), 2), ValueError, "num_experts: expected 3 as the slices have, got 2"),
        ((C, 0), ValueError, "num_experts: expected at least 1, got 0"),
    ],
)
def test_bad_arguments_raise(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RoutedBatchNorm2d(*arguments)


def test_bad_input_raises() -> None:
    layer = RoutedBatchNorm2d(C, N)
    with pytest.raises(ValueError, match=r"input: expected shape \[V, 4, H, W\], got \(3, 5, 2, 2\)"):
        layer(torch.randn(3, 5, 2, 2), _routing([0, 1, 2]))
    with pytest.raises(ValueError, match=r"input: expected shape \[V, 4, H, W\], got \(3, 4\)"):
        layer(torch.randn(3, 4), _routing([0, 1, 2]))
    with pytest.raises(ValueError, match=r"routing: expected 3 choices as the input's samples, got 2"):
        layer(torch.randn(3, 4, 2, 2), _routing([0, 1]))
    with pytest.raises(
        ValueError, match=r"routing: expected 3 choices .*, got 6; a top-k routing goes through expand\(\)"
    ):
        layer(torch.randn(3, 4, 2, 2), Routing(torch.zeros(3, 2, dtype=torch.int64), num_experts=N))
    with pytest.raises(ValueError, match="routing: expected 3 experts, got 2"):
        layer(torch.randn(3, 4, 2, 2), _routing([0, 1, 0], 2))
    for training in (True, False):
        for bad in (3, -1):
            with pytest.raises(ValueError, match=rf"routing: expert index {bad} of sample 1 is outside 0 \.\. 2"):
                layer.train(training)(torch.randn(3, 4, 2, 2), _routing([0, bad, 0]))
