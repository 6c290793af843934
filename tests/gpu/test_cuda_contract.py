# SPDX-License-Identifier: Apache-2.0
"""The contract on CUDA tensors: values and every gradient against a float64 loop on the CPU."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from on_device import (
    DEVICE,
    FEW,
    MANY,
    all_zero,
    assert_close_in_norm,
    check,
    choice,
    compare,
    counters,
    images,
    net,
    no_synchronisation,
    on_device,
)
from oracle import LAYOUTS, NAMED, Case, named, partition, whole, windows
from torch import Tensor

import moe_kernels
from moe_kernels import ExpertSlices, RoutedBatchNorm2d, RoutedConv2d, RoutedLinear, Routing, functional, use_backend

pytestmark = pytest.mark.gpu

REPEATS = 50  # of what only a race would make differ
ARITHMETIC = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}


@pytest.fixture(params=list(ARITHMETIC))
def arithmetic(request: pytest.FixtureRequest) -> tuple[torch.dtype, bool]:
    """The dtype, and whether float32 is multiplied as tf32: by the switch that nn.Conv2d obeys."""
    dtype, tf32 = ARITHMETIC[request.param]
    torch.backends.cudnn.allow_tf32 = tf32  # the fixture around every test puts it back
    return dtype, tf32


@named()
def test_equals_the_loop(case: Case, arithmetic: tuple[torch.dtype, bool]) -> None:
    dtype, tf32 = arithmetic
    check(replace(case, dtype=dtype), tf32)


# Layers of ResNet-18 at r = 0.5: the widest image, a stride, tiles of several samples. A batch that no tile divides.
_REAL = Case(partition(32, 2), whole(64), batch=37, padding=(1, 1), size=(32, 32), bias=False, layout="channels_last")
REAL = {
    "64->32@32": _REAL,
    "32->64@32 stride 2": replace(_REAL, out_slices=partition(64, 2), in_slices=whole(32), stride=(2, 2)),
    "256->256@4": replace(_REAL, out_slices=partition(256, 2), in_slices=whole(256), size=(4, 4)),
}


@pytest.mark.parametrize("case", list(REAL.values()), ids=list(REAL))
def test_layers_of_resnet18(case: Case, arithmetic: tuple[torch.dtype, bool]) -> None:
    dtype, tf32 = arithmetic
    check(replace(case, dtype=dtype), tf32)


# Widths that matrix instructions like, where the named cases have few channels.
_WIDE = Case(windows(48, 0.5, 3), windows(64, 0.5, 3), batch=9, padding=(1, 1), dtype=torch.bfloat16)
WIDE = {
    "windows on both sides": _WIDE,
    "own choice of the input": replace(_WIDE, own_in_routing=True),
    "top 2": replace(_WIDE, top_k=2),
    "top 2, one choice a side": replace(_WIDE, top_k=2, own_in_routing=True),
    "one sample": replace(_WIDE, batch=1),
    "no samples": replace(_WIDE, batch=0),
    "more experts than samples": replace(_WIDE, out_slices=partition(16, 40), in_slices=whole(32)),
    "groups": replace(_WIDE, out_slices=partition(64, 3), in_slices=whole(32), groups=4),
    "depthwise": replace(_WIDE, out_slices=partition(32, 3), in_slices=whole(32), groups=32),
    "odd channels": replace(_WIDE, out_slices=partition(33, 3), in_slices=whole(17)),
    "7x7, stride 2": replace(_WIDE, kernel=(7, 7), stride=(2, 2), padding=(3, 3), size=(15, 14)),
    "dilation": replace(_WIDE, dilation=(2, 3), padding=(2, 3), size=(9, 9)),
    "stride 3, no padding": replace(_WIDE, stride=(3, 2), padding=(0, 0), size=(10, 9)),
    "1x1": replace(_WIDE, kernel=(1, 1), padding=(0, 0)),
}


@pytest.mark.parametrize("case", list(WIDE.values()), ids=list(WIDE))
def test_every_kind_of_layer_with_wide_channels(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str, weight_layout: str) -> None:
    check(replace(_WIDE, layout=layout, weight_layout=weight_layout))


def test_many_samples_in_many_groups() -> None:
    """More samples than one program of the plan takes, and pairs of experts as groups."""
    case = replace(_WIDE, batch=1300, kernel=(1, 1), padding=(0, 0), size=(2, 2), own_in_routing=True)
    check(replace(case, out_slices=windows(32, 0.5, 7), in_slices=windows(24, 0.5, 5)))


def test_epilogue_in_one_pass() -> None:
    case = replace(_WIDE, top_k=1)
    values = on_device(oracle.numbers(case))
    arguments: dict[str, Any] = {
        "out_slices": case.out_slices,
        "in_slices": case.in_slices,
        "scale": values.scale,
        "shift": values.shift,
        "residual": values.residual,
        "relu": True,
        **case.convolution,
    }
    with torch.no_grad():
        y = functional.routed_conv2d_fused(values.x, values.weight, values.routing(case), values.bias, **arguments)
        with use_backend("reference"):
            expected = functional.routed_conv2d_fused(
                values.x, values.weight, values.routing(case), values.bias, **arguments
            )
    assert_close_in_norm(y, expected, 1e-2)
    assert (y >= 0).all() and (y > 0).any()


@pytest.mark.parametrize("tokens", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear(tokens: int | None, dtype: torch.dtype) -> None:
    """A routed linear layer is the 1×1 convolution of an image with a row for each token."""
    case = Case(windows(20, 0.5, 3), windows(48, 0.5, 3), batch=7, kernel=(1, 1), size=(tokens or 1, 1), dtype=dtype)
    values = oracle.numbers(case)
    expected, magnitude = oracle.truth(case, values)
    values = on_device(values)
    layer = RoutedLinear(case.in_slices, case.out_slices, device=DEVICE, dtype=dtype)
    assert values.bias is not None and layer.bias is not None
    with torch.no_grad():
        layer.weight.copy_(values.weight[:, :, 0, 0])
        layer.bias.copy_(values.bias)
    x = values.x.detach().squeeze(3).transpose(1, 2).requires_grad_()  # [B, T, in]
    y = layer(x if tokens else x.squeeze(1), values.routing(case))
    y = y if tokens else y.unsqueeze(1)
    leaves = [x, layer.weight, layer.bias, values.gate]
    dx, dw, db, dgate = torch.autograd.grad(y, leaves, values.grad.squeeze(3).transpose(1, 2))  # type: ignore[arg-type]
    actual = {"output": y.transpose(1, 2)[..., None], "input": dx.transpose(1, 2)[..., None]}
    compare(case, {**actual, "weight": dw[:, :, None, None], "bias": db, "gate": dgate}, expected, magnitude)


SIDES = {"partition": (16, 3), "windows": (windows(32, 0.5, 3), None)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("side", list(SIDES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_batch_norm(dtype: torch.dtype, side: str, layout: torch.memory_format, backend: str) -> None:
    """Against the same layer in torch's own operators, in float64 on the CPU: training, then eval."""
    features, num_experts = SIDES[side]
    layer = RoutedBatchNorm2d(features, num_experts, device=DEVICE)  # type: ignore[arg-type]
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    truth = copy.deepcopy(layer).cpu().double()
    bound = 1e-5 if dtype == torch.float32 else 1e-2
    for expert in ([0, 1, 2, 0, 1, 1, 0], [2, 2, 0, 0, 0, 2, 2], None):
        if expert is None:
            layer.eval()
            truth.eval()
        which = torch.tensor(expert or [1, 0, 1, 2, 2, 2, 0])
        x = (torch.randn(7, 16, 5, 6) * 2 + 1).to(dtype).contiguous(memory_format=layout)
        dy = torch.randn(7, 16, 5, 6).to(dtype)
        results = []
        for module, device, wide in ((layer, DEVICE, dtype), (truth, torch.device("cpu"), torch.float64)):
            leaf = x.to(device, wide).requires_grad_()
            with use_backend("reference" if module is truth else backend):
                y = module(leaf, Routing(which.to(device), num_experts=3))
                grads = torch.autograd.grad(y, [leaf, module.weight, module.bias], dy.to(device, wide))
            results.append((y, *grads))
        assert results[0][0].dtype == dtype and results[0][0].is_contiguous(memory_format=layout)
        for name, actual, expected in zip(("output", "input", "weight", "bias"), *results, strict=True):
            assert_close_in_norm(actual, expected, bound, name)
        for name in ("running_mean", "running_var"):  # of the values as they came, in float32
            assert_close_in_norm(getattr(layer, name), getattr(truth, name), 1e-5, name)
        assert torch.equal(layer.num_batches_tracked.cpu(), truth.num_batches_tracked)


def test_eval_packs_the_weight_and_follows_it() -> None:
    """The kept form of the weight gives the bits that the weight itself gives, also after a step of an optimizer."""
    layer = RoutedConv2d(16, 32, 3, padding=1, num_experts=3, device=DEVICE)
    x, routing = images(), choice(0, 1, 2, 0, 1, 1)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(layer.eval()(x, routing), layer.train()(x, routing))
            layer.eval()(x, routing)
        layer.weight.grad = torch.randn_like(layer.weight)
        torch.optim.SGD([layer.weight], lr=0.1).step()  # in eval mode: the kept form must not survive it


@pytest.mark.parametrize("batch", [FEW, MANY])
def test_a_routing_changed_in_place_is_seen(batch: int) -> None:
    """The plan that a Routing keeps is that of its values, not of its address."""
    model, x = net(router=False), images(batch)
    expert = torch.tensor([0, 1, 2, 0, 1, 1], device=DEVICE).repeat(batch // 6)
    routing = Routing(expert, num_experts=3)
    first = model(x, routing)
    expert.copy_(torch.tensor([2, 2, 0, 1, 0, 0], device=DEVICE).repeat(batch // 6))
    model.norm.reset_running_stats()
    assert torch.equal(model(x, routing), model(x, Routing(expert.clone(), num_experts=3)))
    assert not torch.equal(model(x, routing), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_twice(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    x, target = images(37, 16, dtype), torch.randint(10, (37,), device=DEVICE)
    seen = []
    for _ in range(2):
        again = copy.deepcopy(model)
        leaf = x.clone().requires_grad_()
        torch.nn.functional.cross_entropy(again(leaf), target).backward()
        found = {name: p.grad for name, p in again.named_parameters()}
        seen.append({**found, **dict(again.named_buffers()), "input": leaf.grad})
    for name, value in seen[0].items():
        assert value is not None and torch.equal(value, seen[1][name]), name


def test_permuting_samples_permutes_outputs() -> None:
    """Bit for bit, although tiles then hold other rows: images of 4×4 share a tile."""
    model = net(norm=False, router=False)
    expert = torch.randint(3, (37,), device=DEVICE)
    order = torch.randperm(37, device=DEVICE)
    for size in (8, 16):
        x, dy = images(37, size), torch.randn(37, 10, device=DEVICE)
        results: list[tuple[Tensor, Tensor]] = []
        for which in (torch.arange(37, device=DEVICE), order):
            leaf = x[which].contiguous(memory_format=torch.channels_last).requires_grad_()
            y = model(leaf, Routing(expert[which], num_experts=3))
            results.append((y, torch.autograd.grad(y, leaf, dy[which])[0]))
        for whole_batch, permuted in zip(*results, strict=True):
            assert torch.equal(whole_batch[order], permuted)


def test_two_half_batches_equal_the_whole() -> None:
    model, x = net(norm=False, router=False), images(24)
    expert = torch.randint(3, (24,), device=DEVICE)
    halves = [model(x[half], Routing(expert[half], num_experts=3)) for half in (slice(0, 12), slice(12, 24))]
    whole_batch = model(x, Routing(expert, num_experts=3))
    torch.testing.assert_close(torch.cat(halves), whole_batch, rtol=1e-5, atol=1e-5)


def test_another_device_than_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"one CUDA device: {torch.cuda.get_device_name()}")
    for name in ("windows", "own choice of the input", "top 2"):
        check(replace(NAMED[name], dtype=torch.float32), device=torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0


def test_kernels_run_on_the_current_stream() -> None:
    """Behind what was queued there: an input that is written late is read late."""
    layer = RoutedConv2d(16, ExpertSlices.windows(64, 0.5, 3), 3, padding=1, device=DEVICE)
    x, routing = images(32), Routing(torch.arange(32, device=DEVICE) % 3, num_experts=3)
    expected = layer(x, routing)
    torch.cuda.synchronize()
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    with torch.cuda.stream(stream), no_synchronisation():
        torch.cuda._sleep(50_000_000)  # cycles: tens of milliseconds
        late.copy_(x)
        y = layer(late, routing)
    stream.synchronize()
    assert torch.equal(y, expected)


# --- kernels that follow each other closely, or run at once -------------------------------------------------------------


def _chain(layers: list[RoutedConv2d], x: Tensor, routing: Routing, wait: bool = False) -> Tensor:
    for layer in layers:
        x = layer(x, routing)
        if wait:
            torch.cuda.synchronize()
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 16])
def test_a_layer_after_a_layer(batch: int, dtype: torch.dtype) -> None:
    """With so few samples a kernel may start before the one ahead of it has ended: what it reads must be there, and what
    it writes over, memory that was free by then, read by all. Bits of calls that wait for each other."""
    wide = windows(64, 0.5, 3)
    layers = [RoutedConv2d(32, wide, 3, padding=1), RoutedConv2d(wide, 64, 3, stride=2, padding=1, num_experts=3)]
    layers += [RoutedConv2d(64, 64, 3, padding=1, num_experts=3), RoutedConv2d(64, 32, 1, num_experts=3)]
    layers = [layer.to(DEVICE, dtype, memory_format=torch.channels_last).eval() for layer in layers]
    inputs = torch.randn(8, batch, 32, 8, 8).to(DEVICE, dtype).unbind(0)
    inputs = tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)
    routings = [Routing(torch.randint(3, (batch,)).to(DEVICE), num_experts=3) for _ in inputs]
    with torch.no_grad():
        expected = [_chain(layers, x, routing, wait=True) for x, routing in zip(inputs, routings, strict=True)]
        for _ in range(REPEATS):
            found = [_chain(layers, x, routing) for x, routing in zip(inputs, routings, strict=True)]
            assert torch.equal(torch.stack(found), torch.stack(expected))
        with use_backend("reference"):
            truth = [_chain(layers, x, routing) for x, routing in zip(inputs, routings, strict=True)]
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    assert_close_in_norm(torch.stack(found), torch.stack(truth), bound)


@pytest.mark.parametrize("batch", [1, 16])
def test_a_training_step_of_layers_after_layers(batch: int) -> None:
    """The same of the backward pass: each input gradient is read by the next, and by a weight gradient."""
    model, x, dy = net(norm=False, router=False), images(batch), torch.randn(batch, 10, device=DEVICE)
    routing = Routing(torch.randint(3, (batch,)).to(DEVICE), num_experts=3)
    leaf = x.requires_grad_()
    leaves = [leaf, *model.parameters()]
    first: tuple[Tensor, ...] = ()
    for _ in range(REPEATS):
        grads = torch.autograd.grad(model(leaf, routing), leaves, dy)
        first = first or grads
        assert all(torch.equal(a, b) for a, b in zip(grads, first, strict=True))
    with use_backend("reference"):
        truth = torch.autograd.grad(model(leaf, routing), leaves, dy)
    for a, b in zip(first, truth, strict=True):
        assert_close_in_norm(a, b, 1e-4)


def test_two_streams_at_once(backend: str) -> None:
    """Split reductions of both run beside each other: neither may see the other's counters."""
    layer = RoutedConv2d(256, 256, 3, padding=1, bias=False, num_experts=3, device=DEVICE).requires_grad_(False)
    inputs = torch.randn(2, 1, 256, 4, 4, device=DEVICE).unbind(0)
    routings, kept = (choice(1), choice(2)), counters()
    expected = [layer(x, routing) for x, routing in zip(inputs, routings, strict=True)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in inputs]
    found: list[list[Tensor]] = [[] for _ in inputs]
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)  # both queues are filled before the first kernel runs
    for _ in range(REPEATS):
        for stream, x, routing, results in zip(streams, inputs, routings, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(layer(x, routing))
    torch.cuda.synchronize()
    for results, y in zip(found, expected, strict=True):
        assert all(torch.equal(result, y) for result in results)
    if backend == "cuda":
        assert len(kept) == 3 and all_zero(kept)


# --- the router of pooled features --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["straight_through", "softmax", "none"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 37])
def test_pooled_routing_is_its_composition(batch: int, dtype: torch.dtype, normalize: bool, gate: str) -> None:
    x = images(batch, 9, dtype)
    norm, linear = torch.nn.LayerNorm(16), torch.nn.Linear(16, 5)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    norm, linear = norm.to(DEVICE, dtype), linear.to(DEVICE, dtype)
    affine = (norm.weight, norm.bias) if normalize else (None, None)
    with torch.no_grad(), no_synchronisation():
        routing = functional.pooled_routing(x, linear.weight, linear.bias, *affine, normalize=normalize, gate=gate)
    features = x.double().mean((2, 3))
    if normalize:
        features = torch.nn.functional.layer_norm(features, [16], norm.weight.double(), norm.bias.double(), norm.eps)
    scores = torch.nn.functional.linear(features, linear.weight.double(), linear.bias.double())
    first, second = scores.topk(2, dim=1).values.unbind(1)
    close = 1e-4 if dtype == torch.float32 else 0.1  # scores so near each other may be ordered either way
    clear = first - second > close
    assert (batch == 1 or clear.any()) and torch.equal(routing.expert[clear], scores.argmax(1)[clear])
    if gate == "softmax":
        assert routing.gate is not None and routing.gate.dtype == dtype
        expected = scores.softmax(1).gather(1, routing.expert[:, None])[:, 0]
        torch.testing.assert_close(routing.gate.reshape(-1).double(), expected, rtol=close, atol=close)
    elif routing.gate is not None:
        assert (routing.gate == 1).all()


def test_pooled_routing_gives_a_sample_with_nan_no_expert() -> None:
    x, weight = images(5), torch.randn(3, 16, device=DEVICE)
    good = functional.pooled_routing(x, weight).expert
    x[2, 4, 1, 1] = float("nan")
    expert = functional.pooled_routing(x, weight).expert
    rest = [0, 1, 3, 4]
    assert expert[2] == 3 and torch.equal(expert[rest], good[rest])


# --- fresh processes ----------------------------------------------------------------------------------------------------

_START = """
import hashlib, os, sys
import torch
from moe_kernels import ExpertSlices, RoutedConv2d, RoutedLinear, Routing, functional
torch.manual_seed(0)
wide = ExpertSlices.windows(64, 0.5, 3)
layers = [RoutedConv2d(16, wide, 3, padding=1), RoutedConv2d(wide, 64, 3, 2, 1, num_experts=3)]
layers = [layer.to(DEVICE) for layer in layers]
x = torch.randn(40, 16, 9, 9).to(DEVICE).requires_grad_()
weight = torch.randn(3, 16).to(DEVICE)
torch.cuda.synchronize()
started = []
sys.addaudithook(lambda event, args: started.append(args[0]) if event in ("subprocess.Popen", "os.exec") else None)
"""
_CALLS = """
with torch.no_grad():
    routing = functional.pooled_routing(x, weight)
y = x
for layer in layers:
    y = layer(y, routing)
(y * y).sum().backward()
torch.cuda.synchronize()
values = [y.detach(), x.grad, *(p.grad for layer in layers for p in layer.parameters())]
digest = hashlib.sha256(b"".join(v.cpu().contiguous().numpy().tobytes() for v in values)).hexdigest()
print("STARTED", started)
print("DIGEST", digest)
"""


def _in_a_fresh_process(backend: str, **variables: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(moe_kernels.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "MOE_KERNELS_BACKEND": backend, **variables}
    script = _START.replace("DEVICE", repr(str(DEVICE))) + _CALLS
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    lines = (line.split(" ", 1) for line in done.stdout.splitlines())
    return {name: rest for name, rest in lines if name in ("STARTED", "DIGEST")}


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_nothing_is_compiled_at_the_first_call(backend: str, tmp_path: Path) -> None:
    """No process is started, and Triton's cache of compiled kernels stays empty."""
    found = _in_a_fresh_process(backend, TRITON_CACHE_DIR=str(tmp_path))
    assert found["STARTED"] == "[]" and not list(tmp_path.iterdir())


def test_another_process_gives_the_same_bits(backend: str) -> None:
    first, second = (_in_a_fresh_process(backend)["DIGEST"] for _ in range(2))
    assert first == second
