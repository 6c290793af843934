# SPDX-License-Identifier: Apache-2.0
"""What lies between convolutions: the CPU's kernels against torch's own operators."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from oracle import windows
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from moe_kernels import ExpertSlices, RoutedBatchNorm2d, Routing, backends, use_backend
from moe_kernels.backends import REFERENCE, Side
from moe_kernels.backends.native import module
from moe_kernels.features import norm_relu_with_means, relu_with_means

# narrow pixels, which the kernels take several at a time; wide ones; images of more than one unit; one pixel; none
SHAPES = [(3, 5, 7, 9), (4, 8, 8, 8), (2, 70, 5, 3), (2, 300, 20, 20), (3, 1, 6, 6), (1, 3, 160, 160), (5, 6, 1, 1)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _images(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)


def _near(actual: Tensor, expected: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2) * scale
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_means_of_no_pixels_are_nan() -> None:
    means = relu_with_means(_images((2, 3, 0, 4)))[1]
    assert means.isnan().all()  # as those of torch.mean


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relu_with_means(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = _images(shape, dtype).requires_grad_()
    y, means = relu_with_means(x)
    assert torch.equal(y, x.relu()) and y.is_contiguous(memory_format=torch.channels_last)
    assert means.dtype == torch.promote_types(dtype, torch.float32)
    _near(means, x.detach().double().relu().mean((2, 3)), torch.promote_types(dtype, torch.float32))
    dy, dm = torch.randn_like(y), torch.randn_like(means)
    wide = x.detach().double().requires_grad_()
    z = wide.relu()
    for outputs, given, whole in (
        ((y, means), (dy, dm), (z * dy.double()).sum() + (z.mean((2, 3)) * dm.double()).sum()),
        ((y,), (dy,), (z * dy.double()).sum()),
        ((means,), (dm,), (z.mean((2, 3)) * dm.double()).sum()),
    ):
        (dx,) = torch.autograd.grad(outputs, x, given, retain_graph=True)
        assert dx.dtype == dtype
        _near(dx, torch.autograd.grad(whole, wide, retain_graph=True)[0], dtype)
    with torch.no_grad():
        again = relu_with_means(x)
    assert torch.equal(again[0], y) and torch.equal(again[1], means)


def test_relu_with_means_is_one_function_on_the_cpu() -> None:
    x = _images((2, 4, 5, 5)).requires_grad_()
    y, means = relu_with_means(x)
    assert y.grad_fn is means.grad_fn and type(y.grad_fn).__name__ == "_ReluWithMeansBackward"


@pytest.mark.parametrize("given", ["contiguous", "empty", "reference"])
def test_elsewhere_it_is_torchs_operators(given: str) -> None:
    x = torch.randn(0 if given == "empty" else 2, 4, 5, 5)
    x = (x if given == "contiguous" else x.contiguous(memory_format=torch.channels_last)).requires_grad_()
    with use_backend("reference" if given == "reference" else "auto"):
        y, means = relu_with_means(x)
    assert y.grad_fn is not means.grad_fn
    assert torch.equal(y, x.relu()) and torch.equal(means, y.mean((2, 3)))


def test_transforms_and_modes() -> None:
    x = _images((3, 4, 5, 5))

    def loss(x: Tensor) -> Tensor:
        y, means = relu_with_means(x)
        return (y**2).sum() + (means**3).sum()

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    torch.testing.assert_close(torch.func.grad(loss)(x.detach()), expected)
    y, means = relu_with_means(x.to("meta"))
    assert y.is_meta and means.shape == (3, 4)
    tangent = torch.randn_like(x)
    _, slope = torch.func.jvp(loss, (x.detach(),), (tangent,))
    torch.testing.assert_close(slope, (expected * tangent).sum(), rtol=1e-4, atol=1e-4)
    scaled = torch.func.vmap(lambda s: loss(x.detach() * s))(torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(scaled, torch.stack([loss(x.detach()), loss(2 * x.detach())]))


def test_second_derivatives() -> None:
    x = _images((2, 3, 2, 3), torch.float64).requires_grad_()
    assert gradcheck(relu_with_means, (x,))
    assert gradgradcheck(relu_with_means, (x,))


def test_nan_stays() -> None:
    x = _images((2, 3, 4, 4))
    x[1, 2, 0, 0] = math.nan
    y, means = relu_with_means(x)
    assert y.isnan().sum() == 1 and means.isnan().nonzero().tolist() == [[1, 2]]


@pytest.mark.parametrize("bad", [torch.zeros(2, 3), torch.zeros(1, 2, 3, 4, dtype=torch.int64), None])
def test_relu_with_means_refuses(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"x: expected floating \[B, C, H, W\], got"):
        relu_with_means(bad)


SIDES = {
    "partition": (4, ()),
    "windows": (4, windows(6, 0.5, 4).starts),
    "one": (1, ()),
}


def _side(name: str, samples: int, channels: int) -> Side:
    experts, starts = SIDES[name]
    starts = tuple(start * channels // 3 for start in starts)
    total = experts * channels if not starts else max(starts) + channels
    chosen = torch.randint(0, max(1, experts - 1), (samples,))  # the last expert has none
    return Side(chosen, experts, starts, channels, total)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(SIDES))
@pytest.mark.parametrize("shape", [(6, 3, 7, 5), (5, 96, 4, 4), (3, 33, 30, 30), (2, 3, 100, 90)], ids=str)
def test_batch_norm_of_each_expert_is_the_references(shape: tuple[int, ...], name: str, dtype: torch.dtype) -> None:
    """Moments, sums and the map; what is a layer's own is tested in test_batch_norm."""
    backend, side = backends.choose(torch.device("cpu")), _side(name, shape[0], shape[1])
    assert backend.normalises
    x, grad = _images(shape, dtype) * 2 + 3, _images(shape, dtype)
    wide = torch.promote_types(dtype, torch.float32)
    exact = x.double(), grad.double()
    moments = backend.moments(x, side, None)
    for got, expected in zip(moments, REFERENCE.moments(exact[0], side, None), strict=True):
        assert got.dtype == wide and got.shape == (side.total,)
        _near(got, expected, wide, 10)
    mean = moments[0]
    for got, expected in zip(
        backend.sums(x, grad, mean, side, None), REFERENCE.sums(*exact, mean.double(), side, None), strict=True
    ):
        _near(got, expected, wide, 100)
    scale, shift, grad_scale = (torch.randn(side.total, dtype=wide) for _ in range(3))
    for more in ((None, None, None), (shift, None, None), (shift, grad, grad_scale)):
        got = backend.affine(x, side, scale, mean, *more)
        expected = REFERENCE.affine(
            exact[0], side, scale.double(), mean.double(), *(None if t is None else t.double() for t in more)
        )
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        _near(got, expected, dtype, 10)


def test_statistics_of_large_means() -> None:
    """In one pass, and still of centred values: E[x^2] - E[x]^2 would be all rounding here."""
    x = (torch.randn(8, 4, 70, 70, dtype=torch.float64) + 10_000).contiguous(memory_format=torch.channels_last)
    side = Side(torch.zeros(8, dtype=torch.int64), 1, (), 4, 4)
    narrow = x.float()
    mean, var, count = backends.choose(torch.device("cpu")).moments(narrow, side, None)
    assert count.tolist() == [8 * 4900] * 4
    torch.testing.assert_close(mean.double(), narrow.double().mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), narrow.double().var((0, 2, 3), unbiased=False), rtol=1e-4, atol=0)


NORMS = ("shared", "partition", "windows")


def _norm(kind: str, channels: int, samples: int, dtype: torch.dtype) -> tuple[nn.Module, Routing | None]:
    """A BatchNorm with weights and statistics of its own, and what it takes beside features."""
    layer: nn.Module
    routing = None
    if kind == "shared":
        layer = nn.BatchNorm2d(channels)
    else:
        slices = ExpertSlices.partition(channels, 3) if kind == "partition" else windows(2 * channels, 0.5, 3)
        layer = RoutedBatchNorm2d(slices)
        routing = Routing(torch.arange(samples) % 2, num_experts=3)  # the last expert has none
    with torch.no_grad():
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5 if name != "bias" else torch.randn_like(value))
    return layer.to(dtype if dtype == torch.float64 else torch.float32), routing


def _one_by_one(layer: nn.Module, x: Tensor, routing: Routing | None, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    y = layer(x) if routing is None else layer(x, routing)
    y = (y if residual is None else y + residual).relu()
    return y, y.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", NORMS)
def test_norm_relu_with_means(kind: str, training: bool, joined: bool, dtype: torch.dtype) -> None:
    for shape in [(4, 6, 9, 9), (5, 70, 5, 3), (2, 300, 20, 20), (2, 3, 160, 160)]:
        layer, routing = _norm(kind, shape[1], shape[0], dtype)
        layer.train(training)
        exact = copy.deepcopy(layer).double()
        x = (_images(shape, dtype) * 2 + 3).requires_grad_()
        residual = _images(shape, dtype).requires_grad_() if joined else None
        y, means = norm_relu_with_means(layer, x, routing, residual)
        assert type(y.grad_fn).__name__ == "_NormReluWithMeansBackward"
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, residual)]
        z, pooled = _one_by_one(exact, wide[0], routing, wide[1])
        _near(y, z, dtype, 10)
        _near(means, pooled, dtype)
        assert (y == 0).sum() > 0 and (means.dtype == torch.promote_types(dtype, torch.float32))
        for (name, got), expected in zip(layer.named_buffers(), exact.buffers(), strict=True):
            torch.testing.assert_close(
                got.double(), expected.double(), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6
            )
            assert name != "num_batches_tracked" or torch.equal(got, expected)
        dy, dm = _images(shape, dtype), torch.randn_like(means)
        # where a rounded y is 0 and the exact one is not, the derivatives are of different functions
        dy = torch.where((y == 0) == (z == 0), dy, torch.zeros_like(dy))
        inputs = [t for t in (x, layer.weight, layer.bias, residual) if t is not None]
        exact_inputs = [t for t in (wide[0], exact.weight, exact.bias, wide[1]) if t is not None]
        for given in ((dy, dm), (dy, None), (None, dm)):
            pairs = [(t, s, g) for t, s, g in zip((y, means), (z, pooled), given, strict=True) if g is not None]
            got = torch.autograd.grad([t for t, _, _ in pairs], inputs, [g for *_, g in pairs], retain_graph=True)
            expected = torch.autograd.grad(
                [s for _, s, _ in pairs], exact_inputs, [g.double() for *_, g in pairs], retain_graph=True
            )
            for a, b in zip(got, expected, strict=True):
                error = (a.double() - b).norm() / b.norm()
                assert error < {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-2), error


def test_an_attack_takes_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a weight that requires one is not computed where only the image's is asked for."""
    layer, _ = _norm("shared", 6, 4, torch.float32)
    x = _images((4, 6, 9, 9)).requires_grad_()
    y, _ = norm_relu_with_means(layer.eval(), x)
    cpu = backends.choose(x.device)
    monkeypatch.setattr(cpu, "sums_behind", lambda *args: pytest.fail("sums were taken"))
    torch.autograd.grad(y.sum(), x)


@pytest.mark.parametrize("joined", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", ["shared", "partition"])
def test_second_derivatives_of_norm_and_relu(kind: str, training: bool, joined: bool) -> None:
    layer, routing = _norm(kind, 3, 4, torch.float64)
    layer.train(training)
    x = _images((4, 3, 3, 2), torch.float64).requires_grad_()
    residual = _images((4, 3, 3, 2), torch.float64).requires_grad_() if joined else None

    def of(x: Tensor, weight: Tensor, bias: Tensor, *residual: Tensor) -> tuple[Tensor, Tensor]:
        layer.weight, layer.bias = weight, bias  # by attribute: gradcheck moves them
        return norm_relu_with_means(layer, x, routing, *residual)

    weight, bias = (p.detach().clone().requires_grad_() for p in (layer.weight, layer.bias))
    del layer.weight, layer.bias
    inputs = (x, weight, bias) if residual is None else (x, weight, bias, residual)
    assert gradcheck(of, inputs)
    assert gradgradcheck(of, inputs)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_second_derivatives_where_the_residual_alone_has_one(training: bool) -> None:
    layer, _ = _norm("shared", 3, 4, torch.float64)
    layer.train(training).requires_grad_(False)
    x = _images((4, 3, 3, 2), torch.float64)
    residual = _images((4, 3, 3, 2), torch.float64).requires_grad_()
    assert gradgradcheck(lambda r: norm_relu_with_means(layer, x, None, r), (residual,))


def test_norm_and_relu_where_statistics_were_taken_away() -> None:
    layer, _ = _norm("shared", 4, 3, torch.float32)
    layer.running_mean = layer.running_var = None
    x = _images((3, 4, 5, 5))
    y, means = norm_relu_with_means(layer, x)
    expected = _one_by_one(layer, x, None, None)
    assert torch.equal(y, expected[0])
    torch.testing.assert_close(means, expected[0].mean((2, 3)))


@pytest.mark.parametrize("why", ["hook", "another norm", "contiguous", "one value", "no weight", "another dtype"])
def test_norm_and_relu_one_by_one_where_kernels_would_not_do(why: str) -> None:
    layer: nn.Module = nn.BatchNorm2d(4, affine=why != "no weight")
    x = _images((2, 4, 5, 5))
    residual = _images((2, 4, 5, 5), torch.float64 if why == "another dtype" else torch.float32)
    calls: list[int] = []
    if why == "hook":
        layer.register_forward_hook(lambda *args: calls.append(1))
    elif why == "another norm":
        layer = nn.GroupNorm(2, 4)
    elif why == "contiguous":
        x = x.contiguous()
    elif why == "one value":
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            norm_relu_with_means(layer, x[:1, :, :1, :1].contiguous(memory_format=torch.channels_last))
        return
    other = copy.deepcopy(layer)
    y, means = norm_relu_with_means(layer, x.requires_grad_(), None, residual)
    assert type(y.grad_fn).__name__ != "_NormReluWithMeansBackward"
    assert why != "hook" or calls == [1]
    expected = _one_by_one(other, x, None, residual)
    assert torch.equal(y, expected[0])
    torch.testing.assert_close(means, expected[0].mean((2, 3)))


def test_norm_and_relu_refuse_what_the_layer_refuses() -> None:
    layer, routing = _norm("partition", 4, 3, torch.float32)
    assert routing is not None
    with pytest.raises(ValueError, match=r"expected 2 choices as the input.s samples, got 3"):
        norm_relu_with_means(layer, _images((2, 4, 5, 5)), routing)
    with pytest.raises(ValueError, match="expected more than one value per channel"):
        norm_relu_with_means(layer.train(), _images((3, 4, 1, 1)), routing)
    with pytest.raises(ValueError, match=r"expected shape \[V, 4, H, W\]"):
        norm_relu_with_means(layer, _images((3, 5, 2, 2)), routing)


def test_features_have_the_same_bits_for_any_number_of_threads() -> None:
    backend = backends.choose(torch.device("cpu"))
    x, grad = _images((6, 40, 50, 50)), _images((6, 40, 50, 50))
    side = _side("windows", 6, 40)
    results: list[list[Tensor]] = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        mean, *others = backend.moments(x, side, None)
        y, means = backend.rectify(x)
        layer = nn.BatchNorm2d(40)
        z, pooled = norm_relu_with_means(layer, x.requires_grad_())
        results.append(
            [
                mean, *others, *backend.sums(x, grad, mean, side, None), y, means,
                backend.rectify_backward(grad, means, y), z, pooled,
                *torch.autograd.grad((z, pooled), (x, layer.weight, layer.bias), (grad, means)),
            ]
        )  # fmt: skip
    for later in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], later, strict=True))


def test_an_index_out_of_range_is_refused() -> None:
    backend = backends.choose(torch.device("cpu"))
    for bad in (2, -1):
        side = Side(torch.tensor([0, bad]), 2, (), 3, 6)
        with pytest.raises(ValueError, match=rf"routing: expert index {bad} of sample 1 is outside 0 \.\. 1"):
            backend.moments(_images((2, 3, 4, 4)), side, None)
    nothing = (0, 0, (1,)), [0] * 13
    with pytest.raises(ValueError, match="starts: expected 0, got 1"):
        module.features(0, 0, 1, False, (0, 0, 0, 0), *nothing)
    with pytest.raises(ValueError, match=r"kernel: expected 0 \.\. 3, got 4"):
        module.features(4, 0, 1, False, (0, 0, 0, 0), *nothing)
