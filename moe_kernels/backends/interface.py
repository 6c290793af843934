# SPDX-License-Identifier: Apache-2.0
"""What a backend is asked for. Letters as in :mod:`moe_kernels.ops`."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..rows import gather_rows, scatter_rows

if TYPE_CHECKING:
    from ..geometry import Conv2dGeometry

__all__ = ["NO_EPILOGUE", "Backend", "BackendUnavailable", "Behind", "Epilogue", "Experts", "Side"]


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run here; the message says why and what to do."""


class Experts(NamedTuple):
    """The slice of each virtual sample on both sides, int64 ``[V]``; None where that side is whole."""

    out: Tensor | None
    inner: Tensor | None
    plan: Tensor | None = None  # the routing plan, where the backend makes one (Backend.plan) and it was made before

    def same_choice(self) -> bool:
        """Whether both sides follow one choice; told by their memory, so that no value is read."""
        out, inner = self.out, self.inner
        if out is inner:
            return True
        if out is None or inner is None or out.shape != inner.shape or out.stride() != inner.stride():
            return False
        return out.data_ptr() == inner.data_ptr() != 0

    def groups(self, g: Conv2dGeometry, samples: int) -> tuple[int, bool]:
        """How many groups the plan has, that was made before or will be; and whether they are pairs of experts.

        Raises:
            ValueError: if the plan is not one of these slices and samples.
        """
        both = g.num_out > 0 and g.num_in > 0
        every_pair = max(g.num_out, 1) * max(g.num_in, 1)
        if self.plan is None:
            pairs = both and not self.same_choice()
            return (every_pair if pairs or not both else g.num_out), pairs
        count = self.plan.shape[0] - samples - 2
        if self.plan.dtype != torch.int32 or not (count == every_pair or count == g.num_out == g.num_in):
            raise ValueError(
                f"plan: expected int32 for {samples} samples, got {self.plan.dtype} of shape {tuple(self.plan.shape)}"
            )
        return count, both and not count == g.num_out == g.num_in


class Side(NamedTuple):
    """The slices of one side, and the choice of each sample: whose values a per-channel quantity belongs to."""

    expert: Tensor  # [V]
    num_experts: int
    starts: Sequence[int]  # empty: a partition
    width: int
    total: int

    @classmethod
    def shared(cls, x: Tensor) -> Side:
        """One slice, the channels of ``x``, for all samples."""
        return cls(torch.zeros(x.shape[0], dtype=torch.int64, device=x.device), 1, (), x.shape[1], x.shape[1])

    def rows(self, value: Tensor) -> Tensor:
        """``[total]`` to each sample's slice, ``[V, width]``."""
        return gather_rows(value, self.expert, self.num_experts, self.starts, self.width)

    def sum(self, rows: Tensor) -> Tensor:
        """``[V, width]`` summed into ``[total]``."""
        return scatter_rows(rows, self.expert, self.num_experts, self.starts, self.width, self.total)


class Behind(NamedTuple):
    """A ReLU and channel means behind ``scale * (x - mean) + shift``: what their gradient takes to come through them."""

    scale: Tensor  # [total]
    shift: Tensor
    grad_means: Tensor | None = None  # [V, C], of the means


class Epilogue(NamedTuple):
    """What follows the convolution: ``relu(scale * (gate * (conv + bias)) + shift + residual)``."""

    bias: Tensor | None = None  # [R_out]
    gate: Tensor | None = None  # [V]
    scale: Tensor | None = None  # [w_out] for all experts, or [R_out]
    shift: Tensor | None = None  # as scale
    residual: Tensor | None = None  # [V, w_out, P, Q]
    relu: bool = False


NO_EPILOGUE = Epilogue()


class Backend(abc.ABC):
    """The three calls, forward with its epilogue; what each backend says of itself; and what some do faster."""

    name: str
    plans = False  # whether its calls read a plan, which is then made once for a Routing
    plans_from = 2  # samples: with fewer they read none
    plan_below = 0  # pixels of a result: with as many no tile takes rows of several samples, and only weights need a plan
    normalises = False  # whether it has kernels for a BatchNorm of each expert's own; elsewhere that is torch's operators
    routes = False  # whether it has a kernel for the router of pooled features
    rectifies = False  # whether it has a kernel for ReLU and channel means together, and for their derivative

    def unavailable(self) -> str | None:
        """None, or why this backend cannot run in this process."""
        return None

    def unsupported(self, device: torch.device) -> str | None:
        """None, or why it cannot compute on this device."""
        return self.unavailable()

    @abc.abstractmethod
    def describe(self) -> str:
        """What runs here, in one line, for bug reports; only where it is available."""

    @abc.abstractmethod
    def forward(
        self,
        input: Tensor,  # [B, C, H, W]
        weight: Tensor,  # [R_out, R_in / groups, kh, kw]
        experts: Experts,
        geometry: Conv2dGeometry,
        epilogue: Epilogue,
        packed: Tensor | None,
    ) -> Tensor:  # [V, w_out, P, Q]
        ...

    @abc.abstractmethod
    def grad_input(
        self,
        grad: Tensor,  # [V, w_out, P, Q]
        weight: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        size: tuple[int, int],  # H, W
        packed: Tensor | None,
    ) -> Tensor:  # [B, C, H, W]
        ...

    @abc.abstractmethod
    def grad_weight(
        self,
        grad: Tensor,
        input: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        shape: tuple[int, ...],  # of the weight
        channels_last: bool,  # the memory format of what is returned
    ) -> Tensor: ...

    def grad_input_gated(
        self,
        grad: Tensor,
        weight: Tensor,
        experts: Experts,
        geometry: Conv2dGeometry,
        input: Tensor,  # [B, C, H, W], of the forward
        gate: Tensor | None,  # [V]; None: exactly 1
        packed: Tensor | None,
    ) -> tuple[Tensor, Tensor] | None:  # [B, C, H, W], [V]
        """The gradients of ``gate * conv2d`` for the input and the gate in one pass; None: no way better than two."""
        return None

    def packed_form(self, weight: Tensor, geometry: Conv2dGeometry, size: tuple[int, int]) -> tuple[int, int]:
        """The forms in which :meth:`pack` gives this weight for images of ``size`` (height, width) to forward and
        grad_input. What is packed serves images of all sizes with the same form."""
        return 0, 0

    def pack(self, weight: Tensor, geometry: Conv2dGeometry, size: tuple[int, int], backward: bool) -> Tensor | None:
        """The weight as forward wants it (``backward``: as grad_input does) for images of ``size`` (height, width), or
        None where keeping it would not pay."""
        return None

    def plan(self, experts: Experts, num_out: int, num_in: int, samples: int, device: torch.device) -> Tensor:
        """The samples in the order of their groups: int32 ``[G + 2 + V]``, where each group begins and the order.

        A group is a pair of experts, ``out * num_in + inner`` (``num_in`` is 0 where the input side follows the output
        side's choice); G = max(num_out, 1) * max(num_in, 1). Samples with an index out of range make group G, the last.
        In torch's own operators, without a synchronisation.
        """
        count = max(num_out, 1) * max(num_in, 1)
        group = torch.zeros(samples, dtype=torch.int64, device=device)
        valid = torch.ones(samples, dtype=torch.bool, device=device)
        for expert, number in ((experts.out, num_out), (experts.inner, num_in)):
            if number and expert is not None:
                group = group * number + expert
                valid = valid & (expert >= 0) & (expert < number)
        ordered, order = torch.where(valid, group, count).sort(stable=True)
        offsets = torch.searchsorted(ordered, torch.arange(count + 2, device=device))
        return torch.cat([offsets, order]).to(torch.int32)

    def moments(self, x: Tensor, side: Side, plan: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, biased variance and number of values of each channel of the whole side, over the samples whose slice has
        it: ``[total]`` in float32 at least."""
        x = _wide(x)
        count = side.sum(x.new_full((x.shape[0], x.shape[1]), float(x.shape[2] * x.shape[3])))
        safe = count.clamp_min(1)
        mean = side.sum(x.sum(3).sum(2)) / safe
        centred = x - side.rows(mean)[:, :, None, None]
        return mean, side.sum((centred * centred).sum(3).sum(2)) / safe, count

    def sums(self, x: Tensor, grad: Tensor, mean: Tensor, side: Side, plan: Tensor | None) -> tuple[Tensor, Tensor]:
        """The sums of ``grad`` and of ``grad * (x - mean)`` over each channel of the whole side: ``[total]``."""
        grad = _wide(grad)
        product = grad * (_wide(x) - side.rows(mean)[:, :, None, None])
        return side.sum(grad.sum(3).sum(2)), side.sum(product.sum(3).sum(2))

    def affine(
        self,
        x: Tensor,  # [V, C, H, W]
        side: Side,
        scale: Tensor,  # [total], as the others
        mean: Tensor,
        shift: Tensor | None,
        grad: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> Tensor:
        """``scale * (x - mean) + shift + grad_scale * grad`` with the values of each sample's slice."""
        y = (_wide(x) - side.rows(mean)[:, :, None, None]) * side.rows(scale)[:, :, None, None]
        if shift is not None:
            y = y + side.rows(shift)[:, :, None, None]
        if grad is not None and grad_scale is not None:
            y = y + _wide(grad) * side.rows(grad_scale)[:, :, None, None]
        return y.to(x.dtype)

    def sums_behind(
        self, x: Tensor, grad: Tensor | None, mean: Tensor, side: Side, behind: Behind
    ) -> tuple[Tensor, Tensor]:
        """:meth:`sums` of the gradient that comes through ``behind``; of ``grad`` and that of the means one is there."""
        return self.sums(x, _through(x, grad, mean, side, behind), mean, side, None)

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
        """:meth:`affine` of the gradient that comes through ``behind``, multiplied by its scale; without ``scale`` and
        ``shift`` that is all."""
        none = torch.zeros_like(mean)
        return self.affine(
            x, side, none if scale is None else scale, mean, shift, _through(x, grad, mean, side, behind), behind.scale
        )

    def rectify(
        self,
        x: Tensor,
        side: Side | None = None,
        scale: Tensor | None = None,
        mean: Tensor | None = None,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """``y = max(x, 0)`` of channels_last ``x [V, C, H, W]``, or of ``scale * (x - mean) + shift + residual`` with the
        values of each sample's slice; and y's channel means, ``[V, C]`` in float32 at least."""
        wide = _wide(x)
        if side is not None and scale is not None and mean is not None:
            wide = _wide(self.affine(wide, side, scale, mean, shift))
        y = (wide if residual is None else wide + _wide(residual)).relu()
        return y.to(x.dtype), y.mean((2, 3))

    def rectify_backward(self, grad: Tensor | None, grad_means: Tensor | None, y: Tensor) -> Tensor:
        """The gradient for what ReLU got in :meth:`rectify`, from those of its results; one of them at least is there."""
        return torch.where(y <= 0, 0.0, _of_both(grad, grad_means, y)).to(y.dtype)

    def route(
        self,
        input: Tensor,  # [B, C, H, W]
        weight: Tensor,  # [N, C]
        bias: Tensor | None,  # [N]
        norm_weight: Tensor | None,  # [C]
        norm_bias: Tensor | None,  # [C]
        normalize: bool,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor] | None:  # int64 [B], [B, N] in the input's dtype, float32 [B]
        """Expert, scores and the expert's softmax probability of :func:`moe_kernels.functional.pooled_routing`, without a
        gradient; None: not this call, which torch's own operators take then.

        The expert is the lowest index of the highest score as returned; where a score is NaN it is N, with a probability
        of NaN.
        """
        return None


def _of_both(grad: Tensor | None, grad_means: Tensor | None, like: Tensor) -> Tensor:
    """What each pixel has from its own gradient and from that of the means."""
    total = torch.zeros_like(like, dtype=_wide_type(like)) if grad is None else _wide(grad)
    if grad_means is not None:
        total = total + grad_means[:, :, None, None] / (like.shape[2] * like.shape[3])
    return total


def _through(x: Tensor, grad: Tensor | None, mean: Tensor, side: Side, behind: Behind) -> Tensor:
    """The gradient of the map's result."""
    result = (_wide(x) - side.rows(mean)[:, :, None, None]) * side.rows(behind.scale)[:, :, None, None]
    result = result + side.rows(behind.shift)[:, :, None, None]
    return torch.where(result <= 0, 0.0, _of_both(grad, behind.grad_means, x))


def _wide_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_type(x))
