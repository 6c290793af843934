# SPDX-License-Identifier: Apache-2.0
"""Every check of an argument, in one place: what came, what was expected, by the argument's name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .geometry import output_size
from .slices import ExpertSlices

if TYPE_CHECKING:
    from .backends.interface import Epilogue, Experts
    from .geometry import Conv2dGeometry
    from .routing import Routing

__all__ = [
    "DTYPES",
    "choices",
    "epilogue",
    "experts",
    "image",
    "layer_input",
    "no_nan",
    "operands",
    "routing",
    "scores",
    "sides",
    "weight",
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def routing(expert: Any, gate: Any, num_experts: Any) -> None:
    if not isinstance(expert, Tensor):
        raise TypeError(f"expert: expected a tensor, got {type(expert).__name__}")
    if expert.dtype != torch.int64:
        raise TypeError(f"expert: expected int64, got {expert.dtype}")
    if expert.dim() not in (1, 2):
        raise ValueError(f"expert: expected shape [B] or [B, k], got {tuple(expert.shape)}")
    if isinstance(num_experts, bool) or not isinstance(num_experts, int):
        raise TypeError(f"num_experts: expected an integer, got {num_experts!r}")
    if num_experts < 1:
        raise ValueError(f"num_experts: expected at least 1, got {num_experts}")
    if expert.dim() == 2 and expert.shape[1] < 1:
        raise ValueError("expert: expected at least one choice a sample, got k = 0")
    if gate is None:
        return
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError(f"gate: expected a floating tensor or None, got {getattr(gate, 'dtype', type(gate).__name__)}")
    if gate.shape != expert.shape:
        raise ValueError(f"gate: expected the shape of expert, {tuple(expert.shape)}, got {tuple(gate.shape)}")
    if gate.device != expert.device:
        raise ValueError(f"gate: expected device {expert.device} as expert, got {gate.device}")


def scores(value: Any, top_k: Any, gate: Any, gates: tuple[str, ...]) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(
            f"scores: expected a floating tensor [B, num_experts], got {getattr(value, 'dtype', type(value).__name__)}"
        )
    if value.dim() != 2 or value.shape[1] < 1:
        raise ValueError(f"scores: expected shape [B, num_experts], got {tuple(value.shape)}")
    if isinstance(top_k, bool) or not isinstance(top_k, int):
        raise TypeError(f"top_k: expected an integer, got {top_k!r}")
    if not 1 <= top_k <= value.shape[1]:
        raise ValueError(f"top_k: expected 1 .. {value.shape[1]} (the number of experts), got {top_k}")
    if gate not in gates:
        raise ValueError(f"gate: expected one of {', '.join(gates)}, got {gate!r}")
    if top_k > 1 and gate in ("straight_through", "raw_straight_through"):
        raise ValueError(f"gate: {gate!r} is defined for top_k = 1 only, got top_k = {top_k}; use 'softmax' or 'none'")
    no_nan("scores", value)


def no_nan(name: str, value: Tensor) -> None:
    """Raises on NaN where looking costs no synchronisation: on the CPU, outside a trace."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and type(value) in (Tensor, torch.nn.Parameter):
        # NaN spreads through a sum; infinities of both signs do too, so a NaN sum is looked at again
        with torch.no_grad():
            bad = bool(torch.isnan(value.sum())) and bool(torch.isnan(value).any())
        if bad:
            raise ValueError(f"{name}: expected no NaN, got NaN in {int(torch.isnan(value).sum())} places")


def experts(name: str, expert: Tensor, num_experts: int) -> None:
    """Raises on an index out of range where looking costs no synchronisation: on the CPU, outside a trace."""
    if expert.device.type != "cpu" or torch.compiler.is_compiling() or type(expert) is not Tensor or not len(expert):
        return
    low, high = (int(v) for v in torch.aminmax(expert))
    if low < 0 or high >= num_experts:
        sample = int(((expert < 0) | (expert >= num_experts)).nonzero()[0])
        raise ValueError(
            f"{name}: expert index {int(expert[sample])} of sample {sample} is outside 0 .. {num_experts - 1}"
        )


def choices(experts: Experts, geometry: Conv2dGeometry, samples: int) -> None:
    """That a sliced side has one choice for each sample: kernels would read past the end of fewer."""
    for name, expert, count in (
        ("out_expert", experts.out, geometry.num_out),
        ("in_expert", experts.inner, geometry.num_in),
    ):
        if count and (expert is None or expert.numel() != samples):
            got = "None" if expert is None else str(expert.numel())
            raise ValueError(f"{name}: expected {samples} choices, one a sample, got {got}")


def operands(
    input: tuple[torch.dtype, tuple[int, ...]],
    weight: tuple[torch.dtype, tuple[int, ...]],
    grad: tuple[torch.dtype, tuple[int, ...]],
    geometry: Conv2dGeometry,
) -> None:
    """That a convolution's three tensors, each given as dtype and shape, fit each other and the geometry; for operators
    that are called by themselves. Kernels are handed pointers, and would read past the end of less."""
    g = geometry
    for name, (dtype, shape) in (("input", input), ("weight", weight), ("grad", grad)):
        if len(shape) != 4:
            raise ValueError(f"{name}: expected four dimensions, got shape {shape}")
        if dtype not in DTYPES or dtype != weight[0]:
            raise TypeError(f"{name}: expected one of {', '.join(map(str, DTYPES))}, all alike; got {dtype}")
    (batch, channels, *size), (total_out, total_in, *kernel) = input[1], weight[1]
    if channels != g.in_width:
        raise ValueError(f"input: expected {g.in_width} channels, got shape {input[1]}")
    reach = (_reach(g.num_out, g.out_starts, g.out_width), _reach(g.num_in, g.in_starts, g.in_width) // g.groups)
    if total_out < reach[0] or total_in < reach[1] or min(kernel) < 1:
        raise ValueError(f"weight: expected at least [{reach[0]}, {reach[1]}, 1, 1] as the slices need, got {weight[1]}")
    out = (output_size(*of) for of in zip(size, kernel, g.stride, g.padding, g.dilation, strict=True))
    expected = (batch * g.samples_per_input, g.out_width, *out)
    if grad[1] != expected or min(expected[2:]) < 1:
        raise ValueError(f"grad: expected the output's shape {expected}, got {grad[1]}")


def _reach(count: int, starts: Sequence[int], width: int) -> int:
    return width if not count else max(starts) + width if starts else count * width


def sides(out_slices: Any, in_slices: Any, groups: Any) -> None:
    for name, value in (("out_slices", out_slices), ("in_slices", in_slices)):
        if not isinstance(value, ExpertSlices):
            raise TypeError(f"{name}: expected ExpertSlices, got {type(value).__name__}")
    if isinstance(groups, bool) or not isinstance(groups, int):
        raise TypeError(f"groups: expected an integer, got {groups!r}")
    if groups < 1:
        raise ValueError(f"groups: expected at least 1, got {groups}")
    if groups == 1:
        return
    if not in_slices.is_whole or not (out_slices.is_whole or out_slices.is_partition):
        raise ValueError(
            f"groups: {groups} groups need a whole input side and a partition (or a whole side) for the output; "
            f"got in_slices={in_slices}, out_slices={out_slices}"
        )
    for name, width in (("in_channels", in_slices.width), ("out_channels", out_slices.width)):
        if width % groups:
            raise ValueError(f"groups: {groups} does not divide {name} = {width}")


def weight(value: Tensor, out_slices: ExpertSlices, in_slices: ExpertSlices, groups: int) -> None:
    expected = (out_slices.total, in_slices.total // groups)
    if value.dim() != 4 or tuple(value.shape[:2]) != expected:
        raise ValueError(
            f"weight: expected shape [{expected[0]}, {expected[1]}, kh, kw], got {tuple(value.shape)}"
            f" (out_slices.total={out_slices.total}, in_slices.total={in_slices.total}, groups={groups})"
        )


def positive_pair(name: str, value: tuple[int, int], minimum: int) -> None:
    if min(value) < minimum:
        raise ValueError(f"{name}: expected at least {minimum}, got {value}")


def image(value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"input: expected a tensor, got {type(value).__name__}")
    if value.dim() != 4:
        raise ValueError(f"input: expected shape [B, C, H, W], got {tuple(value.shape)}")


def epilogue(input: Tensor, values: Epilogue, width: int, total: int, top_k: int, output_shape: tuple[int, ...]) -> None:
    bias, gate, scale, shift, residual, _ = values
    if bias is not None and tuple(bias.shape) != (total,):
        raise ValueError(f"bias: expected shape [{total}], got {tuple(bias.shape)}")
    if gate is not None and tuple(gate.shape) != output_shape[:1]:
        raise ValueError(f"gate: expected shape [{output_shape[0]}], got {tuple(gate.shape)}")
    for name, value in (("scale", scale), ("shift", shift)):
        if value is None:
            continue
        if tuple(value.shape) not in ((width,), (total,)):
            raise ValueError(f"{name}: expected shape [{width}] or [{total}], got {tuple(value.shape)}")
        if top_k > 1 and value.shape[0] != width:
            raise ValueError(
                f"{name}: expected shape [{width}] where choices are summed (k = {top_k}), got {tuple(value.shape)}"
            )
    if scale is not None and shift is not None and scale.shape != shift.shape:
        raise ValueError(f"shift: expected the shape of scale, {tuple(scale.shape)}, got {tuple(shift.shape)}")
    if residual is not None:
        if tuple(residual.shape) != output_shape:
            raise ValueError(f"residual: expected the output's shape {output_shape}, got {tuple(residual.shape)}")
        if residual.dtype != input.dtype:
            raise TypeError(f"residual: expected the input's dtype {input.dtype}, got {residual.dtype}")
    for name, value in (("scale", scale), ("shift", shift), ("residual", residual)):
        if value is not None and value.device != input.device:
            raise ValueError(f"{name}: expected the input's device {input.device}, got {value.device}")


def layer_input(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routing: Routing,
    in_routing: Routing | None,
    geometry: Conv2dGeometry,
) -> None:
    """The checks of each call; cheap, because they are paid at every layer."""
    image(input)
    if input.shape[1] != geometry.in_width:
        raise ValueError(
            f"input: expected {geometry.in_width} channels, got {input.shape[1]} in shape {tuple(input.shape)}"
        )
    dtype, device = input.dtype, input.device
    if dtype not in DTYPES:
        raise TypeError(f"input: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name}: expected the input's dtype {dtype}, got {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected the input's device {device}, got {tensor.device}")
    _choice("routing", routing, geometry.num_out, input)
    if geometry.num_in:
        if in_routing is None:
            raise ValueError("in_routing: expected the Routing that made the input's channels, got None")
        _choice("in_routing", in_routing, geometry.num_in, input)
    size = (input.shape[2], input.shape[3])
    for axis in (0, 1):
        reach = geometry.dilation[axis] * (weight.shape[2 + axis] - 1) + 1
        if size[axis] + 2 * geometry.padding[axis] < reach:
            raise ValueError(
                f"input: the padded size {size[axis] + 2 * geometry.padding[axis]} of axis {2 + axis} is smaller than "
                f"the kernel's reach {reach}"
            )


def _choice(name: str, choice: Any, num_experts: int, input: Tensor) -> None:
    expert = getattr(choice, "expert", None)
    if expert is None:
        raise TypeError(f"{name}: expected a Routing, got {type(choice).__name__}")
    if num_experts and choice.num_experts != num_experts:
        raise ValueError(f"{name}: expected a choice among {num_experts} experts, got one among {choice.num_experts}")
    samples = input.shape[0]
    if expert.shape[0] != samples and expert.shape[0] != samples * choice.choices:
        raise ValueError(
            f"{name}: expected a routing of batch size {samples} as the input's, got {expert.shape[0]}"
            + (f" ({choice.choices} choices a sample)" if choice.choices > 1 else "")
        )
    if expert.device != input.device:
        raise ValueError(f"{name}: expected the input's device {input.device}, got {expert.device}")
