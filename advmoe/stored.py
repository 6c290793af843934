# SPDX-License-Identifier: Apache-2.0
"""Files of ``torch.save`` from anyone: read without running what is in them, and checked before anything is used."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .registry import shown

__all__ = ["load_optimizer", "load_weights", "read_stored", "require_version"]


def read_stored(path: Path) -> Any:
    """What ``torch.save`` has written: tensors, numbers, text and containers of them.

    Raises:
        ValueError: if the file is damaged or holds anything else; in one line.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load takes older forms too, which nothing here has written
            entries = archive.infolist()
            packed = any(each.compress_type != zipfile.ZIP_STORED for each in entries)
            larger = sum(each.file_size for each in entries) > path.stat().st_size
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise ValueError(f"it is cut short, or no file of torch.save ({error})") from error
    if packed:  # a small file could hold any amount of zeros
        raise ValueError("its records are compressed, which torch.save never does")
    if larger:  # several names of one record
        raise ValueError("its records are more than the file holds")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises nearly anything
        # torch's text is long, and advises to load the file without this check
        named = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        what = f"it names {named[1][:200]}" if named else type(error).__name__
        raise ValueError(f"it is damaged, or holds more than tensors and plain values ({what})") from error


def require_version(found: object, expected: int, what: str) -> None:
    """
    Raises:
        ValueError: if ``what`` has another version of its format than this one.
    """
    if type(found) is int and found > expected:
        raise ValueError(
            f"{what} was written by a newer version of advmoe (format {found}, this one's is {expected}); update"
        )
    if type(found) is not int or found != expected:
        raise ValueError(f"{what}: expected format {expected}, got {shown(found)}")


def load_weights(model: nn.Module, state: Any) -> None:
    """``model.load_state_dict`` that takes its own names, shapes and types alone, and finite numbers; nothing is changed
    if something does not fit.

    Raises:
        ValueError: if something does not fit, with the first name that does not.
    """
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"weights: expected a mapping of names to tensors, got {type(state).__name__}")
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    others = [name for name in state if name not in own]
    for what, names in (("there is no", missing), ("the model has no", others)):
        if names:
            more = f" (nor {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{what} {names[0][:200]}{more}")
    for name, value in own.items():
        _require_like(name, state[name], value)
        if name.endswith("running_var") and bool((state[name] < 0).any()):
            raise ValueError(f"{name}: a variance below 0")
    model.load_state_dict(state)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """``optimizer.load_state_dict`` of a state whose tensors have their parameters' shapes.

    Raises:
        ValueError: if something does not fit.
    """
    own = optimizer.state_dict()
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in _OPTIMIZER.items()):
        raise ValueError("optimizers: expected a mapping with state and param_groups each")
    if [_numbers(group) for group in state["param_groups"]] != [_numbers(group) for group in own["param_groups"]]:
        raise ValueError("optimizers: expected as many parameters in each group as the model has")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(values, dict):
            raise ValueError(f"optimizers: expected a mapping for each parameter, got {shown(number)}")
        if values and set(values) != _KEPT[type(optimizer)]:
            kept = ", ".join(sorted(_KEPT[type(optimizer)]))
            raise ValueError(f"optimizers: expected {kept} of parameter {number}, got {shown(list(values))}")
        own_values = {
            "step": torch.zeros(()),
            **dict.fromkeys(("momentum_buffer", "exp_avg", "exp_avg_sq"), parameters[number]),
        }
        for name, value in values.items():
            if value is not None or name != "momentum_buffer":
                _require_like(f"optimizers: {name} of parameter {number}", value, own_values[name])
                if name in ("step", "exp_avg_sq") and bool((value < 0).any()):
                    raise ValueError(f"optimizers: {name} of parameter {number}: below 0")
    # rates and the like are the settings', not the file's
    optimizer.load_state_dict({"state": state["state"], "param_groups": own["param_groups"]})


_OPTIMIZER = {"state": dict, "param_groups": list}
_KEPT = {torch.optim.SGD: {"momentum_buffer"}, torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}}  # of each parameter


def _numbers(group: Any) -> Any:
    return group.get("params") if isinstance(group, dict) else None


def _require_like(name: str, value: Any, own: Any) -> None:
    if not isinstance(own, torch.Tensor):  # a module's extra state
        return
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(value).__name__}")
    for what in ("shape", "dtype", "layout"):
        found, wanted = (tuple(x.shape) if what == "shape" else getattr(x, what) for x in (value, own))
        if found != wanted:
            raise ValueError(f"{name}: expected {what} {wanted}, got {found}")
    if value.is_meta:
        raise ValueError(f"{name}: has no values")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name}: {int((~torch.isfinite(value)).sum())} of its {value.numel()} values are not finite")
