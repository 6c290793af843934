# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: for CUDA tensors, and with TRITON_INTERPRET=1 in numpy for CPU tensors, for tests.

| file | what |
|---|---|
| ``plan.py`` | the routing plan, made on the device |
| ``routed_conv2d.py`` | forward, input gradient with the gate's, weight gradient |
| ``batch_norm.py`` | statistics of each expert's samples, and what a BatchNorm's passes are made of |
| ``configs.py``, ``configs/*.json`` | tiles of each architecture, and which is taken |
| ``tuning.py`` | measured choices, kept on disk |
| ``launch.py`` | starting a kernel; telling one that cannot be built |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from ..fallback import REFERENCE, left_to_reference, warn_once
from ..interface import Backend, Epilogue, Experts, Side

if TYPE_CHECKING:
    from ...geometry import Conv2dGeometry

try:
    import triton

    _import_error: str | None = None
except ImportError as error:
    _import_error = str(error)

if _import_error is None:
    from ... import checks
    from ...layout import dense, gpu_weight, in_format, memory_format_of, nhwc, reads_well
    from ...rows import sum_choices
    from . import batch_norm, plan, routed_conv2d
    from .launch import INTERPRETED, BuildError

__all__ = ["TritonBackend"]

_T = TypeVar("_T")


class TritonBackend(Backend):
    name = "triton"
    plans = True
    plan_below = 512  # from here on those of one sample fill tiles of any size up to 128 well
    normalises = True

    def unavailable(self) -> str | None:
        if _import_error is not None:
            return f"the package triton cannot be imported ({_import_error}); `pip install triton`"
        if not INTERPRETED and not torch.cuda.is_available():
            return "torch sees no CUDA device; TRITON_INTERPRET=1, set before the import, runs the kernels in numpy"
        return None

    def unsupported(self, device: torch.device) -> str | None:
        if _import_error is None and (device.type == "cuda" or (INTERPRETED and device.type == "cpu")):
            return None
        reason = self.unavailable()
        if reason is not None:
            return reason
        return f"computes on CUDA devices only (on the CPU with TRITON_INTERPRET=1), got {device}"

    def describe(self) -> str:
        where = "interpreted in numpy" if INTERPRETED else torch.cuda.get_device_name()
        return f"available; Triton {triton.__version__}, {where}"

    def forward(
        self,
        input: Tensor,
        weight: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        packed: Tensor | None,
    ) -> Tensor:
        def build() -> Tensor:
            checks.choices(experts, geometry, input.shape[0] * geometry.samples_per_input)
            ready = Epilogue(
                bias=dense(epilogue.bias),
                gate=dense(epilogue.gate),
                scale=dense(epilogue.scale),
                shift=dense(epilogue.shift),
                residual=None if epilogue.residual is None else nhwc(epilogue.residual),
                relu=epilogue.relu,
            )
            y = routed_conv2d.forward(nhwc(input), gpu_weight(weight, packed), experts, geometry, ready)
            return in_format(y, memory_format_of(input))

        return _or_reference(
            "forward", input, build, lambda: REFERENCE.forward(input, weight, experts, geometry, epilogue, None)
        )

    def grad_input(
        self,
        grad: Tensor,
        weight: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        size: tuple[int, int],
        packed: Tensor | None,
    ) -> Tensor:
        def build() -> Tensor:
            checks.choices(experts, geometry, grad.shape[0])
            dx, _ = routed_conv2d.grad_input(nhwc(grad), gpu_weight(weight, packed), experts, geometry, size)
            return in_format(sum_choices(dx, geometry.samples_per_input), memory_format_of(grad))

        return _or_reference(
            "grad_input", grad, build, lambda: REFERENCE.grad_input(grad, weight, experts, geometry, size, None)
        )

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
        def build() -> tuple[Tensor, Tensor]:
            checks.choices(experts, geometry, grad.shape[0])
            size = (input.shape[2], input.shape[3])
            value = None if gate is None else gate.contiguous().resolve_neg()
            dx, dots = routed_conv2d.grad_input(
                nhwc(grad), gpu_weight(weight, packed), experts, geometry, size, value, nhwc(input)
            )
            assert dots is not None
            return in_format(sum_choices(dx, geometry.samples_per_input), memory_format_of(grad)), dots

        return _or_reference("grad_input", grad, build, lambda: None)

    def grad_weight(
        self,
        grad: Tensor,
        input: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        shape: tuple[int, ...],
        channels_last: bool,
    ) -> Tensor:
        def build() -> Tensor:
            checks.choices(experts, geometry, grad.shape[0])
            layout = torch.channels_last if channels_last else torch.contiguous_format
            target = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
            routed_conv2d.grad_weight(nhwc(grad), nhwc(input), experts, geometry, target)
            return target

        return _or_reference(
            "grad_weight",
            grad,
            build,
            lambda: REFERENCE.grad_weight(grad, input, experts, geometry, shape, channels_last),
        )

    def pack(self, weight: Tensor, geometry: Conv2dGeometry, size: tuple[int, int], backward: bool) -> Tensor | None:
        return None if reads_well(weight) else weight.contiguous(memory_format=torch.channels_last)

    def plan(self, experts: Experts, num_out: int, num_in: int, samples: int, device: torch.device) -> Tensor:
        def build() -> Tensor:
            return plan.make(experts, num_out, num_in, samples, device)

        return _or_reference(
            "plan", None, build, lambda: super(TritonBackend, self).plan(experts, num_out, num_in, samples, device)
        )

    def moments(self, x: Tensor, side: Side, plan: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        def build() -> tuple[Tensor, Tensor, Tensor]:
            return batch_norm.moments(nhwc(x), self._plan_of(side, plan), side.starts, side.total)

        return _or_reference("moments", x, build, lambda: super(TritonBackend, self).moments(x, side, plan))

    def sums(self, x: Tensor, grad: Tensor, mean: Tensor, side: Side, plan: Tensor | None) -> tuple[Tensor, Tensor]:
        def build() -> tuple[Tensor, Tensor]:
            return batch_norm.sums(nhwc(x), nhwc(grad), mean.contiguous(), self._plan_of(side, plan), side.starts)

        return _or_reference("sums", x, build, lambda: super(TritonBackend, self).sums(x, grad, mean, side, plan))

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
        def build() -> Tensor:
            dy = None if grad is None else nhwc(grad)
            add = None if shift is None else shift.contiguous()
            where = (side.expert, side.num_experts, side.starts)
            y = batch_norm.affine(nhwc(x), *where, scale.contiguous(), mean.contiguous(), add, dy, grad_scale)
            return in_format(y, memory_format_of(x))

        return _or_reference(
            "affine", x, build, lambda: super(TritonBackend, self).affine(x, side, scale, mean, shift, grad, grad_scale)
        )

    def _plan_of(self, side: Side, plan: Tensor | None) -> Tensor:
        if plan is not None:
            if plan.shape != (side.num_experts + 2 + side.expert.shape[0],) or plan.dtype != torch.int32:
                raise ValueError(f"plan: expected that of {side.num_experts} experts, got shape {tuple(plan.shape)}")
            return plan
        return self.plan(Experts(side.expert, None), side.num_experts, 0, side.expert.shape[0], side.expert.device)


def _or_reference(what: str, x: Tensor | None, build: Callable[[], _T], fall_back: Callable[[], _T]) -> _T:
    """The kernels' result; the loop's in float64, and where Triton cannot build a kernel, each with one warning."""
    if x is not None and left_to_reference("triton", x):
        return fall_back()
    try:
        return build()
    except BuildError as error:
        reason = f"{what} runs in the slow reference loop, because Triton cannot build its kernel here: {error}"
        warn_once("triton", reason)
        return fall_back()
