# SPDX-License-Identifier: Apache-2.0
"""Routing: choices, gates, their gradients, virtual samples."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import hypothesis
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import strategies as st
from oracle import partition
from torch.autograd import gradcheck, gradgradcheck

from moe_kernels import RoutedConv2d, Routing, functional

GATES = ("straight_through", "softmax", "raw_straight_through")


def _layer(num_experts: int = 3, **kwargs: Any) -> RoutedConv2d:
    return RoutedConv2d(2, 4, 3, num_experts=num_experts, dtype=torch.float64, **kwargs)


# --- choices ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@hypothesis.given(data=st.data())
def test_ties_go_to_the_lowest_index(dtype: torch.dtype, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    rows = data.draw(st.lists(st.lists(st.integers(-1, 1), min_size=n, max_size=n), min_size=1, max_size=5))
    top_k = data.draw(st.integers(1, n))
    expert = Routing.from_scores(torch.tensor(rows, dtype=dtype), top_k, gate="none").expert
    expected = [sorted(range(n), key=lambda e, row=row: (-row[e], e))[:top_k] for row in rows]
    assert expert.tolist() == ([row[0] for row in expected] if top_k == 1 else expected)
    assert expert.dtype == torch.int64


def test_ties_in_wide_rows_go_to_the_lowest_index() -> None:
    scores = torch.zeros(3, 1000)
    scores[1, 517] = scores[1, 923] = 1.0
    assert Routing.from_scores(scores, gate="none").expert.tolist() == [0, 517, 0]
    assert Routing.from_scores(scores, 3, gate="none").expert.tolist() == [[0, 1, 2], [517, 923, 0], [0, 1, 2]]


def test_infinite_scores_are_scores() -> None:
    scores = torch.tensor([[-torch.inf, 0.0], [1.0, torch.inf], [torch.inf, -torch.inf]])
    assert Routing.from_scores(scores, gate="none").expert.tolist() == [1, 1, 0]


@pytest.mark.parametrize("gate", [*GATES, "none"])
def test_nan_scores_raise(gate: str) -> None:
    scores = torch.zeros(3, 4)
    scores[1, 2] = torch.nan
    with pytest.raises(ValueError, match="scores: expected no NaN, got NaN in 1 places"):
        Routing.from_scores(scores, gate=gate)


def test_no_samples() -> None:
    for gate in (*GATES, "none"):
        routing = Routing.from_scores(torch.zeros(0, 3), gate=gate)
        assert routing.expert.shape == (0,) and routing.expert.dtype == torch.int64


# --- gates ---


@pytest.mark.parametrize("gate", ["straight_through", "raw_straight_through"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_straight_through_value_is_exactly_1(gate: str, dtype: torch.dtype) -> None:
    scores = torch.randn(2000, 5).mul(4).to(dtype).requires_grad_()
    routing = Routing.from_scores(scores, gate=gate)
    assert routing.gate is not None and routing.gate.dtype == dtype
    assert torch.equal(routing.gate, torch.ones(2000, dtype=dtype))
    # and the layer's output has the bits of the ungated one
    x, layer = torch.randn(2000, 2, 1, 1, dtype=dtype), RoutedConv2d(2, 3, 1, num_experts=5, dtype=dtype)
    assert torch.equal(layer(x, routing), layer(x, routing.ungated()))


def test_straight_through_gradient_is_that_of_the_softmax_probability(backend: str) -> None:
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x, layer = torch.randn(4, 2, 5, 5, dtype=torch.float64), _layer()
    routing = Routing.from_scores(scores, gate="straight_through")
    y = layer(x, routing)
    dy = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, scores, dy)
    # d p = <y[i], dy[i]>, and then softmax's own derivative
    probability = scores.softmax(1).gather(1, routing.expert[:, None])[:, 0]
    inner = (layer(x, routing.ungated()).detach() * dy).sum((1, 2, 3))
    (expected,) = torch.autograd.grad(probability, scores, inner)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_raw_straight_through_gradient_reaches_the_selected_score_alone(backend: str) -> None:
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x, layer = torch.randn(4, 2, 5, 5, dtype=torch.float64), _layer()
    routing = Routing.from_scores(scores, gate="raw_straight_through")
    y = layer(x, routing)
    dy = torch.randn_like(y)
    (actual,) = torch.autograd.grad(y, scores, dy)
    expected = torch.zeros_like(scores)
    expected[torch.arange(4), routing.expert] = (layer(x, routing.ungated()).detach() * dy).sum((1, 2, 3))
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_softmax_gate_multiplies_by_the_probability(backend: str) -> None:
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x, layer = torch.randn(4, 2, 5, 5, dtype=torch.float64), _layer()
    routing = Routing.from_scores(scores, gate="softmax")
    y = layer(x, routing)
    probability = scores.softmax(1).gather(1, routing.expert[:, None])
    expected = layer(x, routing.ungated()) * probability[:, :, None, None]
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        *(torch.autograd.grad(t, (scores, *layer.parameters()), dy) for t in (y, expected)), rtol=1e-11, atol=1e-11
    )


def test_softmax_gate_of_top_k_is_renormalised_over_the_k(backend: str) -> None:
    scores = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    x, layer = torch.randn(4, 2, 5, 5, dtype=torch.float64), _layer(5)
    routing = Routing.from_scores(scores, 2, gate="softmax")
    assert routing.gate is not None
    torch.testing.assert_close(routing.gate.sum(1), torch.ones(4, dtype=torch.float64), rtol=1e-14, atol=0)
    probabilities = scores.softmax(1).gather(1, routing.expert)
    weights = probabilities / probabilities.sum(1, keepdim=True)
    torch.testing.assert_close(routing.gate, weights, rtol=1e-13, atol=0)
    y = layer(x, routing)
    one = [layer(x, Routing(routing.expert[:, j], num_experts=5)) * weights[:, j, None, None, None] for j in range(2)]
    torch.testing.assert_close(y, one[0] + one[1], rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        *(torch.autograd.grad(t, (scores, *layer.parameters()), dy) for t in (y, one[0] + one[1])),
        rtol=1e-11,
        atol=1e-11,
    )


def test_gate_none_sums_the_choices(backend: str) -> None:
    x, layer = torch.randn(4, 2, 5, 5, dtype=torch.float64), _layer(5)
    routing = Routing.from_scores(torch.randn(4, 5), 3, gate="none")
    assert routing.gate is None
    one = [layer(x, Routing(routing.expert[:, j], num_experts=5)) for j in range(3)]
    torch.testing.assert_close(layer(x, routing), sum(one), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gate", ["straight_through", "raw_straight_through"])
def test_straight_through_of_top_k_raises(gate: str) -> None:
    with pytest.raises(ValueError, match=f"gate: '{gate}' is defined for top_k = 1 only, got top_k = 2"):
        Routing.from_scores(torch.zeros(3, 4), 2, gate=gate)


def test_gradient_of_the_gate_comes_from_the_ungated_values(backend: str) -> None:
    """Not from y / gate: gates of 0 and of 1e-300 lose nothing."""
    gate = torch.tensor([0.0, 1e-300, 1.0, -2.0], dtype=torch.float64, requires_grad=True)
    x, layer = torch.randn(4, 2, 5, 5, dtype=torch.float64), _layer()
    routing = Routing(torch.tensor([0, 1, 2, 0]), gate, num_experts=3)
    y = layer(x, routing)
    dy = torch.randn_like(y)
    expected = (layer(x, routing.ungated()) * dy).sum((1, 2, 3))
    torch.testing.assert_close(torch.autograd.grad(y, gate, dy)[0], expected, rtol=1e-12, atol=1e-12)


def test_straight_through_gates_shared_by_layers_add_their_gradients(backend: str) -> None:
    scores = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, 5, 5, dtype=torch.float64)
    layers = [_layer(padding=1), RoutedConv2d(4, 4, 3, num_experts=3, dtype=torch.float64)]
    routing = Routing.from_scores(scores)
    outputs = [layers[0](x, routing)]
    outputs.append(layers[1](outputs[0].tanh(), routing))
    for y in outputs:
        y.retain_grad()
    outputs[1].square().sum().backward()
    assert torch.equal(outputs[1], layers[1](layers[0](x, routing.ungated()).tanh(), routing.ungated()))
    inner = sum((y.detach() * y.grad).sum((1, 2, 3)) for y in outputs if y.grad is not None)
    probability = scores.softmax(1).gather(1, routing.expert[:, None])[:, 0]
    (expected,) = torch.autograd.grad(probability, scores, inner)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("top_k", [1, 2])
def test_gradcheck_and_gradgradcheck_through_softmax_scores(backend: str, top_k: int) -> None:
    scores = torch.tensor([[0.3, -1.0, 0.1], [2.0, 1.0, -0.5]], dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(6, 2, 2, 2, dtype=torch.float64, requires_grad=True)

    def function(scores: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        routing = Routing.from_scores(scores, top_k, gate="softmax")
        return functional.routed_conv2d(x, w, routing, out_slices=partition(2, 3))

    assert gradcheck(function, (scores, x, w))
    assert gradgradcheck(function, (scores, x, w), atol=1e-6)


def test_a_routing_without_gradient_needs_no_graph(backend: str) -> None:
    routing = Routing.from_scores(torch.randn(3, 2, requires_grad=True), gate="none")
    layer = RoutedConv2d(2, 3, 1, num_experts=2).requires_grad_(False)
    assert not layer(torch.randn(3, 2, 4, 4), routing).requires_grad


# --- virtual samples ---


def test_expand_and_combine() -> None:
    gate = torch.tensor([[0.25, 0.75], [0.5, 2.0], [1.0, 0.0]], requires_grad=True)
    routing = Routing(torch.tensor([[1, 0], [2, 3], [0, 0]]), gate, num_experts=4)
    assert routing.top_k == 2 and routing.batch_size == 3
    expanded = routing.expand()
    assert expanded.expert.tolist() == [1, 0, 2, 3, 0, 0]
    assert expanded.gate is None and expanded.num_experts == 4 and expanded.choices == 2
    y = torch.randn(6, 5, 2, 2, requires_grad=True)
    combined = routing.combine(y)
    expected = (y.view(3, 2, 5, 2, 2) * gate[:, :, None, None, None]).sum(1)
    torch.testing.assert_close(combined, expected)
    grads = (torch.autograd.grad(t, (y, gate), torch.ones_like(t)) for t in (combined, expected))
    torch.testing.assert_close(*grads)
    assert routing.combine(torch.ones(6)).tolist() == [1.0, 2.5, 1.0]  # logits of any shape
    with pytest.raises(ValueError, match=r"y: expected 3 \* 2 = 6 virtual samples, got shape \(3, 5\)"):
        routing.combine(torch.ones(3, 5))


def test_combine_of_one_choice_applies_the_gate() -> None:
    scores = torch.randn(3, 2, requires_grad=True)
    y = torch.randn(3, 4)
    routing = Routing.from_scores(scores, gate="softmax")
    assert routing.gate is not None
    torch.testing.assert_close(routing.combine(y), y * routing.gate[:, None])
    straight = Routing.from_scores(scores)
    assert torch.equal(straight.combine(y), y)
    assert straight.combine(y).requires_grad


def test_ungated_is_the_same_choice() -> None:
    routing = Routing.from_scores(torch.randn(3, 4), 2, gate="softmax")
    ungated = routing.ungated()
    assert ungated.expert is routing.expert and ungated.gate is None and ungated.num_experts == 4


def test_a_block_gated_once_at_its_output_equals_the_loop_over_choices(backend: str) -> None:
    """Two layers that share one top-2 routing: expanded inside, combined at the end."""
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    first = _layer(4, padding=1)
    second = RoutedConv2d(4, 3, 3, num_experts=4, dtype=torch.float64)
    routing = Routing.from_scores(torch.randn(3, 4, dtype=torch.float64, requires_grad=True), 2, gate="softmax")
    inner = routing.expand()
    y = routing.combine(second(first(x, inner).relu(), inner))
    total = torch.zeros_like(y)
    assert routing.gate is not None
    for j in range(2):
        choice = Routing(routing.expert[:, j].contiguous(), num_experts=4)
        total = total + second(first(x, choice).relu(), choice) * routing.gate[:, j, None, None, None]
    torch.testing.assert_close(y, total, rtol=1e-12, atol=1e-12)
    for a, e in zip(
        torch.autograd.grad(y.sum(), (first.weight, second.weight), retain_graph=True),
        torch.autograd.grad(total.sum(), (first.weight, second.weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


# --- values ---


def test_validate() -> None:
    good = Routing(torch.tensor([0, 1]), torch.tensor([0.0, -1.0]), num_experts=2)
    assert good.validate() is good
    assert Routing(torch.empty(0, dtype=torch.int64), num_experts=2).validate().batch_size == 0
    for bad in ([0, 2], [-1, 1]):
        with pytest.raises(ValueError, match=r"expert: expected indices in 0 \.\. 1, got values from "):
            Routing(torch.tensor(bad), num_experts=2).validate()
    for bad_gate in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="gate: expected finite values, got NaN or infinity"):
            Routing(torch.tensor([0, 1]), torch.tensor([1.0, bad_gate]), num_experts=2).validate()


def test_debug_mode_validates_always(monkeypatch: pytest.MonkeyPatch) -> None:
    Routing(torch.tensor([2]), num_experts=2)
    monkeypatch.setenv("MOE_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="expert: expected indices"):
        Routing(torch.tensor([2]), num_experts=2)
    with pytest.raises(ValueError, match="gate: expected finite values"):
        Routing(torch.tensor([1]), torch.tensor([torch.nan]), num_experts=2)
    with pytest.raises(ValueError, match="gate: expected finite values"):
        Routing.from_scores(torch.tensor([[0.0, torch.inf]]), gate="softmax")


@pytest.mark.parametrize("gate", [*GATES, "none"])
def test_pytree(gate: str) -> None:
    routing = Routing.from_scores(torch.randn(3, 4, requires_grad=True), gate=gate)
    leaves, spec = pytree.tree_flatten(routing)
    assert [leaf for leaf in leaves if leaf is not None] == [t for t in (routing.expert, routing.gate) if t is not None]
    for again in (
        pytree.tree_unflatten(leaves, spec),
        pytree.tree_unflatten(leaves, pytree.treespec_loads(pytree.treespec_dumps(spec))),
    ):
        assert isinstance(again, Routing)
        assert again.expert is routing.expert and again.gate is routing.gate
        assert (again.num_experts, again.unit_gate, again.choices) == (4, routing.unit_gate, 1)
    paths = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(routing)[0]]
    assert paths[0] == ".expert"
    expanded = pytree.tree_map(lambda t: t, Routing(torch.zeros(3, 2, dtype=torch.int64), num_experts=2).expand())
    assert expanded.choices == 2


def test_pickle_deepcopy_and_repr() -> None:
    routing = Routing.from_scores(torch.randn(3, 4), gate="softmax")
    for again in (pickle.loads(pickle.dumps(routing)), copy.deepcopy(routing)):
        assert torch.equal(again.expert, routing.expert) and torch.equal(again.gate, routing.gate)
        assert again.num_experts == 4 and again.expert is not routing.expert
    assert repr(routing) == "Routing(expert=[3], gate=torch.float32, num_experts=4)"
    assert repr(Routing.from_scores(torch.randn(3, 4))) == "Routing(expert=[3], gate=1 (straight-through), num_experts=4)"
    assert repr(routing.ungated()) == "Routing(expert=[3], gate=None, num_experts=4)"


_EXPERT = torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0, 1], None, 2), TypeError, "expert: expected a tensor, got list"),
        ((_EXPERT.int(), None, 2), TypeError, r"expert: expected int64, got torch\.int32"),
        ((_EXPERT[0], None, 2), ValueError, r"expert: expected shape \[B\] or \[B, k\], got \(\)"),
        ((_EXPERT[:, None, None], None, 2), ValueError, r"expert: expected shape \[B\] or \[B, k\], got \(3, 1, 1\)"),
        ((_EXPERT[:, None][:, :0], None, 2), ValueError, "expert: expected at least one choice a sample, got k = 0"),
        ((_EXPERT, None, 2.0), TypeError, r"num_experts: expected an integer, got 2\.0"),
        ((_EXPERT, None, 0), ValueError, "num_experts: expected at least 1, got 0"),
        ((_EXPERT, [1.0] * 3, 2), TypeError, "gate: expected a floating tensor or None, got list"),
        ((_EXPERT, _EXPERT, 2), TypeError, r"gate: expected a floating tensor or None, got torch\.int64"),
        ((_EXPERT, torch.ones(2), 2), ValueError, r"gate: expected the shape of expert, \(3,\), got \(2,\)"),
        ((_EXPERT, torch.ones(3, device="meta"), 2), ValueError, "gate: expected device cpu as expert, got meta"),
    ],
)
def test_bad_routing_raises(arguments: Any, error: type[Exception], message: str) -> None:
    expert, gate, num_experts = arguments
    with pytest.raises(error, match=message):
        Routing(expert, gate, num_experts=num_experts)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]],), TypeError, r"scores: expected a floating tensor \[B, num_experts\], got list"),
        ((_EXPERT[:, None],), TypeError, r"scores: expected a floating tensor \[B, num_experts\], got torch\.int64"),
        ((torch.zeros(3),), ValueError, r"scores: expected shape \[B, num_experts\], got \(3,\)"),
        ((torch.zeros(3, 0),), ValueError, r"scores: expected shape \[B, num_experts\], got \(3, 0\)"),
        ((torch.zeros(3, 2), 1.0), TypeError, r"top_k: expected an integer, got 1\.0"),
        ((torch.zeros(3, 2), 3), ValueError, r"top_k: expected 1 \.\. 2 \(the number of experts\), got 3"),
        ((torch.zeros(3, 2), 0), ValueError, r"top_k: expected 1 \.\. 2 \(the number of experts\), got 0"),
        ((torch.zeros(3, 2), 1, "hard"), ValueError, "gate: expected one of straight_through, softmax, .*, got 'hard'"),
    ],
)
def test_bad_scores_raise(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Routing.from_scores(*arguments)
