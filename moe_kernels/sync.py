# SPDX-License-Identifier: Apache-2.0
"""BatchNorms whose batch is that of all processes, on any device: :func:`synchronize_batch_norms`."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .collectives import all_reduce
from .nn import RoutedBatchNorm2d

__all__ = ["SyncedBatchNorm", "synchronize_batch_norms"]


class SyncedBatchNorm(_BatchNorm):
    """What a BatchNorm becomes: in training its statistics are those of the batches of all processes together.

    torch's own SyncBatchNorm is for GPUs alone. Sums and the squares of deviations are reduced one after the other, as
    precise as a BatchNorm of the joined batch; gradients flow back through both.

    Shapes: as of the BatchNorm that it was; the processes may have different numbers of samples.

    Raises:
        ValueError: if all processes together have one value per channel.
    """

    process_group: Any = None

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        takes_statistics = self.training or (self.running_mean is None and self.running_var is None)
        if not takes_statistics:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        dims = [0, *range(2, x.dim())]
        values = x.new_full((1,), x.numel() / x.shape[1])
        dist.all_reduce(values, group=self.process_group)
        count = values.item()
        if count <= 1:
            raise ValueError(
                f"input: expected more than one value per channel of all processes together, got {count:.0f}"
            )
        shape = [1, -1, *[1] * (x.dim() - 2)]
        mean = all_reduce(x.sum(dims), self.process_group) / count
        centred = x - mean.view(shape)
        var = all_reduce(centred.square().sum(dims), self.process_group) / count
        if self.training and self.track_running_stats:
            self._track(mean.detach(), var.detach() * (count / (count - 1)))
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(var.to(self.running_var.dtype), step)


def synchronize_batch_norms(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Makes every BatchNorm of the model take its statistics from the batches of all processes, in place; those of each
    expert's own, too (:class:`RoutedBatchNorm2d`), which count each expert's samples wherever they are.

    All processes must call the model alike and with the same group, one of its own if other collectives may run
    meanwhile. State dicts stay as they are.

    Args:
        process_group: of torch.distributed; all processes by default.

    Returns:
        the model.

    Raises:
        ValueError: of the model's forwards, in training: if a channel has one value in all processes together.
    """
    for module in model.modules():
        if isinstance(module, RoutedBatchNorm2d):
            module.process_group = process_group
            module.synchronized = True
        elif isinstance(module, _BatchNorm):
            if not isinstance(module, SyncedBatchNorm):
                own = type(module)
                # in front of torch's forward and behind one that a subclass has
                module.__class__ = type(f"Synced{own.__name__}", (own, SyncedBatchNorm), {})
            module.process_group = process_group
    return model
