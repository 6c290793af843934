# SPDX-License-Identifier: Apache-2.0
"""Looking at a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(model: nn.Module, eval_mode: bool = True) -> Iterator[None]:
    """Freezes all parameters and, if asked for, puts every module in eval mode. Restores each module's mode, each
    ``requires_grad`` and, where the mode is kept, every buffer (BatchNorm's statistics move in training mode), also on
    errors."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    buffers = [] if eval_mode else [(b, b.clone()) for b in model.buffers()]
    try:
        if eval_mode:
            model.eval()
        for p, _ in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in wanted:
            p.requires_grad_(flag)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        if eval_mode:
            if all(mode for _, mode in modes):
                model.train()
            else:
                # children keep modes of their own, such as a frozen BatchNorm
                model.train(modes[0][1])
                for module, mode in modes:
                    module.training = mode
