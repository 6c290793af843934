# SPDX-License-Identifier: Apache-2.0
"""Routed layers as modules."""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from . import backends, checks, norm, ops, planning
from .collectives import all_reduce
from .functional import apply_geometry
from .geometry import Conv2dGeometry, pair
from .routing import Routing
from .rows import gather_rows, scatter_rows
from .slices import ExpertSlices
from .tracing import fusing

__all__ = ["RoutedBatchNorm2d", "RoutedConv2d", "RoutedLayerNorm", "RoutedLinear"]

_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


# How many steps torch.optim's optimizers have made in this process. The fused ones write to parameters without counting
# it in their version.
_steps = [0]


def _count_step(*args: Any) -> None:
    _steps[0] += 1


register_optimizer_step_post_hook(_count_step)


class _Packed(NamedTuple):
    """Packed weights and what they were made of."""

    weight: weakref.ref[Tensor]
    # An alias of the weight, which keeps its memory from being handed to another: ``param.data = ...`` is no new version,
    # and without the alias the next weight may lie where this one lay.
    memory: Tensor
    version: int
    steps: int
    backend: str
    size: tuple[int, int]  # of images they were last used for
    form: tuple[int, int]
    forward: Tensor | None
    grad_input: Tensor | None
    backward: bool  # grad_input has been asked for; until then it is None


class _RoutedLayer(nn.Module):
    """A weight with one slice for each expert, its initialisation and its cache of packed weights.

    The cache exists in eval mode only and belongs to one value of the weight: it is dropped by ``train()``, ``eval()``,
    ``load_state_dict``, ``to()`` and its kin, by every step of a torch.optim optimizer, by another tensor or other memory
    in the weight's place, and by every in-place change that torch counts. In-place writes through ``.data`` or a numpy
    view are not counted: call :meth:`clear_cache` after them.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    geometry: Conv2dGeometry
    _cache: _Packed | None

    def _set_sides(
        self, in_side: Any, out_side: Any, num_experts: int | None, groups: int, names: tuple[str, str]
    ) -> None:
        if num_experts is None and not isinstance(in_side, ExpertSlices) and not isinstance(out_side, ExpertSlices):
            raise TypeError(f"num_experts: expected an integer, or ExpertSlices as {names[0]} or {names[1]}; got None")
        if num_experts is not None and (isinstance(num_experts, bool) or not isinstance(num_experts, int)):
            raise TypeError(f"num_experts: expected an integer or None, got {num_experts!r}")
        for name, side in zip(names, (in_side, out_side), strict=True):
            if not isinstance(side, ExpertSlices) and (isinstance(side, bool) or not isinstance(side, int)):
                raise TypeError(f"{name}: expected an integer or ExpertSlices, got {side!r}")
            if isinstance(side, int) and side < 1:
                raise ValueError(f"{name}: expected at least 1, got {side}")
        if groups != 1 and (isinstance(in_side, ExpertSlices) or isinstance(out_side, ExpertSlices)):
            raise ValueError(
                f"groups: only integers for {names[0]} and {names[1]} go with groups > 1, got groups={groups}"
            )
        self.in_slices = in_side if isinstance(in_side, ExpertSlices) else ExpertSlices.whole(in_side)
        if isinstance(out_side, ExpertSlices):
            self.out_slices = out_side
        elif num_experts is None:
            self.out_slices = ExpertSlices.whole(out_side)
        else:
            self.out_slices = ExpertSlices.partition(out_side, num_experts)
        sliced = [s.num_experts for s in (self.out_slices, self.in_slices) if not s.is_whole]
        if num_experts is not None and isinstance(out_side, ExpertSlices) and sliced and num_experts not in sliced:
            raise ValueError(f"num_experts: expected {sliced[0]} as the slices have, got {num_experts}")
        self.num_experts = num_experts if num_experts is not None else (sliced[0] if sliced else 1)
        checks.sides(self.out_slices, self.in_slices, groups)

    def _make_parameters(self, kernel_size: tuple[int, ...], groups: int, bias: bool, device: Any, dtype: Any) -> None:
        self._weight_shape = (self.out_slices.total, self.in_slices.total // groups, *kernel_size)
        self._bias_shape = (self.out_slices.total,)
        self.weight = nn.Parameter(torch.empty(self._weight_shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(self._bias_shape, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._fan_in = self.in_slices.width // groups * math.prod(kernel_size)
        self._cache = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Conv2d's and nn.Linear's initialisation, by the fan of one expert and not of all: uniform in
        ±1/sqrt(fan_in)."""
        bound = 1 / math.sqrt(self._fan_in)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _parameters_now(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, which may have been replaced, or be computed by a parametrization.

        Raises:
            ValueError: for other shapes than the layer was made with; kernels would read past their end.
        """
        weight, bias = self.weight, self.bias
        if weight is None or weight.shape != self._weight_shape:
            got = None if weight is None else list(weight.shape)
            raise ValueError(f"weight: expected shape {list(self._weight_shape)}, got {got}")
        if bias is not None and bias.shape != self._bias_shape:
            raise ValueError(f"bias: expected shape {list(self._bias_shape)}, got {list(bias.shape)}")
        return weight, bias

    def clear_cache(self) -> None:
        """Drops the packed weights; needed after an in-place write through ``weight.data`` only."""
        self._cache = None

    def _packed(self, weight: Tensor, image: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """This weight packed for the backend in use and images of this size, from the cache where it holds."""
        if (
            self.training
            or not isinstance(image, Tensor)
            or image.dim() != 4
            or ops.traced(weight, weight)
            or weight.is_inference()
            or torch.is_autocast_enabled(weight.device.type)
        ):
            return None, None
        backend = backends.choose(weight.device)
        height, width = image.shape[2:]
        size = (height, width)
        wanted = torch.is_grad_enabled()  # an attack or a saliency map; serving keeps one form only
        cache = self._cache
        if not (
            cache is not None
            and cache.weight() is weight
            and cache.memory.is_set_to(weight)
            and cache.version == weight._version
            and cache.steps == _steps[0]
            and cache.backend == backend.name
        ):
            cache = None
        if cache is not None and cache.size != size:
            form = backend.packed_form(self._weight4d(cache.memory), self.geometry, size)
            cache = self._cache = cache._replace(size=size) if form == cache.form else None
        if cache is None or (wanted and not cache.backward):
            # outside inference mode, so that what is packed under it also serves a later backward
            with torch.inference_mode(False), torch.no_grad():
                memory = weight.detach()
                value = self._weight4d(memory)
                form = backend.packed_form(value, self.geometry, size)
                forward = backend.pack(value, self.geometry, size, False) if cache is None else cache.forward
                grad_input = backend.pack(value, self.geometry, size, True) if wanted else None
            made_of = weakref.ref(weight), memory, weight._version, _steps[0], backend.name
            cache = self._cache = _Packed(*made_of, size, form, forward, grad_input, wanted)
        return cache.forward, cache.grad_input

    def _weight4d(self, weight: Tensor) -> Tensor:
        return weight

    def train(self, mode: bool = True) -> Any:
        self._cache = None
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._cache = None
        return super()._apply(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._cache = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": None}  # pickle and deepcopy


_SETTINGS = ("stride", "padding", "dilation", "padding_mode")
_FIXED = ("in_channels", "out_channels", "in_slices", "out_slices", "num_experts", "kernel_size", "groups", "geometry")


class RoutedConv2d(_RoutedLayer):
    """nn.Conv2d with one slice of weights for each expert; each sample is convolved with its expert's slice alone.

    With integers and ``num_experts=N`` the drop-in form: ``in_channels`` come in, ``out_channels`` go out, as with
    nn.Conv2d; the weight is ``[N * out_channels, in_channels / groups, kh, kw]`` (the layout of AdvMoE's released
    code). Either side may instead be an :class:`ExpertSlices`; an integer without ``num_experts`` is a whole side.

    Args:
        in_channels, out_channels: channels in and out, or ExpertSlices.
        kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as nn.Conv2d's.
        num_experts: N, for the drop-in form.

    Shapes: input ``[B, in, H, W]``, output ``[B, out, P, Q]``; channels_last in, channels_last out.

    ``stride``, ``padding``, ``dilation`` and ``padding_mode`` may be assigned later, as nn.Conv2d's; the rest may not.

    Raises:
        TypeError, ValueError: naming the argument; also in ``forward`` for a weight or bias of another shape.
        AttributeError: for a new value of what cannot change.
    """

    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    padding_mode: str
    _pad_before: tuple[int, int, int, int] | None

    def __init__(
        self,
        in_channels: int | ExpertSlices,
        out_channels: int | ExpertSlices,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        num_experts: int | None = None,
    ) -> None:
        super().__init__()
        self._set_sides(in_channels, out_channels, num_experts, groups, ("in_channels", "out_channels"))
        self.in_channels = self.in_slices.width
        self.out_channels = self.out_slices.width
        self.kernel_size = pair(kernel_size, "kernel_size")
        checks.positive_pair("kernel_size", self.kernel_size, 1)
        self.groups = groups
        self._set_geometry(stride, padding, dilation, padding_mode)
        self._make_parameters(self.kernel_size, groups, bias, device, dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        """As with nn.Conv2d, ``stride``, ``padding``, ``dilation`` and ``padding_mode`` may be changed later."""
        if name in _SETTINGS and "geometry" in self.__dict__:
            self._set_geometry(**{**{n: getattr(self, n) for n in _SETTINGS}, name: value})
            self.clear_cache()
        elif name in _FIXED and name in self.__dict__ and value != self.__dict__[name]:
            raise AttributeError(f"{name}: a RoutedConv2d keeps what it was made with; make a new one")
        else:
            super().__setattr__(name, value)

    def _set_geometry(self, stride: Any, padding: Any, dilation: Any, padding_mode: str) -> None:
        stride, dilation = pair(stride, "stride"), pair(dilation, "dilation")
        checks.positive_pair("stride", stride, 1)
        checks.positive_pair("dilation", dilation, 1)
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode: expected one of {', '.join(_PADDING_MODES)}, got {padding_mode!r}")
        if not isinstance(padding, str):
            padding = pair(padding, "padding")
        top, bottom, left, right = _borders(self.kernel_size, stride, padding, dilation)
        inside = padding_mode == "zeros" and top == bottom and left == right
        within = (top, left) if inside else (0, 0)
        self.__dict__.update(
            stride=stride,
            padding=padding,
            dilation=dilation,
            padding_mode=padding_mode,
            # what the convolution itself cannot pad is padded before it, in the order of F.pad
            _pad_before=None if inside else (left, right, top, bottom),
            geometry=Conv2dGeometry.of(self.out_slices, self.in_slices, stride, within, dilation, self.groups),
        )

    def forward(self, input: Tensor, routing: Routing, in_routing: Routing | None = None) -> Tensor:
        if self._pad_before is not None:
            checks.image(input)
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._pad_before, mode=mode)
        weight, bias = self._parameters_now()
        packed = (None, None) if self.training else self._packed(weight, input)
        return apply_geometry(input, weight, bias, routing, in_routing, self.geometry, packed)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, num_experts={self.num_experts}"]
        parts.append(f"kernel_size={self.kernel_size}, stride={self.stride}")
        if self.padding not in ((0, 0), "valid"):
            parts.append(f"padding={self.padding!r}" if isinstance(self.padding, str) else f"padding={self.padding}")
        if self.dilation != (1, 1):
            parts.append(f"dilation={self.dilation}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        return ", ".join([*parts, *_side_repr(self)])


def _borders(
    kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int] | str, dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Padding at the top, bottom, left and right."""
    if not isinstance(padding, str):
        checks.positive_pair("padding", padding, 0)
        return padding[0], padding[0], padding[1], padding[1]
    if padding == "valid":
        return 0, 0, 0, 0
    if padding != "same":
        raise ValueError(f"padding: expected integers, 'same' or 'valid', got {padding!r}")
    if stride != (1, 1):
        raise ValueError(f"padding: 'same' needs stride 1, got stride={stride}")
    total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
    return total[0] // 2, total[0] - total[0] // 2, total[1] // 2, total[1] - total[1] // 2


class RoutedLinear(_RoutedLayer):
    """nn.Linear with one slice of weights for each expert: a routed 1×1 convolution.

    Args:
        in_features, out_features: features in and out, or ExpertSlices.
        bias, device, dtype: as nn.Linear's.
        num_experts: N, for the drop-in form; the weight is then ``[N * out_features, in_features]``.

    Shapes: input ``[B, in]`` or ``[B, T, in]`` (T tokens of a sample go to the sample's expert), output ``[..., out]``.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        in_features: int | ExpertSlices,
        out_features: int | ExpertSlices,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        num_experts: int | None = None,
    ) -> None:
        super().__init__()
        self._set_sides(in_features, out_features, num_experts, 1, ("in_features", "out_features"))
        self.in_features = self.in_slices.width
        self.out_features = self.out_slices.width
        self.geometry = Conv2dGeometry.of(self.out_slices, self.in_slices, (1, 1), (0, 0), (1, 1), 1)
        self._make_parameters((), 1, bias, device, dtype)

    def _weight4d(self, weight: Tensor) -> Tensor:
        return weight[:, :, None, None]

    def forward(self, input: Tensor, routing: Routing, in_routing: Routing | None = None) -> Tensor:
        if not isinstance(input, Tensor):
            raise TypeError(f"input: expected a tensor, got {type(input).__name__}")
        if input.dim() not in (2, 3):
            raise ValueError(f"input: expected shape [B, in] or [B, T, in], got {tuple(input.shape)}")
        weight, bias = self._parameters_now()
        tokens = input.shape[1] if input.dim() == 3 else 1
        # tokens as rows of an image, features as its channels: the memory of channels_last, without a copy
        image = input.reshape(input.shape[0], tokens, 1, input.shape[-1]).permute(0, 3, 1, 2)
        packed = (None, None) if self.training else self._packed(weight, image)
        y = apply_geometry(image, self._weight4d(weight), bias, routing, in_routing, self.geometry, packed)
        y = y.permute(0, 2, 3, 1).flatten(2)  # [V, T, out]
        return y if input.dim() == 3 else y.squeeze(1)

    def extra_repr(self) -> str:
        parts = [f"in_features={self.in_features}, out_features={self.out_features}, num_experts={self.num_experts}"]
        return ", ".join([*parts, f"bias={self.bias is not None}", *_side_repr(self)])


class RoutedBatchNorm2d(nn.Module):
    """nn.BatchNorm2d with affine parameters and running statistics of each expert's own.

    A sample is normalised by the statistics of its expert's samples of the batch. Given :class:`ExpertSlices` instead of
    a number of channels, the values belong to the channels of the whole side, and are shared where windows overlap.

    Args:
        num_features: channels of one expert, or ExpertSlices.
        num_experts: N; not with ExpertSlices.
        eps, momentum, affine, track_running_stats, device, dtype: as nn.BatchNorm2d's. ``num_batches_tracked`` counts,
            for each channel, the batches that had a sample of it.

    Shapes: input ``[V, C, H, W]`` and output the same; parameters and statistics ``[N * C]``, or ``[slices.total]``.

    An expert without samples keeps its running statistics.

    Raises:
        ValueError: if an expert has one value per channel where the batch's own statistics are used (in training, or
            without running ones), as nn.BatchNorm2d; looked at on the CPU, outside a trace. For a wrong shape or routing.
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    synchronized = False  # set by moe_kernels.sync
    process_group: Any = None

    def __init__(
        self,
        num_features: int | ExpertSlices,
        num_experts: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if isinstance(num_features, ExpertSlices):
            if num_experts is not None and num_experts != num_features.num_experts:
                raise ValueError(
                    f"num_experts: expected {num_features.num_experts} as the slices have, got {num_experts}"
                )
            self.slices = num_features
        elif num_experts is None:
            raise TypeError("num_experts: expected an integer, or ExpertSlices as num_features; got None")
        elif num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {num_features}")
        else:
            self.slices = ExpertSlices.partition(num_features, num_experts)
        self.num_features = self.slices.width
        self.num_experts = self.slices.num_experts
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        total = self.slices.total
        if affine:
            self.weight = nn.Parameter(torch.empty(total, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(total, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        for name, make in (("running_mean", torch.zeros), ("running_var", torch.ones)):
            self.register_buffer(name, make(total, device=device, dtype=dtype) if track_running_stats else None)
        count = torch.zeros(total, dtype=torch.int64, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor, routing: Routing) -> Tensor:
        expert = self._checked(input, routing)
        by_kernels = planning.has_kernels_for_norm(input) or (fusing() and not self._takes_statistics())
        if not self.slices.is_whole and not self.synchronized and by_kernels:
            return self._by_kernels(input, routing, expert)
        wide = torch.promote_types(input.dtype, torch.float32)
        x = input.to(wide)
        if self._takes_statistics():
            mean, var, count = self._batch_statistics(x, expert)
            if self.training and self.track_running_stats:
                self.update(mean.detach(), var.detach(), count)
        else:
            assert self.running_mean is not None and self.running_var is not None
            mean, var = self.running_mean.to(wide), self.running_var.to(wide)
        scale = torch.rsqrt(var + self.eps)
        if self.affine:
            scale = scale * self.weight.to(wide)
        centred = x - self._rows(mean, expert)
        y = centred * self._rows(scale, expert)
        if self.affine:
            y = y + self._rows(self.bias.to(wide), expert)
        return y.to(input.dtype)

    def _checked(self, input: Tensor, routing: Routing) -> Tensor:
        """Each sample's expert."""
        if input.dim() != 4 or input.shape[1] != self.num_features:
            raise ValueError(f"input: expected shape [V, {self.num_features}, H, W], got {tuple(input.shape)}")
        if not isinstance(routing, Routing):
            raise TypeError(f"routing: expected a Routing, got {type(routing).__name__}")
        expert = routing.expert.reshape(-1)
        if expert.shape[0] != input.shape[0]:
            raise ValueError(
                f"routing: expected {input.shape[0]} choices as the input's samples, got {expert.shape[0]}; a top-k "
                "routing goes through expand() first"
            )
        if routing.num_experts != self.num_experts and not self.slices.is_whole:
            raise ValueError(f"routing: expected {self.num_experts} experts, got {routing.num_experts}")
        if not self.slices.is_whole:
            checks.experts("routing", expert, self.num_experts)
        return expert

    def side(self, input: Tensor, routing: Routing) -> backends.Side:
        """Whose values each sample takes, for kernels that do more than this layer in one pass (``features.py``).

        Raises:
            ValueError, TypeError: as the forward.
        """
        expert = self._checked(input, routing)
        if self._takes_statistics() and checks.readable(input):
            self._refuse_single_values(input, expert)
        return self._side(expert)

    def _side(self, expert: Tensor) -> backends.Side:
        s = self.slices
        return backends.Side(expert, s.num_experts, () if s.is_partition else s.starts, s.width, s.total)

    def _takes_statistics(self) -> bool:
        """Whether the batch's own statistics are used, and not the running ones."""
        return self.training or self.running_mean is None or self.running_var is None

    def _by_kernels(self, input: Tensor, routing: Routing, expert: Tensor) -> Tensor:
        side = self._side(expert)
        wide = torch.promote_types(input.dtype, torch.float32)
        if not self._takes_statistics():
            assert self.running_mean is not None and self.running_var is not None
            scale = torch.rsqrt(self.running_var.to(wide) + self.eps)
            if self.affine:
                scale = scale * self.weight.to(wide)
            shift = self.bias.to(wide) if self.affine else None
            # kept for a backward, which a training step in between must not spoil
            mean = self.running_mean.to(wide, copy=torch.is_grad_enabled())
            return norm.affine(input, scale, mean, shift, side, None)
        if checks.readable(input):
            self._refuse_single_values(input, expert)
        plan = planning.plan_for_norm(routing, input, self.num_experts)
        weight, bias = (self.weight, self.bias) if self.affine else (None, None)
        y, mean, var, count = norm.batch_norm(input, weight, bias, self.eps, side, plan)
        if self.training and self.track_running_stats:
            self.update(mean, var, count)
        return y

    def _rows(self, value: Tensor, expert: Tensor) -> Tensor:
        s = self.slices
        count = 0 if s.is_whole else s.num_experts
        return gather_rows(value, expert, count, () if s.is_partition else s.starts, s.width)[:, :, None, None]

    def _sum(self, rows: Tensor, expert: Tensor) -> Tensor:
        s = self.slices
        count = 0 if s.is_whole else s.num_experts
        return scatter_rows(rows, expert, count, () if s.is_partition else s.starts, s.width, s.total)

    def _batch_statistics(self, x: Tensor, expert: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of values of each channel of the whole side: ``[total]`` each."""
        count = self._refuse_single_values(x, expert)
        safe = count.clamp_min(1)
        mean = self._of_all(self._sum(x.sum(3).sum(2), expert)) / safe
        centred = x - self._rows(mean, expert)
        var = self._of_all(self._sum((centred * centred).sum(3).sum(2), expert)) / safe
        return mean, var, count

    def _of_all(self, value: Tensor) -> Tensor:
        """Summed over all processes, where they are one batch (:func:`moe_kernels.sync.synchronize_batch_norms`)."""
        return all_reduce(value, self.process_group) if self.synchronized else value

    def _refuse_single_values(self, x: Tensor, expert: Tensor) -> Tensor:
        """The number of values of each channel of the whole side.

        Raises:
            ValueError: if one has a single value, where that can be read.
        """
        pixels = x.shape[2] * x.shape[3]
        count = self._of_all(self._sum(x.new_full((x.shape[0], x.shape[1]), float(pixels)), expert))
        if checks.readable(x) and bool((count == 1).any()):
            channel = int((count == 1).nonzero()[0])
            s, present = self.slices, expert.unique().tolist()
            names = [str(e) for e in present if s.is_whole or s.starts[e] <= channel < s.starts[e] + s.width]
            raise ValueError(
                "input: expected more than one value per channel where the batch's own statistics are used, got one for "
                f"expert {' and '.join(names)} (input shape {tuple(x.shape)}); a larger batch, fewer experts or a shared "
                "BatchNorm avoid it"
            )
        return count

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        """Moves the running statistics of those channels that had values: mean, biased variance, number, ``[total]``."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        seen = count > 0
        self.num_batches_tracked.add_(seen)  # assigned to a module, torch 2.11 cannot compile it
        if self.momentum is None:
            step = 1.0 / self.num_batches_tracked.clamp_min(1).to(mean.dtype)
        else:
            step = torch.full_like(mean, self.momentum)
        step = torch.where(seen, step, torch.zeros_like(step))
        unbiased = var * (count / (count - 1).clamp_min(1))
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.copy_(torch.lerp(running.to(mean.dtype), value, step))

    def extra_repr(self) -> str:
        text = f"{self.num_features}, num_experts={self.num_experts}, eps={self.eps}, momentum={self.momentum}"
        text += f", affine={self.affine}, track_running_stats={self.track_running_stats}"
        return text if self.slices.is_partition else f"{text}, slices={self.slices}"


class RoutedLayerNorm(nn.Module):
    """nn.LayerNorm over the last dimension with affine parameters of each expert's own.

    Shapes: input ``[V, ..., D]`` and output the same; parameters ``[N * D]``.

    Raises:
        ValueError: for a wrong shape or routing.
    """

    def __init__(
        self, num_features: int, num_experts: int, eps: float = 1e-5, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        for name, size in (("num_features", num_features), ("num_experts", num_experts)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.slices = ExpertSlices.partition(num_features, num_experts)
        self.num_features = num_features
        self.num_experts = num_experts
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(self.slices.total, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(self.slices.total, device=device, dtype=dtype))

    def forward(self, input: Tensor, routing: Routing) -> Tensor:
        if input.dim() < 2 or input.shape[-1] != self.num_features:
            raise ValueError(f"input: expected shape [V, ..., {self.num_features}], got {tuple(input.shape)}")
        expert = routing.expert.reshape(-1)
        if expert.shape[0] != input.shape[0] or routing.num_experts != self.num_experts:
            raise ValueError(
                f"routing: expected {input.shape[0]} choices of {self.num_experts} experts, got {expert.shape[0]} of "
                f"{routing.num_experts}; a top-k routing goes through expand() first"
            )
        checks.experts("routing", expert, self.num_experts)
        shape = (-1, *[1] * (input.dim() - 2), self.num_features)
        weight, bias = (
            gather_rows(v, expert, self.num_experts, (), self.num_features).view(shape) for v in (self.weight, self.bias)
        )
        y = F.layer_norm(input, (self.num_features,), eps=self.eps)
        return torch.addcmul(bias.to(y.dtype), y, weight.to(y.dtype))

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_experts={self.num_experts}, eps={self.eps}"


def _side_repr(layer: _RoutedLayer) -> list[str]:
    sides = []
    if not layer.out_slices.is_partition:
        sides.append(f"out_slices={layer.out_slices}")
    if not layer.in_slices.is_whole:
        sides.append(f"in_slices={layer.in_slices}")
    return sides
