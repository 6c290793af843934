# SPDX-License-Identifier: Apache-2.0
"""Every check of an argument, in one place: what came, what was expected, by the argument's name."""

from __future__ import annotations

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
    "alike",
    "choices",
    "epilogue",
    "experts",
    "gate",
    "geometry",
    "image",
    "layer_input",
    "no_nan",
    "operands",
    "pooled_router",
    "readable",
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


def choice_of(expert: Tensor, scores: Tensor, top_k: int) -> None:
    """Of a choice that is made elsewhere: its form, and its range where values are readable."""
    shape = scores.shape[:1] if top_k == 1 else (scores.shape[0], top_k)
    if expert.dtype != torch.int64 or expert.shape != shape or expert.device != scores.device:
        raise ValueError(
            f"expert: expected int64 {list(shape)} on {scores.device}, "
            f"got {expert.dtype} {list(expert.shape)} on {expert.device}"
        )
    experts("expert", expert, scores.shape[1])


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


def pooled_router(
    input: Any,
    weight: Any,
    bias: Any,
    norm_weight: Any,
    norm_bias: Any,
    normalize: bool,
    gate: Any,
    gates: tuple[str, ...],
) -> None:
    image(input)
    if input.dtype not in DTYPES:
        raise TypeError(f"input: expected one of {', '.join(map(str, DTYPES))}, got {input.dtype}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor [num_experts, C], got {type(weight).__name__}")
    channels = input.shape[1]
    if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != channels:
        raise ValueError(f"weight: expected shape [num_experts, {channels}], got {tuple(weight.shape)}")
    for name, value, count in (
        ("bias", bias, weight.shape[0]),
        ("norm_weight", norm_weight, channels),
        ("norm_bias", norm_bias, channels),
    ):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {type(value).__name__}")
        if tuple(value.shape) != (count,):
            raise ValueError(f"{name}: expected shape [{count}], got {tuple(value.shape)}")
        if not normalize and name.startswith("norm"):
            raise ValueError(f"{name}: expected None where normalize is False, got a tensor")
    casts = not input.is_meta and torch.is_autocast_enabled(input.device.type)  # torch has no autocast for meta
    for name, value in (("weight", weight), ("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if value is None:
            continue
        if not value.is_floating_point():
            raise TypeError(f"{name}: expected a floating tensor, got {value.dtype}")
        if value.dtype != input.dtype and not casts and not name.startswith("norm"):
            raise TypeError(f"{name}: expected the input's dtype {input.dtype}, got {value.dtype}")
        if value.device != input.device:
            raise ValueError(f"{name}: expected the input's device {input.device}, got {value.device}")
    if gate not in gates:
        raise ValueError(f"gate: expected one of {', '.join(gates)}, got {gate!r}")


def readable(x: Tensor) -> bool:
    """Whether looking at values costs no synchronisation and breaks no trace or transform: plain tensors on the CPU."""
    return (
        x.device.type == "cpu"
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


def no_nan(name: str, value: Tensor) -> None:
    """Raises on NaN where values are readable."""
    if readable(value):
        # NaN spreads through a sum; infinities of both signs do too, so a NaN sum is looked at again
        with torch.no_grad():
            bad = bool(torch.isnan(value.sum())) and bool(torch.isnan(value).any())
        if bad:
            raise ValueError(f"{name}: expected no NaN, got NaN in {int(torch.isnan(value).sum())} places")


def experts(name: str, expert: Tensor, num_experts: int) -> None:
    """Raises on an index out of range where values are readable."""
    if not readable(expert) or not len(expert):
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


def geometry(g: Conv2dGeometry) -> None:
    """For operators that are called by themselves: their geometry comes as numbers."""
    for name, values, minimum in (
        ("stride", g.stride, 1),
        ("padding", g.padding, 0),
        ("dilation", g.dilation, 1),
        ("groups", [g.groups], 1),
        ("samples_per_input", [g.samples_per_input], 1),
        ("out_width", [g.out_width], 1),
        ("in_width", [g.in_width], 1),
        ("num_out", [g.num_out], 0),
        ("num_in", [g.num_in], 0),
        ("out_starts", g.out_starts, 0),
        ("in_starts", g.in_starts, 0),
    ):
        if any(v < minimum for v in values):
            raise ValueError(f"{name}: expected at least {minimum}, got {list(values)}")
    for name, starts, count in (("out_starts", g.out_starts, g.num_out), ("in_starts", g.in_starts, g.num_in)):
        if len(starts) not in (0, count):
            raise ValueError(f"{name}: expected none or {count}, one a slice, got {list(starts)}")
    if g.in_width % g.groups or g.out_width % g.groups or (g.groups > 1 and (g.num_in or g.out_starts)):
        raise ValueError(
            f"groups: {g.groups} groups need a whole input side, a whole side or a partition for the output, and widths "
            f"that they divide; got {g}"
        )


def operands(
    input: tuple[int, ...], weight: tuple[int, ...], output: tuple[str, tuple[int, ...]], g: Conv2dGeometry
) -> None:
    """For operators that are called by themselves: that a convolution's three shapes fit each other and the geometry.
    Kernels are handed pointers, and would read past the end of less. ``output`` has its argument's name."""
    name, shape = output
    for who, dims in (("input", input), ("weight", weight), (name, shape)):
        if len(dims) != 4:
            raise ValueError(f"{who}: expected four dimensions, got shape {dims}")
    (batch, channels, *size), (rows, columns, *kernel) = input, weight
    if channels != g.in_width:
        raise ValueError(f"input: expected {g.in_width} channels, got shape {input}")
    for axis, got, count, starts, width in (
        (0, rows, g.num_out, g.out_starts, g.out_width),
        (1, columns, g.num_in, g.in_starts, g.in_width // g.groups),
    ):
        least = max(starts) + width if starts else max(count, 1) * width
        if got < least or (got > least and not starts):
            raise ValueError(
                f"weight: expected {'at least ' if starts else ''}{least} as size of axis {axis}, got shape {weight}"
            )
    if min(kernel) < 1:
        raise ValueError(f"weight: expected a kernel of at least one pixel, got shape {weight}")
    out = tuple(output_size(*of) for of in zip(size, kernel, g.stride, g.padding, g.dilation, strict=True))
    if min(out) < 1:
        raise ValueError(f"input: expected at least the kernel's reach after padding, got shape {input} for {weight}")
    expected = (batch * g.samples_per_input, g.out_width, *out)
    if shape != expected:
        raise ValueError(f"{name}: expected the output's shape {expected}, got {shape}")


def alike(**tensors: Tensor | None) -> None:
    """That floating tensors have one dtype, and all tensors one device."""
    first = next(iter(tensors))
    model = tensors[first]
    assert model is not None
    if model.dtype not in DTYPES:
        raise TypeError(f"{first}: expected one of {', '.join(map(str, DTYPES))}, got {model.dtype}")
    for name, value in tensors.items():
        if value is None:
            continue
        if name.endswith("expert") and value.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {value.dtype}")
        if name in ("input", "weight") and value.dtype != model.dtype:
            raise TypeError(f"{name}: expected the dtype of {first}, {model.dtype}, got {value.dtype}")
        if value.device != model.device:
            raise ValueError(f"{name}: expected the device of {first}, {model.device}, got {value.device}")


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


def gate(value: Tensor, samples: int) -> None:
    """For operators that are called by themselves."""
    if not value.is_floating_point():
        raise TypeError(f"gate: expected a floating tensor, got {value.dtype}")
    if tuple(value.shape) != (samples,):
        raise ValueError(f"gate: expected shape [{samples}], got {tuple(value.shape)}")


def layer_input(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routing: Routing,
    in_routing: Routing | None,
    geometry: Conv2dGeometry,
) -> None:
    """The checks of each call behind :func:`image`; cheap, because they are paid at every layer."""
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
            raise TypeError(f"{name}: expected the input's dtype {dtype}, got {tensor.dtype}; cast one of them")
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
    if expert.dtype != torch.int64:  # a Routing checks it, but a conversion of a tree of tensors goes past that
        raise TypeError(f"{name}: expected expert to be int64, got {expert.dtype}")
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
