# SPDX-License-Identifier: Apache-2.0
"""Work of one process and of several, which are forked behind the imports: ``python several.py OUT JOB:SIZE…``.

Torch and advmoe are loaded once for all of them; each has the environment that torchrun would give it.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import parallel_steps
import pytest
import torch
from small_runs import SMALL, after, interrupt_at, small_architecture, spoil, tiny
from torch import nn

from advmoe.attacks import AutoAttack, from_name
from advmoe.cli import main
from advmoe.config import ModelConfig
from advmoe.data import TensorSplit, stream_generator
from advmoe.evaluation import measure
from advmoe.models import create_model
from advmoe.training import Interrupted, Run, resume, train
from advmoe.training.faults import NON_FINITE
from advmoe.training.methods.advmoe import AdvMoE
from advmoe.training.parallel import joined
from advmoe.world import ALONE, ProcessLost, World

BATCH = {3: 24}  # which 3 divides, in parts too; else parallel_steps'
EPSILON = 0.03
# of 60 images, which are three chunks; the checks' are one, so that the second process has none of them
COMMAND = [
    "evaluate", "several:model", "--data", "digits", "--limit", "60", "--batch-size", "5", "--attack", "pgd2",
    "--checks", "12", "--epsilon", "0.03", "--device", "cpu", "--threads", "1",
]  # fmt: skip


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def launch(size: int, work: Callable[[int], None]) -> list[int]:
    """Exit codes of so many processes that do ``work(rank)``; 0 or what :class:`SystemExit` says, 1 for other errors."""
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pids = []
    for rank in range(size):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
                work(rank)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    codes: dict[int, int] = {}
    while len(codes) < size:
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] == 1:  # the others would wait for it
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGTERM)
    return [codes[pid] for pid in pids]


def model() -> nn.Module:
    """Of kind moe for digits, as it is drawn."""
    torch.manual_seed(0)
    with small_architecture():
        return create_model(SMALL, num_classes=10, image_size=8, width=4, kind="moe").eval()


def images() -> TensorSplit:
    """100 images, nine of ten with the label that the model gives them: attacks on an untrained model have something to
    change."""
    generator = stream_generator("evaluated")
    pixels = torch.randint(0, 256, (100, 3, 8, 8), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        labels = model()(TensorSplit(pixels, torch.zeros(100, dtype=torch.int64)).batch(torch.arange(100))[0]).argmax(1)
    labels[::10] = (labels[::10] + 1) % 10
    return TensorSplit(pixels, labels)


def attacks(whole: bool) -> dict[str, Any]:
    names = ("fgsm", "pgd3x2", "flip2")
    chosen: dict[str, Any] = {name: from_name(name, EPSILON) for name in names}
    parts = ("apgd-ce", "apgd-t", "fab-t", "square") if whole else ("apgd-ce", "square")
    return {**chosen, "autoattack": AutoAttack(EPSILON, attacks=parts, queries=20, steps=3)}


def evaluated(world: World, state: Path | None = None, whole: bool = False) -> dict[str, Any]:
    """What a process has of the evaluation: five chunks, the last one short, and AutoAttack in batches of five."""
    limits = {"autoattack": 40, "fgsm": 90}
    found = measure(model(), images(), attacks(whole), 5, limits=limits, state=state, world=world)
    return {"evaluation": found.evaluation.as_dict(), "right": found.right, "robust": found.robust}


def attacked_batches() -> tuple[dict[str, Any], list[int]]:
    """The evaluation by one process, and the sizes of AutoAttack's batches in it."""
    attack, sizes = AutoAttack._attack, []

    def counting(*arguments: Any) -> None:
        sizes.append(len(arguments[3]))
        attack(*arguments)

    AutoAttack._attack = staticmethod(counting)
    try:
        return evaluated(ALONE), sizes
    finally:
        AutoAttack._attack = staticmethod(attack)


def steps(out: Path, size: int, rank: int, names: list[str], count: int) -> None:
    with joined("cpu") as world:
        found = {name: parallel_steps.run(name, world, count, BATCH.get(size, parallel_steps.BATCH)) for name in names}
    torch.save(found, out / f"steps-{size}-{rank}.pt")


def evaluate(out: Path, size: int, rank: int, whole: bool) -> None:
    with joined("cpu") as world:
        torch.save(evaluated(world, whole=whole), out / f"evaluated-{size}-{rank}.pt")


def command(out: Path, size: int, rank: int) -> None:
    """advmoe evaluate, as torchrun would start it."""
    with (out / f"printed-{size}-{rank}.txt").open("w") as file, redirect_stdout(file):
        raise SystemExit(main([*COMMAND, "--out", str(out / f"record-{size}.json")]))


def broken(out: Path, size: int, rank: int, breaks: bool) -> None:
    """AutoAttack whose last process ends at its third batch."""
    attack, batches = AutoAttack._attack, 0

    def ending(*arguments: Any) -> None:
        nonlocal batches
        batches += 1
        if breaks and rank == size - 1 and batches == 3:
            os._exit(9)
        (out / f"attacked-{rank}.txt").open("a").write(f"{breaks}\n")
        attack(*arguments)

    AutoAttack._attack = staticmethod(ending)
    with joined("cpu") as world:
        try:
            torch.save(evaluated(world, out), out / f"resumed-{rank}.pt")
        except ProcessLost:
            os._exit(4)


TERMINATED = 4  # the step in which SIGTERM arrives; an epoch has three


def trained(out: Path, size: int, rank: int, name: str) -> None:
    """A run that nothing disturbs, one whose last process gets SIGTERM, or that one resumed."""
    with small_architecture(), joined("cpu") as world, pytest.MonkeyPatch.context() as patch:
        if name == "resumed":
            resume(out / "terminated", quiet=True, world=world)
            return
        if name == "terminated" and rank == size - 1:
            interrupt_at(TERMINATED, AdvMoE, patch, signal.SIGTERM)
        try:
            train(tiny(model=ModelConfig(SMALL, width=4)), out / name, quiet=True, world=world)
        except Interrupted:
            if rank == 0:  # which writes the checkpoint; the other does not wait for it
                state = torch.load(Run(out / name).checkpoint(), weights_only=True)
                torch.save((state["epoch"], state["step"]), out / "interrupted.pt")
            os._exit(3)


RUINED = "layer2.0.conv2"


def ruined(out: Path, size: int, rank: int) -> None:
    """A run in whose third step a number of the last process's part is not finite, and so a BatchNorm of all of them."""
    with small_architecture(), joined("cpu") as world, pytest.MonkeyPatch.context() as patch:
        if rank == size - 1:
            spoil(RUINED, False, patch, after(2))
        try:
            train(tiny("standard", model=ModelConfig(SMALL, width=4)), out / "ruined", quiet=True, world=world)
        except NON_FINITE as error:
            (out / f"said-{rank}.txt").write_text(str(error))
            os._exit(5)


IN_CI = {3: ["advmoe"], 4: ["at per_expert balanced"]}  # cases, by the number of processes
CI_STEPS = 2
JOBS: dict[str, Callable[[Path, int, int], None]] = {
    "steps": lambda out, size, rank: steps(out, size, rank, IN_CI[size], CI_STEPS),
    "all_steps": lambda out, size, rank: steps(out, size, rank, list(parallel_steps.CASES), parallel_steps.STEPS),
    "evaluate": lambda out, size, rank: evaluate(out, size, rank, whole=False),
    "evaluate_whole": lambda out, size, rank: evaluate(out, size, rank, whole=True),
    "command": command,
    "broken": lambda out, size, rank: broken(out, size, rank, breaks=True),
    "resumed": lambda out, size, rank: broken(out, size, rank, breaks=False),
    "unbroken_run": lambda out, size, rank: trained(out, size, rank, "unbroken"),
    "terminated_run": lambda out, size, rank: trained(out, size, rank, "terminated"),
    "ruined_run": ruined,
    "resumed_run": lambda out, size, rank: trained(out, size, rank, "resumed"),
}
# exit codes where they are not 0
CODES = {"broken:2": [4, 9], "terminated_run:2": [3, 3], "ruined_run:2": [5, 5]}

if __name__ == "__main__":
    torch.set_num_threads(1)
    out, *words = sys.argv[1:]
    for word in words:
        job, size = word.split(":")
        codes = launch(int(size), partial(JOBS[job], Path(out), int(size)))
        print(word, *codes, flush=True)
