# SPDX-License-Identifier: Apache-2.0
"""Looking at a model without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["undisturbed"]


@contextmanager
def undisturbed(model: nn.Module, eval_mode: bool = True) -> Iterator[None]:
    """Freezes all parameters and, if asked for, puts every module in eval mode. Restores each module's mode, each
    ``requires_grad`` and, where the mode is kept, every buffer (BatchNorm's statistics move in training mode), also on
    errors."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    # copies take the buffers' places meanwhile: written back, they would be newer than a graph that has saved them
    buffers = [] if eval_mode else [(m, dict(m._buffers)) for m in model.modules() if m._buffers]
    for module, own in buffers:
        module._buffers.update({name: None if b is None else b.clone() for name, b in own.items()})
    try:
        if eval_mode:
            model.eval()
        for p, _ in wanted:
            p.requires_grad_(False)
        yield
    finally:
        for p, flag in wanted:
            p.requires_grad_(flag)
        for module, own in buffers:
            module._buffers.update(own)
        if eval_mode:
            if all(mode for _, mode in modes):
                model.train()
            else:
                # children keep modes of their own, such as a frozen BatchNorm
                model.train(modes[0][1])
                for module, mode in modes:
                    module.training = mode
