# SPDX-License-Identifier: Apache-2.0
"""The operators of torch.library: schema, fake, autograd, autocast and FLOP formula, in one place.

``conv2d`` F(x, w), ``conv2d_grad_input`` D(dy, w) and ``conv2d_grad_weight`` G(dy, x) are each bilinear, and the
derivative of each is made of the other two, so that any order of derivative needs no further kernel:

    F: dx = D(dy, w),  dw = G(dy, x)
    D with cotangent v: d(dy) = F(v, w),  dw = G(dy, v)
    G with cotangent u: d(dy) = F(x, u),  dx = D(dy, u)

``conv2d_fused`` is F with the epilogue bias, gate, scale and shift, residual, ReLU in one pass, for calls that need no
gradient; where one does, its autograd form is composed of the same pieces.

Letters: B inputs, V = B * samples_per_input virtual samples, C/K input/output channels of one slice, H, W the input's and
P, Q the output's rows and columns.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad

# The Function as the engine sees it, without functorch's layer: at the Autograd key functorch has already peeled its own
# level off, and torch.autograd.Function would look for it again. It is also cheaper to call.
from torch.autograd.function import _SingleLevelFunction as _Function
from torch.utils.flop_counter import register_flop_formula

from . import backends, checks
from .backends import NO_EPILOGUE, Epilogue, Experts
from .geometry import Conv2dGeometry, output_size
from .layout import is_channels_last, memory_format_of
from .rows import gather_rows

__all__ = [
    "add_bias",
    "call",
    "conv2d",
    "conv2d_fused",
    "conv2d_grad_input",
    "conv2d_grad_weight",
    "epilogue",
    "output_shape",
    "traced",
]

_EXPERTS = "Tensor? out_expert, Tensor? in_expert"
_GEOMETRY = (
    "int[] out_starts, int[] in_starts, int num_out, int num_in, int out_width, int in_width, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, int samples_per_input"
)
_PACKED = "Tensor? packed=None, Tensor? packed_grad=None"
_G, _E = len(Conv2dGeometry._fields), len(Epilogue._fields)
_Choice: TypeAlias = Tensor | None  # a sliced side's experts

_lib = torch.library.Library("moe_kernels", "DEF")
_lib.define(f"conv2d(Tensor input, Tensor weight, {_EXPERTS}, {_GEOMETRY}, {_PACKED}) -> Tensor")
_lib.define(
    f"conv2d_grad_input(Tensor grad, Tensor weight, {_EXPERTS}, {_GEOMETRY}, SymInt[2] size, {_PACKED}) -> Tensor"
)
_lib.define(
    f"conv2d_grad_weight(Tensor grad, Tensor input, {_EXPERTS}, {_GEOMETRY}, SymInt[4] weight_shape, "
    "bool channels_last=False) -> Tensor"
)
_lib.define(
    f"conv2d_fused(Tensor input, Tensor weight, {_EXPERTS}, {_GEOMETRY}, Tensor? bias, Tensor? gate, Tensor? scale, "
    "Tensor? shift, Tensor? residual, bool relu, Tensor? packed=None) -> Tensor"
)

conv2d = torch.ops.moe_kernels.conv2d.default
conv2d_grad_input = torch.ops.moe_kernels.conv2d_grad_input.default
conv2d_grad_weight = torch.ops.moe_kernels.conv2d_grad_weight.default
conv2d_fused = torch.ops.moe_kernels.conv2d_fused.default


def _geometry(args: Sequence[Any]) -> Conv2dGeometry:
    """The geometry out of an operator's flat arguments; through the dispatcher its tuples come as lists."""
    return Conv2dGeometry._make(args)


# --- the backends' calls ------------------------------------------------------------------------------------------------


def _conv2d(input: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *packed: Any) -> Tensor:
    backend = backends.choose(input.device)
    return backend.forward(input, weight, Experts(out, inner), g, NO_EPILOGUE, packed[0] if packed else None)


def _conv2d_grad_input(
    grad: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, size: Sequence[int], *packed: Any
) -> Tensor:
    backend = backends.choose(grad.device)
    height, width = size
    packed_grad = packed[1] if len(packed) > 1 else None
    return backend.grad_input(grad, weight, Experts(out, inner), g, (height, width), packed_grad)


def _conv2d_grad_weight(
    grad: Tensor, input: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, shape: Sequence[int], *last: Any
) -> Tensor:
    backend = backends.choose(grad.device)
    return backend.grad_weight(grad, input, Experts(out, inner), g, tuple(shape), bool(last and last[0]))


def _conv2d_fused(input: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *rest: Any) -> Tensor:
    backend = backends.choose(input.device)
    packed = rest[_E] if len(rest) > _E else None
    return backend.forward(input, weight, Experts(out, inner), g, Epilogue._make(rest[:_E]), packed)


def _check(op: Any, *args: Any) -> None:
    """For calls through the dispatcher, which may be anybody's. ``packed`` is taken on trust: it is what the backend's
    ``pack`` made of this weight."""
    first, second, out, inner, *rest = args
    g = _geometry(rest[:_G])
    checks.geometry(g)
    shapes = [tuple(t.shape) for t in (first, second)]
    for name, shape in zip(_OPERANDS[op], shapes, strict=True):
        if len(shape) != 4:
            raise ValueError(f"{name}: expected four dimensions, got shape {shape}")
    more: dict[str, Tensor | None] = {"out_expert": out, "in_expert": inner}
    if op is conv2d_grad_weight:
        checks.operands(shapes[1], tuple(rest[_G]), ("grad", shapes[0]), g)
    elif op is conv2d_grad_input:
        size = (shapes[0][0] // g.samples_per_input, g.in_width, *rest[_G])
        checks.operands(size, shapes[1], ("grad", shapes[0]), g)
    else:
        shape = output_shape(first, second, g)
        checks.operands(shapes[0], shapes[1], ("output", shape), g)
        if op is conv2d_fused:
            epilogue = Epilogue._make(rest[_G : _G + _E])
            checks.epilogue(first, epilogue, g.out_width, shapes[1][0], 1, shape)
            more |= {name: getattr(epilogue, name) for name in ("bias", "gate", "scale", "shift", "residual")}
    checks.alike(**dict(zip(_OPERANDS[op], (first, second), strict=True)), **more)


_OPERANDS: dict[Any, tuple[str, str]] = {
    conv2d: ("input", "weight"),
    conv2d_grad_input: ("grad", "weight"),
    conv2d_grad_weight: ("grad", "input"),
    conv2d_fused: ("input", "weight"),
}
_RUN: dict[Any, Any] = {
    conv2d: _conv2d,
    conv2d_grad_input: _conv2d_grad_input,
    conv2d_grad_weight: _conv2d_grad_weight,
    conv2d_fused: _conv2d_fused,
}


# --- shapes -------------------------------------------------------------------------------------------------------------


def output_shape(input: Tensor, weight: Tensor, g: Conv2dGeometry) -> tuple[int, ...]:
    """``[V, K, P, Q]`` of a forward."""
    size = (
        output_size(input.shape[a], weight.shape[a], g.stride[a - 2], g.padding[a - 2], g.dilation[a - 2]) for a in (2, 3)
    )
    return (input.shape[0] * g.samples_per_input, g.out_width, *size)


def _conv2d_fake(input: Tensor, weight: Tensor, out_expert: Any, in_expert: Any, *rest: Any, **packed: Any) -> Tensor:
    shape = output_shape(input, weight, _geometry(rest[:_G]))
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def _grad_input_fake(grad: Tensor, weight: Tensor, out_expert: Any, in_expert: Any, *rest: Any, **packed: Any) -> Tensor:
    g = _geometry(rest[:_G])
    shape = (grad.shape[0] // g.samples_per_input, g.in_width, *rest[_G])
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format_of(grad))


def _grad_weight_fake(
    grad: Tensor, input: Tensor, out_expert: Any, in_expert: Any, *rest: Any, channels_last: bool = False
) -> Tensor:
    channels_last = rest[_G + 1] if len(rest) > _G + 1 else channels_last
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(rest[_G]), dtype=grad.dtype, device=grad.device, memory_format=layout)


# --- autograd -----------------------------------------------------------------------------------------------------------


def _wanted(ctx: Any, index: int) -> bool:
    """Whether the running backward will use the gradient of the first (0) or the second tensor.

    needs_input_grad also says yes for a weight that requires grad while only d loss / d x is asked for, as in an attack;
    the engine knows better. The question is private to torch and refused for leaves that are asked for (then: yes).
    """
    if not ctx.needs_input_grad[index]:
        return False
    if torch.compiler.is_compiling():
        return True
    try:
        node = ctx.next_functions[index][0]
        if index == 0 and isinstance(node, torch._C._functions.AccumulateGrad):  # type: ignore[attr-defined]
            return True  # an image that requires grad is nearly always asked for, and the refusal costs 25 µs
        return torch._C._will_engine_execute_node(node)
    except (AttributeError, IndexError, RuntimeError, TypeError):
        return True


def traced(x: Tensor, other: Tensor) -> bool:
    """Whether a call would be recorded or changed on its way: by a trace, a mode, a transform or a subclass."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, torch.nn.Parameter)
        or type(other) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or x.is_meta
    )


def _watched(x: Tensor, other: Tensor) -> bool:
    """Whether anything would see or change a call to an operator: what traces it, or the profiler.

    Where nothing does and no gradient is needed, the backend is called directly: a pass through the dispatcher and back
    into Python costs 6 to 15 µs, more than a small layer's work.
    """
    return traced(x, other) or torch.autograd._profiler_enabled()


def _refuse_tangents(args: Sequence[Any]) -> None:
    """Raises for dual tensors: dropping a tangent would give a wrong derivative without a word.

    Raises:
        NotImplementedError: under forward-mode differentiation, if an argument carries a tangent.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(isinstance(a, Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args):
        raise NotImplementedError("routed operators have no forward-mode derivative; use reverse mode (torch.func.vjp)")


def _below_autograd(op: Any, first: Tensor, second: Tensor, out: _Choice, inner: _Choice, g: Any, *rest: Any) -> Tensor:
    if not _watched(first, second):
        return _RUN[op](first, second, out, inner, g, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return op(first, second, out, inner, *g, *rest)


def _in_function(op: Any, *args: Any) -> Tensor:
    """:func:`_below_autograd` for a Function's forward. torch runs that without grad mode, in which functorch's outer
    levels would record nothing and a second derivative come out as zero."""
    if torch._C._are_functorch_transforms_active():
        with torch.enable_grad():
            return _below_autograd(op, *args)
    return _below_autograd(op, *args)


def call(op: Any, first: Tensor, second: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *rest: Any) -> Tensor:
    """``op(first, second, out, inner, *g, *rest)`` with every argument given, past the dispatcher where nobody would
    notice."""
    _refuse_tangents((first, second, *rest))
    if _watched(first, second):
        return op(first, second, out, inner, *g, *rest)
    if torch.is_grad_enabled():
        if op is conv2d_fused:
            return _fused_differentiable(first, second, out, inner, g, *rest)
        if first.requires_grad or second.requires_grad:
            return _FUNCTION[op].apply(first, second, out, inner, g, *rest, _RUN[op])
    return _RUN[op](first, second, out, inner, g, *rest)


# Their last argument computes them: a backend where nothing watches, _in_function elsewhere.


class _Conv2d(_Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, out: _Choice, inner: _Choice, *rest: Any) -> Tensor:
        g, packed, packed_grad, run = rest
        ctx.save_for_backward(input, weight, out, inner, packed, packed_grad)
        ctx.geometry = g
        return run(input, weight, out, inner, *rest[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight, out, inner, *packed = ctx.saved_tensors
        g = ctx.geometry
        dx = dw = None
        if _wanted(ctx, 0):
            dx = call(conv2d_grad_input, grad, weight, out, inner, g, input.shape[2:], *packed)
        if _wanted(ctx, 1):
            dw = call(conv2d_grad_weight, grad, input, out, inner, g, weight.shape, is_channels_last(weight))
        return dx, dw, None, None, None, None, None, None


class _Conv2dGradInput(_Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, out: _Choice, inner: _Choice, *rest: Any) -> Tensor:
        g, _, packed, packed_grad, run = rest
        ctx.save_for_backward(grad, weight, out, inner, packed, packed_grad)
        ctx.geometry = g
        return run(grad, weight, out, inner, *rest[:-1])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        grad, weight, out, inner, *packed = ctx.saved_tensors
        g = ctx.geometry
        dg = dw = None
        if _wanted(ctx, 0):
            dg = call(conv2d, v, weight, out, inner, g, *packed)
        if _wanted(ctx, 1):
            dw = call(conv2d_grad_weight, grad, v, out, inner, g, weight.shape, is_channels_last(weight))
        return dg, dw, None, None, None, None, None, None, None


class _Conv2dGradWeight(_Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, input: Tensor, out: _Choice, inner: _Choice, *rest: Any) -> Tensor:
        ctx.save_for_backward(grad, input, out, inner)
        ctx.geometry, *_, run = rest
        return run(grad, input, out, inner, *rest[:-1])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        grad, input, out, inner = ctx.saved_tensors
        g = ctx.geometry
        dg = dx = None
        if _wanted(ctx, 0):
            dg = call(conv2d, input, u, out, inner, g, None, None)
        if _wanted(ctx, 1):
            dx = call(conv2d_grad_input, grad, u, out, inner, g, input.shape[2:], None, None)
        return dg, dx, None, None, None, None, None, None


_FUNCTION: dict[Any, Any] = {
    conv2d: _Conv2d,
    conv2d_grad_input: _Conv2dGradInput,
    conv2d_grad_weight: _Conv2dGradWeight,
}


def _differentiable(op: Any, required: int, **defaults: Any) -> Any:
    function, run = _FUNCTION[op], functools.partial(_in_function, op)

    def differentiable(*args: Any, **kwargs: Any) -> Tensor:
        # torch leaves out arguments that equal their defaults; the Function wants them all, in order
        rest = list(defaults.items())[len(args) - required :]
        args = (*args, *(kwargs.get(name, value) for name, value in rest))
        args = (*args[:4], _geometry(args[4 : 4 + _G]), *args[4 + _G :])
        _refuse_tangents(args)
        if not (torch.is_grad_enabled() and (args[0].requires_grad or args[1].requires_grad)):
            return _below_autograd(op, *args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*args, run)
        return function.apply(*args, run)

    return differentiable


def _differentiable_fused(*args: Any, packed: Tensor | None = None) -> Tensor:
    rest = args[4 + _G :]
    rest = rest if len(rest) > _E else (*rest, packed)
    return _fused_differentiable(*args[:4], _geometry(args[4 : 4 + _G]), *rest)


def _fused_differentiable(
    input: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *rest: Any
) -> Tensor:
    bias, gate, scale, shift, residual, relu, packed = rest
    tensors = (input, weight, bias, gate, scale, shift, residual)
    _refuse_tangents(tensors)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return _below_autograd(conv2d_fused, input, weight, out, inner, g, *rest)
    y = conv2d(input, weight, out, inner, *g, packed, None)
    y = add_bias(y, bias, out, g)
    if gate is not None:
        y = y * gate.to(y.dtype)[:, None, None, None]
    return epilogue(y, out, g, scale, shift, residual, relu)


def epilogue(
    y: Tensor,  # [V, K, P, Q]
    out_expert: Tensor | None,
    g: Conv2dGeometry,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """What follows bias and gate, in torch's own operators."""
    if scale is not None:
        y = y * _affine_rows(scale, out_expert, g).to(y.dtype)
    if shift is not None:
        y = y + _affine_rows(shift, out_expert, g).to(y.dtype)
    if residual is not None:
        y = y + residual
    return y.relu() if relu else y


def add_bias(y: Tensor, bias: Tensor | None, out_expert: Tensor | None, g: Conv2dGeometry) -> Tensor:
    """``y [V, K, P, Q]`` plus each sample's slice of ``bias [R_out]``, in y's dtype."""
    if bias is None:
        return y
    rows = gather_rows(_wide(bias), out_expert, g.num_out, g.out_starts, g.out_width)
    return y + rows.to(y.dtype)[:, :, None, None]


def _affine_rows(value: Tensor, out_expert: Tensor | None, g: Conv2dGeometry) -> Tensor:
    if value.shape[0] == g.out_width:
        return value[None, :, None, None]
    return gather_rows(_wide(value), out_expert, g.num_out, g.out_starts, g.out_width)[:, :, None, None]


def _wide(value: Tensor) -> Tensor:
    """In float32 at least, so that gathering's derivative, a sum over the samples, accumulates in it."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


# --- autocast -----------------------------------------------------------------------------------------------------------


def _autocast(op: Any, device: str, key: torch._C.DispatchKey) -> Any:
    given = _G + (10 if op is conv2d_fused else 4)
    exclude = torch._C.DispatchKeySet(key)

    def call(*args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        # packed weights, the last of an operator's arguments, fit only the uncast weight
        args = args[:given]
        # float64 is left alone, as by torch's own list of operators
        cast = [
            a.to(dtype)
            if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 and a.device.type == device
            else a
            for a in args
        ]
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return op(*cast)

    return call


def _kernel(op: Any, *args: Any) -> Tensor:
    _check(op, *args)
    return _RUN[op](*args[:4], _geometry(args[4 : 4 + _G]), *args[4 + _G :])


def _autograd(op: Any, differentiable: Any, *args: Any, **kwargs: Any) -> Tensor:
    if not _watched(args[0], args[1]):  # elsewhere the kernel itself follows, on real tensors
        _check(op, *args)
    return differentiable(*args, **kwargs)


def _register() -> None:
    packed = {"packed": None, "packed_grad": None}
    implementations: dict[str, tuple[Any, Any, Any]] = {
        "conv2d": (conv2d, _conv2d_fake, _differentiable(conv2d, _G + 4, **packed)),
        "conv2d_grad_input": (
            conv2d_grad_input,
            _grad_input_fake,
            _differentiable(conv2d_grad_input, _G + 5, **packed),
        ),
        "conv2d_grad_weight": (
            conv2d_grad_weight,
            _grad_weight_fake,
            _differentiable(conv2d_grad_weight, _G + 5, channels_last=False),
        ),
        "conv2d_fused": (conv2d_fused, _conv2d_fake, _differentiable_fused),
    }
    for name, (op, fake, differentiable) in implementations.items():
        _lib.impl(name, functools.partial(_kernel, op), "CompositeExplicitAutograd")
        _lib.impl(name, functools.partial(_autograd, op, differentiable), "Autograd")
        torch.library.register_fake(f"moe_kernels::{name}", fake, lib=_lib)
    for device, key in (("cpu", torch._C.DispatchKey.AutocastCPU), ("cuda", torch._C.DispatchKey.AutocastCUDA)):
        for name in ("conv2d", "conv2d_fused"):
            op = getattr(torch.ops.moe_kernels, name).default
            _lib.impl(name, _autocast(op, device, key), key.name)


# --- FLOPs: two for each multiply-accumulate, as torch counts ----------------------------------------------------------


def _flops(samples: int, rows: int, columns: int, weight_shape: Any, g: Conv2dGeometry) -> int:
    return 2 * samples * rows * columns * g.out_width * (g.in_width // g.groups) * weight_shape[2] * weight_shape[3]


def _register_flops() -> None:
    packet = torch.ops.moe_kernels

    @register_flop_formula([packet.conv2d, packet.conv2d_fused])
    def conv2d_flops(input_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return _flops(out_shape[0], out_shape[2], out_shape[3], weight_shape, _geometry(args[2 : 2 + _G]))

    @register_flop_formula(packet.conv2d_grad_input)
    def grad_input_flops(grad_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return _flops(grad_shape[0], grad_shape[2], grad_shape[3], weight_shape, _geometry(args[2 : 2 + _G]))

    @register_flop_formula(packet.conv2d_grad_weight)
    def grad_weight_flops(grad_shape: Any, input_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return _flops(grad_shape[0], grad_shape[2], grad_shape[3], args[2 + _G], _geometry(args[2 : 2 + _G]))


_register()
_register_flops()
