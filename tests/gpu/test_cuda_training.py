# SPDX-License-Identifier: Apache-2.0
"""Training as people do it on a GPU: autocast, GradScaler, DistributedDataParallel; and second derivatives."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from on_device import (
    DEVICE,
    assert_close_in_norm,
    assert_same_bits,
    choice,
    gradients,
    images,
    net,
    no_synchronisation,
    sgd,
    train,
)
from oracle import partition, windows
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from moe_kernels import RoutedConv2d, Routing, functional, use_backend
from moe_kernels.backends import fallback

pytestmark = pytest.mark.gpu


def test_steps_with_kernels_and_with_the_loop_agree() -> None:
    """The same losses, step after step."""
    model = net()
    slow = copy.deepcopy(model)
    optimizer, slow_optimizer = sgd(model), sgd(slow)
    x, target = images(12), torch.randint(10, (12,), device=DEVICE)
    routing = Routing(torch.arange(12, device=DEVICE) % 3, num_experts=3)
    losses = []
    for _ in range(8):
        loss = train(model, optimizer, x, target, routing)
        with use_backend("reference"):
            expected = train(slow, slow_optimizer, x, target, routing)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# --- autocast and GradScaler --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_the_layer_in_that_dtype(dtype: torch.dtype) -> None:
    layer = RoutedConv2d(16, windows(64, 0.5, 3), 3, padding=1, device=DEVICE)
    x, routing = images(), choice(0, 1, 2, 0, 1, 1)
    with torch.autocast(DEVICE.type, dtype=dtype):
        y = layer(x, routing)
    weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
    sides = {"out_slices": layer.out_slices, "in_slices": layer.in_slices}
    expected = functional.routed_conv2d(x.to(dtype), weight, routing, bias, **sides, padding=1)
    assert y.dtype == dtype and torch.equal(y, expected)
    dy = torch.randn_like(y)
    dw, expected_dw = (torch.autograd.grad(out, layer.weight, dy)[0] for out in (y, expected))
    assert dw.dtype == torch.float32 and torch.equal(dw, expected_dw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast(dtype: torch.dtype) -> None:
    """Parameters and their gradients stay float32, near the float32 gradients; and nothing waits for the device."""
    model = net(router=False)
    x, routing = images(12), Routing(torch.arange(12, device=DEVICE) % 3, num_experts=3)
    target = torch.randint(10, (12,), device=DEVICE)
    F.cross_entropy(model(x, routing), target).backward()
    expected = gradients(model)

    def step() -> None:
        model.zero_grad()
        with torch.autocast(DEVICE.type, dtype=dtype):
            y = model(x, routing)
            assert y.dtype == dtype
            loss = F.cross_entropy(y, target)
        loss.backward()

    step()
    with no_synchronisation():
        step()
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32
        # a bias before a BatchNorm has the gradient 0, of which rounding alone is left
        if name != "first.bias":
            assert_close_in_norm(grad, expected[name], 0.1, name)


def test_grad_scaler() -> None:
    """A scaled step is nearly the unscaled one; one with infinite gradients is left out, and the scale halved."""
    model = net()
    plain = copy.deepcopy(model)
    optimizer, scaler = sgd(model), torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    x, target = images(12), torch.randint(10, (12,), device=DEVICE)

    def scaled_step(factor: float) -> None:
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            loss = F.cross_entropy(model(x), target) * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    scaled_step(1.0)
    train(plain, sgd(plain), x, target)
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.isfinite(p).all()
        assert_close_in_norm(p, q, 1e-2, name)
    assert scaler.get_scale() == 1024.0
    before = copy.deepcopy(dict(model.named_parameters()))
    scaled_step(float("inf"))
    assert scaler.get_scale() == 512.0
    assert_same_bits(dict(model.named_parameters()), before)


# --- DistributedDataParallel --------------------------------------------------------------------------------------------


def test_distributed_data_parallel_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "lo")
    kind = "nccl" if DEVICE.type == "cuda" and dist.is_nccl_available() else "gloo"
    device_ids = [0] if DEVICE.type == "cuda" else None
    dist.init_process_group(kind, init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = net()
        plain = copy.deepcopy(model)
        parallel = DistributedDataParallel(model, device_ids=device_ids)
        optimizer, plain_optimizer = sgd(model), sgd(plain)
        for _ in range(2):
            x, target = images(), torch.randint(10, (6,), device=DEVICE)
            train(parallel, optimizer, x, target)
            train(plain, plain_optimizer, x, target)
        assert_same_bits(gradients(model), gradients(plain))
        assert_same_bits(model.state_dict(), plain.state_dict())
        # a routing from outside passes through the wrapper
        parallel(images(), choice(0, 1, 2, 0, 1, 1)).sum()
    finally:
        dist.destroy_process_group()


# --- second derivatives and float64 -------------------------------------------------------------------------------------


def _penalty(layer: RoutedConv2d, x: Tensor, routing: Routing) -> list[Tensor]:
    """Gradients of the squared norm of a gradient, as a penalty on gradients has them."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(layer(x, routing).sigmoid().square().sum(), x, create_graph=True)
    dx.square().sum().backward()
    assert x.grad is not None and layer.weight.grad is not None and layer.bias is not None
    assert layer.bias.grad is not None
    return [x.grad, layer.weight.grad, layer.bias.grad]


@pytest.mark.parametrize("gated", [False, True])
def test_second_derivative_in_float32_equals_the_loop(gated: bool) -> None:
    layer = RoutedConv2d(16, windows(48, 0.5, 3), 3, stride=2, padding=1, device=DEVICE)
    gate = torch.rand(6, device=DEVICE) + 0.5 if gated else None
    x, routing = images(), Routing(torch.tensor([0, 1, 2, 0, 1, 1], device=DEVICE), gate, num_experts=3)
    actual = _penalty(layer, x, routing)
    with use_backend("reference"):
        expected = _penalty(layer, x, routing)
    for name, a, e in zip(("input", "weight", "bias"), actual, expected, strict=True):
        assert_close_in_norm(a, e, 1e-4, name)


@pytest.mark.filterwarnings("ignore:.*float64 runs in the slow reference loop")
def test_gradgradcheck() -> None:
    x = torch.randn(2, 1, 3, 3, device=DEVICE, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 1, 2, 2, device=DEVICE, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(2, device=DEVICE, dtype=torch.float64, requires_grad=True)
    expert = torch.tensor([1, 0], device=DEVICE)

    def call(x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return functional.routed_conv2d(
            x, weight, Routing(expert, gate, num_experts=2), out_slices=partition(2, 2), stride=2, padding=1
        )

    # cuDNN's float64 gradients need not have the same bits twice
    assert torch.autograd.gradcheck(call, (x, weight, gate), nondet_tol=1e-9)
    assert torch.autograd.gradgradcheck(call, (x, weight, gate), nondet_tol=1e-9)


def test_float64_warns_once() -> None:
    layer = RoutedConv2d(2, 3, 3, num_experts=3, device=DEVICE, dtype=torch.float64)
    x, routing = torch.randn(3, 2, 5, 5, device=DEVICE, dtype=torch.float64), choice(2, 0, 1)
    fallback.warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            layer(x, routing).sum().backward()
    messages = [str(w.message) for w in caught if "float64" in str(w.message)]
    assert len(messages) == 1 and "reference" in messages[0]
