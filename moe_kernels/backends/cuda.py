# SPDX-License-Identifier: Apache-2.0
"""The CUDA C++ kernels of csrc/cuda, compiled ahead of time: on the device, and in a simulator on the host, for tests.

Nothing is compiled at a first call, and a call is one launch wherever it can be: up to 32 samples are ordered by the
kernels themselves, a split reduction is added by the tile's last block. Which tile, whether the reduction is split and
how much scratch memory that takes is decided in csrc/cuda/convolution.cu and grad_weight.cu, from shapes and the device.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..geometry import output_size
from ..layout import dense, gpu_weight, in_format, memory_format_of, nhwc, reads_well
from ..rows import starts_on, sum_choices
from . import native
from .fallback import REFERENCE, left_to_reference, uses_tf32
from .interface import NO_EPILOGUE, Backend, Epilogue, Experts
from .native import DTYPE, conv2d_shape, pointer

if TYPE_CHECKING:
    from ..geometry import Conv2dGeometry

__all__ = ["CudaBackend", "SimulatedCudaBackend"]

_SMALL_BATCH = 16  # up to here a kernel may start before the one ahead of it has ended, where the device can
_OLDEST, _OVERLAPPING = (8, 0), (9, 0)  # compute capabilities: compiled for; with programmatic dependent launch
_ABSENT = (0, 0, 0)
_NO_EPILOGUE = (_ABSENT, _ABSENT, _ABSENT, _ABSENT, 0, False, False)
_COUNTERS = 4096  # of split reductions: a device has fewer multiprocessors than that
_MAX_ROUTER_CHANNELS = 8192  # their means lie in a block's shared memory
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # the public way makes an object first


class _Device(NamedTuple):
    multiprocessors: int
    capability: tuple[int, int]


class ConvolutionNeeds(NamedTuple):
    """What a forward or an input gradient needs beside its tensors, and what is started for it."""

    workspace: int  # floats
    counters: int
    dots_columns: int
    reads_plan: bool
    tile_m: int
    tile_n: int
    copies: bool  # asynchronously, 16 bytes at a time; else element by element
    packed: bool  # a tile takes rows of several samples
    splits: int  # parts of the reduction


class GradWeightNeeds(NamedTuple):
    """The same of a weight gradient."""

    workspace: int
    reads_plan: bool
    tile_m: int
    tile_n: int
    copies: bool
    segment: int  # samples of one part
    parts: int


class CudaBackend(Backend):
    name = "cuda"
    plans = True
    plan_below = 128  # rows of the largest tile
    routes = True

    def __init__(self) -> None:
        self._kernels: Any = getattr(native.module, self.name, None)
        if self._kernels is not None:
            self.plans_from = self._kernels.few_samples + 1  # so many the kernels order by themselves
        self._supported: set[torch.device] = set()
        # Where counters of split reductions lie: zeros between kernels, one set for each stream, because kernels of two
        # may run at once. Not torch's memory, which may belong to a pool (a graph's) that ends before the process does.
        self._counters: dict[tuple[int, int], int] = {}

    def unavailable(self) -> str | None:
        reason = native.unavailable()
        if reason is not None:
            return reason
        if self._kernels is None:
            return native.module.cuda_missing
        if torch.cuda.is_available():
            return None
        why = "torch sees no CUDA device" if torch.version.cuda else "this torch is built without CUDA"
        return f"built ({self._kernels.build_info}), but {why}"

    def unsupported(self, device: torch.device) -> str | None:
        if device in self._supported:  # asked at each call
            return None
        reason = self.unavailable()
        if reason is not None:
            return reason
        if device.type != "cuda":
            return f"computes on CUDA devices only, got {device}"
        capability = _properties(device).capability
        if capability < _OLDEST:
            return f"its kernels need compute capability 8.0 or later, {device} has {capability[0]}.{capability[1]}"
        index = torch.cuda.current_device() if device.index is None else device.index
        try:
            self._kernels.check_device((index, 1, False, 0))
        except RuntimeError as error:
            return f"built by {self._kernels.build_info}, which has no code for {device} ({error})"
        self._supported.add(device)
        return None

    def describe(self) -> str:
        return f"available; {self._kernels.build_info}; {torch.cuda.get_device_name()}"

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
        if left_to_reference(self.name, input):
            return REFERENCE.forward(input, weight, experts, g, epilogue, None)
        samples = input.shape[0] * g.samples_per_input
        checks.choices(experts, g, samples)
        size = [
            output_size(input.shape[a], weight.shape[a], g.stride[a - 2], g.padding[a - 2], g.dilation[a - 2])
            for a in (2, 3)
        ]
        y = _empty(input, samples, g.out_width, *size)
        shape = conv2d_shape(samples, g, *input.shape[1:], *y.shape[2:], *weight.shape[2:])
        self._convolve(nhwc(input), gpu_weight(weight, packed), y, experts, g, shape, epilogue, None, False)
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
        if left_to_reference(self.name, grad):
            return REFERENCE.grad_input(grad, weight, experts, geometry, size, None)
        dx, _ = self._grad_input(grad, weight, experts, geometry, size, packed, NO_EPILOGUE, None)
        return dx

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
        if left_to_reference(self.name, grad):
            return None
        size = (input.shape[2], input.shape[3])
        epilogue = NO_EPILOGUE if gate is None else Epilogue(gate=gate)
        dx, dots = self._grad_input(grad, weight, experts, geometry, size, packed, epilogue, nhwc(input))
        assert dots is not None
        return dx, dots.sum((1, 2))

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
        if left_to_reference(self.name, grad):
            return REFERENCE.grad_weight(grad, input, experts, g, shape, channels_last)
        samples = grad.shape[0]
        checks.choices(experts, g, samples)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        dw = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        dy, x = nhwc(grad), nhwc(input)
        sides, keep = _sides(experts, g, grad.device)
        plan, (count, pairs) = experts.plan, experts.groups(g, samples)
        kernels, where = self._kernels, self._where(grad.device, samples)
        sizes = conv2d_shape(samples, g, *input.shape[1:], *grad.shape[2:], *shape[2:])
        fixed = (
            where, DTYPE[grad.dtype], uses_tf32(grad), sizes, *sides, (shape[0], shape[1]), dw.stride(),
        )  # fmt: skip
        needs = _grad_weight_needs(
            kernels, where[1], *fixed[1:4], g.num_out, g.num_in, *fixed[6:], count, pairs, dy.data_ptr() % 16,
            x.data_ptr() % 16,
        )  # fmt: skip
        if needs.reads_plan and plan is None:
            plan = self._plan(experts, g, samples, pairs, grad.device)
        workspace = torch.empty(needs.workspace, dtype=torch.float32, device=grad.device)
        kernels.grad_weight(
            *fixed, (count, pairs, pointer(plan)), dy.data_ptr(), x.data_ptr(), dw.data_ptr(), workspace.data_ptr()
        )
        del keep
        return dw

    def pack(self, weight: Tensor, geometry: Conv2dGeometry, size: tuple[int, int], backward: bool) -> Tensor | None:
        return None if reads_well(weight) else weight.contiguous(memory_format=torch.channels_last)

    def plan(self, experts: Experts, num_out: int, num_in: int, samples: int, device: torch.device) -> Tensor:
        count = max(num_out, 1) * max(num_in, 1)
        kernels = self._kernels
        if count > kernels.most_groups:
            return super().plan(experts, num_out, num_in, samples, device)
        plan = torch.empty(count + 2 + samples, dtype=torch.int32, device=device)
        out = dense(experts.out) if num_out else None
        inner = dense(experts.inner) if num_in else None
        where = self._where(device, samples)
        kernels.plan(where, samples, num_out, num_in, pointer(out), pointer(inner), plan.data_ptr())
        return plan

    def route(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        normalize: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        batch, channels, height, width = input.shape
        given = [norm_weight, norm_bias, weight, bias]
        if channels > _MAX_ROUTER_CHANNELS or any(t is not None and t.dtype == torch.float64 for t in (input, *given)):
            return None
        num_experts = weight.shape[0]
        x = nhwc(input)
        kept = [dense(t) for t in given]
        values = [_values(t) for t in kept]
        expert = torch.empty(batch, dtype=torch.int64, device=x.device)
        scores = torch.empty((batch, num_experts), dtype=x.dtype, device=x.device)
        gate = torch.empty(batch, dtype=torch.float32, device=x.device)
        self._kernels.router(
            self._where(x.device, batch), DTYPE[x.dtype], batch, channels, height * width, num_experts, x.data_ptr(),
            values[0], values[1], normalize, eps, values[2], values[3], expert.data_ptr(), scores.data_ptr(),
            gate.data_ptr(),
        )  # fmt: skip
        del kept
        return expert, scores, gate

    # --- what the calls share -----------------------------------------------------------------------------------------

    def _where(self, device: torch.device, samples: int) -> tuple[int, int, bool, int]:
        """Device, multiprocessors, whether kernels may overlap, stream."""
        properties = _properties(device)
        index = torch.cuda.current_device() if device.index is None else device.index
        overlap = samples <= _SMALL_BATCH and properties.capability >= _OVERLAPPING
        stream = torch.cuda.current_stream(device).cuda_stream if _raw_stream is None else _raw_stream(index)
        return index, properties.multiprocessors, overlap, stream

    def _grad_input(
        self,
        grad: Tensor,
        weight: Tensor,
        experts: Experts,
        g: Conv2dGeometry,
        size: tuple[int, int],
        packed: Tensor | None,
        epilogue: Epilogue,
        image: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        samples = grad.shape[0]
        checks.choices(experts, g, samples)
        dx = _empty(grad, samples, g.in_width, *size)
        shape = conv2d_shape(samples, g, *dx.shape[1:], *grad.shape[2:], *weight.shape[2:])
        weight = gpu_weight(weight, packed)
        dots = self._convolve(nhwc(grad), weight, dx, experts, g, shape, epilogue, image, True)
        return in_format(sum_choices(dx, g.samples_per_input), memory_format_of(grad)), dots

    def _convolve(
        self,
        source: Tensor,
        weight: Tensor,
        target: Tensor,
        experts: Experts,
        g: Conv2dGeometry,
        shape: tuple[int, ...],
        epilogue: Epilogue,
        image: Tensor | None,
        backward: bool,
    ) -> Tensor | None:
        """Fills ``target``; with ``image`` returns the dot products of each pixel, ``[V, columns, H * W]``."""
        samples, device = target.shape[0], target.device
        sides, keep = _sides(experts, g, device)
        plan, (count, pairs) = experts.plan, experts.groups(g, samples)
        kernels, where = self._kernels, self._where(device, samples)
        fixed = (
            where, DTYPE[source.dtype], uses_tf32(source), backward, shape, *sides, tuple(weight.shape[:2]),
            weight.stride(), _alignment(g.in_starts),
        )  # fmt: skip
        needs = _convolution_needs(
            kernels, where[1], *fixed[1:5], g.num_out, g.num_in, *fixed[7:], count, pairs, source.data_ptr() % 16,
            weight.data_ptr() % 16,
        )  # fmt: skip
        if needs.reads_plan and plan is None:
            plan = self._plan(experts, g, samples, pairs, device)
        workspace = dots = None
        counters: int | Tensor = 0
        if needs.workspace:
            workspace = torch.empty(needs.workspace, dtype=torch.float32, device=device)
            counters = self._zeros(where, needs.counters, device)
        if image is not None:
            dots = torch.empty((samples, needs.dots_columns, shape[3] * shape[4]), dtype=torch.float32, device=device)
        values, after = _epilogue(epilogue, g.out_width)
        try:
            kernels.convolution(
                *fixed, (count, pairs, pointer(plan)), source.data_ptr(), weight.data_ptr(), target.data_ptr(),
                *after, pointer(image), pointer(dots), pointer(workspace),
                counters if isinstance(counters, int) else counters.data_ptr(),
            )  # fmt: skip
        except RuntimeError:
            self._counters.clear()  # who knows what they hold
            raise
        del keep, values
        return dots

    def _plan(self, experts: Experts, g: Conv2dGeometry, samples: int, pairs: bool, device: torch.device) -> Tensor:
        num_in = g.num_in if pairs or not g.num_out else 0
        return self.plan(experts, g.num_out, num_in, samples, device)

    def _zeros(self, where: tuple[int, int, bool, int], size: int, device: torch.device) -> int | Tensor:
        """Counters that are zero before a kernel and after it: where they lie, or a tensor for this call."""
        if size > _COUNTERS or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return torch.zeros(size, dtype=torch.int32, device=device)  # a graph's own: it may run beside others
        key = (where[0], where[3])
        if key not in self._counters:
            self._counters[key] = self._kernels.make_counters(where, _COUNTERS)
        return self._counters[key]


class SimulatedCudaBackend(CudaBackend):
    """The same kernels on CPU tensors, checked at each access and slow: csrc/sim, docs/cuda-simulator.md."""

    name = "cuda_sim"

    def unavailable(self) -> str | None:
        reason = native.unavailable()
        if reason is None and self._kernels is None:
            return "built without the simulator; reinstall with MOE_KERNELS_SIMULATOR=1 in the environment"
        return reason

    def unsupported(self, device: torch.device) -> str | None:
        return self.unavailable() or (None if device.type == "cpu" else f"simulates on the CPU only, got {device}")

    def describe(self) -> str:
        return f"available; {self._kernels.build_info}"

    def _where(self, device: torch.device, samples: int) -> tuple[int, int, bool, int]:
        # few multiprocessors: small shapes split their reductions too; a stream for each thread, which waits for nobody
        return 0, 4, samples <= _SMALL_BATCH, threading.get_ident()


@functools.cache
def _properties(device: torch.device) -> _Device:
    properties = torch.cuda.get_device_properties(device)
    return _Device(properties.multi_processor_count, (properties.major, properties.minor))


@functools.lru_cache(maxsize=4096)
def _convolution_needs(kernels: Any, multiprocessors: int, *shapes: Any) -> ConvolutionNeeds:
    """What csrc/cuda says that a call of these shapes needs. Addresses matter by their alignment only."""
    *fixed, num_out, num_in, totals, strides, alignment, count, pairs, source, weight = shapes
    sides = ((0, num_out, 0), (0, num_in, 0))
    where = (0, multiprocessors, False, 0)
    groups = (count, pairs, 0)
    return ConvolutionNeeds._make(
        kernels.convolution_needs(where, *fixed, *sides, totals, strides, alignment, groups, source, weight)
    )


@functools.lru_cache(maxsize=4096)
def _grad_weight_needs(kernels: Any, multiprocessors: int, *shapes: Any) -> GradWeightNeeds:
    *fixed, num_out, num_in, totals, strides, count, pairs, grad, input = shapes
    sides = ((0, num_out, 0), (0, num_in, 0))
    where = (0, multiprocessors, False, 0)
    groups = (count, pairs, 0)
    return GradWeightNeeds._make(kernels.grad_weight_needs(where, *fixed, *sides, totals, strides, groups, grad, input))


@functools.lru_cache(maxsize=1024)
def _alignment_of(starts: tuple[int, ...]) -> int:
    return math.gcd(*starts)


def _alignment(starts: Sequence[int]) -> int:
    """A number that divides every first channel; 0, which everything divides, where they are a partition's."""
    return _alignment_of(tuple(starts)) if starts else 0


def _sides(experts: Experts, g: Conv2dGeometry, device: torch.device) -> tuple[tuple[Any, Any], Any]:
    """The native form of both sides, and the tensors that must outlive the call."""
    out = dense(experts.out) if g.num_out else None
    inner = dense(experts.inner) if g.num_in else None
    starts = starts_on(g.out_starts, device), starts_on(g.in_starts, device)
    sides = (pointer(out), g.num_out, pointer(starts[0])), (pointer(inner), g.num_in, pointer(starts[1]))
    return sides, (out, inner, starts)


def _epilogue(epilogue: Epilogue, width: int) -> tuple[Any, tuple[Any, ...]]:
    """The tensors that must outlive the call, and the native form."""
    if epilogue is NO_EPILOGUE:
        return None, _NO_EPILOGUE
    values = [_single(dense(t)) for t in epilogue[:4]]
    residual = None if epilogue.residual is None else nhwc(epilogue.residual)
    affine = values[2] if values[2] is not None else values[3]
    per_slice = affine is not None and affine.shape[0] != width
    return (values, residual), (*map(_values, values), pointer(residual), per_slice, epilogue.relu)


def _single(value: Tensor | None) -> Tensor | None:
    """The kernels read no float64."""
    return value.float() if value is not None and value.dtype == torch.float64 else value


def _values(value: Tensor | None) -> tuple[int, int, int]:
    return _ABSENT if value is None else (value.data_ptr(), value.numel(), DTYPE[value.dtype])


def _empty(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
