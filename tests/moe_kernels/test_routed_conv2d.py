# SPDX-License-Identifier: Apache-2.0
"""The routed convolution against the loop in float64: shapes, layouts, dtypes, epilogue, metamorphic relations."""

from __future__ import annotations

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from oracle import (
    BACKENDS,
    DTYPES,
    LAYOUTS,
    Case,
    assert_within,
    cases,
    check,
    loop,
    named,
    numbers,
    partition,
    poisoned,
    run,
    truth,
    whole,
    windows,
)
from torch.autograd import gradcheck, gradgradcheck

from moe_kernels import Routing, functional, use_backend


@hypothesis.settings(max_examples=160)
@hypothesis.given(case=cases())
def test_cpu_equals_the_loop_in_value_and_all_gradients(case: Case) -> None:
    with use_backend("cpu"):
        check(case)


@hypothesis.given(case=cases())
def test_reference_equals_the_loop_in_value_and_all_gradients(case: Case) -> None:
    with use_backend("reference"):
        check(case)


@pytest.mark.nightly
@hypothesis.settings(max_examples=5000)
@hypothesis.given(case=cases(), backend=st.sampled_from(BACKENDS))
def test_equals_the_loop_long(case: Case, backend: str) -> None:
    with use_backend(backend):
        check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named()
def test_named_cases_equal_the_loop(backend: str, case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


# shapes of the networks that the kernels are written for, where they take their fast paths
@pytest.mark.parametrize(
    "case",
    [
        Case(partition(32, 2), whole(64), padding=(1, 1), size=(16, 16), batch=2),
        Case(partition(64, 2), whole(32), padding=(1, 1), stride=(2, 2), size=(16, 16), batch=2),
        Case(partition(64, 2), whole(32), kernel=(1, 1), stride=(2, 2), size=(16, 16), batch=2),
        Case(partition(32, 2), partition(64, 2), padding=(1, 1), size=(4, 4), batch=7),
        Case(partition(16, 4), whole(3), kernel=(7, 7), padding=(3, 3), stride=(2, 2), size=(32, 32), batch=1),
        Case(windows(96, 0.5, 3), windows(72, 0.5, 3), padding=(1, 1), size=(9, 9), batch=4),
        Case(partition(8, 20), whole(8), padding=(1, 1), size=(8, 8), batch=4),
        Case(partition(40, 2), whole(40), groups=40, padding=(1, 1), size=(12, 12), batch=2),
    ],
    ids=["3x3", "3x3 stride 2", "1x1 stride 2", "deep", "stem", "windows", "N > B", "depthwise"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_network_shapes_equal_the_loop(case: Case, dtype: torch.dtype, layout: str) -> None:
    with use_backend("cpu"):
        check(replace(case, dtype=dtype, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_wise_error_is_small(backend: str, dtype: torch.dtype) -> None:
    case = Case(partition(24, 3), whole(31), padding=(1, 1), size=(12, 12), batch=6, dtype=dtype)
    values = numbers(case)
    expected, _ = truth(case, values)
    y = run(case, values)
    grads = torch.autograd.grad(y, list(values.leaves().values()), values.grad)
    limit = {torch.float64: 1e-13, torch.float32: 1e-5}.get(dtype, 1e-2)
    for name, value in {"output": y, **dict(zip(values.leaves(), grads, strict=True))}.items():
        error = (value.detach().double() - expected[name]).norm() / expected[name].norm()
        assert error < limit, f"{name}: {error}"


@pytest.mark.parametrize("experts", ["all", "one", "none"])
@pytest.mark.parametrize("batch", [0, 1, 8])
def test_every_expert_chosen_one_chosen_none(backend: str, experts: str, batch: int) -> None:
    case = Case(partition(3, 4), whole(6), padding=(1, 1), batch=batch if experts != "none" else 0)
    values = numbers(case)
    values.expert = torch.arange(case.batch) % 4 if experts == "all" else torch.full((case.batch,), 2)
    expected, magnitude = truth(case, values)
    with poisoned():
        y = run(case, values)
        dx, dw, db, dg = torch.autograd.grad(y, list(values.leaves().values()), values.grad)
    assert_within(y, expected["output"], magnitude["output"], case.terms_forward)
    assert_within(dx, expected["input"], magnitude["input"], case.terms_input)
    assert_within(dw, expected["weight"], magnitude["weight"], case.terms_weight)
    assert_within(db, expected["bias"], magnitude["bias"], case.terms_weight)
    assert_within(dg, expected["gate"], magnitude["gate"], case.terms_gate)


def test_unchosen_experts_get_zero_gradients(backend: str) -> None:
    case = Case(partition(3, 4), whole(6), padding=(1, 1), batch=5)
    values = numbers(case)
    values.expert = torch.tensor([1, 3, 3, 1, 1])
    with poisoned():
        run(case, values).sum().backward()
    dw, db = values.weight.grad, values.bias.grad
    assert dw is not None and db is not None
    for expert in (0, 2):
        assert torch.equal(dw[3 * expert : 3 * expert + 3], torch.zeros(3, 6, 3, 3, dtype=torch.float64))
        assert torch.equal(db[3 * expert : 3 * expert + 3], torch.zeros(3, dtype=torch.float64))
    for expert in (1, 3):
        assert (dw[3 * expert : 3 * expert + 3] != 0).all() and (db[3 * expert : 3 * expert + 3] != 0).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_channels_last_in_channels_last_out_contiguous_in_contiguous_out(backend: str, layout: str) -> None:
    case = Case(partition(3, 2), whole(5), padding=(1, 1), layout=layout, dtype=torch.float32)
    values = numbers(case)
    y = run(case, values)
    (dx,) = torch.autograd.grad(y, values.x, torch.empty_like(y).normal_())
    for t in (y, dx):
        assert t.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")
        assert t.is_contiguous() == (layout != "channels_last")
    with torch.no_grad():
        assert run(case, values).stride() == y.stride()
    # the gradient that comes back may be of either format and must not matter
    other = torch.channels_last if layout == "contiguous" else torch.contiguous_format
    grad = torch.randn(y.shape)
    first = torch.autograd.grad(run(case, values), values.leaves().values(), grad)
    second = torch.autograd.grad(run(case, values), values.leaves().values(), grad.contiguous(memory_format=other))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("grad_layout", ["expanded", "sliced", "transposed"])
def test_gradients_of_odd_strides(backend: str, grad_layout: str) -> None:
    case = Case(partition(4, 2), whole(3), padding=(1, 1), batch=4)
    values = numbers(case)
    if grad_layout == "expanded":
        values.grad = torch.ones((), dtype=torch.float64).expand_as(values.grad)  # what y.sum().backward() sends
    elif grad_layout == "sliced":
        values.grad = torch.cat([values.grad] * 2, 3)[..., 1 : values.grad.shape[3] + 1]
    else:
        values.grad = values.grad.transpose(0, 1).contiguous().transpose(0, 1)
    expected, magnitude = truth(case, values)
    grads = torch.autograd.grad(run(case, values), list(values.leaves().values()), values.grad)
    for (name, _), value in zip(values.leaves().items(), grads, strict=True):
        assert_within(value, expected[name], magnitude[name], 10 * case.terms_weight, what=name)


# --- derivatives ---------------------------------------------------------------------------------------------------


def _as_function(case: Case):  # type: ignore[no-untyped-def]
    values = numbers(replace(case, batch=2, size=(4, 4)))
    names = list(values.leaves())

    def function(*leaves: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, leaves, strict=True))
        return run(
            case,
            replace(values, x=given["input"], weight=given["weight"], bias=given.get("bias"), gate=given.get("gate")),
        )

    return function, tuple(values.leaves().values())


@named()
def test_gradcheck(backend: str, case: Case) -> None:
    function, leaves = _as_function(case)
    # exact up to rounding: the map is linear in each argument, so that a step of 1e-3 has no error of its own
    assert gradcheck(function, leaves, eps=1e-3, atol=1e-9, rtol=1e-7, fast_mode=False)


@named()
def test_gradgradcheck(backend: str, case: Case) -> None:
    function, leaves = _as_function(case)
    assert gradgradcheck(function, leaves, atol=1e-6, fast_mode=True)


def test_gradgradcheck_slow(backend: str) -> None:
    function, leaves = _as_function(Case(partition(2, 2), whole(2), kernel=(2, 2)))
    assert gradgradcheck(function, leaves, atol=1e-6, fast_mode=False)


@named()
def test_third_derivative_equals_that_of_the_loop(backend: str, case: Case) -> None:
    """The operators' backward passes, differentiated twice more along one direction."""
    case = replace(case, batch=2, size=(4, 4))
    values = numbers(case)
    directions = [torch.randn(leaf.shape, dtype=torch.float64) for leaf in values.leaves().values()]

    def derivatives(by_loop: bool) -> list[torch.Tensor]:
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        moved = {name: leaf.detach() + t * d for (name, leaf), d in zip(values.leaves().items(), directions, strict=True)}
        x, weight, bias, gate = moved["input"], moved["weight"], moved.get("bias"), moved.get("gate")
        if by_loop:
            y = loop(x, weight, bias, gate, values.expert, values.in_expert, case)
        else:
            y = run(case, replace(values, x=x, weight=weight, bias=bias, gate=gate))
        chain = [(y * values.grad).square().sum()]
        for _ in range(3):
            chain.append(torch.autograd.grad(chain[-1], t, create_graph=True)[0])
        return chain

    for a, e in zip(derivatives(by_loop=False), derivatives(by_loop=True), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


@named()
def test_torch_func_grad(backend: str, case: Case) -> None:
    function, leaves = _as_function(case)
    detached = tuple(leaf.detach() for leaf in leaves)

    def loss(*args: torch.Tensor) -> torch.Tensor:
        return function(*args).square().sum()

    actual = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*detached)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)

    def norm_of_gradient(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(loss)(x, *rest).square().sum()

    second = torch.func.grad(norm_of_gradient, argnums=tuple(range(len(leaves))))(*detached)
    (dx,) = torch.autograd.grad(loss(*leaves), leaves[0], create_graph=True)
    for a, e in zip(second, torch.autograd.grad(dx.square().sum(), leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


# --- epilogue ------------------------------------------------------------------------------------------------------


@st.composite
def epilogues(draw: st.DrawFn) -> dict[str, object]:
    return {
        "scale": draw(st.sampled_from((None, "slice", "width"))),
        "shift": draw(st.booleans()),
        "residual": draw(st.sampled_from((None, "contiguous", "channels_last"))),
        "relu": draw(st.booleans()),
        "grad": draw(st.booleans()),
    }


@hypothesis.settings(max_examples=120)
@hypothesis.given(case=cases(), kind=epilogues(), backend=st.sampled_from(("cpu", "cpu", "reference")))
def test_fused_epilogue_equals_its_formula(case: Case, kind: dict[str, object], backend: str) -> None:
    """relu(scale * (gate * (conv + bias)) + shift + residual)."""
    values = numbers(case)
    expected, magnitude = truth(case, values)
    y, size = expected["output"], magnitude["output"]
    width = case.out_slices.width
    # a value for each channel of the whole side has no meaning once choices are summed
    per_slice = kind["scale"] == "slice" and case.top_k == 1
    scale = shift = residual = None
    if kind["scale"] is not None:
        scale = values.scale if per_slice else values.scale[:width]
    if kind["shift"]:
        shift = values.shift if per_slice or (scale is None and case.top_k == 1) else values.shift[:width]
    if kind["residual"] is not None:
        form = torch.channels_last if kind["residual"] == "channels_last" else torch.contiguous_format
        residual = values.residual.contiguous(memory_format=form)

    def rows(value: torch.Tensor) -> torch.Tensor:
        value = value.double()
        if value.shape[0] == width:
            return value[None, :, None, None]
        starts = [0 if case.out_slices.is_whole else case.out_slices.starts[e] for e in values.expert.tolist()]
        parts = [value[s : s + width] for s in starts]
        return torch.stack(parts)[:, :, None, None] if parts else value.new_zeros(0, width, 1, 1)

    if scale is not None:
        y, size = y * rows(scale), size * rows(scale).abs()
    if shift is not None:
        y, size = y + rows(shift), size + rows(shift).abs()
    if residual is not None:
        y, size = y + residual.double(), size + residual.double().abs()
    if kind["relu"]:
        y = y.relu()
    with use_backend(backend), poisoned(), torch.set_grad_enabled(bool(kind["grad"])):
        actual = functional.routed_conv2d_fused(
            values.x,
            values.weight,
            values.routing(case),
            values.bias,
            out_slices=case.out_slices,
            in_slices=case.in_slices,
            in_routing=values.in_routing(case),
            scale=scale,
            shift=shift,
            residual=residual,
            relu=bool(kind["relu"]),
            **case.convolution,
        )
    assert actual.requires_grad == bool(kind["grad"])
    # in one pass the result is rounded once
    roundings = 6 + case.top_k if kind["grad"] or case.top_k > 1 else 1
    assert_within(actual, y, size, case.terms_forward + 3, roundings, "fused")


@pytest.mark.parametrize("per_slice", [True, False])
@named("top 2", "top 2 without gates")
def test_fused_gradients_equal_the_composition(backend: str, case: Case, per_slice: bool) -> None:
    values = numbers(case)
    count = case.out_slices.total if per_slice else case.out_slices.width
    leaves = {**values.leaves(), "scale": values.scale[:count], "shift": values.shift[:count]}
    leaves["residual"] = values.residual
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    width, starts = case.out_slices.width, case.out_slices.starts

    def rows(value: torch.Tensor) -> torch.Tensor:
        if not per_slice or case.out_slices.is_whole:
            return value[None, :, None, None]
        return torch.stack([value[starts[e] : starts[e] + width] for e in values.expert.tolist()])[:, :, None, None]

    y = loop(
        leaves["input"], leaves["weight"], leaves.get("bias"), leaves.get("gate"), values.expert, values.in_expert, case
    )
    y = (y * rows(leaves["scale"]) + rows(leaves["shift"]) + leaves["residual"]).relu()
    expected = torch.autograd.grad(y, list(leaves.values()), values.grad)
    fused = functional.routed_conv2d_fused(
        leaves["input"],
        leaves["weight"],
        Routing(values.expert, leaves.get("gate"), num_experts=case.num_experts),
        leaves.get("bias"),
        out_slices=case.out_slices,
        in_slices=case.in_slices,
        in_routing=values.in_routing(case),
        scale=leaves["scale"],
        shift=leaves["shift"],
        residual=leaves["residual"],
        relu=True,
        **case.convolution,
    )
    torch.testing.assert_close(fused, y, rtol=1e-11, atol=1e-11)
    for a, e in zip(torch.autograd.grad(fused, list(leaves.values()), values.grad), expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)


# --- k > 1 ---------------------------------------------------------------------------------------------------------


@hypothesis.given(case=cases(top_k=(2, 3)), backend=st.sampled_from(("cpu", "cpu", "reference")))
def test_expand_and_combine_equal_the_routing_itself(case: Case, backend: str) -> None:
    values = numbers(case)
    routing = values.routing(case)
    sides = {"out_slices": case.out_slices, "in_slices": case.in_slices, "in_routing": values.in_routing(case)}
    leaves = list(values.leaves().values())
    with use_backend(backend):
        y = run(case, values)
        grads = torch.autograd.grad(y, leaves, values.grad)
        inputs = (values.x, values.x.repeat_interleave(case.top_k, 0))  # B inputs, and B * k of them
        for number, x in enumerate(inputs):
            given = dict(sides)
            if number == 1 and given["in_routing"] is not None:
                given["in_routing"] = Routing(
                    values.in_expert.repeat_interleave(case.top_k), num_experts=case.in_slices.num_experts
                )
            inner = functional.routed_conv2d(x, values.weight, routing.expand(), values.bias, **given, **case.convolution)
            assert inner.shape[0] == case.virtual
            combined = routing.combine(inner)
            if case.dtype in (torch.float32, torch.float64):
                assert torch.equal(combined, y)
            else:  # the layer rounds once, after its gate; here each output is rounded before it, however they cancel
                gate = None if routing.gate is None else routing.gate.detach().abs()
                size = Routing(routing.expert, gate, num_experts=routing.num_experts).combine(inner.detach().abs())
                limit = 4 * torch.finfo(case.dtype).eps * size.double() + torch.finfo(case.dtype).tiny
                assert ((combined - y).double().abs() <= limit).all()
            again = torch.autograd.grad(combined, leaves, values.grad)
            # the layer's gate is applied inside its backward, the combined one before it
            limit = 1e-9 if case.dtype == torch.float64 else 100 * torch.finfo(case.dtype).eps
            for a, b in zip(again, grads, strict=True):
                torch.testing.assert_close(
                    a, b, rtol=limit, atol=limit * max(1.0, b.abs().max().item() if b.numel() else 1.0)
                )


def test_expanded_virtual_sample_v_reads_input_v_div_k(backend: str) -> None:
    case = Case(partition(3, 4), whole(2), top_k=3, batch=2, kernel=(1, 1), gate=False, bias=False)
    values = numbers(case)
    y = functional.routed_conv2d(
        values.x, values.weight, values.routing(case).expand(), out_slices=case.out_slices, in_slices=case.in_slices
    )
    for v, e in enumerate(values.expert.reshape(-1).tolist()):
        one = torch.nn.functional.conv2d(values.x[v // 3 : v // 3 + 1], values.weight[3 * e : 3 * e + 3])
        torch.testing.assert_close(y[v : v + 1], one, rtol=1e-13, atol=1e-13)


# --- metamorphic ---------------------------------------------------------------------------------------------------


@hypothesis.given(case=cases(), backend=st.sampled_from(("cpu", "cpu", "reference")), data=st.data())
def test_permuting_samples_permutes_outputs_bit_for_bit(case: Case, backend: str, data: st.DataObject) -> None:
    values = numbers(case)
    order = torch.tensor(data.draw(st.permutations(range(case.batch))), dtype=torch.int64)
    moved = replace(
        values,
        x=values.x.detach()[order],
        expert=values.expert[order],
        gate=None if values.gate is None else values.gate.detach()[order],
        in_expert=None if values.in_expert is None else values.in_expert[order],
    )
    for leaf in moved.leaves().values():
        leaf.requires_grad_()
    with use_backend(backend):
        y, z = run(case, values), run(case, moved)
        assert torch.equal(z, y[order])
        (dx,) = torch.autograd.grad(y, values.x, values.grad)
        (dz,) = torch.autograd.grad(z, moved.x, values.grad[order])
    assert torch.equal(dz, dx[order])


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_identical_experts_equal_a_plain_convolution(backend: str, dtype: torch.dtype, kernel: tuple[int, int]) -> None:
    case = Case(partition(6, 5), whole(7), kernel=kernel, padding=(1, 1), batch=6, gate=False, dtype=dtype)
    values = numbers(case)
    w = values.weight.detach()[:6].requires_grad_()
    b = values.bias.detach()[:6].requires_grad_()
    values.weight, values.bias = w.repeat(5, 1, 1, 1), b.repeat(5)
    y = run(case, values)
    plain = torch.nn.functional.conv2d(values.x, w, b, padding=1)
    limits = {"rtol": 1e-5, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(y, plain, **limits)
    routed = torch.autograd.grad(y, (values.x, w, b), values.grad)
    for a, e in zip(routed, torch.autograd.grad(plain, (values.x, w, b), values.grad), strict=True):
        torch.testing.assert_close(a, e, **limits)


@named()
def test_two_half_batches_equal_the_whole(backend: str, case: Case) -> None:
    case = replace(case, batch=4, dtype=torch.float32)
    values = numbers(case)
    leaves = list(values.leaves().values())
    y = run(case, values)
    grads = torch.autograd.grad(y, leaves, values.grad)
    halves, parts = [], []
    for half in (slice(0, 2), slice(2, 4)):
        part = replace(
            values,
            x=values.x[half],
            expert=values.expert[half],
            gate=None if values.gate is None else values.gate[half],
            in_expert=None if values.in_expert is None else values.in_expert[half],
        )
        halves.append(run(case, part))
        parts.append(torch.autograd.grad(halves[-1], leaves, values.grad[half], materialize_grads=True))
    assert torch.equal(torch.cat(halves), y)
    for whole_grad, first, second in zip(grads, *parts, strict=True):
        torch.testing.assert_close(first + second, whole_grad, rtol=1e-5, atol=1e-5)


def test_gate_zero_gives_zero_and_keeps_the_gradient_of_the_gate(backend: str) -> None:
    case = Case(partition(3, 2), whole(4), padding=(1, 1), batch=4)
    values = numbers(case)
    values.gate = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    y = run(case, values)
    assert torch.equal(y, torch.zeros_like(y))
    dx, dw, db, dg = torch.autograd.grad(y, list(values.leaves().values()), values.grad)
    for t in (dx, dw, db):
        assert torch.equal(t, torch.zeros_like(t))
    ungated = loop(values.x, values.weight, values.bias, None, values.expert, None, case)
    torch.testing.assert_close(dg, (ungated * values.grad).sum((1, 2, 3)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2])
def test_wide_windows_are_the_dense_convolution(backend: str, k: int) -> None:
    """ratio 1: every choice is the whole layer."""
    case = Case(windows(6, 1.0, 3), windows(5, 1.0, 3), padding=(1, 1), top_k=k, gate=False)
    values = numbers(case)
    plain = torch.nn.functional.conv2d(values.x, values.weight, values.bias, padding=1)
    torch.testing.assert_close(run(case, values), k * plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wanted", ["nothing", "input", "weight", "bias", "gate"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("dtype", "many"), [(torch.bfloat16, 300), (torch.float16, 2052)], ids=str)
def test_a_bias_is_added_before_rounding(backend: str, dtype: torch.dtype, many: int, gated: bool, wanted: str) -> None:
    """As by nn.Conv2d. The sum, many + 1, is no number of the dtype; with the bias 1 is left."""
    gate = torch.ones(1, dtype=dtype) if gated else None
    x, w = torch.ones(1, many + 1, 1, 1, dtype=dtype), torch.ones(2, many + 1, 1, 1, dtype=dtype)
    bias = torch.full((2,), -many, dtype=dtype)
    assert bias[0].item() == -many
    assert w[0, 0].new_tensor(many + 1).item() != many + 1
    leaf = {"input": x, "weight": w, "bias": bias, "gate": gate, "nothing": None}[wanted]
    if leaf is not None:
        leaf.requires_grad_()
    routing = Routing(torch.zeros(1, dtype=torch.int64), gate, num_experts=2)
    assert functional.routed_conv2d(x, w, routing, bias, out_slices=partition(1, 2)).item() == 1


@pytest.mark.parametrize(("dtype", "many"), [(torch.bfloat16, 300), (torch.float16, 2052)], ids=str)
def test_accumulation_is_float32_at_least(backend: str, dtype: torch.dtype, many: int) -> None:
    """Sums of many ones: an accumulator of 8 or 11 bits stops at 256 or 2048, one of 24 bits is exact."""
    x = torch.ones(1, many, 1, 1, dtype=dtype)
    w = torch.ones(2, many, 1, 1, dtype=dtype)
    first = Routing(torch.zeros(1, dtype=torch.int64), num_experts=2)
    assert functional.routed_conv2d(x, w, first, out_slices=partition(1, 2)).item() == many

    x = torch.ones(1, 1, 1, 1, dtype=dtype, requires_grad=True)
    w = torch.ones(2 * many, 1, 1, 1, dtype=dtype)
    y = functional.routed_conv2d(x, w, first, out_slices=partition(many, 2))
    assert torch.autograd.grad(y, x, torch.ones_like(y))[0].item() == many

    expert = torch.zeros(many, dtype=torch.int64)
    for slices in (partition(1, 2), partition(3, 2), windows(5, 0.6, 2), whole(3)):
        x = torch.ones(many, 1, 1, 1, dtype=dtype)
        w = torch.ones(slices.total, 1, 1, 1, dtype=dtype, requires_grad=True)
        b = torch.zeros(slices.total, dtype=dtype, requires_grad=True)
        y = functional.routed_conv2d(x, w, Routing(expert, num_experts=2), b, out_slices=slices)
        dw, db = torch.autograd.grad(y, (w, b), torch.ones_like(y))
        rest = [0] * (slices.total - slices.width)
        assert dw.flatten().tolist() == [many] * slices.width + rest
        assert db.tolist() == [many] * slices.width + rest

    gate = torch.ones(1, dtype=dtype, requires_grad=True)
    x, w = torch.ones(1, 1, 1, many, dtype=dtype), torch.ones(1, 1, 1, 1, dtype=dtype)
    y = functional.routed_conv2d(x, w, Routing(expert[:1], gate, num_experts=1), out_slices=whole(1))
    assert torch.autograd.grad(y, gate, torch.ones_like(y))[0].item() == many

    x = torch.ones(1, 1, 1, 1, dtype=dtype, requires_grad=True)
    routing = Routing(expert[None], num_experts=1)
    y = functional.routed_conv2d(x, w, routing.expand(), out_slices=whole(1))
    assert torch.autograd.grad(y, x, torch.ones_like(y))[0].item() == many

    for top_k in (Routing(expert[None], num_experts=1), Routing(expert[None], gate.expand(1, many), num_experts=1)):
        assert functional.routed_conv2d(x, w, top_k, out_slices=whole(1)).item() == many
