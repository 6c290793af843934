# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels in the simulator: every tile that is built, on shapes that make the launcher take it.

What all backends have in common is in test_gpu_kernels.py, the simulator's own tests in test_simulator.py.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import hypothesis
import pytest
import torch
from oracle import Case, cases, check, compare, numbers, partition, poisoned, products, run, truth, whole, windows

import moe_kernels
from moe_kernels import RoutedConv2d, Routing, use_backend
from moe_kernels.backends import REFERENCE, Experts, cuda

pytestmark = pytest.mark.skipif(
    moe_kernels.available_backends()["cuda_sim"] is not None, reason=str(moe_kernels.available_backends()["cuda_sim"])
)

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
# As in csrc/cuda/tiles.h.
CONVOLUTION_TILES = {
    "half": {(128, 128), (128, 64), (64, 64), (128, 32), (16, 64)},
    "tf32": {(128, 64), (64, 64), (16, 64)},
    "ieee": {(64, 64), (16, 64)},
}
GRAD_WEIGHT_TILES = {"half": {(128, 128), (64, 64), (32, 128)}, "tf32": {(64, 64)}, "ieee": {(64, 64)}}

ALIGNED = {
    "128 channels": Case(partition(128, 2), whole(128), padding=(1, 1), size=(12, 12), batch=2),
    "64 channels": Case(partition(64, 2), whole(64), padding=(1, 1), size=(12, 12), batch=2),
    "32 channels": Case(partition(32, 2), whole(32), padding=(1, 1), size=(12, 12), batch=2),
    "4x4": Case(partition(64, 3), whole(128), padding=(1, 1), size=(4, 4), batch=9),
    "4x4, one sample": Case(partition(64, 3), whole(64), padding=(1, 1), size=(4, 4), batch=1),
    "1x1": Case(partition(256, 2), whole(128), kernel=(1, 1), size=(4, 4), batch=1),
    "stride 2": Case(partition(64, 3), whole(64), padding=(1, 1), stride=(2, 2), size=(9, 8), batch=9),
    "stride 3, dilation 2": Case(
        windows(48, 0.5, 3), whole(16), padding=(2, 1), stride=(3, 2), dilation=(2, 2), size=(9, 9)
    ),
    "stride as dilation": Case(partition(16, 2), whole(16), padding=(2, 2), stride=(2, 2), dilation=(2, 2), size=(7, 7)),
    "windows on both sides": Case(windows(64, 0.5, 3), windows(80, 0.4, 3), padding=(1, 1), size=(5, 5), batch=7),
    "windows that are not aligned": Case(windows(64, 0.5, 2), windows(44, 0.5, 2), padding=(1, 1), size=(4, 4), batch=3),
    "two choices": Case(
        windows(64, 0.5, 2), windows(48, 0.5, 3), own_in_routing=True, size=(4, 4), batch=7, padding=(1, 1)
    ),
    "two choices of many samples": Case(
        windows(32, 0.5, 2), windows(16, 0.5, 3), own_in_routing=True, size=(2, 2), batch=35, padding=(1, 1)
    ),
    "4 groups": Case(partition(32, 2), whole(64), groups=4, padding=(1, 1), size=(4, 4), batch=5),
    "top 2 of 3": Case(partition(16, 3), whole(16), top_k=2, padding=(1, 1), size=(4, 4), batch=4),
    "top 2 of many samples": Case(partition(16, 3), whole(16), top_k=2, padding=(1, 1), size=(3, 3), batch=18),
    "more experts than samples": Case(partition(16, 9), whole(16), padding=(1, 1), size=(4, 4), batch=3),
    "more samples than a kernel orders": Case(partition(32, 4), whole(32), padding=(1, 1), size=(3, 3), batch=40),
    "7x7 kernel": Case(partition(40, 5), whole(24), kernel=(7, 7), padding=(3, 3), size=(6, 6), batch=3),
    "3 channels": Case(partition(64, 2), whole(3), padding=(1, 1), size=(10, 10), batch=2),
    "17 and 31 channels": Case(partition(31, 2), whole(17), padding=(1, 1), size=(6, 6), batch=3),
}


@pytest.fixture
def multiprocessors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many the launcher is told: with 1 it takes large tiles, with 132 small ones and split reductions."""
    number: int = request.param
    monkeypatch.setattr(cuda.SimulatedCudaBackend, "_where", lambda self, device, samples: (0, number, samples <= 16, 0))
    return number


@pytest.fixture(autouse=True)
def _simulator() -> Iterator[None]:
    with use_backend("cuda_sim"), products():
        yield


def check_tf32(case: Case) -> None:
    """Both factors of each product are rounded to 11 bits."""
    values = numbers(case)
    expected, magnitude = truth(case, values)
    leaves = values.leaves()
    with poisoned(), products("tf32"):
        y = run(case, values)
        grads = torch.autograd.grad(y, list(leaves.values()), values.grad)
    compare(case, {"output": y, **dict(zip(leaves, grads, strict=True))}, expected, magnitude, rounded=2 * 2.0**-11)


@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"], ids=str)
@pytest.mark.parametrize("multiprocessors", [1, 132], indirect=True)
@pytest.mark.parametrize("name", list(ALIGNED))
def test_tiles_equal_the_loop(name: str, multiprocessors: int, dtype: Any) -> None:
    case = replace(ALIGNED[name], layout="channels_last", weight_layout="channels_last")
    if dtype == "tf32":
        check_tf32(replace(case, dtype=torch.float32))
    else:
        check(replace(case, dtype=dtype))


def test_the_cases_above_take_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the launcher's other choices: copies or not, several samples in a tile or not, a split reduction or not."""
    convolutions: set[tuple[Any, ...]] = set()
    grad_weights: set[tuple[Any, ...]] = set()
    ask, ask_for_weight = cuda._convolution_needs, cuda._grad_weight_needs

    def seen(*args: Any) -> Any:
        needs = ask(*args)
        kind = "half" if args[2] else "tf32" if args[3] else "ieee"
        convolutions.add((kind, bool(args[4]), needs.tile_m, needs.tile_n, needs.copies, needs.packed, needs.splits > 1))
        return needs

    def weight_seen(*args: Any) -> Any:
        needs = ask_for_weight(*args)
        kind = "half" if args[2] else "tf32" if args[3] else "ieee"
        grad_weights.add((kind, needs.tile_m, needs.tile_n, needs.copies, needs.segment > 1))
        return needs

    monkeypatch.setattr(cuda, "_convolution_needs", seen)
    monkeypatch.setattr(cuda, "_grad_weight_needs", weight_seen)
    kernels: Any = moe_kernels.backends._BACKENDS["cuda_sim"]
    for name in ("convolution", "grad_weight"):  # what they would take, not what they compute
        monkeypatch.setattr(kernels._kernels, name, lambda *args: None)
    for number in (1, 132):
        monkeypatch.setattr(cuda.SimulatedCudaBackend, "_where", lambda self, d, s, n=number: (0, n, False, 0))
        for case in ALIGNED.values():
            for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")):
                case = replace(case, layout="channels_last", weight_layout="channels_last", dtype=dtype)
                values = numbers(case)
                with products(precision):
                    y = run(case, values)
                    torch.autograd.grad(y, list(values.leaves().values()), values.grad)
    for kind, tiles in CONVOLUTION_TILES.items():
        for backward in (False, True):
            taken = {one for one in convolutions if one[:2] == (kind, backward)}
            assert {one[2:4] for one in taken if one[4]} == tiles
            assert (64, 64) in {one[2:4] for one in taken if not one[4]}
            assert {one[5] for one in taken} == {one[6] for one in taken} == {True, False}
    for kind, tiles in GRAD_WEIGHT_TILES.items():
        taken = {one for one in grad_weights if one[0] == kind}
        assert {one[1:3] for one in taken if one[3]} == tiles
        assert {one[4] for one in taken} == {True, False}
        assert any(not one[3] for one in taken)


_CHANNELS = (8, 16, 24, 40, 64, 72, 136)


@hypothesis.settings(max_examples=25, phases=(hypothesis.Phase.explicit, hypothesis.Phase.generate))
@hypothesis.given(case=cases(dtypes=DTYPES, channels=_CHANNELS))
def test_aligned_channels_equal_the_loop(case: Case) -> None:
    check(replace(case, weight_layout="channels_last"))


@pytest.mark.nightly
@hypothesis.settings(max_examples=1000)
@hypothesis.given(case=cases(dtypes=DTYPES, channels=_CHANNELS))
def test_aligned_channels_equal_the_loop_long(case: Case) -> None:
    check(replace(case, weight_layout="channels_last"))


@pytest.mark.parametrize("multiprocessors", [132], indirect=True)
def test_a_split_reduction_leaves_its_counters_zero(multiprocessors: int) -> None:
    layer, x = RoutedConv2d(64, 64, 3, padding=1, num_experts=2), torch.randn(1, 64, 4, 4)
    backend: Any = moe_kernels.backends._BACKENDS["cuda_sim"]
    backend._counters.clear()
    with torch.no_grad():
        first, second = (layer(x, Routing(torch.tensor([1]), num_experts=2)) for _ in range(2))
    (address,) = backend._counters.values()
    counters = (ctypes.c_int32 * cuda._COUNTERS).from_address(address)
    assert torch.equal(first, second) and not any(counters)


@pytest.mark.parametrize("multiprocessors", [132], indirect=True)
def test_the_order_of_blocks_changes_no_bit(multiprocessors: int) -> None:
    """The last block of a tile to arrive adds the parts, whichever it is; segments are added in their order."""
    kernels = moe_kernels.backends._BACKENDS["cuda_sim"]._kernels  # type: ignore[attr-defined]
    for name in ("4x4", "stride 2", "more samples than a kernel orders"):
        case = replace(ALIGNED[name], dtype=torch.float32)
        values = numbers(case)
        found = []
        for reverse in (False, True):
            kernels.run_last_block_first(reverse)
            try:
                y = run(case, values)
                found.append([y, *torch.autograd.grad(y, list(values.leaves().values()), values.grad)])
            finally:
                kernels.run_last_block_first(False)
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_no_pixels_and_large_strides_and_float64_gates() -> None:
    empty = torch.randn(2, 8, 0, 5, requires_grad=True)
    layer = RoutedConv2d(8, 8, 3, padding=2, num_experts=2)
    y = layer(empty, Routing(torch.tensor([0, 1]), num_experts=2))
    (dx,) = torch.autograd.grad(y.sum(), empty)
    assert dx.shape == empty.shape
    check(Case(partition(8, 2), whole(8), padding=(1, 1), stride=(300, 3), size=(4, 4), dtype=torch.float32))
    gate = torch.rand(3, dtype=torch.float64)
    x, expert = torch.randn(3, 8, 5, 5), torch.tensor([0, 1, 1])
    both = []
    for backend in ("cuda_sim", "reference"):
        with use_backend(backend), torch.no_grad():
            both.append(layer(x, Routing(expert, gate, num_experts=2)))
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-5)


def test_an_access_outside_names_buffer_file_kernel_block_and_thread() -> None:
    """The extents are those that the call states: of a weight with fewer rows than the slice, the rest is outside."""
    kernels = moe_kernels.backends._BACKENDS["cuda_sim"]._kernels  # type: ignore[attr-defined]
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    y = torch.empty_like(x)
    shape = (1, 1, 8, 4, 4, 8, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    with pytest.raises(RuntimeError, match=r"(?s)weight.*cuda/convolution\.h:\d+.*forward.*block.*thread"):
        kernels.convolution(
            (0, 1, False, 0), 0, False, False, shape, (0, 0, 0), (0, 0, 0), (4, 8), weight.stride(), 0, (1, False, 0),
            x.data_ptr(), weight.data_ptr(), y.data_ptr(), *[(0, 0, 0)] * 4, 0, False, False, 0, 0, 0, 0,
        )  # fmt: skip


def test_arguments_that_kernels_cannot_take_are_named() -> None:
    kernels = moe_kernels.backends._BACKENDS["cuda_sim"]._kernels  # type: ignore[attr-defined]
    where = (0, 4, False, 0)
    with pytest.raises(ValueError, match="groups: at most 8191, got 10000"):
        kernels.plan(where, 3, 10000, 0, 0, 0, 0)
    shape = (1, 1, 8, 4, 4, 8, 4, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="dtype: expected float32, bfloat16 or float16"):
        kernels.convolution_needs(
            where, 1, False, False, shape, (0, 0, 0), (0, 0, 0), (8, 8), (72, 1, 24, 8), 0, (1, False, 0), 0, 0
        )
    with pytest.raises(ValueError, match=r"dtype: expected 0 \.\. 3, got 7"):
        kernels.router(where, 7, 1, 1, 1, 1, 0, (0, 0, 0), (0, 0, 0), False, 0.0, (0, 0, 0), (0, 0, 0), 0, 0, 0)


def test_more_groups_than_counters_are_planned_by_torch() -> None:
    experts = Experts(torch.arange(40) * 200, None)
    cpu = torch.device("cpu")
    made = moe_kernels.backends.choose(cpu).plan(experts, 9000, 0, 40, cpu)
    assert torch.equal(made, REFERENCE.plan(experts, 9000, 0, 40, cpu))
