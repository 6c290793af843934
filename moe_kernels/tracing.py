# SPDX-License-Identifier: Apache-2.0
"""Whether a model is traced in order to be fused: what routers choose and what a BatchNorm of each expert's own does then
stay one operator each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

__all__ = ["for_fusion", "fusing"]

_fusing: ContextVar[bool] = ContextVar("moe_kernels_fusing", default=False)


def fusing() -> bool:
    # torch.compile cannot trace the variable; fuse() traces without Dynamo
    return not torch.compiler.is_dynamo_compiling() and _fusing.get()


@contextmanager
def for_fusion() -> Iterator[None]:
    token = _fusing.set(True)
    try:
        yield
    finally:
        _fusing.reset(token)
