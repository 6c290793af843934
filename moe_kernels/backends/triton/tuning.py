# SPDX-License-Identifier: Apache-2.0
"""Tuned configurations: measured when asked for, kept on disk, one file for each device and Triton version.

Off by default. Within ``with tune():``, or with ``MOE_KERNELS_TUNE=1``, the first call of each shape class times every
configuration of its list with ``triton.testing.do_bench`` and keeps the fastest; that synchronises, and is refused while
a CUDA graph is captured. Kept results are used from then on, also where tuning is off. ``MOE_KERNELS_CACHE`` names the
folder (default: ``~/.cache/moe_kernels``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from . import configs
from .configs import Problem, TileConfig, architecture, candidates, estimated_best
from .launch import INTERPRETED, BuildError

__all__ = ["active", "cache_file", "choose", "clear", "fastest", "tune"]

_active = [os.environ.get("MOE_KERNELS_TUNE") == "1"]
_generation = [0]  # counts changes of what is tuned, so that choices made before are made again
_tables: dict[str, dict[str, list[Any]]] = {}


@contextlib.contextmanager
def tune() -> Iterator[None]:
    """Tunes whatever runs inside."""
    _active.append(True)
    try:
        yield
    finally:
        _active.pop()


def active() -> bool:
    return _active[-1]


def choose(problem: Problem, device: torch.device) -> TileConfig:
    """A tuned configuration where there is one, else the one with the least estimated time."""
    assumed, given = configs.assumed()
    if assumed:
        return given if given is not None else estimated_best(problem, device)
    return _choose(problem, device, _generation[0])


@functools.lru_cache(maxsize=4096)
def _choose(problem: Problem, device: torch.device, generation: int) -> TileConfig:
    kept = _read(cache_file(device)).get(_key(problem))
    if kept is not None:
        config = TileConfig(*kept)
        if config in candidates(architecture(device), problem.kernel, problem.kind):  # else of an older list
            return config
    return estimated_best(problem, device)


def cache_file(device: torch.device) -> Path:
    folder = os.environ.get("MOE_KERNELS_CACHE")
    where = Path(folder) if folder else Path.home() / ".cache" / "moe_kernels"
    name = "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)
    return where / f"tuned-{re.sub(r'[^A-Za-z0-9]+', '-', name)}-triton-{triton.__version__}.json"


def fastest(problem: Problem, device: torch.device, run: Callable[[TileConfig], object]) -> None:
    """Times ``run`` with each configuration of the problem's list and keeps the fastest, unless one is kept already.

    Raises:
        RuntimeError: while a CUDA graph is captured.
    """
    path = cache_file(device)
    table = _read(path)
    if _key(problem) in table:
        return
    if not INTERPRETED and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tuning measures, which a CUDA graph cannot capture; run once before the capture")
    listed = candidates(architecture(device), problem.kernel, problem.kind)
    times = {config: _milliseconds(run, config) for config in listed}
    best = min(times, key=lambda config: times[config])
    if not math.isfinite(times[best]):
        return  # none can be built here: the call that follows says so
    table[_key(problem)] = list(best)
    _generation[0] += 1
    _write(path, table)


def clear() -> None:
    """Forgets what was read from disk; the files stay."""
    _tables.clear()
    _generation[0] += 1


def _milliseconds(run: Callable[[TileConfig], object], config: TileConfig) -> float:
    try:
        if INTERPRETED:  # no device to time: one call shows that the configuration runs
            run(config)
            return float(config.block_m * config.block_n)
        return triton.testing.do_bench(lambda: run(config), return_mode="median")
    except BuildError:
        return math.inf


def _key(problem: Problem) -> str:
    """Of the shape class: sizes rounded to a power of two share a configuration."""
    sizes = [1 << round(math.log2(max(1, size))) for size in problem[2:]]
    return " ".join(map(str, (problem.kernel, problem.kind, *sizes)))


def _read(path: Path) -> dict[str, list[Any]]:
    name = str(path)
    if name not in _tables:
        table: Any = {}
        if path.exists():
            try:
                table = json.loads(path.read_text())
                if not isinstance(table, dict) or any(not _is_config(value) for value in table.values()):
                    raise ValueError("not a table of configurations")
            except (OSError, ValueError) as error:
                warnings.warn(f"{path}: cannot be used ({error}); configurations are chosen untuned", stacklevel=2)
                table = {}
        _tables[name] = table
    return _tables[name]


def _is_config(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 6 and all(isinstance(v, (int, float)) for v in value)


def _write(path: Path, table: dict[str, list[Any]]) -> None:
    """Written whole under another name first: two processes that tune together leave one table or the other."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
            json.dump(table, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"{path}: tuned configurations are not kept ({error})", stacklevel=2)
