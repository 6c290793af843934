# SPDX-License-Identifier: Apache-2.0
"""The packed weights that a module keeps in eval mode: used where they hold, never where they do not."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from oracle import CallCounter, partition, windows
from torch import Tensor, nn

from moe_kernels import RoutedConv2d, RoutedLinear, Routing, functional, use_backend

ROUTING = Routing(torch.tensor([2, 0, 1, 0]), num_experts=3)
X = torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(0))


def _layer() -> RoutedConv2d:
    return RoutedConv2d(5, 6, 3, padding=1, num_experts=3).eval()


def _fresh(layer: RoutedConv2d, weight: Tensor | None = None) -> Tensor:
    """What the layer's weights give with nothing kept."""
    weight = layer.weight if weight is None else weight
    return functional.routed_conv2d(X, weight, ROUTING, layer.bias, out_slices=layer.out_slices, padding=1)


def test_packed_once_in_eval_mode_and_used(calls: CallCounter) -> None:
    layer = _layer()
    first = layer(X, ROUTING)
    assert calls["pack"] == 2  # for the forward, and for the input gradient
    kept = layer._cache
    assert kept is not None and kept.forward is not None and kept.grad_input is not None
    assert torch.equal(layer(X, ROUTING), first)
    with torch.no_grad():
        assert torch.equal(layer(X, ROUTING), first)
    with torch.inference_mode():
        assert torch.equal(layer(X, ROUTING), first)
    assert calls["pack"] == 2
    assert torch.equal(first, _fresh(layer))
    # that it is used shows where it is spoilt
    kept.forward.zero_()
    assert torch.equal(layer(X, ROUTING), layer.bias.view(3, 6)[ROUTING.expert][:, :, None, None].expand_as(first))


def test_serving_packs_for_the_forward_alone(calls: CallCounter) -> None:
    """The form for the input gradient comes when a forward with gradients enabled may want it."""
    layer = _layer()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            layer(X, ROUTING)
    assert calls["pack"] == 1
    assert layer._cache is not None and layer._cache.grad_input is None
    forward = layer._cache.forward
    layer(X, ROUTING)
    assert calls["pack"] == 2
    assert layer._cache.forward is forward and layer._cache.grad_input is not None


def test_the_gradient_of_the_input_uses_it_too() -> None:
    layer = _layer()
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(_fresh_of(layer, x).square().sum(), x)
    y = layer(x, ROUTING)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert torch.equal(dx, expected)
    assert layer._cache is not None and layer._cache.grad_input is not None
    layer._cache.grad_input.zero_()
    assert torch.equal(torch.autograd.grad(layer(x, ROUTING).sum(), x)[0], torch.zeros_like(x))


def _fresh_of(layer: RoutedConv2d, x: Tensor) -> Tensor:
    return functional.routed_conv2d(x, layer.weight, ROUTING, layer.bias, out_slices=layer.out_slices, padding=1)


def test_double_backward_through_packed_weights() -> None:
    layer = _layer().double()
    x = X.double().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: layer(x, ROUTING), x[:, :, :3, :3].detach().requires_grad_(), atol=1e-6, fast_mode=True
    )
    assert layer._cache is not None


def test_never_in_training_mode(calls: CallCounter) -> None:
    layer = _layer().train()
    layer(X, ROUTING)
    with torch.no_grad():
        layer(X, ROUTING)
    assert calls["pack"] == 0 and layer._cache is None


def _optimiser_step(layer: RoutedConv2d) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(X, ROUTING).square().sum().backward()
    optimizer.step()


def _fused_optimiser_step(layer: RoutedConv2d) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5, fused=True)
    layer(X, ROUTING).square().sum().backward()
    optimizer.step()


def _foreach_optimiser_step(layer: RoutedConv2d) -> None:
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.5, foreach=True)
    layer(X, ROUTING).square().sum().backward()
    optimizer.step()


def _ema_update(layer: RoutedConv2d) -> None:
    with torch.no_grad():
        layer.weight.lerp_(torch.randn_like(layer.weight), 0.5)


def _ema_update_in_inference_mode(layer: RoutedConv2d) -> None:
    with torch.inference_mode():
        layer.weight.mul_(0.5)


def _averaged_model(layer: RoutedConv2d) -> None:
    """torch's own EMA, which writes into the averaged module's parameters."""
    average = torch.optim.swa_utils.AveragedModel(layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.eval()
    average(X, ROUTING)
    average.update_parameters(layer)
    with torch.no_grad():
        layer.weight.mul_(3)
    average.update_parameters(layer)
    torch.testing.assert_close(average(X, ROUTING), _fresh(average.module))


def _load_state_dict(layer: RoutedConv2d) -> None:
    layer.load_state_dict(_layer().state_dict())


def _load_state_dict_assign(layer: RoutedConv2d) -> None:
    layer.load_state_dict(_layer().state_dict(), assign=True)


def _load_state_dict_of_a_parent(layer: RoutedConv2d) -> None:
    nn.Sequential(layer).load_state_dict(nn.Sequential(_layer()).state_dict())


def _to_double_and_back(layer: RoutedConv2d) -> None:
    layer.double()
    assert layer._cache is None
    with torch.no_grad():
        layer.weight.add_(1)
    layer.float()


def _new_parameter(layer: RoutedConv2d) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def _other_storage(layer: RoutedConv2d) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def _vector_to_parameters(layer: RoutedConv2d) -> None:
    vector = nn.utils.parameters_to_vector(layer.parameters())
    nn.utils.vector_to_parameters(vector.detach() * 2, layer.parameters())


def _data_and_clear_cache(layer: RoutedConv2d) -> None:
    layer.weight.data.mul_(2)
    layer.clear_cache()


def _data_and_train_eval(layer: RoutedConv2d) -> None:
    layer.weight.data.mul_(2)
    layer.train()
    layer.eval()


def _data_and_eval(layer: RoutedConv2d) -> None:
    layer.weight.data.mul_(2)
    layer.eval()


def _reset_parameters(layer: RoutedConv2d) -> None:
    layer.reset_parameters()


def _half_of_a_view(layer: RoutedConv2d) -> None:
    with torch.no_grad():
        layer.weight[:6].zero_()


CHANGES = [
    _optimiser_step,
    _fused_optimiser_step,
    _foreach_optimiser_step,
    _ema_update,
    _ema_update_in_inference_mode,
    _load_state_dict,
    _load_state_dict_assign,
    _load_state_dict_of_a_parent,
    _to_double_and_back,
    _new_parameter,
    _other_storage,
    _vector_to_parameters,
    _data_and_clear_cache,
    _data_and_train_eval,
    _data_and_eval,
    _reset_parameters,
    _half_of_a_view,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_dropped_when_the_weight_changes(change: Callable[[RoutedConv2d], None]) -> None:
    layer = _layer()
    before = layer(X, ROUTING).detach()
    assert layer._cache is not None
    change(layer)
    after = layer(X, ROUTING).detach()
    assert not torch.equal(after, before)
    assert torch.equal(after, _fresh(layer))
    assert torch.equal(layer(X, ROUTING), after)


def _perturb_by_vector(layer: RoutedConv2d, scale: float) -> None:
    vector = nn.utils.parameters_to_vector(layer.parameters()).detach()
    nn.utils.vector_to_parameters(vector * scale, layer.parameters())


def _perturb_by_data(layer: RoutedConv2d, scale: float) -> None:
    for _ in range(2):
        layer.weight.data = layer.weight.data * scale


@pytest.mark.parametrize("perturb", [_perturb_by_vector, _perturb_by_data])
def test_other_memory_in_a_loop(perturb: Callable[[RoutedConv2d, float], None]) -> None:
    """Perturb, look, restore: the allocator hands the same few blocks of memory round and round."""
    layer = RoutedConv2d(64, 128, 3, padding=1, num_experts=2, bias=False).eval()
    x, routing = torch.randn(2, 64, 6, 6), Routing(torch.tensor([1, 0]), num_experts=2)
    with torch.no_grad():
        for i in range(10):
            perturb(layer, 1.5 if i % 2 else 0.5)
            expected = functional.routed_conv2d(x, layer.weight, routing, out_slices=layer.out_slices, padding=1)
            assert torch.equal(layer(x, routing), expected), i


def test_other_strides_over_the_same_memory() -> None:
    layer = RoutedConv2d(12, 4, 3, padding=1, num_experts=3, bias=False).eval()
    x = torch.randn(4, 12, 6, 6)
    layer(x, ROUTING)
    layer.weight.data = layer.weight.data.transpose(0, 1)
    expected = functional.routed_conv2d(x, layer.weight, ROUTING, out_slices=layer.out_slices, padding=1)
    assert torch.equal(layer(x, ROUTING), expected)


def test_averaged_model_is_detected() -> None:
    _averaged_model(_layer())


@pytest.mark.parametrize("change", ["train", "eval", "load_state_dict", "to", "clear_cache"])
def test_dropped_at_once(change: str) -> None:
    """The memory goes when it happens, not at the next forward."""
    layer = _layer()
    layer(X, ROUTING)
    assert layer._cache is not None
    block = weakref.ref(layer._cache.forward)
    arguments = {"load_state_dict": (layer.state_dict(),), "to": (torch.float64,)}.get(change, ())
    getattr(layer, change)(*arguments)
    gc.collect()
    assert layer._cache is None and block() is None


def test_never_for_inference_tensors(calls: CallCounter) -> None:
    with torch.inference_mode():
        layer = _layer()
        assert layer.weight.is_inference()
        first = layer(X, ROUTING)
        layer.weight.mul_(2)  # not counted by torch
        assert torch.equal(layer(X, ROUTING), _fresh(layer)) and not torch.equal(first, _fresh(layer))
    assert calls["pack"] == 0 and layer._cache is None


def test_packed_in_inference_mode_serves_a_later_backward() -> None:
    layer = _layer()
    with torch.inference_mode():
        layer(X, ROUTING)
    assert layer._cache is not None
    x = X.clone().requires_grad_()
    y = layer(x, ROUTING)
    grads = torch.autograd.grad(y.sum(), (x, layer.weight))
    expected = torch.autograd.grad(_fresh_of(layer, x).sum(), (x, layer.weight))
    assert all(torch.equal(a, e) for a, e in zip(grads, expected, strict=True))


def test_functional_call_uses_the_weights_it_is_given() -> None:
    layer = _layer()
    layer(X, ROUTING)
    given = torch.randn_like(layer.weight)
    y = torch.func.functional_call(layer, {"weight": given}, (X, ROUTING))
    assert torch.equal(y, _fresh(layer, given))
    assert torch.equal(layer(X, ROUTING), _fresh(layer))


def test_torch_func_grad_in_eval_mode() -> None:
    layer = _layer()
    layer(X, ROUTING)
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (X, ROUTING)).square().sum()

    grads = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    expected = torch.autograd.grad(_fresh(layer).square().sum(), list(parameters.values()))
    for name, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(grads[name], e)


def test_deepcopy_does_not_share() -> None:
    layer = _layer()
    layer(X, ROUTING)
    again = copy.deepcopy(layer)
    assert again._cache is None
    with torch.no_grad():
        again.weight.mul_(2)
    assert torch.equal(again(X, ROUTING), _fresh(again))
    assert torch.equal(layer(X, ROUTING), _fresh(layer))


def test_shared_weights_are_packed_for_each_geometry() -> None:
    """Two modules over one parameter: each keeps what its own geometry needs."""
    first = RoutedConv2d(windows(6, 0.5, 3), partition(4, 3), 3).eval()
    second = RoutedConv2d(6, 12, 3, num_experts=1).eval()
    second.weight, second.bias = first.weight, first.bias
    x = torch.randn(4, 6, 5, 5)
    for _ in range(2):
        y = first(x[:, :3], ROUTING)
        z = second(x, Routing(torch.zeros(4, dtype=torch.int64), num_experts=1))
    e, c = 2, first.in_slices.starts[2]
    one = nn.functional.conv2d(x[:1, :3], first.weight[4 * e : 4 * e + 4, c : c + 3], first.bias[4 * e : 4 * e + 4])
    torch.testing.assert_close(y[:1], one, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z, nn.functional.conv2d(x, first.weight, first.bias), rtol=1e-4, atol=1e-5)


def test_use_backend_switches_it(calls: CallCounter) -> None:
    layer = _layer()
    y = layer(X, ROUTING)
    with use_backend("reference"):
        torch.testing.assert_close(layer(X, ROUTING), y, rtol=1e-4, atol=1e-5)
        assert layer._cache is not None and layer._cache.forward is None and layer._cache.grad_input is None
    assert torch.equal(layer(X, ROUTING), y)
    assert calls["pack"] == 4


@pytest.mark.parametrize("autocast", [True, False])
def test_autocast_in_eval_mode(autocast: bool) -> None:
    """Blocks packed in float32 are not taken for bfloat16 weights."""
    layer = _layer()
    layer(X, ROUTING)
    with torch.autocast("cpu", enabled=autocast):
        y = layer(X, ROUTING)
    if autocast:
        expected = copy.deepcopy(layer).bfloat16().train()(X.bfloat16(), ROUTING)
        assert torch.equal(y, expected)
    else:
        assert torch.equal(y, _fresh(layer))


def test_channels_last_weights() -> None:
    layer = _layer()
    y = layer(X, ROUTING)
    layer.to(memory_format=torch.channels_last)
    assert torch.equal(layer(X, ROUTING), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_has_the_bits_of_the_unpacked(dtype: torch.dtype) -> None:
    for layer in (
        RoutedConv2d(5, 6, 3, padding=1, num_experts=3, dtype=dtype),
        RoutedConv2d(windows(10, 0.5, 3), windows(7, 0.5, 3), (1, 3), dtype=dtype),
        RoutedConv2d(5, 10, 3, groups=5, num_experts=3, dtype=dtype),
    ):
        x = X.to(dtype).requires_grad_()
        outputs, grads = [], []
        for training in (True, False):
            outputs.append(layer.train(training)(x, ROUTING))
            grads.append(torch.autograd.grad(outputs[-1].sum(), x)[0])
        assert layer._cache is not None
        assert torch.equal(*outputs) and torch.equal(*grads)


def test_routed_linear_keeps_packed_weights(calls: CallCounter) -> None:
    layer = RoutedLinear(5, 6, num_experts=3).eval()
    x = torch.randn(4, 5)
    first, second = layer(x, ROUTING), layer(x, ROUTING)
    assert calls["pack"] == 2 and torch.equal(first, second)
    assert torch.equal(first, layer.train()(x, ROUTING))
    layer.eval()(x, ROUTING)
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer(x, ROUTING), copy.deepcopy(layer).train()(x, ROUTING))


def test_a_weight_changed_between_forward_and_backward_raises() -> None:
    layer = _layer()
    x = X.clone().requires_grad_()
    y = layer(x, ROUTING)
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_jit_trace_reads_the_weights(calls: CallCounter, warm: bool, grad: bool) -> None:
    """Packed weights would be constants of the trace, or memory that nobody has written."""
    layer = _layer()
    if warm:
        layer(X, ROUTING)
    before = calls["pack"]
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(_WithRouting(layer), (X, ROUTING.expert), check_trace=False)
        assert torch.equal(traced(X, ROUTING.expert), _fresh(layer))
        with torch.no_grad():
            layer.weight.mul_(2)
        assert torch.equal(traced(X, ROUTING.expert), _fresh(layer))
    assert calls["pack"] == before


class _WithRouting(nn.Module):
    def __init__(self, layer: RoutedConv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        return self.layer(x, Routing(expert, num_experts=3))


def test_a_fake_mode_packs_nothing(calls: CallCounter) -> None:
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y = _layer()(torch.randn(4, 5, 6, 6), Routing(torch.zeros(4, dtype=torch.int64), num_experts=3))
    assert y.shape == (4, 6, 6, 6) and calls["pack"] == 0
