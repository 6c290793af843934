# SPDX-License-Identifier: Apache-2.0
"""Counts what a process does to files, to fail or to be killed in the middle of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from advmoe import files
from advmoe.training import engine


def at_operation(number: int, act: Callable[[], None], patch: Callable[[Any, str, Any], None]) -> list[str]:
    """Calls ``act`` in the middle of that operation, counted from 1: a write of a file (its first half is written), its
    synchronisation, its renaming, the appending of a line, and around a validation.

    Args:
        patch: sets an attribute, as monkeypatch does.

    Returns:
        The names of the operations made so far.
    """
    made: list[str] = []

    def next_is(name: str) -> None:
        made.append(name)
        if len(made) == number:
            act()

    fsync, replace, write, evaluate = os.fsync, Path.replace, files._Noting.write, engine.evaluate

    def counted_fsync(descriptor: int) -> None:
        next_is("fsync")
        fsync(descriptor)

    def counted_replace(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            next_is(f"rename {target.name}")
        return replace(self, target)

    def counted_write(self: Any, data: Any) -> int:
        if not getattr(self, "seen", False):
            self.seen = True
            data = bytes(data)
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            next_is(f"write {Path(self._file.name).name}")
            return len(data[: len(data) // 2]) + write(self, data[len(data) // 2 :])
        return write(self, data)

    def counted_evaluate(*args: Any, **kwargs: Any) -> Any:
        next_is("validation")
        result = evaluate(*args, **kwargs)
        next_is("validated")
        return result

    patch(os, "fsync", counted_fsync)
    patch(Path, "replace", counted_replace)
    patch(files._Noting, "write", counted_write)
    patch(engine, "evaluate", counted_evaluate)
    return made
