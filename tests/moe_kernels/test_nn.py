# SPDX-License-Identifier: Apache-2.0
"""RoutedConv2d and RoutedLinear as modules: against nn.Conv2d and F.linear, initialisation, padding, state, repr."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import partition, whole, windows
from torch import Tensor, nn

from moe_kernels import ExpertSlices, RoutedConv2d, RoutedLayerNorm, RoutedLinear, Routing, use_backend

N = 3
EXPERT = [2, 0, 1, 0]
ROUTING = Routing(torch.tensor(EXPERT), num_experts=N)


def _plain(layer: RoutedConv2d, x: Tensor, expert: list[int] = EXPERT, **kwargs: Any) -> Tensor:
    """One nn.Conv2d for each sample, with the expert's weights."""
    out = []
    for i, e in enumerate(expert):
        o = layer.out_slices.starts[e] if not layer.out_slices.is_whole else 0
        c = layer.in_slices.starts[e] if not layer.in_slices.is_whole else 0
        conv = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, dtype=x.dtype, **kwargs)
        width = layer.in_channels // conv.groups
        parameters = {"weight": layer.weight[o : o + layer.out_channels, c : c + width]}
        if layer.bias is not None:
            parameters["bias"] = layer.bias[o : o + layer.out_channels]
        out.append(torch.func.functional_call(conv, parameters, (x[i : i + 1],)))
    return torch.cat(out)


def _assert_same(layer: nn.Module, x: Tensor, y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    leaves = (x, *layer.parameters())
    for a, e in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


# --- RoutedConv2d ---


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # says nn.Conv2d
@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [0, 1, (2, 1), "valid", "same"], ids=str)
@pytest.mark.parametrize("kernel_size", [3, (2, 4)], ids=str)
def test_padding_and_padding_modes_equal_conv2d(backend: str, kernel_size: Any, padding: Any, padding_mode: str) -> None:
    kwargs = {"padding": padding, "padding_mode": padding_mode, "dilation": (1, 2) if padding == "same" else 1}
    layer = RoutedConv2d(2, 3, kernel_size, num_experts=N, dtype=torch.float64, **kwargs)
    x = torch.randn(4, 2, 7, 8, dtype=torch.float64, requires_grad=True)
    _assert_same(layer, x, layer(x, ROUTING), _plain(layer, x, **kwargs))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"stride": 2},
        {"stride": (1, 3), "dilation": 2},
        {"bias": False},
        {"groups": 2},
        {"groups": 4, "padding": 1},
        {"groups": 4, "bias": False, "padding": "same"},
    ],
    ids=str,
)
def test_drop_in_form_equals_conv2d_of_the_chosen_expert(backend: str, kwargs: dict[str, Any]) -> None:
    layer = RoutedConv2d(4, 8, (3, 2), num_experts=N, dtype=torch.float64, **kwargs)
    x = torch.randn(4, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    _assert_same(layer, x, layer(x, ROUTING), _plain(layer, x, **kwargs))


@pytest.mark.parametrize(
    ("in_side", "out_side"),
    [
        (5, windows(6, 0.5, N)),
        (windows(5, 0.6, N), 4),
        (windows(5, 0.6, N), windows(6, 0.5, N)),
        (partition(2, N), partition(3, N)),
        (whole(3), whole(2)),
        (2, partition(3, N)),
    ],
    ids=["int, windows", "windows, int", "windows", "partition", "whole", "int, partition"],
)
@pytest.mark.parametrize("training", [True, False])
def test_sliced_forms_equal_conv2d_of_the_chosen_slices(
    backend: str, in_side: Any, out_side: Any, training: bool
) -> None:
    layer = RoutedConv2d(in_side, out_side, 3, padding=1, dtype=torch.float64).train(training)
    x = torch.randn(4, layer.in_channels, 5, 6, dtype=torch.float64, requires_grad=True)
    _assert_same(layer, x, layer(x, ROUTING), _plain(layer, x, padding=1))


def test_in_routing_is_the_choice_that_made_the_input(backend: str) -> None:
    layer = RoutedConv2d(windows(6, 0.5, 4), partition(2, N), 3, dtype=torch.float64)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    made_by = Routing(torch.tensor([3, 1, 0, 2]), num_experts=4)
    y = layer(x, ROUTING, made_by)
    for i, (o, c) in enumerate(zip(EXPERT, [3, 1, 0, 2], strict=True)):
        w = layer.weight[2 * o : 2 * o + 2, c : c + 3]
        one = F.conv2d(x[i : i + 1], w, layer.bias[2 * o : 2 * o + 2])
        torch.testing.assert_close(y[i : i + 1], one, rtol=1e-12, atol=1e-12)


def test_a_chain_of_windows_equals_the_chain_of_sliced_convolutions(backend: str) -> None:
    """Layer after layer the same choice on both sides, as in the paper's reading of a pathway."""
    sides = [whole(3), windows(8, 0.5, N), windows(10, 0.5, N), whole(4)]
    layers = [RoutedConv2d(i, o, 3, padding=1, dtype=torch.float64) for i, o in itertools.pairwise(sides)]
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    y, expected = x, x
    for layer in layers:
        y, expected = layer(y, ROUTING).relu(), _plain(layer, expected, padding=1).relu()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_initialisation_is_by_the_fan_of_one_expert() -> None:
    for make, fan_in in (
        (lambda: RoutedConv2d(16, 32, 3, num_experts=8), 16 * 9),
        (lambda: RoutedConv2d(16, 32, 3, groups=4, num_experts=8), 4 * 9),
        (lambda: RoutedConv2d(windows(64, 0.25, 4), 32, 3), 16 * 9),
        (lambda: RoutedConv2d(partition(16, 8), partition(32, 8), (1, 3)), 16 * 3),
        (lambda: RoutedLinear(50, 40, num_experts=8), 50),
    ):
        layer = make()
        bound = 1 / math.sqrt(fan_in)
        for values in (layer.weight, layer.bias):
            assert values.abs().max() <= bound
            assert values.abs().max() > 0.9 * bound
        assert abs(layer.weight.std() / (bound / math.sqrt(3)) - 1) < 0.05  # uniform
    torch.manual_seed(3)
    routed = RoutedConv2d(5, 6, 3, num_experts=1)
    torch.manual_seed(3)
    plain = nn.Conv2d(5, 6, 3)
    torch.testing.assert_close(routed.weight, plain.weight)
    torch.testing.assert_close(routed.bias, plain.bias)


def test_state_dict_has_the_released_layout() -> None:
    """[N * w_out, w_in, k, k], as in the checkpoints of AdvMoE's released code; expert e from row e * w_out on."""
    layer = RoutedConv2d(16, 32, 3, num_experts=2, bias=False)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {"weight": (64, 16, 3, 3)}
    shapes = {
        name: tuple(v.shape) for name, v in RoutedConv2d(6, 9, (1, 5), groups=3, num_experts=4).state_dict().items()
    }
    assert shapes == {"weight": (36, 2, 1, 5), "bias": (36,)}
    assert RoutedConv2d(windows(64, 0.5, 4), windows(32, 0.5, 4), 3).weight.shape == (32, 64, 3, 3)
    assert RoutedConv2d(partition(8, 4), partition(4, 4), 3).weight.shape == (16, 32, 3, 3)
    assert {n: tuple(v.shape) for n, v in RoutedLinear(5, 7, num_experts=3).state_dict().items()} == {
        "weight": (21, 5),
        "bias": (21,),
    }
    released = torch.randn(64, 16, 3, 3)
    layer.load_state_dict({"weight": released})
    x = torch.randn(2, 16, 4, 4)
    y = layer(x, Routing(torch.tensor([1, 0]), num_experts=2))
    expected = torch.cat([F.conv2d(x[:1], released[32:]), F.conv2d(x[1:], released[:32])])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_state_dict_round_trip() -> None:
    layer = RoutedConv2d(3, 4, 3, num_experts=N)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = RoutedConv2d(3, 4, 3, num_experts=N)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(layer(x, ROUTING), other(x, ROUTING))


def test_repr() -> None:
    assert repr(RoutedConv2d(3, 8, 3, num_experts=2)) == (
        "RoutedConv2d(3, 8, num_experts=2, kernel_size=(3, 3), stride=(1, 1))"
    )
    everything = RoutedConv2d(4, 8, 3, 2, (1, 2), 2, 2, bias=False, padding_mode="circular", num_experts=2)
    assert repr(everything) == (
        "RoutedConv2d(4, 8, num_experts=2, kernel_size=(3, 3), stride=(2, 2), padding=(1, 2), dilation=(2, 2), "
        "groups=2, bias=False, padding_mode=circular)"
    )
    assert "padding='same'" in repr(RoutedConv2d(4, 8, 3, padding="same", num_experts=2))
    sliced = repr(RoutedConv2d(windows(4, 0.5, 2), windows(6, 0.6, 2), 1))
    assert "2, 3, num_experts=2" in sliced
    assert "out_slices=ExpertSlices(total=6, width=3, starts=(0, 3))" not in sliced  # a partition says nothing
    assert "in_slices=ExpertSlices(total=4, width=2, starts=(0, 2))" in sliced
    assert "out_slices=ExpertSlices(total=5, width=3" in repr(RoutedConv2d(2, windows(5, 0.6, 2), 1))
    assert repr(RoutedLinear(3, 4, num_experts=2)) == (
        "RoutedLinear(in_features=3, out_features=4, num_experts=2, bias=True)"
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer", [RoutedConv2d(3, 4, 3, num_experts=N), RoutedLinear(3, 4, num_experts=N)], ids=["conv", "linear"]
)
def test_pickle_and_deepcopy(layer: nn.Module, training: bool) -> None:
    layer.train(training)
    x = torch.randn(4, 3, 5, 5) if isinstance(layer, RoutedConv2d) else torch.randn(4, 3)
    y = layer(x, ROUTING)
    for again in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(again(x, ROUTING), y)
        assert again.weight is not layer.weight and again.training == training
        assert repr(again) == repr(layer)


def test_attributes_as_of_conv2d() -> None:
    layer, plain = (make(4, 6, 3, 2, 1, 1, 2, **kw) for make, kw in ((RoutedConv2d, {"num_experts": 2}), (nn.Conv2d, {})))
    for name in (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    ):
        assert getattr(layer, name) == getattr(plain, name)
    assert layer.num_experts == 2
    assert RoutedConv2d(4, 6, 3, num_experts=1, device="meta", dtype=torch.float16).weight.dtype == torch.float16


def test_no_expert_dimension_is_a_plain_convolution(backend: str) -> None:
    """Ints alone need num_experts; num_experts=1 is nn.Conv2d."""
    layer = RoutedConv2d(3, 4, 3, num_experts=1, dtype=torch.float64)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    y = layer(x, Routing(torch.zeros(2, dtype=torch.int64), num_experts=1))
    torch.testing.assert_close(y, F.conv2d(x, layer.weight, layer.bias), rtol=1e-12, atol=1e-12)


# --- RoutedLinear ---


@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 1), (0,), (0, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("in_side", "out_side"),
    [(6, 3), (31, windows(12, 0.5, N)), (windows(7, 0.5, N), windows(5, 0.7, N)), (partition(2, N), 3)],
    ids=["drop-in", "windows out", "windows", "partition in"],
)
def test_routed_linear_equals_linear_of_each_sample(
    backend: str, in_side: Any, out_side: Any, bias: bool, shape: tuple[int, ...]
) -> None:
    layer = RoutedLinear(in_side, out_side, bias, dtype=torch.float64, num_experts=N)
    x = torch.randn(*shape, layer.in_features, dtype=torch.float64, requires_grad=True)
    expert = EXPERT[: shape[0]]
    gate = torch.randn(shape[0], dtype=torch.float64)
    y = layer(x, Routing(torch.tensor(expert, dtype=torch.int64), gate, num_experts=N))
    out = []
    for i, e in enumerate(expert):
        o = 0 if layer.out_slices.is_whole else layer.out_slices.starts[e]
        c = 0 if layer.in_slices.is_whole else layer.in_slices.starts[e]
        w = layer.weight[o : o + layer.out_features, c : c + layer.in_features]
        b = None if layer.bias is None else layer.bias[o : o + layer.out_features]
        out.append(gate[i] * F.linear(x[i : i + 1], w, b))
    assert y.shape == (*shape, layer.out_features)
    if out:
        _assert_same(layer, x, y, torch.cat(out))


def test_routed_linear_of_top_k(backend: str) -> None:
    layer = RoutedLinear(6, 4, num_experts=N, dtype=torch.float64)
    scores = torch.randn(4, N, dtype=torch.float64)
    routing = Routing.from_scores(scores, 2, gate="softmax")
    assert routing.gate is not None
    for shape in ((4, 6), (4, 5, 6)):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        total = []
        for i in range(4):
            parts = [
                routing.gate[i, j]
                * F.linear(x[i : i + 1], layer.weight[4 * e : 4 * e + 4], layer.bias[4 * e : 4 * e + 4])
                for j, e in enumerate(routing.expert[i].tolist())
            ]
            total.append(parts[0] + parts[1])
        _assert_same(layer, x, layer(x, routing), torch.cat(total))
        expanded = layer(x, routing.expand())
        assert expanded.shape == (8, *shape[1:-1], 4)
        torch.testing.assert_close(routing.combine(expanded), torch.cat(total), rtol=1e-12, atol=1e-12)


def test_routed_linear_of_bad_shape_raises() -> None:
    layer = RoutedLinear(6, 4, num_experts=N)
    with pytest.raises(ValueError, match=r"input: expected shape \[B, in\] or \[B, T, in\], got \(4, 2, 3, 6\)"):
        layer(torch.randn(4, 2, 3, 6), ROUTING)
    with pytest.raises(ValueError, match="input: expected 6 channels, got 5"):
        layer(torch.randn(4, 5), ROUTING)


# --- with what surrounds a module ---


@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 6)], ids=str)
def test_routed_layer_norm_equals_that_of_each_sample(shape: tuple[int, ...]) -> None:
    layer = RoutedLayerNorm(6, 3, eps=1e-3).double()
    expert = [2, 0, 2, 1, 0]
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.uniform_(-1, 1)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x, Routing(torch.tensor(expert), num_experts=3))
    weight, bias = layer.weight.view(3, 6), layer.bias.view(3, 6)
    expected = torch.stack([F.layer_norm(x[i], (6,), weight[e], bias[e], 1e-3) for i, e in enumerate(expert)])
    torch.testing.assert_close(y, expected)
    leaves, dy = [x, layer.weight, layer.bias], torch.randn_like(y)
    for found, wanted in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(found, wanted)
    assert repr(layer) == "RoutedLayerNorm(6, num_experts=3, eps=0.001)"


def test_routed_layer_norm_refuses() -> None:
    layer = RoutedLayerNorm(6, 3)
    with pytest.raises(ValueError, match=r"input: expected shape \[V, \.\.\., 6\], got \(2, 5\)"):
        layer(torch.zeros(2, 5), Routing(torch.tensor([0, 1]), num_experts=3))
    with pytest.raises(ValueError, match="routing: expected 2 choices of 3 experts, got 4 of 3"):
        layer(torch.zeros(2, 6), Routing(torch.zeros(2, 2, dtype=torch.int64), num_experts=3))
    with pytest.raises(ValueError, match=r"routing: expert index 3 of sample 1 is outside 0 \.\. 2"):
        layer(torch.zeros(2, 6), Routing(torch.tensor([0, 3]), num_experts=3))
    with pytest.raises(ValueError, match="num_experts: expected at least 1, got 0"):
        RoutedLayerNorm(6, 0)


def test_grad_scaler_of_the_cpu() -> None:
    layer = RoutedConv2d(3, 4, 3, num_experts=N)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = layer.weight.detach().clone()
    with torch.autocast("cpu"):
        loss = layer(torch.randn(4, 3, 5, 5), ROUTING).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.isfinite(layer.weight).all() and not torch.equal(layer.weight, before)


def test_a_short_training_has_the_loss_curve_of_the_reference() -> None:
    def curve(backend: str) -> list[float]:
        torch.manual_seed(1)
        router = nn.Linear(3 * 64, N, dtype=torch.float64)
        first = RoutedConv2d(3, 8, 3, padding=1, num_experts=N, dtype=torch.float64)
        second = RoutedConv2d(8, 8, 3, stride=2, num_experts=N, dtype=torch.float64)
        head = RoutedLinear(8, 4, num_experts=N, dtype=torch.float64)
        modules = nn.ModuleList([router, first, second, head])
        optimizer = torch.optim.SGD(modules.parameters(), lr=0.1, momentum=0.9)
        x, labels = torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.randint(4, (16,))
        losses = []
        with use_backend(backend):
            for _ in range(12):
                routing = Routing.from_scores(router(x.flatten(1)))
                y = second(first(x, routing).relu(), routing).relu().mean((2, 3))
                loss = F.cross_entropy(head(y, routing), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses

    cpu, reference = curve("cpu"), curve("reference")
    torch.testing.assert_close(torch.tensor(cpu), torch.tensor(reference), rtol=1e-9, atol=0)
    assert cpu[-1] < 0.8 * cpu[0]


def test_weights_may_be_parametrised(backend: str) -> None:
    """torch.nn.utils.parametrize makes a new tensor at each access; eval mode must not mistake it for an old one."""

    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = RoutedConv2d(3, 4, 3, num_experts=N, bias=False)
    x = torch.randn(4, 3, 5, 5)
    plain = layer(x, ROUTING)
    nn.utils.parametrize.register_parametrization(layer, "weight", Twice())
    for training in (True, False, False):
        torch.testing.assert_close(layer.train(training)(x, ROUTING), 2 * plain)
        torch.testing.assert_close(layer(x, ROUTING), 2 * plain)


def test_slices_are_kept_on_the_module() -> None:
    layer = RoutedConv2d(4, windows(6, 0.5, 3), 1)
    assert layer.in_slices == ExpertSlices.whole(4)
    assert layer.out_slices == windows(6, 0.5, 3)
    assert (layer.in_channels, layer.out_channels, layer.num_experts) == (4, 3, 3)


# --- settings changed later, as nn.Conv2d's may be ---


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{"stride": 2}, {"padding": (2, 1)}, {"dilation": 2, "padding": "same"}, {"padding_mode": "circular", "padding": 1}],
    ids=str,
)
def test_geometry_may_be_changed_later(changes: dict[str, Any], training: bool) -> None:
    layer = RoutedConv2d(2, 3, 3, num_experts=N, dtype=torch.float64).train(training)
    x = torch.randn(4, 2, 7, 8, dtype=torch.float64, requires_grad=True)
    layer(x, ROUTING)  # keeps packed weights in eval mode
    for name, value in changes.items():
        setattr(layer, name, value)
    _assert_same(layer, x, layer(x, ROUTING), _plain(layer, x, **changes))
    again = copy.deepcopy(layer)
    assert repr(again) == repr(layer) == repr(RoutedConv2d(2, 3, 3, num_experts=N, **changes))
    assert torch.equal(again(x, ROUTING), layer(x, ROUTING))


def test_a_wrong_change_changes_nothing() -> None:
    layer = RoutedConv2d(2, 3, 3, stride=2, padding=1, num_experts=N)
    before = repr(layer), layer.geometry
    for name, value in {"stride": 0, "padding": "same", "dilation": (1, 0), "padding_mode": "mirror"}.items():
        with pytest.raises(ValueError, match=f"^{name}: expected|^padding: 'same' needs stride 1"):
            setattr(layer, name, value)
    for name in ("in_channels", "out_channels", "num_experts", "kernel_size", "groups", "out_slices", "in_slices"):
        with pytest.raises(AttributeError, match=f"^{name}: a RoutedConv2d keeps what it was made with"):
            setattr(layer, name, 7)
    with pytest.raises(AttributeError, match=r"^geometry: a RoutedConv2d keeps"):
        layer.geometry = layer.geometry._replace(out_width=100)
    layer.groups, layer.num_experts = 1, N  # what they are
    assert (repr(layer), layer.geometry) == before


def test_values_under_the_negative_bit() -> None:
    """torch negates the imaginary part of a conjugate by a bit, which pointers do not see."""

    def negated(*shape: int) -> Tensor:
        x = torch.randn(*shape, 2).view(*shape, 2)
        value = torch.view_as_complex(x).conj().imag
        assert value.is_neg()
        return value

    layer = RoutedConv2d(3, 4, 1, num_experts=N)
    x, weight, bias, dy = negated(4, 3, 1, 1), negated(12, 3, 1, 1), negated(12), negated(4, 4, 1, 1)
    results = []
    for t in ((x, weight, bias, dy), tuple(v.resolve_neg() for v in (x, weight, bias, dy))):
        for grad in (True, False):
            leaves = [v.detach().requires_grad_(grad) for v in t[:3]]
            for training in (True, False):
                call = {"weight": leaves[1], "bias": leaves[2]}
                y = torch.func.functional_call(layer.train(training), call, (leaves[0], ROUTING))
                results.append((y, *(torch.autograd.grad(y, leaves, t[3]) if grad else ())))
    half = len(results) // 2
    for a, b in zip(results[:half], results[half:], strict=True):
        for left, right in zip(a, b, strict=True):
            torch.testing.assert_close(left, right)
