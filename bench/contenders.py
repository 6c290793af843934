# SPDX-License-Identifier: Apache-2.0
"""Ways to convolve each sample with its own expert's weights, on the convolution shapes of ResNet-18 at r = 0.5."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_kernels import RoutedConv2d, Routing

__all__ = ["CONTENDERS", "DIRECTIONS", "SHAPES", "Shape", "gather_and_scatter", "make", "mask_and_select"]

DIRECTIONS = ("forward", "train", "grad_input")


@dataclass(frozen=True)
class Shape:
    """A 3×3 convolution with padding 1; channels are those of one expert at r = 0.5 on 32×32 images."""

    in_channels: int
    out_channels: int
    size: int
    stride: int

    def __str__(self) -> str:
        return f"{self.in_channels}->{self.out_channels}@{self.size}/{self.stride}"


SHAPES = tuple(
    Shape(*s)
    for s in (
        (64, 32, 32, 1), (32, 32, 32, 1), (32, 64, 32, 2), (64, 64, 16, 1),
        (64, 128, 16, 2), (128, 128, 8, 1), (128, 256, 8, 2), (256, 256, 4, 1),
    )
)  # fmt: skip


def mask_and_select(y: Tensor, expert: Tensor, num_experts: int) -> Tensor:
    """Of all experts' outputs ``[B, N * C, H, W]`` each sample's own ``[B, C, H, W]``, behind a mask of 0 and 1."""
    mask = F.one_hot(expert, num_experts).to(y.dtype).repeat_interleave(y.shape[1] // num_experts, 1)
    y = y * mask[:, :, None, None]
    return y.unflatten(1, (num_experts, -1))[torch.arange(len(y), device=y.device), expert]


def gather_and_scatter(x: Tensor, expert: Tensor, num_experts: int, convolve: Callable[[Tensor, int], Tensor]) -> Tensor:
    """``convolve(samples of expert e, e)`` for each expert that has samples, put where the samples were."""
    out: Tensor | None = None
    for e in range(num_experts):
        index = (expert == e).nonzero().squeeze(1)
        if not len(index):
            continue
        y = convolve(x.index_select(0, index), e)
        if out is None:
            out = y.new_zeros((len(x), *y.shape[1:])).contiguous(memory_format=torch.channels_last)
        out = out.index_copy(0, index, y)
    assert out is not None
    return out


class _Contender(nn.Module):
    """Weights of ``num_experts`` experts; ``widen`` multiplies the input's channels (2 for the dense layer)."""

    widen = 1

    def __init__(self, shape: Shape, num_experts: int) -> None:
        super().__init__()
        self.shape = shape
        self.num_experts = num_experts
        self.weight = nn.Parameter(self._initial().contiguous(memory_format=torch.channels_last))

    def _initial(self) -> Tensor:
        s = self.shape
        return torch.randn(self.num_experts * s.out_channels, s.in_channels, 3, 3) / (9 * s.in_channels) ** 0.5

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.shape.stride, 1)

    def _expert(self, index: int) -> Tensor:
        k = self.shape.out_channels
        return self.weight[index * k : (index + 1) * k]


class Floor(_Contender):
    """torch's convolution of one expert's width, all samples to one expert: what routing would cost if it were free."""

    def _initial(self) -> Tensor:
        return super()._initial()[: self.shape.out_channels]

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        return self._conv(x, self.weight)


class Routed(_Contender):
    """This library."""

    def __init__(self, shape: Shape, num_experts: int) -> None:
        super().__init__(shape, num_experts)
        self.layer = RoutedConv2d(
            shape.in_channels, shape.out_channels, 3, shape.stride, 1, bias=False, num_experts=num_experts
        )
        self.layer.weight = self.weight

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        return self.layer(x, Routing(expert, num_experts=self.num_experts))


class Dense(_Contender):
    """The dense layer that an expert is the half of, on both sides."""

    widen = 2

    def _initial(self) -> Tensor:
        s = self.shape
        return torch.randn(2 * s.out_channels, 2 * s.in_channels, 3, 3) / (18 * s.in_channels) ** 0.5

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        return self._conv(x, self.weight)


class ComputeAllAndMask(_Contender):
    """All experts, then a mask and a selection: what AdvMoE's released code does."""

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        return mask_and_select(self._conv(x, self.weight), expert, self.num_experts)


class IndexSelect(_Contender):
    """For each expert its samples gathered, convolved and scattered."""

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        return gather_and_scatter(x, expert, self.num_experts, lambda part, e: self._conv(part, self._expert(e)))


class GroupedConvolution(_Contender):
    """One grouped convolution with the batch folded into channels, and each sample's weights gathered: how people
    convolve by sample today."""

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        s = self.shape
        weight = self.weight.view(self.num_experts, s.out_channels, s.in_channels, 3, 3)[expert].flatten(0, 1)
        y = F.conv2d(x.reshape(1, -1, s.size, s.size), weight, None, s.stride, 1, groups=len(x))
        return y.view(len(x), s.out_channels, *y.shape[2:])


CONTENDERS: dict[str, type[_Contender]] = {
    "routed": Routed,
    "floor": Floor,
    "dense": Dense,
    "compute all and mask": ComputeAllAndMask,
    "index_select": IndexSelect,
    "grouped convolution": GroupedConvolution,
}


def make(name: str, shape: Shape, batch: int, num_experts: int, direction: str) -> Callable[[], object]:
    """A function that runs one forward (eval mode, no gradient), one training step's forward and backward, or one input
    gradient alone (eval mode, frozen weights, as in an attack). Samples take the experts in turn; float32, channels_last.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction: expected one of {', '.join(DIRECTIONS)}, got {direction!r}")
    torch.manual_seed(0)
    module = CONTENDERS[name](shape, num_experts)
    x = torch.randn(batch, module.widen * shape.in_channels, shape.size, shape.size)
    x = x.contiguous(memory_format=torch.channels_last)
    expert = torch.arange(batch) % num_experts
    if direction == "forward":
        module.eval()

        def forward() -> object:
            with torch.no_grad():
                return module(x, expert)

        return forward
    x.requires_grad_()
    if direction == "grad_input":
        module.eval()
        module.weight.requires_grad_(False)
        y = module(x, expert)
        dy = torch.randn_like(y)
        return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)
    dy = torch.randn_like(module(x, expert))

    def train() -> object:
        x.grad = module.weight.grad = None
        module(x, expert).backward(dy)
        return module.weight.grad

    return train
