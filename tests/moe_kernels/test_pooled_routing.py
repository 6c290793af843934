# SPDX-License-Identifier: Apache-2.0
"""The router of pooled features against its composition, and the kernel that takes its place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moe_kernels import Routing, available_backends, backends, functional, use_backend
from moe_kernels.routing import GATES

NAMES = ("input", "weight", "bias", "norm_weight", "norm_bias")


def arguments(
    batch: int = 5,
    channels: int = 6,
    num_experts: int = 3,
    size: tuple[int, int] = (4, 3),
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    norm: bool = True,
) -> dict[str, Any]:
    """Images whose channel means differ enough for several experts to be chosen."""
    x = torch.randn(batch, channels, *size) + 2 * torch.randn(batch, channels, 1, 1)
    tensors = {
        "input": x.contiguous(memory_format=torch.channels_last),
        "weight": torch.randn(num_experts, channels),
        "bias": torch.randn(num_experts) if bias else None,
        "norm_weight": 1 + 0.1 * torch.randn(channels) if norm else None,
        "norm_bias": torch.randn(channels) if norm else None,
    }
    return {name: None if t is None else t.to(dtype) for name, t in tensors.items()}


def scores_of(given: dict[str, Any], normalize: bool = True, eps: float = 1e-5) -> Tensor:
    features = given["input"].mean((2, 3))
    if normalize:
        features = F.layer_norm(features, features.shape[1:], given["norm_weight"], given["norm_bias"], eps)
    return F.linear(features, given["weight"], given["bias"])


def composition(given: dict[str, Any], gate: str = "straight_through", **how: Any) -> Routing:
    return Routing.from_scores(scores_of(given, **how), gate=gate)


def assert_same(actual: Routing, expected: Routing) -> None:
    assert torch.equal(actual.expert, expected.expert) and actual.expert.dtype == torch.int64
    assert (actual.num_experts, actual.unit_gate) == (expected.num_experts, expected.unit_gate)
    if expected.gate is None:
        assert actual.gate is None
    else:
        assert actual.gate is not None and actual.gate.dtype == expected.gate.dtype
        assert torch.equal(actual.gate, expected.gate)


# --- the composition ---


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_the_composition(gate: str, gradients: bool, dtype: torch.dtype) -> None:
    given = arguments(batch=20, dtype=dtype)
    with torch.set_grad_enabled(gradients):
        actual = functional.pooled_routing(**given, gate=gate)
        assert_same(actual, composition(given, gate))
    assert actual.expert.unique().numel() > 1 and actual.num_experts == 3


@pytest.mark.parametrize(
    "how", [{"normalize": False}, {"eps": 0.5}, {"norm": False}, {"bias": False}, {"size": (1, 1)}, {"batch": 0}], ids=str
)
def test_options_equal_the_composition(how: dict[str, Any]) -> None:
    call = {name: how[name] for name in ("normalize", "eps") if name in how}
    make = {name: value for name, value in how.items() if name not in call}
    given = arguments(**{"norm": "normalize" not in how, **make})
    assert_same(functional.pooled_routing(**given, gate="softmax", **call), composition(given, "softmax", **call))


@pytest.mark.parametrize("gate", ["straight_through", "softmax", "raw_straight_through"])
def test_gradients_equal_those_of_the_composition(gate: str) -> None:
    given = arguments(dtype=torch.float64)
    leaves = [given[name].requires_grad_() for name in NAMES]
    cotangent = torch.randn(5, dtype=torch.float64)
    found = []
    for routing in (functional.pooled_routing(**given, gate=gate), composition(given, gate)):
        assert routing.gate is not None
        found.append(torch.autograd.grad(routing.gate, leaves, cotangent))
    for actual, expected in zip(*found, strict=True):
        assert actual.abs().sum() > 0 and torch.equal(actual, expected)


def test_ties_go_to_the_lowest_index(any_router: str) -> None:
    given = arguments(num_experts=40, channels=8)
    given["weight"] = given["weight"][:1].repeat(40, 1)
    given["bias"] = torch.zeros(40)
    given["bias"][[21, 13, 37]] = 1.0
    assert functional.pooled_routing(**given).expert.tolist() == [13] * 5
    given["bias"] = torch.zeros(40)
    assert functional.pooled_routing(**given).expert.tolist() == [0] * 5
    given["bias"] = torch.full((40,), -torch.inf)
    assert functional.pooled_routing(**given).expert.tolist() == [0] * 5


@pytest.mark.parametrize("gate", GATES)
def test_nan_scores_raise(gate: str, any_router: str) -> None:
    given = arguments()
    given["input"][2, 0, 1, 1] = torch.nan
    with torch.no_grad(), pytest.raises(ValueError, match="scores: expected no NaN, got NaN in 3 places"):
        functional.pooled_routing(**given, gate=gate)


@pytest.mark.parametrize("gate", ["straight_through", "softmax"])
def test_compiles_in_one_graph(gate: str, fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    def route(*tensors: Tensor) -> Routing:
        return functional.pooled_routing(*tensors, gate=gate)

    compiled = torch.compile(route, fullgraph=True, backend=counter)
    for _ in range(2):
        given = arguments()
        with torch.no_grad():
            assert_same(compiled(*given.values()), composition(given, gate))
    assert counter.frame_count == 1


def test_under_transforms_and_on_meta() -> None:
    given = arguments(dtype=torch.float64)
    rest = [given[name] for name in NAMES[1:]]

    def gates(x: Tensor) -> Tensor:
        gate = functional.pooled_routing(x, *rest, gate="softmax").gate
        assert gate is not None
        return gate

    x = given["input"]
    expected = composition(given, "softmax").gate
    assert expected is not None
    torch.testing.assert_close(torch.func.vmap(gates)(x[None])[0], expected)
    _, tangent = torch.func.jvp(gates, (x,), (x,))
    slope = (gates(x * (1 + 1e-6)) - gates(x * (1 - 1e-6))) / 2e-6
    torch.testing.assert_close(tangent, slope, rtol=1e-5, atol=1e-8)
    routing = functional.pooled_routing(*(t.to("meta") for t in given.values()))
    assert routing.expert.is_meta and routing.expert.shape == (5,)


# --- checks ---

_X, _W = torch.zeros(2, 3, 4, 4), torch.zeros(5, 3)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"input": [0.0]}, TypeError, "input: expected a tensor, got list"),
        ({"input": _X[0]}, ValueError, r"input: expected shape \[B, C, H, W\], got \(3, 4, 4\)"),
        ({"input": _X.int()}, TypeError, r"input: expected one of torch.float32, .*, got torch\.int32"),
        ({"weight": None}, TypeError, r"weight: expected a tensor \[num_experts, C\], got NoneType"),
        ({"weight": _W.T}, ValueError, r"weight: expected shape \[num_experts, 3\], got \(3, 5\)"),
        ({"weight": _W[:0]}, ValueError, r"weight: expected shape \[num_experts, 3\], got \(0, 3\)"),
        ({"weight": _W.double()}, TypeError, r"weight: expected the input's dtype torch\.float32, got torch\.float64"),
        ({"weight": _W.to("meta")}, ValueError, "weight: expected the input's device cpu, got meta"),
        ({"bias": 0.0}, TypeError, "bias: expected a tensor or None, got float"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias: expected shape \[5\], got \(3,\)"),
        ({"norm_weight": torch.zeros(5)}, ValueError, r"norm_weight: expected shape \[3\], got \(5,\)"),
        ({"norm_bias": torch.zeros(3, 1)}, ValueError, r"norm_bias: expected shape \[3\], got \(3, 1\)"),
        ({"norm_bias": torch.zeros(3).int()}, TypeError, r"norm_bias: expected a floating tensor, got torch\.int32"),
        (
            {"norm_weight": torch.zeros(3), "normalize": False},
            ValueError,
            "norm_weight: expected None where normalize is False, got a tensor",
        ),
        ({"gate": "hard"}, ValueError, "gate: expected one of straight_through, softmax, .*, got 'hard'"),
    ],
)
def test_bad_arguments_raise(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        functional.pooled_routing(**{"input": _X, "weight": _W, **given})


# --- a backend with a kernel ---


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The cpu backend with a route of its own, which answers with the composition's. The inputs that it was asked for."""
    asked: list[Tensor] = []

    def route(
        input: Tensor, weight: Tensor, bias: Any, norm_weight: Any, norm_bias: Any, normalize: bool, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(input)
        given = dict(zip(NAMES, (input, weight, bias, norm_weight, norm_bias), strict=True))
        scores = scores_of(given, normalize, eps)
        probability, expert = scores.float().softmax(1).max(1)
        return expert, scores, probability

    cpu = backends._BACKENDS["cpu"]
    monkeypatch.setattr(cpu, "routes", True)
    monkeypatch.setattr(cpu, "route", route)
    return asked


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_is_asked_where_no_gradient_is_needed(kernel: list[Tensor], gate: str, dtype: torch.dtype) -> None:
    given = arguments(dtype=dtype)
    with torch.no_grad():
        assert_same(functional.pooled_routing(**given, gate=gate), composition(given, gate))
    assert len(kernel) == 1
    routing = functional.pooled_routing(**given, gate=gate)  # gradients are enabled, but nobody can ask for one
    assert len(kernel) == 2
    assert (routing.gate is None) == (gate != "softmax") and not routing.unit_gate


@pytest.mark.parametrize("name", NAMES)
def test_the_kernel_is_not_asked_for_gradients(kernel: list[Tensor], name: str) -> None:
    given = arguments()
    given[name].requires_grad_()
    routing = functional.pooled_routing(**given)
    assert not kernel
    assert routing.gate is not None and routing.gate.requires_grad
    with torch.no_grad():
        functional.pooled_routing(**given)
    assert len(kernel) == 1


def test_the_kernel_is_not_asked_where_somebody_watches(kernel: list[Tensor], fresh_dynamo: None) -> None:
    given = arguments()
    tensors = list(given.values())

    class Subclass(Tensor):
        pass

    with torch.no_grad():
        torch.compile(functional.pooled_routing, fullgraph=True, backend="eager")(*tensors)
        torch.func.vmap(lambda x: functional.pooled_routing(x, *tensors[1:]).expert)(tensors[0][None])
        functional.pooled_routing(*tensors[:4], tensors[4].as_subclass(Subclass))
        with torch.utils.flop_counter.FlopCounterMode(display=False):
            functional.pooled_routing(*tensors)
        with torch.autocast("cpu"):
            functional.pooled_routing(*tensors)
    assert not kernel


def test_a_kernel_may_decline(kernel: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends._BACKENDS["cpu"], "route", lambda *args: None)
    given = arguments()
    assert_same(functional.pooled_routing(**given, gate="softmax"), composition(given, "softmax"))


def test_debug_mode_validates_what_the_kernel_says(kernel: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_KERNELS_DEBUG", "1")
    given = arguments()
    given["bias"][1] = torch.inf
    with pytest.raises(ValueError, match="gate: expected finite values"):
        functional.pooled_routing(**given, gate="softmax")


# --- the kernel in the simulator ---

_NO_SIMULATOR = available_backends().get("cuda_sim", "there is no backend cuda_sim")
simulated = pytest.mark.skipif(_NO_SIMULATOR is not None, reason=f"cuda_sim: {_NO_SIMULATOR}")


@pytest.fixture(params=["composition", pytest.param("cuda_sim", marks=simulated)])
def any_router(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with torch's operators and with the kernel."""
    with use_backend("auto" if request.param == "composition" else request.param):
        yield request.param


def simulate(given: dict[str, Any], normalize: bool = True, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        made = backends._BACKENDS["cuda_sim"].route(*(given[name] for name in NAMES), normalize, eps)
    assert made is not None
    return made


def check_simulated(given: dict[str, Any], **how: Any) -> None:
    """Scores as close to those of float64 as their rounding allows; the choice, exactly, that of these scores."""
    expert, scores, probability = simulate(given, **how)
    dtype = given["input"].dtype
    assert (expert.dtype, scores.dtype, probability.dtype) == (torch.int64, dtype, torch.float32)
    exact = scores_of({name: None if t is None else t.double() for name, t in given.items()}, **how)
    eps = torch.finfo(dtype).eps
    tolerance = 1e-5 * math.sqrt(given["input"].shape[1])
    torch.testing.assert_close(scores.double(), exact, rtol=eps, atol=tolerance)
    chosen = Routing.from_scores(scores.float(), gate="softmax")
    assert torch.equal(expert, chosen.expert)
    torch.testing.assert_close(probability, chosen.gate, rtol=1e-5, atol=1e-6)
    with use_backend("cuda_sim"), torch.no_grad():
        routing = functional.pooled_routing(**given, gate="softmax", **how)
    assert torch.equal(routing.expert, expert)
    assert routing.gate is not None and torch.equal(routing.gate, probability.to(dtype))


@simulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"channels": 17},
        {"channels": 17, "size": (9, 9)},  # several pixels a thread, not as many for each
        {"channels": 1, "size": (12, 11)},
        {"channels": 8, "size": (20, 20)},
        {"channels": 64, "size": (8, 8)},
        {"channels": 512, "batch": 2},
        {"channels": 4096 + 8, "batch": 2, "size": (2, 2)},  # several passes
        {"channels": 2000 + 1, "batch": 2, "size": (2, 2)},
        {"num_experts": 1},
        {"num_experts": 2},
        {"num_experts": 7},
        {"num_experts": 50, "batch": 3},
        {"size": (1, 1)},
        {"norm": False},
        {"bias": False},
        {"batch": 0},
        {"batch": 1},
    ],
    ids=str,
)
def test_the_kernel_equals_the_composition(how: dict[str, Any], dtype: torch.dtype) -> None:
    check_simulated(arguments(**how, dtype=dtype))


@simulated
def test_the_kernels_options() -> None:
    check_simulated(arguments(norm=False), normalize=False)
    check_simulated(arguments(norm=False, bias=False), normalize=False)
    check_simulated(arguments(), eps=0.5)
    given = arguments(dtype=torch.bfloat16)
    check_simulated({**given, "norm_weight": given["norm_weight"].float(), "norm_bias": given["norm_bias"].half()})


@simulated
@pytest.mark.parametrize("layout", ["contiguous", "offset", "sliced"])
def test_the_kernel_reads_any_layout(layout: str) -> None:
    given = arguments(channels=16)
    x = given["input"]
    if layout == "contiguous":
        given["input"] = x.contiguous()
    elif layout == "offset":  # channels_last, but not 16 bytes aligned
        memory = torch.zeros(x.numel() + 1)
        memory[1:] = x.permute(0, 2, 3, 1).reshape(-1)
        given["input"] = memory[1:].view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    else:
        given["input"] = torch.cat([x, x], 1)[:, 5:-11]
    given["weight"] = given["weight"].T.contiguous().T
    check_simulated(given)


@simulated
def test_the_kernel_and_scores_that_are_not_finite() -> None:
    given = arguments(batch=4, num_experts=9)
    given["input"][2, 0, 1, 1] = torch.nan
    expert, scores, probability = simulate(given)
    assert expert[2] == 9 and probability[2].isnan() and scores[2].isnan().all()
    finite = [0, 1, 3]
    assert (expert[finite] < 9).all() and probability[finite].isfinite().all()
    given = arguments(batch=2, num_experts=9)
    for value, index in ((torch.inf, 5), (-torch.inf, None), (torch.nan, 9)):
        given["bias"][5] = value
        expert, scores, probability = simulate(given)
        expected = Routing.from_scores(scores.nan_to_num(0, torch.inf, -torch.inf), gate="softmax")
        assert expert.tolist() == (expected.expert.tolist() if index is None else [index] * 2)
        assert probability.isnan().all() == (index is not None)
    given["bias"][:] = -torch.inf
    expert, scores, probability = simulate(given)
    assert expert.tolist() == [0, 0] and probability.isnan().all()


@simulated
def test_the_kernel_chooses_by_the_scores_that_it_returns() -> None:
    """Scores that differ only beyond bfloat16 are equal, and the lowest index is chosen."""
    given = arguments(dtype=torch.bfloat16, num_experts=4)
    for name in ("weight", "bias"):
        given[name] = torch.zeros_like(given[name])
    given["bias"] = torch.tensor([1.0, 1.0 + 1e-4, 1.0, 1.0])
    expert, scores, _ = simulate(given)
    assert expert.tolist() == [0] * 5 and (scores == 1).all()


@simulated
def test_the_kernel_gives_the_same_bits_each_time() -> None:
    given = arguments(channels=40, size=(7, 7))
    first, second = simulate(given), simulate(given)
    assert all(map(torch.equal, first, second))
