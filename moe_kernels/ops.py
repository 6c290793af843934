# SPDX-License-Identifier: Apache-2.0
"""The operators of torch.library: schema, fake, autograd, autocast and FLOP formula, in one place.

``conv2d`` F(x, w), ``conv2d_grad_input`` D(dy, w) and ``conv2d_grad_weight`` G(dy, x) are each bilinear, and the
derivative of each is made of the other two, so that any order of derivative needs no further kernel:

    F: dx = D(dy, w),  dw = G(dy, x)
    D with cotangent v: d(dy) = F(v, w),  dw = G(dy, v)
    G with cotangent u: d(dy) = F(x, u),  dx = D(dy, u)

``conv2d_gated`` is ``gate * (F + bias)``, either of them or both, rounded once; its backward takes the input's and the
gate's gradient from one pass, ``conv2d_grad_gated``: by linearity ``<F(x[v], w), dy[v]> = <D(dy[v], w), x[v]>``, so that
no output is kept for it.

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
from .routing import sample_dot
from .rows import gather_rows, keep_starts, scatter_rows, sum_choices

__all__ = [
    "call",
    "conv2d",
    "conv2d_fused",
    "conv2d_gated",
    "conv2d_grad_gated",
    "conv2d_grad_input",
    "conv2d_grad_weight",
    "epilogue",
    "output_shape",
    "plan",
    "traced",
    "wanted",
]

_EXPERTS = "Tensor? out_expert, Tensor? in_expert"
_GEOMETRY = (
    "int[] out_starts, int[] in_starts, int num_out, int num_in, int out_width, int in_width, int[2] stride, "
    "int[2] padding, int[2] dilation, int groups, int samples_per_input"
)
# What can be made from the other arguments and was made before: packed weights of the backend in use, the routing plan.
_MADE = "Tensor? packed=None, Tensor? packed_grad=None, Tensor? plan=None"
_G, _E = len(Conv2dGeometry._fields), len(Epilogue._fields)
_Choice: TypeAlias = Tensor | None  # a sliced side's experts

_lib = torch.library.Library("moe_kernels", "DEF")
_lib.define(f"conv2d(Tensor input, Tensor weight, {_EXPERTS}, {_GEOMETRY}, {_MADE}) -> Tensor")
_lib.define(f"conv2d_grad_input(Tensor grad, Tensor weight, {_EXPERTS}, {_GEOMETRY}, SymInt[2] size, {_MADE}) -> Tensor")
_lib.define(
    f"conv2d_grad_weight(Tensor grad, Tensor input, {_EXPERTS}, {_GEOMETRY}, SymInt[4] weight_shape, "
    "bool channels_last=False, Tensor? plan=None) -> Tensor"
)
_lib.define(
    f"conv2d_gated(Tensor input, Tensor weight, {_EXPERTS}, {_GEOMETRY}, Tensor? bias, Tensor? gate, bool unit, "
    f"{_MADE}) -> Tensor"
)
_lib.define(
    f"conv2d_grad_gated(Tensor grad, Tensor weight, {_EXPERTS}, {_GEOMETRY}, Tensor input, Tensor gate, bool unit, "
    f"{_MADE}) -> (Tensor, Tensor)"
)
_lib.define(
    f"conv2d_fused(Tensor input, Tensor weight, {_EXPERTS}, {_GEOMETRY}, Tensor? bias, Tensor? gate, Tensor? scale, "
    "Tensor? shift, Tensor? residual, bool relu, Tensor? packed=None, Tensor? plan=None) -> Tensor"
)
_lib.define("plan(Tensor? out_expert, Tensor? in_expert, int num_out, int num_in) -> Tensor")

conv2d = torch.ops.moe_kernels.conv2d.default
conv2d_grad_input = torch.ops.moe_kernels.conv2d_grad_input.default
conv2d_grad_weight = torch.ops.moe_kernels.conv2d_grad_weight.default
conv2d_fused = torch.ops.moe_kernels.conv2d_fused.default
conv2d_gated = torch.ops.moe_kernels.conv2d_gated.default
conv2d_grad_gated = torch.ops.moe_kernels.conv2d_grad_gated.default
plan = torch.ops.moe_kernels.plan.default


def _geometry(args: Sequence[Any]) -> Conv2dGeometry:
    """The geometry out of an operator's flat arguments; through the dispatcher its tuples come as lists, and out of a
    package of AOTInductor an empty list as None (torch 2.13)."""
    g = Conv2dGeometry._make(args)
    if g.out_starts is None or g.in_starts is None:
        g = g._replace(out_starts=g.out_starts or (), in_starts=g.in_starts or ())
    return g


# --- the backends' calls ------------------------------------------------------------------------------------------------


def _nth(values: Sequence[Any], index: int) -> Any:
    return values[index] if len(values) > index else None


def _conv2d(input: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *made: Any) -> Tensor:
    backend = backends.choose(input.device)
    return backend.forward(input, weight, Experts(out, inner, _nth(made, 2)), g, NO_EPILOGUE, _nth(made, 0))


def _conv2d_grad_input(
    grad: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, size: Sequence[int], *made: Any
) -> Tensor:
    backend = backends.choose(grad.device)
    height, width = size
    return backend.grad_input(grad, weight, Experts(out, inner, _nth(made, 2)), g, (height, width), _nth(made, 1))


def _conv2d_grad_weight(
    grad: Tensor, input: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, shape: Sequence[int], *last: Any
) -> Tensor:
    backend = backends.choose(grad.device)
    return backend.grad_weight(grad, input, Experts(out, inner, _nth(last, 1)), g, tuple(shape), bool(_nth(last, 0)))


def _conv2d_fused(input: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *rest: Any) -> Tensor:
    backend = backends.choose(input.device)
    experts = Experts(out, inner, _nth(rest, _E + 1))
    return backend.forward(input, weight, experts, g, Epilogue._make(rest[:_E]), _nth(rest, _E))


def _conv2d_gated(input: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *rest: Any) -> Tensor:
    bias, gate, unit, *made = rest
    backend = backends.choose(input.device)
    epilogue = NO_EPILOGUE if bias is None and (unit or gate is None) else Epilogue(bias, None if unit else gate)
    return backend.forward(input, weight, Experts(out, inner, _nth(made, 2)), g, epilogue, _nth(made, 0))


def _conv2d_grad_gated(
    grad: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *rest: Any
) -> tuple[Tensor, Tensor]:
    input, gate, unit, *made = rest
    backend = backends.choose(grad.device)
    experts = Experts(out, inner, _nth(made, 2))
    both = backend.grad_input_gated(grad, weight, experts, g, input, None if unit else gate, _nth(made, 1))
    if both is None:
        return _grad_gated_by_parts(grad, weight, out, inner, g, *rest)
    return both[0], both[1].to(gate.dtype)


def _grad_gated_by_parts(
    grad: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *rest: Any
) -> tuple[Tensor, Tensor]:
    """From the ungated input gradient of each virtual sample; differentiable."""
    input, gate, unit, *made = rest
    k = g.samples_per_input
    one_each = g._replace(samples_per_input=1)
    made = [*made, None, None, None][:3]
    dx = call(conv2d_grad_input, grad, weight, out, inner, one_each, input.shape[2:], *made)
    x = input if k == 1 else input.repeat_interleave(k, 0)
    dots = sample_dot(dx, x).to(gate.dtype)
    return sum_choices(_times(dx, gate, unit), k), dots


def _times(x: Tensor, gate: Tensor | None, unit: bool) -> Tensor:
    """``x [V, ...]`` times ``gate [V]``: where its value is 1, only for the sake of a derivative."""
    if gate is None or (unit and not (torch.is_grad_enabled() and gate.requires_grad)):
        return x
    return x * gate.to(x.dtype)[:, None, None, None]


def _plan(out: _Choice, inner: _Choice, num_out: int, num_in: int) -> Tensor:
    first = out if out is not None else inner
    assert first is not None
    return backends.choose(first.device).plan(Experts(out, inner), num_out, num_in, first.shape[0], first.device)


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
    elif op is conv2d_grad_input or op is conv2d_grad_gated:
        height, width = rest[_G] if op is conv2d_grad_input else rest[_G].shape[2:]
        size = (shapes[0][0] // g.samples_per_input, g.in_width, height, width)
        checks.operands(size, shapes[1], ("grad", shapes[0]), g)
        if op is conv2d_grad_gated:
            more |= {"input": rest[_G], "gate": rest[_G + 1]}
            if tuple(rest[_G].shape) != size:
                raise ValueError(f"input: expected shape {size}, got {tuple(rest[_G].shape)}")
            checks.gate(rest[_G + 1], shapes[0][0])
    else:
        shape = output_shape(first, second, g)
        checks.operands(shapes[0], shapes[1], ("output", shape), g)
        if op is conv2d_fused:
            epilogue = Epilogue._make(rest[_G : _G + _E])
            checks.epilogue(first, epilogue, g.out_width, shapes[1][0], 1, shape)
            more |= {name: getattr(epilogue, name) for name in ("bias", "gate", "scale", "shift", "residual")}
        if op is conv2d_gated:
            bias, gate = rest[_G : _G + 2]
            more |= {"bias": bias, "gate": gate}
            if gate is not None:
                checks.gate(gate, shape[0])
            checks.epilogue(first, Epilogue(bias), g.out_width, shapes[1][0], 1, shape)
    checks.alike(**dict(zip(_OPERANDS[op], (first, second), strict=True)), **more)


_OPERANDS: dict[Any, tuple[str, str]] = {
    conv2d: ("input", "weight"),
    conv2d_grad_input: ("grad", "weight"),
    conv2d_grad_weight: ("grad", "input"),
    conv2d_fused: ("input", "weight"),
    conv2d_gated: ("input", "weight"),
    conv2d_grad_gated: ("grad", "weight"),
}
_RUN: dict[Any, Any] = {
    conv2d: _conv2d,
    conv2d_grad_input: _conv2d_grad_input,
    conv2d_grad_weight: _conv2d_grad_weight,
    conv2d_fused: _conv2d_fused,
    conv2d_gated: _conv2d_gated,
    conv2d_grad_gated: _conv2d_grad_gated,
}


# --- shapes -------------------------------------------------------------------------------------------------------------


def output_shape(input: Tensor, weight: Tensor, g: Conv2dGeometry) -> tuple[int, ...]:
    """``[V, K, P, Q]`` of a forward."""
    size = (
        output_size(input.shape[a], weight.shape[a], g.stride[a - 2], g.padding[a - 2], g.dilation[a - 2]) for a in (2, 3)
    )
    return (input.shape[0] * g.samples_per_input, g.out_width, *size)


def _conv2d_fake(input: Tensor, weight: Tensor, out_expert: Any, in_expert: Any, *rest: Any, **made: Any) -> Tensor:
    g = _geometry(rest[:_G])
    keep_starts(g.out_starts, input.device)
    keep_starts(g.in_starts, input.device)
    shape = output_shape(input, weight, g)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=memory_format_of(input))


def _grad_input_fake(grad: Tensor, weight: Tensor, out_expert: Any, in_expert: Any, *rest: Any, **made: Any) -> Tensor:
    g = _geometry(rest[:_G])
    shape = (grad.shape[0] // g.samples_per_input, g.in_width, *rest[_G])
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format_of(grad))


def _grad_gated_fake(
    grad: Tensor, weight: Tensor, out_expert: Any, in_expert: Any, *rest: Any, **made: Any
) -> tuple[Tensor, Tensor]:
    input, gate = rest[_G : _G + 2]
    dx = _grad_input_fake(grad, weight, out_expert, in_expert, *rest[:_G], input.shape[2:])
    return dx, torch.empty_like(gate)


def _plan_fake(out_expert: Any, in_expert: Any, num_out: int, num_in: int) -> Tensor:
    first = out_expert if out_expert is not None else in_expert
    count = max(num_out, 1) * max(num_in, 1)
    return torch.empty((count + 2 + first.shape[0],), dtype=torch.int32, device=first.device)


def _grad_weight_fake(
    grad: Tensor,
    input: Tensor,
    out_expert: Any,
    in_expert: Any,
    *rest: Any,
    channels_last: bool = False,
    plan: Any = None,
) -> Tensor:
    channels_last = rest[_G + 1] if len(rest) > _G + 1 else channels_last
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(tuple(rest[_G]), dtype=grad.dtype, device=grad.device, memory_format=layout)


# --- autograd -----------------------------------------------------------------------------------------------------------


def wanted(ctx: Any, index: int) -> bool:
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


def _below_autograd(op: Any, first: Tensor, second: Tensor, out: _Choice, inner: _Choice, g: Any, *rest: Any) -> Any:
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


def call(op: Any, first: Tensor, second: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *rest: Any) -> Any:
    """``op(first, second, out, inner, *g, *rest)`` with every argument given, past the dispatcher where nobody would
    notice."""
    _refuse_tangents((first, second, *rest))
    if _watched(first, second):
        return op(first, second, out, inner, *g, *rest)
    if torch.is_grad_enabled():
        if op is conv2d_fused:
            return _fused_differentiable(first, second, out, inner, g, *rest)
        if op is conv2d_grad_gated:
            return _grad_gated_differentiable(first, second, out, inner, g, *rest)
        if first.requires_grad or second.requires_grad or (op is conv2d_gated and _extra_gradient(rest[0], rest[1])):
            return _FUNCTION[op].apply(first, second, out, inner, g, *rest, _RUN[op])
    return _RUN[op](first, second, out, inner, g, *rest)


def _extra_gradient(bias: Tensor | None, gate: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in (bias, gate))


# Their last argument computes them: a backend where nothing watches, _in_function elsewhere.


class _Conv2d(_Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, out: _Choice, inner: _Choice, *rest: Any) -> Tensor:
        g, *made, run = rest
        ctx.save_for_backward(input, weight, out, inner, *made)
        ctx.geometry = g
        return run(input, weight, out, inner, *rest[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight, out, inner, *made = ctx.saved_tensors
        g = ctx.geometry
        dx = dw = None
        if wanted(ctx, 0):
            dx = call(conv2d_grad_input, grad, weight, out, inner, g, input.shape[2:], *made)
        if wanted(ctx, 1):
            dw = call(conv2d_grad_weight, grad, input, out, inner, g, weight.shape, is_channels_last(weight), made[2])
        return dx, dw, *[None] * 7


class _GatedConv2d(_Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, out: _Choice, inner: _Choice, *rest: Any) -> Tensor:
        g, bias, gate, unit, *made, run = rest
        ctx.save_for_backward(input, weight, out, inner, bias, gate, *made)
        ctx.geometry, ctx.unit = g, unit
        return run(input, weight, out, inner, *rest[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        input, weight, out, inner, bias, gate, *made = ctx.saved_tensors
        g, unit = ctx.geometry, ctx.unit
        dx = dw = dbias = dgate = gated = None
        if ctx.needs_input_grad[6]:
            dx, dgate = call(conv2d_grad_gated, grad, weight, out, inner, g, input, gate, unit, *made)
        elif wanted(ctx, 0):
            gated = _times(grad, gate, unit)
            dx = call(conv2d_grad_input, gated, weight, out, inner, g, input.shape[2:], *made)
        if wanted(ctx, 1):
            gated = _times(grad, gate, unit) if gated is None else gated
            layout = is_channels_last(weight)
            dw = call(conv2d_grad_weight, gated, input, out, inner, g, weight.shape, layout, made[2])
        if bias is not None and (dgate is not None or ctx.needs_input_grad[5]):
            sums = grad.sum(3, dtype=torch.promote_types(grad.dtype, torch.float32)).sum(2)  # [V, K]
            if dgate is not None:
                rows = gather_rows(_wide(bias), out, g.num_out, g.out_starts, g.out_width)
                dgate = dgate + (sums * rows).sum(1).to(dgate.dtype)
            if ctx.needs_input_grad[5]:
                if gate is not None:
                    sums = sums * gate.to(sums.dtype)[:, None]
                total = bias.shape[0]
                dbias = scatter_rows(sums, out, g.num_out, g.out_starts, g.out_width, total).to(bias.dtype)
        return dx, dw, None, None, None, dbias, dgate, *[None] * 5


class _Conv2dGradInput(_Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, weight: Tensor, out: _Choice, inner: _Choice, *rest: Any) -> Tensor:
        g, _, *made, run = rest
        ctx.save_for_backward(grad, weight, out, inner, *made)
        ctx.geometry = g
        return run(grad, weight, out, inner, *rest[:-1])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Any, ...]:
        grad, weight, out, inner, *made = ctx.saved_tensors
        g = ctx.geometry
        dg = dw = None
        if wanted(ctx, 0):
            dg = call(conv2d, v, weight, out, inner, g, *made)
        if wanted(ctx, 1):
            dw = call(conv2d_grad_weight, grad, v, out, inner, g, weight.shape, is_channels_last(weight), made[2])
        return dg, dw, *[None] * 8


class _Conv2dGradWeight(_Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, input: Tensor, out: _Choice, inner: _Choice, *rest: Any) -> Tensor:
        g, _, _, plan, run = rest
        ctx.save_for_backward(grad, input, out, inner, plan)
        ctx.geometry = g
        return run(grad, input, out, inner, *rest[:-1])

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Any, ...]:
        grad, input, out, inner, plan = ctx.saved_tensors
        g = ctx.geometry
        dg = dx = None
        if wanted(ctx, 0):
            dg = call(conv2d, input, u, out, inner, g, None, None, plan)
        if wanted(ctx, 1):
            dx = call(conv2d_grad_input, grad, u, out, inner, g, input.shape[2:], None, None, plan)
        return dg, dx, *[None] * 7


_FUNCTION: dict[Any, Any] = {
    conv2d: _Conv2d,
    conv2d_grad_input: _Conv2dGradInput,
    conv2d_grad_weight: _Conv2dGradWeight,
    conv2d_gated: _GatedConv2d,
}


def _differentiable(op: Any, required: int, **defaults: Any) -> Any:
    function, run = _FUNCTION[op], functools.partial(_in_function, op)

    def differentiable(*args: Any, **kwargs: Any) -> Tensor:
        # torch leaves out arguments that equal their defaults; the Function wants them all, in order
        rest = list(defaults.items())[len(args) - required :]
        args = (*args, *(kwargs.get(name, value) for name, value in rest))
        args = (*args[:4], _geometry(args[4 : 4 + _G]), *args[4 + _G :])
        _refuse_tangents(args)
        needed = (
            args[0].requires_grad or args[1].requires_grad or (op is conv2d_gated and _extra_gradient(args[5], args[6]))
        )
        if not (torch.is_grad_enabled() and needed):
            return _below_autograd(op, *args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return function.apply(*args, run)
        return function.apply(*args, run)

    return differentiable


def _differentiable_fused(*args: Any, packed: Tensor | None = None, plan: Tensor | None = None) -> Tensor:
    rest = args[4 + _G :]
    rest = (*rest, *(packed, plan)[len(rest) - _E :])
    return _fused_differentiable(*args[:4], _geometry(args[4 : 4 + _G]), *rest)


def _fused_differentiable(
    input: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *rest: Any
) -> Tensor:
    bias, gate, scale, shift, residual, relu, packed, plan = rest
    tensors = (input, weight, bias, gate, scale, shift, residual)
    _refuse_tangents(tensors)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return _below_autograd(conv2d_fused, input, weight, out, inner, g, *rest)
    if bias is None and gate is None:
        y = conv2d(input, weight, out, inner, *g, packed, None, plan)
    else:
        y = conv2d_gated(input, weight, out, inner, *g, bias, gate, False, packed, None, plan)
    return epilogue(y, out, g, scale, shift, residual, relu)


def _differentiable_grad_gated(*args: Any, **made: Any) -> tuple[Tensor, Tensor]:
    rest = (*args[4 + _G :], *(made.get(name) for name in ("packed", "packed_grad", "plan")[len(args) - _G - 7 :]))
    return _grad_gated_differentiable(*args[:4], _geometry(args[4 : 4 + _G]), *rest)


def _grad_gated_differentiable(
    grad: Tensor, weight: Tensor, out: _Choice, inner: _Choice, g: Conv2dGeometry, *rest: Any
) -> tuple[Tensor, Tensor]:
    tensors = (grad, weight, *rest[:2])
    _refuse_tangents(tensors)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return _below_autograd(conv2d_grad_gated, grad, weight, out, inner, g, *rest)
    return _grad_gated_by_parts(grad, weight, out, inner, g, *rest)


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


def _affine_rows(value: Tensor, out_expert: Tensor | None, g: Conv2dGeometry) -> Tensor:
    if value.shape[0] == g.out_width:
        return value[None, :, None, None]
    return gather_rows(_wide(value), out_expert, g.num_out, g.out_starts, g.out_width)[:, :, None, None]


def _wide(value: Tensor) -> Tensor:
    """In float32 at least, so that gathering's derivative, a sum over the samples, accumulates in it."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


# --- autocast -----------------------------------------------------------------------------------------------------------


def _autocast(op: Any, device: str, key: torch._C.DispatchKey) -> Any:
    given = _G + {conv2d_fused: 10, conv2d_gated: 7}.get(op, 4)
    exclude = torch._C.DispatchKeySet(key)

    def call(*args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.get_autocast_dtype(device)
        # packed weights fit only the uncast weight
        plan = kwargs.get("plan", _nth(args, given + (1 if op is conv2d_fused else 2)))
        args = args[:given]
        # float64 is left alone, as by torch's own list of operators
        cast = [
            a.to(dtype)
            if isinstance(a, Tensor) and a.is_floating_point() and a.dtype != torch.float64 and a.device.type == device
            else a
            for a in args
        ]
        with torch._C._ExcludeDispatchKeyGuard(exclude):
            return op(*cast, plan=plan)

    return call


def _kernel(op: Any, *args: Any) -> Tensor:
    _check(op, *args)
    return _RUN[op](*args[:4], _geometry(args[4 : 4 + _G]), *args[4 + _G :])


def _autograd(op: Any, differentiable: Any, *args: Any, **kwargs: Any) -> Tensor:
    if not _watched(args[0], args[1]):  # elsewhere the kernel itself follows, on real tensors
        _check(op, *args)
    return differentiable(*args, **kwargs)


def _register() -> None:
    made = {"packed": None, "packed_grad": None, "plan": None}
    implementations: dict[str, tuple[Any, Any, Any]] = {
        "conv2d": (conv2d, _conv2d_fake, _differentiable(conv2d, _G + 4, **made)),
        "conv2d_grad_input": (
            conv2d_grad_input,
            _grad_input_fake,
            _differentiable(conv2d_grad_input, _G + 5, **made),
        ),
        "conv2d_grad_weight": (
            conv2d_grad_weight,
            _grad_weight_fake,
            _differentiable(conv2d_grad_weight, _G + 5, channels_last=False, plan=None),
        ),
        "conv2d_fused": (conv2d_fused, _conv2d_fake, _differentiable_fused),
        "conv2d_gated": (conv2d_gated, _conv2d_fake, _differentiable(conv2d_gated, _G + 7, **made)),
        "conv2d_grad_gated": (conv2d_grad_gated, _grad_gated_fake, _differentiable_grad_gated),
    }
    for name, (op, fake, differentiable) in implementations.items():
        _lib.impl(name, functools.partial(_kernel, op), "CompositeExplicitAutograd")
        _lib.impl(name, functools.partial(_autograd, op, differentiable), "Autograd")
        torch.library.register_fake(f"moe_kernels::{name}", fake, lib=_lib)
    _lib.impl("plan", _plan, "CompositeExplicitAutograd")
    torch.library.register_fake("moe_kernels::plan", _plan_fake, lib=_lib)
    for device, key in (("cpu", torch._C.DispatchKey.AutocastCPU), ("cuda", torch._C.DispatchKey.AutocastCUDA)):
        for name in ("conv2d", "conv2d_fused", "conv2d_gated"):
            op = getattr(torch.ops.moe_kernels, name).default
            _lib.impl(name, _autocast(op, device, key), key.name)


# --- FLOPs: two for each multiply-accumulate, as torch counts ----------------------------------------------------------


def _flops(samples: int, rows: int, columns: int, weight_shape: Any, g: Conv2dGeometry) -> int:
    return 2 * samples * rows * columns * g.out_width * (g.in_width // g.groups) * weight_shape[2] * weight_shape[3]


def _register_flops() -> None:
    packet = torch.ops.moe_kernels

    @register_flop_formula([packet.conv2d, packet.conv2d_fused, packet.conv2d_gated])
    def conv2d_flops(input_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return _flops(out_shape[0], out_shape[2], out_shape[3], weight_shape, _geometry(args[2 : 2 + _G]))

    @register_flop_formula(packet.conv2d_grad_input)
    def grad_input_flops(grad_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return _flops(grad_shape[0], grad_shape[2], grad_shape[3], weight_shape, _geometry(args[2 : 2 + _G]))

    @register_flop_formula(packet.conv2d_grad_gated)
    def grad_gated_flops(grad_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return _flops(grad_shape[0], grad_shape[2], grad_shape[3], weight_shape, _geometry(args[2 : 2 + _G]))

    @register_flop_formula(packet.conv2d_grad_weight)
    def grad_weight_flops(grad_shape: Any, input_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return _flops(grad_shape[0], grad_shape[2], grad_shape[3], args[2 + _G], _geometry(args[2 : 2 + _G]))


_register()
_register_flops()
