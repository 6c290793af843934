# SPDX-License-Identifier: Apache-2.0
"""Names to builders, with near matches for a name that is not there."""

from __future__ import annotations

import difflib
import importlib
import os
import reprlib
import sys
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

__all__ = ["Registry", "imported", "shown", "unknown_name"]

T = TypeVar("T")


def shown(value: object) -> str:
    """A value in a message: cut, however long or deep it is."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = 100
    cut.maxlevel = 3
    try:
        return cut.repr(value)
    except ValueError:  # a whole number of thousands of digits
        return f"a large {type(value).__name__}"


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """A ValueError that lists what there is, nearest first."""
    known = list(known)
    near = difflib.get_close_matches(name[:100], known, n=3, cutoff=0.5) if isinstance(name, str) else []
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ValueError(f"{kind}: expected one of {', '.join(known)}, got {shown(name)}{hint}")


def imported(name: str) -> Any:
    """What ``module:attribute`` names; modules of the working folder are found too.

    Raises:
        ValueError: if there is nothing of the name.
    """
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script has its own folder there; last, to shadow nothing
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        hint = ""
        package = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            hint = f"; run it where {package} is, or name its folder in PYTHONPATH"
        raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {error}{hint}") from error


class Registry(Generic[T]):
    """A mapping that users extend with a decorator."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        def decorate(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind}: {name!r} is registered already")
            self._entries[name] = entry
            return entry

        return decorate

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def names(self) -> list[str]:
        return list(self._entries)
