# SPDX-License-Identifier: Apache-2.0
"""Tile configurations: data files, one for each architecture, and the heuristic that picks from them.

``configs/sm_90.json`` and its siblings list a few tiles for each kernel and kind of arithmetic: ``half`` (bfloat16 and
float16), ``tf32`` and ``ieee`` (float32 without and with full products). ``efficiency`` is the share of the matrix units'
rate that a tile is taken to reach against the best of its list; an estimate until it is tuned on the device.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fallback import uses_tf32
from .launch import INTERPRETED

__all__ = [
    "KERNELS",
    "KINDS",
    "SMALLEST_BLOCK",
    "Problem",
    "TileConfig",
    "architecture",
    "assume",
    "assumed",
    "block_k",
    "candidates",
    "estimated_best",
    "kind",
    "multiprocessors",
]

KERNELS = ("convolution", "grad_weight")
KINDS = ("half", "tf32", "ieee")
_ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SMALLEST_BLOCK = 16  # of tl.dot
# What a step of a loop is taken to be worth for each element of its reduction: short steps spend more on addresses.
_STEP_RATE = {64: 1.0, 32: 0.85, 16: 0.6}


class TileConfig(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    efficiency: float = 1.0


class Problem(NamedTuple):
    """What the choice of a tile depends on: a GEMM of ``rows`` × ``columns`` × ``depth``, ``times`` over. ``times``
    counts what has tiles of its own: convolution groups, residues of a stride, and taps and segments of a weight
    gradient."""

    kernel: str  # one of KERNELS
    kind: str  # one of KINDS
    rows: int
    columns: int
    depth: int
    times: int = 1


@functools.cache
def _table(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "configs" / f"{name}.json").read_text())


def candidates(name: str, kernel: str, kind: str) -> list[TileConfig]:
    """The configurations of an architecture, ``"sm_90"`` for one."""
    return [TileConfig(**entry) for entry in _table(name)[kernel][kind]]


_assumed: list[tuple[str, TileConfig | None]] = []


@contextlib.contextmanager
def assume(name: str, config: TileConfig | None = None) -> Iterator[None]:
    """Inside, every device is taken for one of that architecture, and ``config``, if given, is every kernel's: for
    compiling without the device."""
    _assumed.append((name, config))
    try:
        yield
    finally:
        _assumed.pop()


def assumed() -> tuple[bool, TileConfig | None]:
    """Whether inside of :func:`assume`, and the configuration that it gave."""
    return bool(_assumed), _assumed[-1][1] if _assumed else None


def architecture(device: torch.device) -> str:
    """The table for a device: of the newest architecture that is not newer than it; ``"interpreter"`` in numpy."""
    return _assumed[-1][0] if _assumed else _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    if INTERPRETED:
        return "interpreter"
    major, minor = torch.cuda.get_device_capability(device)
    fitting = [name for name in _ARCHITECTURES if int(name.removeprefix("sm_")) <= 10 * major + minor]
    return fitting[-1] if fitting else _ARCHITECTURES[0]


def multiprocessors(device: torch.device) -> int:
    if _assumed or INTERPRETED:
        return _table(architecture(device))["multiprocessors"]
    return _multiprocessors(device)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def kind(x: Tensor) -> str:
    """The arithmetic of a dtype."""
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if uses_tf32(x) else "ieee"


def block_k(config: TileConfig, depth: int) -> tuple[int, bool]:
    """The block of the reduction for a number of channels, and whether blocks straddle taps.

    Up to the configuration's own: the one with the most useful work, the rest of a tap's last block being zeros. So few
    channels that most of the smallest block would be zeros straddle taps, at the price of an address for each element.
    """
    if depth < SMALLEST_BLOCK:
        return min(config.block_k, 32), True
    blocks = [block for block in _STEP_RATE if block <= config.block_k]
    return max(blocks, key=lambda block: _STEP_RATE[block] * depth / (math.ceil(depth / block) * block)), False


def estimated_best(problem: Problem, device: torch.device) -> TileConfig:
    """The configuration with the least estimated time."""
    configs = candidates(architecture(device), problem.kernel, problem.kind)
    return min(configs, key=lambda config: _estimate(problem, config, multiprocessors(device)))


def _estimate(problem: Problem, config: TileConfig, multiprocessors: int) -> float:
    """Time in arbitrary units: full waves of tiles, each as long as its products take at its efficiency."""
    tiles = math.ceil(problem.rows / config.block_m) * math.ceil(problem.columns / config.block_n) * problem.times
    # Two small tiles share a multiprocessor in the time of one large one: waves are counted in units of work.
    waves = max(1.0, tiles / multiprocessors)
    return waves * config.block_m * config.block_n / config.efficiency
