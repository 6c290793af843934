# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of csrc/cpu, handed raw pointers. Images are channels_last inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from ..geometry import output_size
from ..layout import in_format, memory_format_of, nhwc
from ..rows import sum_choices
from . import native
from .interface import NO_EPILOGUE, Backend
from .native import DTYPE as _DTYPE
from .native import conv2d_shape
from .native import module as _C
from .native import pointer as _pointer

if TYPE_CHECKING:
    from ..geometry import Conv2dGeometry
    from .interface import Behind, Epilogue, Experts, Side

__all__ = ["CpuBackend"]

_FORWARD, _GRAD_INPUT = 0, 1
_MAP, _MOMENTS, _SUMS, _DOT = range(4)  # as moe::cpu::FeatureKernel
_NHWC = torch.channels_last
# Two sliced sides have a packed block for each pair of slices; more than this many times the weight is not worth keeping,
# but for small weights, whose few channels are padded to a whole panel.
_MAX_PACKED_RATIO, _SMALL_PACKED = 8, 1 << 18


class CpuBackend(Backend):
    name = "cpu"
    normalises = True
    rectifies = True

    def unavailable(self) -> str | None:
        return native.unavailable()

    def unsupported(self, device: torch.device) -> str | None:
        return self.unavailable() or (None if device.type == "cpu" else f"computes on the CPU only, got {device}")

    def describe(self) -> str:
        try:
            isa = _C.isa()
        except ValueError as error:  # MOE_KERNELS_CPU_ISA names one that this CPU has not
            return str(error)
        return f"available; {isa}; {_C.build_info()}"

    def isa(self) -> str:
        """The instruction set chosen at run time: avx512, avx2 or generic.

        Raises:
            ValueError: if MOE_KERNELS_CPU_ISA names one that cannot be used here.
        """
        return _C.isa()

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        packed: Tensor | None,
    ) -> Tensor:
        g = geometry
        dtype = input.dtype
        batch, channels, height, width = input.shape
        kh, kw = weight.shape[2], weight.shape[3]
        rows = output_size(height, kh, g.stride[0], g.padding[0], g.dilation[0])
        columns = output_size(width, kw, g.stride[1], g.padding[1], g.dilation[1])
        samples = batch * g.samples_per_input
        x, weight = nhwc(input), weight.resolve_neg()
        y = torch.empty((samples, g.out_width, rows, columns), dtype=dtype, device=input.device, memory_format=_NHWC)
        shape = conv2d_shape(samples, g, channels, height, width, rows, columns, kh, kw)
        slices, keep = _slices(experts, g, samples)
        pointers, also_keep = _epilogue(epilogue, dtype, g.out_width)
        _C.conv2d_forward(
            _DTYPE[dtype], torch.get_num_threads(), shape, slices, _laid_out(weight), x.data_ptr(),
            weight.data_ptr(), _packed(packed), y.data_ptr(), *pointers,
        )  # fmt: skip
        del keep, also_keep
        return in_format(y, memory_format_of(input))

    def grad_input(
        self,
        grad: Tensor,
        weight: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        size: tuple[int, int],
        packed: Tensor | None,
    ) -> Tensor:
        g = geometry
        samples, _, rows, columns = grad.shape
        dy, weight = nhwc(grad), weight.resolve_neg()
        dx = torch.empty((samples, g.in_width, *size), dtype=grad.dtype, device=grad.device, memory_format=_NHWC)
        native_shape = conv2d_shape(samples, g, g.in_width, *size, rows, columns, weight.shape[2], weight.shape[3])
        slices, keep = _slices(experts, g, samples)
        _C.conv2d_grad_input(
            _DTYPE[grad.dtype], torch.get_num_threads(), native_shape, slices, _laid_out(weight), dy.data_ptr(),
            weight.data_ptr(), _packed(packed), dx.data_ptr(),
        )  # fmt: skip
        del keep
        dx = sum_choices(dx, g.samples_per_input)
        return in_format(dx, memory_format_of(grad))

    def grad_input_gated(
        self,
        grad: Tensor,
        weight: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        input: Tensor,
        gate: Tensor | None,
        packed: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:
        if geometry.samples_per_input != 1:
            return None
        height, width = input.shape[2:]
        dx = self.grad_input(grad, weight, experts, geometry, (height, width), packed)
        dots = torch.empty(input.shape[0], dtype=_accumulation(input.dtype), device=input.device)
        _features(_DOT, nhwc(input), x=nhwc(dx), grad=nhwc(input), first=dots)
        return dx if gate is None else dx * gate.to(dx.dtype)[:, None, None, None], dots

    def grad_weight(
        self,
        grad: Tensor,
        input: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        shape: tuple[int, ...],
        channels_last: bool,
    ) -> Tensor:
        g = geometry
        samples, _, rows, columns = grad.shape
        _, channels, height, width = input.shape
        dy = nhwc(grad)
        x = nhwc(input)
        layout = _NHWC if channels_last else torch.contiguous_format
        dw = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        native_shape = conv2d_shape(samples, g, channels, height, width, rows, columns, shape[2], shape[3])
        slices, keep = _slices(experts, g, samples)
        _C.conv2d_grad_weight(
            _DTYPE[grad.dtype], torch.get_num_threads(), native_shape, slices, _laid_out(dw), dy.data_ptr(),
            x.data_ptr(), dw.data_ptr(),
        )  # fmt: skip
        del keep
        return dw

    def packed_form(self, weight: Tensor, geometry: Conv2dGeometry, size: tuple[int, int]) -> tuple[int, int]:
        shape, dtype = _shape_of_any_batch(weight, geometry, size), _DTYPE.get(weight.dtype)
        if shape is None or dtype is None:
            return 0, 0
        return _C.algorithm(_FORWARD, dtype, shape), _C.algorithm(_GRAD_INPUT, dtype, shape)

    def pack(self, weight: Tensor, geometry: Conv2dGeometry, size: tuple[int, int], backward: bool) -> Tensor | None:
        g = geometry
        shape = _shape_of_any_batch(weight, g, size)
        if weight.dtype not in _DTYPE or weight.device.type != "cpu" or shape is None:
            return None
        slices = (0, g.num_out, g.out_starts, 0, g.num_in, g.in_starts)
        direction, dtype = (_GRAD_INPUT if backward else _FORWARD), _DTYPE[weight.dtype]
        numel = _C.pack_numel(direction, dtype, shape, slices)
        if numel > max(_MAX_PACKED_RATIO * weight.numel(), _SMALL_PACKED):
            return None
        weight = weight.resolve_neg()
        block = torch.empty(numel, dtype=_accumulation(weight.dtype), device=weight.device)
        threads = torch.get_num_threads()
        _C.pack(direction, dtype, threads, shape, slices, _laid_out(weight), weight.data_ptr(), block.data_ptr())
        return block

    def moments(self, x: Tensor, side: Side, plan: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        first, second, third = (_values(x, side.total) for _ in range(3))
        x = nhwc(x)
        _features(_MOMENTS, x, side, x=x, first=first, second=second, third=third)
        return first, second, third

    def sums(self, x: Tensor, grad: Tensor, mean: Tensor, side: Side, plan: Tensor | None) -> tuple[Tensor, Tensor]:
        return self._sums(x, grad, mean, side, None)

    def sums_behind(
        self, x: Tensor, grad: Tensor | None, mean: Tensor, side: Side, behind: Behind
    ) -> tuple[Tensor, Tensor]:
        return self._sums(x, grad, mean, side, behind)

    def _sums(
        self, x: Tensor, grad: Tensor | None, mean: Tensor, side: Side, behind: Behind | None
    ) -> tuple[Tensor, Tensor]:
        first, second = (_values(x, side.total) for _ in range(2))
        x = nhwc(x)
        _features(
            _SUMS, x, side, behind is not None, x=x, grad=_beside(grad, x), mean=_read(mean, x), first=first,
            second=second, **_behind(behind, x),
        )  # fmt: skip
        return first, second

    def affine(
        self,
        x: Tensor,
        side: Side,
        scale: Tensor,
        mean: Tensor,
        shift: Tensor | None,
        grad: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> Tensor:
        given = {} if grad is None else {"grad": grad, "grad_scale": grad_scale}
        return self._map(x, side, scale, mean, shift, False, given)

    def affine_behind(
        self,
        x: Tensor,
        side: Side,
        scale: Tensor | None,
        mean: Tensor,
        shift: Tensor | None,
        grad: Tensor | None,
        behind: Behind,
    ) -> Tensor:
        return self._map(x, side, scale, mean, shift, True, {"grad": grad, **_behind(behind, x)})

    def _map(
        self,
        x: Tensor,
        side: Side,
        scale: Tensor | None,
        mean: Tensor,
        shift: Tensor | None,
        relu: bool,
        given: dict[str, Tensor | None],
    ) -> Tensor:
        layout = memory_format_of(x)
        x = nhwc(x)
        y = torch.empty_like(x)
        grad = _beside(given.pop("grad", None), x)
        values = {name: _read(value, x) for name, value in given.items()}
        _features(
            _MAP, x, side, relu, x=x, scale=_read(scale, x), mean=_read(mean, x), shift=_read(shift, x), y=y, grad=grad,
            **values,
        )  # fmt: skip
        return in_format(y, layout)

    def rectify(
        self,
        x: Tensor,
        side: Side | None = None,
        scale: Tensor | None = None,
        mean: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        y, means = torch.empty_like(x), x.new_empty(x.shape[:2], dtype=_accumulation(x.dtype))
        _features(
            _MAP, x, side, True, x=x, scale=_read(scale, x), mean=_read(mean, x), shift=_read(shift, x),
            residual=_beside(residual, x), y=y, first=means,
        )  # fmt: skip
        return y, means

    def rectify_backward(self, grad: Tensor | None, grad_means: Tensor | None, y: Tensor) -> Tensor:
        dx = torch.empty_like(y)
        _features(_MAP, y, None, True, x=y, grad=_beside(grad, y), pooled_grad=_read(grad_means, y), y=dx)
        return dx


# as moe::cpu::FeatureJob
_POINTERS = (
    "x", "grad", "residual", "scale", "mean", "shift", "grad_scale", "kept_shift", "pooled_grad", "y", "first", "second",
    "third",
)  # fmt: skip


def _features(kernel: int, like: Tensor, side: Side | None = None, relu: bool = False, **tensors: Tensor | None) -> None:
    """A kernel of csrc/cpu/features.h over channels_last features of this shape; the tensors are named as there."""
    samples, channels, height, width = like.shape
    expert = None
    slices: tuple[int, int, Any] = (0, 0, ())
    total = channels
    if side is not None:
        expert, total = side.expert.contiguous(), side.total
        slices = (expert.data_ptr(), side.num_experts, side.starts)
    sizes = (samples, height * width, channels, total)
    pointers = [_pointer(tensors.get(name)) for name in _POINTERS]
    _C.features(kernel, _DTYPE[like.dtype], torch.get_num_threads(), relu, sizes, slices, pointers)
    del expert  # it has to outlive the call


def _beside(features: Tensor | None, x: Tensor) -> Tensor | None:
    """Features as kernels read them beside ``x``."""
    return None if features is None else nhwc(features.to(x.dtype))


def _behind(behind: Behind | None, x: Tensor) -> dict[str, Tensor | None]:
    if behind is None:
        return {}
    return {
        "grad_scale": _read(behind.scale, x),
        "kept_shift": _read(behind.shift, x),
        "pooled_grad": _read(behind.grad_means, x),
    }


def _values(x: Tensor, count: int) -> Tensor:
    return torch.empty(count, dtype=_accumulation(x.dtype), device=x.device)


def _read(values: Tensor | None, x: Tensor) -> Tensor | None:
    """Values of channels as kernels read them beside ``x``."""
    return None if values is None else values.detach().to(_accumulation(x.dtype)).contiguous().resolve_neg()


def _packed(packed: Tensor | None) -> tuple[int, int]:
    """Where packed weights are, and how many numbers."""
    return (0, 0) if packed is None else (packed.data_ptr(), packed.numel())


def _laid_out(weight: Tensor) -> tuple[int, ...]:
    """As moe::cpu::WeightLayout."""
    return (weight.shape[0], weight.shape[1], *weight.stride())


def _shape_of_any_batch(weight: Tensor, g: Conv2dGeometry, size: tuple[int, int]) -> tuple[int, ...] | None:
    """What packing takes of a call for images of ``size``; None where such images have no output."""
    kernel = weight.shape[2], weight.shape[3]
    rows, columns = (output_size(*s) for s in zip(size, kernel, g.stride, g.padding, g.dilation, strict=True))
    return conv2d_shape(0, g, g.in_width, *size, rows, columns, *kernel) if rows > 0 and columns > 0 else None


def _slices(experts: Experts, g: Conv2dGeometry, samples: int) -> tuple[tuple[Any, ...], Any]:
    """The native form of both sides, and the tensors that must outlive the call."""
    checks.choices(experts, g, samples)
    out = experts.out.contiguous() if g.num_out and experts.out is not None else None
    inner = experts.inner.contiguous() if g.num_in and experts.inner is not None else None
    slices = (_pointer(out), g.num_out, g.out_starts, _pointer(inner), g.num_in, g.in_starts)
    return slices, (out, inner)


_NO_POINTERS = (0, 0, 0, 0, False, 0, False)


def _epilogue(epilogue: Epilogue, dtype: torch.dtype, width: int) -> tuple[tuple[Any, ...], Any]:
    """The native form of an epilogue, and the tensors that must outlive the call."""
    if epilogue is NO_EPILOGUE:
        return _NO_POINTERS, None
    acc = _accumulation(dtype)
    values = [None if t is None else t.detach().to(acc).contiguous().resolve_neg() for t in epilogue[:4]]
    residual = epilogue.residual
    if residual is not None:
        residual = nhwc(residual)
    affine = epilogue.scale if epilogue.scale is not None else epilogue.shift
    per_slice = affine is not None and affine.shape[0] != width
    pointers = (*map(_pointer, values), per_slice, _pointer(residual), epilogue.relu)
    return pointers, (values, residual)


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
