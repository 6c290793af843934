# SPDX-License-Identifier: Apache-2.0
"""A program: runs that are killed and resumed, over and over, against an unbroken one.

killed_runs.py FOLDER KILLS SEED NUMBER…

So often at random moments; then in the middle of these operations on files, or of "each".

Each run is a process of its own, forked from this one, in which torch has computed nothing yet.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from file_operations import at_operation
from small_runs import SMALL, assert_same_run, small_architecture, tiny

from advmoe.config import ModelConfig
from advmoe.training import Run, resume, train

CONFIG = tiny(model=ModelConfig(SMALL, width=4), epochs=2, threads=1, validation_attack="pgd1")


def started(folder: Path, prepare: Callable[[], Any] = lambda: None) -> int:
    """A process that begins the run, or goes on with it."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        prepare()
        if Run(folder).config_path.exists():
            resume(folder, quiet=True)
        else:
            train(CONFIG, folder, quiet=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(pid: int) -> bool:
    """Whether it came to its end; it may have been killed instead."""
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise SystemExit(f"a run ended with {code}")
    return code == 0


def where(folder: Path) -> str:
    """What a killed run has left."""
    run = Run(folder)
    left = [path.name for path in sorted(folder.glob("*.tmp"))] if folder.exists() else []
    if not run.config_path.exists():
        stage = "no run yet"
    elif not run.checkpoint().exists():
        stage = "no checkpoint yet"
    else:
        stage = f"{len(run.metrics())} epochs"
    return ", ".join([stage, *left])


def at_random(folder: Path, unbroken: Run, seconds: float, kills: int, seed: int) -> list[str]:
    drawn = random.Random(seed)
    stages: list[str] = []
    while True:
        pid = started(folder)
        if len(stages) < kills:
            time.sleep(drawn.uniform(0, seconds))
            os.kill(pid, signal.SIGKILL)  # until it is waited for, its number is nobody else's
        if not ended(pid):
            stages.append(where(folder))
            continue
        assert_same_run(unbroken, Run(folder))
        if len(stages) >= kills:
            return stages
        shutil.rmtree(folder)


def planted(folder: Path, unbroken: Run, numbers: Iterable[int]) -> list[str]:
    stages = []
    for number in numbers:
        pid = started(folder, lambda n=number: at_operation(n, die, setattr))  # type: ignore[misc]
        if ended(pid):
            break  # there are fewer
        stages.append(f"{number}: {where(folder)}")
        assert ended(started(folder))
        assert_same_run(unbroken, Run(folder))
        shutil.rmtree(folder)
    return stages


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, kills: str, seed: str, *numbers: str) -> None:
    with small_architecture():
        for name in ("torch._dynamo", "sklearn.datasets"):  # what every run would load anew
            importlib.import_module(name)
        begin = time.monotonic()
        assert ended(started(folder / "unbroken"))
        seconds = time.monotonic() - begin
        unbroken = Run(folder / "unbroken")
        somewhere = at_random(folder / "run", unbroken, seconds, int(kills), int(seed)) if int(kills) else []
        shutil.rmtree(folder / "run", ignore_errors=True)
        each = range(1, 1000) if "each" in numbers else map(int, numbers)
        print(json.dumps([somewhere, planted(folder / "run", unbroken, each)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
