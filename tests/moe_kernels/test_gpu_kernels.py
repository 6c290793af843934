# SPDX-License-Identifier: Apache-2.0
"""The kernels of the GPUs without one: Triton's in its interpreter and CUDA's in the simulator, on CPU tensors, held
against the same cases as every backend.

Triton's interpreter knows no races, no alignment and no rounding of matrix units; what the simulator does not see is in
docs/cuda-simulator.md. tests/gpu is for the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from oracle import (
    NAMED,
    CallCounter,
    Case,
    arrange,
    cases,
    check,
    named,
    numbers,
    partition,
    products,
    run,
    whole,
    windows,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import moe_kernels
from moe_kernels import ExpertSlices, RoutedBatchNorm2d, RoutedConv2d, RoutedLinear, Routing, functional, use_backend
from moe_kernels.backends import REFERENCE, Experts, fallback

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=("triton", "cuda_sim"), autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend's name; float32 with full products, as the switch of torch.backends.cudnn says."""
    reason = moe_kernels.available_backends()[request.param]
    if reason is not None:
        pytest.skip(reason)
    with products(), use_backend(request.param):
        yield request.param


def planned(kernels: str) -> int:
    """A batch for which a plan is read: the CUDA kernels order a few samples by themselves."""
    return moe_kernels.backends._BACKENDS[kernels].plans_from + 2


# --- values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named()
def test_named_cases_equal_the_loop(case: Case, dtype: torch.dtype) -> None:
    check(replace(case, dtype=dtype))


@hypothesis.settings(max_examples=8, phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate))  # shrinking is slow
@hypothesis.given(case=cases(dtypes=DTYPES, small=True))
def test_equals_the_loop(case: Case) -> None:
    check(case)


@pytest.mark.nightly
@hypothesis.settings(max_examples=40)
@hypothesis.given(case=cases(dtypes=DTYPES))
def test_equals_the_loop_long(case: Case) -> None:
    check(case)


TILES = {
    "4x4, tiles of several samples": Case(partition(20, 3), whole(16), padding=(1, 1), size=(4, 4), batch=9),
    "8x8": Case(partition(16, 2), whole(32), padding=(1, 1), size=(8, 8), batch=3),
    "7x7, packed with ends inside of samples": Case(partition(16, 2), whole(16), kernel=(1, 1), size=(7, 7), batch=7),
    "stride 2": Case(partition(32, 2), whole(16), padding=(1, 1), stride=(2, 2), size=(9, 8), batch=4),
    "stride 3, dilation 2": Case(
        windows(24, 0.5, 3), whole(16), padding=(2, 1), stride=(3, 2), dilation=(2, 2), size=(9, 9)
    ),
    "stride as dilation": Case(partition(16, 2), whole(16), padding=(2, 2), stride=(2, 2), dilation=(2, 2), size=(7, 7)),
    "windows on both sides": Case(windows(48, 0.5, 3), windows(40, 0.5, 3), padding=(1, 1), size=(4, 4), batch=6),
    "two choices": Case(
        windows(32, 0.5, 2), windows(48, 0.5, 3), own_in_routing=True, size=(4, 4), batch=7, padding=(1, 1)
    ),
    "7x7 kernel of 3 channels": Case(
        partition(16, 2), whole(3), kernel=(7, 7), padding=(3, 3), stride=(2, 2), size=(12, 12)
    ),
    "7x7 kernel, more taps than 32 bits": Case(
        partition(16, 2), whole(16), kernel=(7, 7), padding=(3, 3), size=(4, 4), batch=2
    ),
    "9x9 kernel, more taps than 64 bits": Case(partition(4, 2), whole(3), kernel=(9, 9), padding=(4, 4), size=(3, 3)),
    "4 groups": Case(partition(32, 2), whole(64), groups=4, padding=(1, 1), size=(4, 4), batch=5),
    "top 2 of 3": Case(partition(16, 3), whole(16), top_k=2, padding=(1, 1), size=(4, 4), batch=4),
    "more experts than samples": Case(partition(16, 9), whole(16), padding=(1, 1), size=(4, 4), batch=3),
    "one row": Case(partition(16, 2), whole(16), kernel=(1, 3), padding=(0, 1), size=(1, 20), batch=4),
    "no sample": Case(partition(16, 2), whole(16), padding=(1, 1), batch=0),
}


@pytest.mark.parametrize("name", list(TILES))
def test_tiles_equal_the_loop(name: str) -> None:
    check(replace(TILES[name], dtype=torch.float32, layout="channels_last"))


@pytest.mark.parametrize("experts", ["all", "one", "last"])
def test_every_expert_chosen_one_chosen(experts: str) -> None:
    case = Case(partition(16, 4), whole(16), batch=8, size=(4, 4), padding=(1, 1), dtype=torch.float32)
    values = numbers(case)
    values.expert = {"all": torch.arange(8) % 4, "one": torch.zeros(8, dtype=torch.int64), "last": torch.full((8,), 3)}[
        experts
    ]
    leaves = values.leaves()
    grads = dict(zip(leaves, torch.autograd.grad(run(case, values), list(leaves.values()), values.grad), strict=True))
    with use_backend("reference"):
        expected = torch.autograd.grad(run(case, values), list(leaves.values()), values.grad)
    for (name, grad), truth in zip(grads.items(), expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=2e-5, atol=2e-4, msg=name)
    unchosen = [e for e in range(4) if e not in values.expert]
    assert all((grads["weight"][16 * e : 16 * e + 16] == 0).all() for e in unchosen)


@pytest.mark.parametrize(("dtype", "per_slice"), [(torch.float32, True), (torch.bfloat16, False)], ids=str)
@named("top 2", "top 2 without gates")
def test_epilogue_equals_its_formula(case: Case, dtype: torch.dtype, per_slice: bool) -> None:
    case = replace(case, dtype=dtype)
    values = numbers(case)
    total = case.out_slices.total if per_slice else case.out_slices.width
    arguments = {
        "out_slices": case.out_slices, "in_slices": case.in_slices, "in_routing": values.in_routing(case),
        **case.convolution, "scale": values.scale[:total], "shift": values.shift[:total], "residual": values.residual,
        "relu": True,
    }  # fmt: skip
    given = (values.x.detach(), values.weight.detach(), values.routing(case), values.bias)
    with torch.no_grad():
        y = functional.routed_conv2d_fused(*given, **arguments)
        wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        gate = None if values.gate is None else values.gate.double()
        routing = Routing(values.expert, gate, num_experts=case.num_experts)
        bias = None if values.bias is None else values.bias.double()
        with use_backend("reference"):
            expected = functional.routed_conv2d_fused(given[0].double(), given[1].double(), routing, bias, **wide)
    limit = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    torch.testing.assert_close(y.double(), expected, rtol=limit, atol=limit * float(expected.abs().max() + 1))


def test_channels_last_in_channels_last_out() -> None:
    case = TILES["8x8"]
    for layout, format in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        values = numbers(replace(case, layout=layout, dtype=torch.float32))
        y = run(case, values)
        assert y.is_contiguous(memory_format=format)
        (dx,) = torch.autograd.grad(y, values.x, arrange(values.grad, layout))
        assert dx.is_contiguous(memory_format=format)


def test_the_same_inputs_give_the_same_bits_and_permuted_ones_permuted_bits() -> None:
    for name in ("two choices",):
        case = replace(TILES[name], dtype=torch.float32)
        values = numbers(case)
        leaves = list(values.leaves().values())
        y = run(case, values)
        first, again = (torch.autograd.grad(run(case, values), leaves, values.grad) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        order = torch.randperm(case.batch)
        inner = None if values.in_expert is None else values.in_expert[order]
        moved = replace(values, x=values.x[order], expert=values.expert[order], gate=values.gate[order], in_expert=inner)
        assert torch.equal(run(case, moved), y[order])


def test_a_second_derivative_equals_the_references(kernels: str) -> None:
    case = replace(NAMED["windows"], dtype=torch.float32)
    values = numbers(case)
    leaves = list(values.leaves().values())
    both = []
    for backend in (kernels, "reference"):
        with use_backend(backend):
            first = torch.autograd.grad((run(case, values) ** 2).sum(), leaves, create_graph=True)
            both.append(torch.autograd.grad(sum((g * g).sum() for g in first), leaves))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_linear_equals_the_references(kernels: str) -> None:
    for slices in (partition(6, 3), ExpertSlices(20, 17, (0, 2, 3))):
        layer = RoutedLinear(33, slices, num_experts=3)
        for shape in ((5, 33), (5, 4, 33)):
            x = torch.randn(shape, requires_grad=True)
            routing = Routing(torch.tensor([2, 0, 2, 1, 0]), torch.rand(5), num_experts=3)
            both = []
            for backend in (kernels, "reference"):
                with use_backend(backend):
                    y = layer(x, routing)
                    both.append((y, *torch.autograd.grad((y * y).sum(), [x, layer.weight, layer.bias])))
            for a, b in zip(*both, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_a_short_training_has_the_losses_of_the_reference(kernels: str) -> None:
    def losses(backend: str) -> list[float]:
        torch.manual_seed(0)
        first, second = RoutedConv2d(3, 16, 3, padding=1, num_experts=2), RoutedConv2d(16, 16, 3, 2, 1, num_experts=2)
        norm, last, router = RoutedBatchNorm2d(16, 2), RoutedLinear(16, 4, num_experts=2), nn.Linear(3, 2)
        parameters = [p for m in (first, second, norm, last, router) for p in m.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        x, target = torch.randn(6, 3, 5, 5), torch.randint(4, (6,))
        found = []
        with use_backend(backend):
            for _ in range(3):
                routing = Routing.from_scores(router(x.mean((2, 3))))
                h = norm(second(first(x, routing).relu(), routing), routing.ungated()).relu()
                loss = nn.functional.cross_entropy(last(h.mean((2, 3)), routing.ungated()), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.item())
        return found

    assert losses(kernels) == pytest.approx(losses("reference"), rel=1e-3)


@pytest.mark.parametrize(
    ("samples", "num_out", "num_in"),
    [
        (0, 3, 0),
        (1, 1, 0),
        (7, 3, 0),
        (128, 2, 0),
        (129, 5, 0),
        (1024, 17, 0),
        (1025, 3, 0),
        (3000, 40, 0),
        (50, 0, 4),
        (200, 3, 6),
    ],
)
def test_plan_equals_a_sort(samples: int, num_out: int, num_in: int) -> None:
    """Offsets and the stable order, with indices out of range in the last group."""
    out = torch.randint(-1, num_out + 1, (samples,)) if num_out else None
    inner = torch.randint(-1, num_in + 1, (samples,)) if num_in else None
    if inner is not None and samples:
        inner[0] = -(2**62)
    made = moe_kernels.backends.choose(torch.device("cpu")).plan(
        Experts(out, inner), num_out, num_in, samples, torch.device("cpu")
    )
    expected = REFERENCE.plan(Experts(out, inner), num_out, num_in, samples, torch.device("cpu"))
    assert torch.equal(made, expected)
    count = max(num_out, 1) * max(num_in, 1)
    assert made[count + 1] == samples and torch.equal(
        made[count + 2 :].sort().values, torch.arange(samples, dtype=torch.int32)
    )


def test_a_plan_is_made_once_for_a_routing(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = planned(kernels)
    calls = CallCounter(monkeypatch, kernels)
    layers = [RoutedConv2d(8, 8, 3, padding=1, num_experts=3) for _ in range(3)]
    norm = RoutedBatchNorm2d(8, 3)
    expert = torch.arange(batch) % 3
    routing = Routing(expert, torch.rand(batch), num_experts=3)

    def step(routing: Routing) -> None:
        h = torch.randn(batch, 8, 2, 2)
        for layer in layers:
            h = layer(h, routing)
        norm(h, routing.ungated()).sum().backward()

    step(routing)
    assert calls["plan"] == 1 and calls["grad_weight"] == 3
    step(routing)
    assert calls["plan"] == 1
    with torch.no_grad():
        layers[0](torch.randn(batch, 8, 2, 2), routing.expand())
    assert calls["plan"] == 1
    expert[0] = 1  # a change that torch counts
    step(routing)
    assert calls["plan"] == 2
    step(Routing(expert, num_experts=3))
    assert calls["plan"] == 3


def test_one_choice_given_twice_makes_no_pairs(kernels: str) -> None:
    batch = planned(kernels)
    layer = RoutedConv2d(ExpertSlices.windows(8, 0.5, 3), ExpertSlices.windows(8, 0.5, 3), 3, padding=1)
    routing = Routing(torch.arange(batch) % 3, num_experts=3)
    layer(torch.randn(batch, 4, 2, 2), routing, routing.ungated())
    assert list(routing.plans) == [(3, 0)]


def test_autocast_keeps_the_plan(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = planned(kernels)
    calls = CallCounter(monkeypatch, kernels)
    layer = RoutedConv2d(8, 8, 3, padding=1, num_experts=2)
    routing = Routing(torch.arange(batch) % 2, num_experts=2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            functional.routed_conv2d_fused(
                torch.randn(batch, 8, 2, 2), layer.weight, routing, out_slices=layer.out_slices, padding=1
            )
    assert calls["plan"] == 1


def test_a_plan_of_another_routing_is_refused() -> None:
    x, layer = torch.randn(3, 8, 4, 4), RoutedConv2d(8, 8, 3, padding=1, num_experts=4)
    wrong = REFERENCE.plan(Experts(torch.tensor([0, 1]), None), 2, 0, 2, x.device)
    expert = torch.tensor([0, 1, 1])
    with pytest.raises(ValueError, match="plan: expected int32 for 3 samples"):
        shape = list(layer.weight.shape)
        moe_kernels.ops.conv2d_grad_weight(x, x, expert, None, *layer.geometry, shape, False, wrong)


_RARE = [pytest.param(groups, marks=pytest.mark.nightly) for groups in (1023, 3000)]


@pytest.mark.parametrize("groups", [1, 5, 1024, *_RARE])
def test_tiles_are_found_among_any_number_of_groups(groups: int) -> None:
    """More than 1024 groups are looked at in pieces: a weight gradient with one sample of each expert in use."""
    layer = RoutedLinear(4, 1, bias=False, num_experts=groups)
    expert = torch.tensor([0, groups - 1, groups // 2])
    x = torch.randn(3, 4)
    (dw,) = torch.autograd.grad(layer(x, Routing(expert, num_experts=groups)).sum(), layer.weight)
    expected = torch.zeros(groups, 4).index_add(0, expert, x)
    torch.testing.assert_close(dw, expected)


def test_a_kept_plan_is_that_of_its_values(kernels: str) -> None:
    """In-place changes, other tensors in the routing's place, and the input side's own choice."""
    batch = planned(kernels)
    layer = RoutedConv2d(ExpertSlices.windows(8, 0.5, 2), ExpertSlices.windows(8, 0.5, 3), 3, padding=1)
    x = torch.randn(batch, 4, 2, 2)
    out, inner = torch.randint(3, (batch,)), torch.randint(2, (batch,))
    routing, in_routing = Routing(out, num_experts=3), Routing(inner, num_experts=2)
    for change in range(4):
        if change == 1:
            out.add_(1).remainder_(3)
        elif change == 2:
            inner.sub_(1).abs_()
        elif change == 3:
            in_routing = Routing(1 - inner, num_experts=2)
        with torch.no_grad():
            y = layer(x, routing, in_routing)
            with use_backend("reference"):
                torch.testing.assert_close(y, layer(x, routing, in_routing), rtol=1e-4, atol=1e-5)


def test_no_plan_for_large_images_without_a_weight_gradient(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = CallCounter(monkeypatch, kernels)
    layer = RoutedConv2d(8, 8, 1, num_experts=2).requires_grad_(False)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    layer(x, Routing(torch.tensor([0, 1]), num_experts=2)).sum().backward()
    assert calls["forward"] == calls["grad_input"] == 1 and not calls["plan"]


def test_an_inference_tensors_plan_is_not_kept(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = planned(kernels)
    calls = CallCounter(monkeypatch, kernels)
    layer = RoutedConv2d(8, 8, 3, padding=1, num_experts=2).eval()
    with torch.inference_mode():
        routing = Routing(torch.arange(batch) % 2, num_experts=2)
        for _ in range(2):
            layer(torch.randn(batch, 8, 2, 2), routing)
    assert calls["plan"] == 2 and not routing.plans


def test_an_attack_computes_no_weight_gradient_and_the_gate_costs_no_pass(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = CallCounter(monkeypatch, kernels)
    layer = RoutedConv2d(8, 8, 3, padding=1, num_experts=2)
    x, gate = torch.randn(3, 8, 4, 4, requires_grad=True), torch.rand(3, requires_grad=True)
    y = layer(x, Routing(torch.tensor([0, 1, 1]), gate, num_experts=2))
    torch.autograd.grad(y.sum(), x)
    assert calls["grad_weight"] == 0 and calls["forward"] == 1
    assert calls["grad_input_gated"] == 1 and calls["grad_input"] == 0


class _NoSynchronisation(TorchDispatchMode):
    """Raises on the operators that read values back to the host."""

    _READS = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "item", "is_nonzero", "equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        assert not name.startswith(self._READS), f"{name} reads values back"
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back() -> None:
    """With the library's own launch code; on a GPU torch.cuda.set_sync_debug_mode says the same of the whole step."""
    for case in ("partition", "windows", "own choice of the input", "top 2", "depthwise"):
        values = numbers(replace(NAMED[case], dtype=torch.float32))
        leaves = list(values.leaves().values())
        with _NoSynchronisation():
            y = run(NAMED[case], values)
            torch.autograd.grad(y, leaves, values.grad)


@pytest.mark.parametrize("size", [4, 8], ids=["packed", "one sample a tile"])
@pytest.mark.parametrize("bad", [3, -(2**63)])
def test_an_expert_out_of_range_gives_nan_for_its_sample_alone(bad: int, size: int) -> None:
    biased = RoutedConv2d(16, 16, 3, padding=1, num_experts=3)
    layer = RoutedConv2d(16, 16, 3, padding=1, bias=False, num_experts=3)
    x = torch.randn(5, 16, size, size, requires_grad=True)
    expert = torch.tensor([0, 2, bad, 1, 0])
    assert torch.equal(biased(x, Routing(expert, num_experts=3)).isnan().flatten(1).all(1), torch.arange(5) == 2)
    y = layer(x, Routing(expert, num_experts=3))
    rest = [0, 1, 3, 4]
    good = layer(x[rest], Routing(expert[rest], num_experts=3))
    assert y[2].isnan().all() and torch.equal(y[rest], good)
    dy = torch.randn(y.shape)
    dx, dw = torch.autograd.grad(y, [x, layer.weight], dy)
    (expected,) = torch.autograd.grad(good, layer.weight, dy[rest])
    assert dx[2].isnan().all() and dx[rest].isfinite().all()
    torch.testing.assert_close(dw, expected, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="expert: expected indices in 0"):
        Routing(expert, num_experts=3).validate()


def test_float64_runs_in_the_reference_with_one_warning() -> None:
    fallback.warn_once.cache_clear()
    layer = RoutedConv2d(2, 3, 3, num_experts=2, dtype=torch.float64)
    x, routing = torch.randn(2, 2, 5, 5, dtype=torch.float64), Routing(torch.tensor([0, 1]), num_experts=2)
    with pytest.warns(RuntimeWarning, match="float64 runs in the slow reference loop"):
        y = layer(x, routing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x, routing)
    with use_backend("reference"):
        assert torch.equal(y, layer(x, routing))
