# SPDX-License-Identifier: Apache-2.0
"""What becomes of memory that is given back."""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of malloc.h
_KEEP, _PAD = 2**31 - 1, 64 << 20  # bytes
_SET_BY_HAND = ("MALLOC_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Lets glibc keep the memory that is freed, for what is allocated next, instead of giving it to the kernel and taking
    it back page by page: tensors from 32 MiB on, such as a stem's features, are mapped anew each time otherwise
    (docs/performance.md). The process stays as large as it once was. For programs whose main business is one network.

    Returns:
        Whether that could be done: not with another C library, nor where the environment sets glibc's malloc already.
    """
    if any(name.startswith(_SET_BY_HAND) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(mallopt(name, value) for name, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _KEEP), (_M_TOP_PAD, _PAD)))
