# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, interpreted in numpy on CPU tensors: BatchNorm, what starts the kernels, configurations, tuning.

Their values and gradients are those of test_gpu_kernels.py.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import (
    NAMED,
    Case,
    assert_within,
    check,
    numbers,
    partition,
    run,
    whole,
    windows,
)
from torch import Tensor, nn

import moe_kernels
from moe_kernels import ExpertSlices, RoutedBatchNorm2d, RoutedConv2d, Routing, functional, use_backend
from moe_kernels.backends import Experts, fallback

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("moe_kernels.backends.triton")
from moe_kernels.backends.triton import configs, launch, plan, routed_conv2d, tuning  # noqa: E402

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="TRITON_INTERPRET=1 was not set before the import")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


# --- BatchNorm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "slices", [partition(5, 3), partition(70, 3), windows(12, 0.6, 3)], ids=["narrow", "wide", "windows"]
)
@pytest.mark.parametrize("kind", ["training", "eval", "no running statistics", "no affine"])
def test_batch_norm_equals_the_cpu(kind: str, slices: ExpertSlices, dtype: torch.dtype) -> None:
    layer = RoutedBatchNorm2d(slices, track_running_stats=kind != "no running statistics", affine=kind != "no affine")
    parameters = list(layer.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter)
    x = (torch.randn(7, slices.width, 6, 5) * 3 + 100).to(dtype).contiguous(memory_format=torch.channels_last)
    routing = Routing(torch.tensor([0, 2, 2, 0, 0, 2, 2]), num_experts=3)  # nobody takes expert 1
    dy = torch.randn(x.shape).to(dtype)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    both = []
    for backend in ("triton", "cpu"):
        layer.load_state_dict(start)
        layer.train(kind != "eval")
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            y = layer(leaf, routing)
            both.append([y, *torch.autograd.grad(y, [leaf, *parameters], dy), *(b.clone() for b in layer.buffers())])
    limit = 2e-4 if dtype == torch.float32 else 2e-2
    for a, b in zip(*both, strict=True):
        a, b = a.detach(), b.detach()
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.double(), b.double(), rtol=limit, atol=limit * float(b.abs().max()))
    assert both[0][0].stride() == both[1][0].stride()


def test_batch_norm_has_a_second_derivative() -> None:
    layer = RoutedBatchNorm2d(4, 2)
    nn.init.normal_(layer.weight)
    x, routing = torch.randn(5, 4, 3, 3, requires_grad=True), Routing(torch.tensor([0, 1, 1, 0, 1]), num_experts=2)
    for training in (True, False):
        layer.train(training)
        both = []
        for backend in ("triton", "cpu"):
            with use_backend(backend):
                (dx,) = torch.autograd.grad((layer(x, routing) ** 3).sum(), x, create_graph=True)
                both.append(torch.autograd.grad((dx * dx).sum(), [x, layer.weight]))
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_batch_norm_under_transforms_and_kept_across_a_training_step() -> None:
    layer = RoutedBatchNorm2d(4, 2, track_running_stats=False)
    nn.init.normal_(layer.weight)
    routing = Routing(torch.tensor([0, 1, 1, 0, 1]), num_experts=2)
    x, v = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3)
    running = RoutedBatchNorm2d(4, 2)

    def both(layer: RoutedBatchNorm2d) -> tuple[Tensor, ...]:
        gradient = torch.func.grad(lambda x: (layer(x, routing) ** 3).sum())(x)
        return (*torch.func.jvp(lambda x: layer(x, routing), (x,), (v,)), gradient)

    for one in (layer, running.eval()):
        found = []
        for backend in ("triton", "cpu"):
            with use_backend(backend):
                found.append(both(one))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.detach().abs().max().item())
    leaf = x.clone().requires_grad_()
    y = running.eval()(leaf, routing)
    running.train()(x, routing)  # writes the running statistics
    y.sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_an_attack_pays_for_no_sums_of_batch_norm_parameters(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = moe_kernels.backends._BACKENDS["triton"]
    calls: list[str] = []
    sums = backend.sums
    monkeypatch.setattr(backend, "sums", lambda *args: (calls.append("sums"), sums(*args))[1])
    layer = RoutedBatchNorm2d(4, 2).train(training)
    x = torch.randn(5, 4, 3, 3, requires_grad=True)
    y = layer(x, Routing(torch.tensor([0, 1, 1, 0, 1]), num_experts=2))
    torch.autograd.grad(y.sum(), x)
    assert len(calls) == int(training)  # in training dx is made of them


def test_batch_norm_reads_the_input_once_for_its_statistics() -> None:
    x = torch.randn(6, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    made = plan.make(Experts(torch.tensor([0, 1, 0, 1, 1, 1]), None), 2, 0, 6, x.device)
    with launch.record() as launches:
        kernels.batch_norm.moments(x, made, (), 32)
    readers = [one for one in launches if any(a is x for a in one.args)]
    assert len(readers) == 1


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_tile_bound_holds_for_every_routing() -> None:
    for samples, groups, rows, tile in [
        (1, 1, 16, 32),
        (5, 3, 16, 32),
        (64, 7, 49, 64),
        (128, 200, 1, 16),
        (3, 2, 64, 16),
    ]:
        bound = plan.tile_bound(samples, rows, tile, groups)
        for _ in range(50):
            counts = torch.randint(groups + 1, (samples,)).bincount(minlength=groups + 1)
            assert int((-(-counts * rows // tile)).sum()) <= bound


# --- nothing that was not asked for -----------------------------------------------------------------------------------


def test_stride_2_multiplies_no_inserted_zeros() -> None:
    """Four residues with 1, 2, 2 and 4 of the 9 taps: their tiles are those of a quarter of the pixels each."""
    grad = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    g = RoutedConv2d(16, 16, 3, 2, 1, num_experts=2).geometry
    with launch.record() as launches, configs.assume("interpreter", configs.TileConfig(32, 16, 16, 4, 1)):
        routed_conv2d.grad_input(grad, weight, Experts(torch.tensor([0, 1]), None), g, (16, 16))
    (one,) = launches
    assert one.grid == (2 * 8 * 8 // 32, 4) and one.meta["STEP_R"] == one.meta["STEP_S"] == 2


@pytest.mark.parametrize(("size", "packed"), [(4, True), (8, False), (7, True), (16, False)])
def test_small_images_share_a_tile(size: int, packed: bool) -> None:
    x = torch.randn(6, 16, size, size).contiguous(memory_format=torch.channels_last)
    layer = RoutedConv2d(16, 16, 1, bias=False, num_experts=2)
    with launch.record() as launches, configs.assume("interpreter", configs.TileConfig(64, 16, 16, 4, 1)):
        expert = torch.tensor([0, 1, 1, 0, 0, 1])
        routed_conv2d.forward(
            x, layer.weight.detach(), Experts(expert, None), layer.geometry, moe_kernels.backends.NO_EPILOGUE
        )
    assert launches[-1].meta["PACKED"] == packed


# --- what runs elsewhere ----------------------------------------------------------------------------------------------


def test_a_kernel_that_cannot_be_built_falls_back_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    fallback.warn_once.cache_clear()

    def cannot(*args: Any, **kwargs: Any) -> Any:
        raise launch.BuildError("convolution_kernel: out of resource: shared memory")

    values = numbers(replace(NAMED["partition"], dtype=torch.float32))
    expected = run(NAMED["partition"], values)
    for name in ("forward", "grad_input", "grad_weight"):
        monkeypatch.setattr(routed_conv2d, name, cannot)
    with pytest.warns(RuntimeWarning, match=r"forward runs in the slow reference loop, .* out of resource") as caught:
        y = run(NAMED["partition"], values)
        y.sum().backward()
        run(NAMED["partition"], values)
    assert len([w for w in caught if "forward" in str(w.message)]) == 1
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (triton.runtime.errors.OutOfResources(300000, 232448, "shared memory"), launch.BuildError),
        (RuntimeError("PassManager::run failed"), launch.BuildError),
        (subprocess.CalledProcessError(1, "gcc"), launch.BuildError),
        (RuntimeError("Triton Error [CUDA]: device kernel image is invalid"), launch.BuildError),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), RuntimeError),
        (ValueError("a fault of ours"), ValueError),
    ],
    ids=["resources", "compiler", "C compiler", "image", "launch", "other"],
)
def test_a_failed_launch_is_not_taken_for_a_kernel_that_cannot_be_built(
    error: Exception, raised: type[Exception]
) -> None:
    launch._failed.clear()

    class Kernel:
        __name__ = "kernel"

        def __getitem__(self, grid: Any) -> Any:
            def start(*args: Any, **meta: Any) -> None:
                raise error

            return start

    with pytest.raises(raised) as caught:
        launch._run(Kernel(), (1,), (), {})
    assert isinstance(caught.value, launch.BuildError) == (raised is launch.BuildError)
    assert bool(launch._failed) == (raised is launch.BuildError)  # and is not built again at the next call
    launch._failed.clear()


def test_another_device_and_a_missing_package_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = moe_kernels.backends._BACKENDS["triton"]
    assert "got xpu" in str(backend.unsupported(torch.device("xpu")))
    assert "interpreted" in backend.describe()
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    assert "torch sees no CUDA device; TRITON_INTERPRET=1" in str(backend.unavailable())
    monkeypatch.setattr(kernels, "_import_error", "No module named 'triton'")
    assert "pip install triton" in str(backend.unavailable())


# --- configurations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "sm_100", "interpreter"])
def test_tables_are_whole(name: str) -> None:
    for kernel in configs.KERNELS:
        for kind in configs.KINDS:
            listed = configs.candidates(name, kernel, kind)
            assert listed and len({c[:5] for c in listed}) == len(listed)
            for c in listed:
                assert {c.block_m, c.block_n, c.block_k} <= {16, 32, 64, 128} and 0 < c.efficiency <= 1
            assert listed[0].efficiency == 1


def test_the_heuristic_takes_small_tiles_for_little_work() -> None:
    device = torch.device("cuda")
    with configs.assume("sm_90"):
        many = tuning.choose(configs.Problem("convolution", "half", 128 * 1024, 64, 576), device)
        few = tuning.choose(configs.Problem("convolution", "half", 256, 256, 2304), device)
        narrow = tuning.choose(configs.Problem("convolution", "half", 128 * 1024, 32, 576), device)
    assert many.block_m * many.block_n > few.block_m * few.block_n
    assert many.block_n >= 64 and narrow.block_n == 32


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (64, (64, False)),
        (32, (32, False)),
        (96, (32, False)),
        (16, (16, False)),
        (17, (32, False)),
        (80, (32, False)),
        (160, (32, False)),
        (192, (64, False)),
        (3, (32, True)),
    ],
)
def test_a_block_of_the_reduction_divides_the_channels_or_straddles_taps(depth: int, expected: tuple[int, bool]) -> None:
    assert configs.block_k(configs.TileConfig(64, 64, 64, 4, 3), depth) == expected


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MOE_KERNELS_CACHE", str(tmp_path))
    tuning.clear()
    yield tmp_path
    tuning.clear()


def test_tuning_is_kept_on_disk_and_used(cache: Path) -> None:
    case = replace(Case(partition(16, 2), whole(32), padding=(1, 1), size=(8, 8), batch=3), dtype=torch.float32)
    values = numbers(case)
    expected = run(case, values)
    assert not list(cache.iterdir())  # nothing is tuned unasked
    with tuning.tune():
        y = run(case, values)
        y.backward(values.grad)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    (file,) = cache.iterdir()
    table = json.loads(file.read_text())
    assert {key.split()[0] for key in table} == set(configs.KERNELS)
    problem = routed_conv2d._tiling(_geometry(case), case.batch, case.out_size, case.kernel, values.x, False).problem
    tuning.clear()
    assert tuple(tuning.choose(problem, values.x.device)) == tuple(table[tuning._key(problem)])
    written = file.stat().st_mtime_ns
    with tuning.tune():
        run(case, values)
    assert file.stat().st_mtime_ns == written  # once


def _geometry(case: Case) -> Any:
    return functional.Conv2dGeometry.of(
        case.out_slices, case.in_slices, case.stride, case.padding, case.dilation, case.groups
    )


@pytest.mark.parametrize("text", ["{", "[]", '{"convolution half 1 1 1 1": "x"}'])
def test_a_broken_table_of_tuned_configurations_is_reported(cache: Path, text: str) -> None:
    file = tuning.cache_file(torch.device("cpu"))
    file.write_text(text)
    with pytest.warns(UserWarning, match="cannot be used"):
        check(replace(NAMED["pointwise"], dtype=torch.float32))


def test_a_tuned_configuration_of_an_older_list_is_not_used(cache: Path) -> None:
    problem = configs.Problem("convolution", "tf32", 64, 16, 144)
    tuning.cache_file(torch.device("cpu")).write_text(json.dumps({tuning._key(problem): [256, 256, 64, 8, 3, 1.0]}))
    assert tuning.choose(problem, torch.device("cpu")) == configs.estimated_best(problem, torch.device("cpu"))


def test_the_switch_of_nn_conv2d_decides_about_tf32() -> None:
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for precision in ("tf32", "ieee"):
            torch.backends.cudnn.conv.fp32_precision = precision
            assert configs.kind(torch.zeros(1)) == precision
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    torch.backends.cudnn.allow_tf32 = False
    try:
        assert configs.kind(torch.zeros(1)) == "ieee"
    finally:
        torch.backends.cudnn.allow_tf32 = True
    assert configs.kind(torch.zeros(1)) == "tf32"
    assert configs.kind(torch.zeros(1, dtype=torch.bfloat16)) == "half"


def test_norm_wise_error_is_small() -> None:
    case = Case(partition(64, 2), whole(64), padding=(1, 1), size=(4, 4), batch=4, gate=False, dtype=torch.float32)
    values = numbers(case)
    with torch.no_grad():
        y = run(case, values)
        with use_backend("reference"):
            wide = replace(values, x=values.x.double(), weight=values.weight.double(), bias=values.bias.double())
            expected = run(case, wide)
    assert float((y.double() - expected).norm() / expected.norm()) < 1e-5
    assert_within(y, expected, expected.abs() + 100, case.terms_forward)
