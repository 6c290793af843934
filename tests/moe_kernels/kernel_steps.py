# SPDX-License-Identifier: Apache-2.0
"""A routed convolution's step, for processes that import it."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_kernels import RoutedConv2d, Routing


def step(backward: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    layer = RoutedConv2d(32, 32, 3, num_experts=2, padding=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator))
    y = layer(torch.rand(8, 32, 16, 16, generator=generator), Routing(torch.arange(8) % 2, num_experts=2))
    if backward:
        y.sum().backward()
    return y.detach()


class KernelData(torch.utils.data.Dataset[Tensor]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        assert torch.get_num_threads() == 1
        return step()
