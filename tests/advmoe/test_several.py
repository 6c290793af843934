# SPDX-License-Identifier: Apache-2.0
"""Three and four processes against one; evaluation by several against one's; a run that torchrun restarts."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import parallel_steps
import pytest
import several
import torch
from small_runs import SMALL, after, assert_same_run, interrupt_at, small_architecture, spoil, tiny
from test_parallel import COMMON, children

from advmoe.cli import main
from advmoe.config import ModelConfig
from advmoe.training import Interrupted, Run, RunError, train
from advmoe.training.methods.advmoe import AdvMoE
from advmoe.training.replay import replay
from advmoe.world import ALONE, World

HERE = Path(__file__).parent


def launched(out: Path, *jobs: str) -> None:
    """Processes do these jobs and end with the codes that are expected."""
    folder = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
    command = [sys.executable, str(HERE / "several.py"), str(out), *jobs]
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.split(":")[0] in several.JOBS]
    codes = {job: [int(code) for code in rest] for job, *rest in lines}
    assert list(codes) == list(jobs)
    for job, each in codes.items():
        assert each == several.CODES.get(job, [0] * len(each)), (job, done.stderr)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several")
    evaluations = ("evaluate:3", "command:2", "broken:2", "resumed:2")
    runs = ("unbroken_run:2", "terminated_run:2", "resumed_run:2", "ruined_run:2")
    launched(out, "steps:3", "steps:4", *evaluations, *runs)
    return out


@pytest.fixture(scope="module")
def alone() -> tuple[dict[str, Any], list[int]]:
    """One process's evaluation, and the sizes of AutoAttack's batches."""
    return several.attacked_batches()


def assert_steps_are_those_of_one(out: Path, size: int, steps: int, name: str) -> None:
    count = several.BATCH.get(size, parallel_steps.BATCH)
    alone = parallel_steps.run(name, ALONE, steps, count)
    tolerance = parallel_steps.CASES[name].tolerance
    first, *others = (torch.load(out / f"steps-{size}-{rank}.pt")[name] for rank in range(size))
    assert set(first["state"]) == set(alone["state"])
    for key, value in alone["state"].items():
        assert all(torch.equal(first["state"][key], other["state"][key]) for other in others), key
        if value.is_floating_point():
            scale = value.abs().max().clamp_min(1).item()
            assert (first["state"][key] - value).abs().max().item() <= tolerance * scale, key
        else:
            assert torch.equal(first["state"][key], value), key
    for key, value in alone["losses"].items():
        mean = sum(each["losses"][key] for each in (first, *others)) / size
        assert mean == pytest.approx(value, rel=max(1e-4, tolerance))


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, names in several.IN_CI.items() for name in names])
def test_more_processes_are_one_with_the_joined_batch(there: Path, size: int, name: str) -> None:
    assert_steps_are_those_of_one(there, size, several.CI_STEPS, name)


@pytest.mark.nightly
@pytest.mark.parametrize("size", [3, 4])
def test_all_cases_of_more_processes_are_one_with_the_joined_batch(tmp_path: Path, size: int) -> None:
    launched(tmp_path, f"all_steps:{size}")
    for name in parallel_steps.CASES:
        assert_steps_are_those_of_one(tmp_path, size, parallel_steps.STEPS, name)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_batch_that_does_not_divide_is_refused_and_one_that_does_is_shared_once(size: int) -> None:
    worlds = [World(rank, size) for rank in range(size)]
    for world in worlds:
        with pytest.raises(ValueError, match=f"batch_size: expected a multiple of the {size} processes, got 25"):
            world.part(25)
        with pytest.raises(ValueError, match="accumulate: expected a divisor of the 12 images of each process, got 5"):
            world.part(12 * size, 5)
    assert sorted(torch.cat([world.part(12 * size, 3) for world in worlds]).tolist()) == list(range(12 * size))


def assert_evaluation_is_that_of_one(out: Path, size: int, alone: dict[str, Any], whole: bool = False) -> None:
    outcomes = alone["evaluation"]["attacks"]
    assert 0 < outcomes["pgd3x2"]["ra"] < alone["evaluation"]["sa"] < 1 and outcomes["flip2"]["flip_rate"] > 0
    assert 0 < outcomes["autoattack"]["ra"] < outcomes["autoattack"]["stages"]["apgd-ce"] or whole
    for rank in range(size):
        found = torch.load(out / f"evaluated-{size}-{rank}.pt")
        assert found["evaluation"] == alone["evaluation"]
        assert torch.equal(found["right"], alone["right"])
        assert all(torch.equal(found["robust"][name], flags) for name, flags in alone["robust"].items())


def test_evaluation_by_three_processes_is_that_of_one(there: Path, alone: Any) -> None:
    """Clean images, FGSM, PGD from random starts, an attack on routers and AutoAttack: each count, image by image."""
    assert_evaluation_is_that_of_one(there, 3, alone[0])


@pytest.mark.nightly
@pytest.mark.parametrize("size", [2, 3, 4])
def test_autoattacks_targeted_parts_by_several_processes_are_those_of_one(tmp_path: Path, size: int) -> None:
    launched(tmp_path, f"evaluate_whole:{size}")
    assert_evaluation_is_that_of_one(tmp_path, size, several.evaluated(ALONE, whole=True), whole=True)


def test_the_command_by_two_processes_prints_and_writes_once(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(HERE)
    assert main([*several.COMMAND, "--out", str(tmp_path / "one.json")]) == 0
    one, two = (json.loads(path.read_text()) for path in (tmp_path / "one.json", there / "record-2.json"))
    assert len(one.pop("latency")) == len(two.pop("latency")) == 2
    assert one == two and one["checks"] and one["curve"]["images"] == 12
    assert (there / "printed-2-0.txt").read_text().count("written to") == 1
    assert (there / "printed-2-1.txt").read_text() == ""


def test_autoattack_by_two_processes_goes_on_where_they_were(there: Path, alone: Any) -> None:
    """The last of the two ends in its third batch: no batch that was done is attacked again, and the outcome is one's."""
    for rank in range(2):
        assert torch.load(there / f"resumed-{rank}.pt")["evaluation"] == alone[0]["evaluation"]
    first, second = ((there / f"attacked-{rank}.txt").read_text().split() for rank in range(2))
    assert second.count("True") == 2 and first.count("True") >= 2
    assert len(first) + len(second) == len(alone[1])
    assert not list(there.glob("*.state*"))


def test_sigterm_of_one_process_saves_and_ends_all(there: Path) -> None:
    """Behind the step that it arrived in; resumed, the run ends with the unbroken one's bits."""
    assert torch.load(there / "interrupted.pt") == (1, several.TERMINATED - 3)
    assert_same_run(Run(there / "terminated"), Run(there / "unbroken"))


@pytest.fixture
def small() -> Iterator[None]:
    with small_architecture():
        yield


@pytest.mark.usefixtures("small")
def test_a_number_that_is_not_finite_in_one_process_stops_all_and_is_named_by_replay(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(there / "ruined")
    for rank in range(2):
        said = (there / f"said-{rank}.txt").read_text()
        assert said.startswith("epoch 1, step 3: loss is nan") and said.endswith(f"advmoe replay {run.folder}")
    spoil(several.RUINED, False, monkeypatch, after(2))
    found = replay(run.folder)
    assert found.reproduced
    assert [len(each) for each in found.now.indices] == [32]
    assert found.now.where is not None and found.now.where.startswith(f"the output of {several.RUINED}, forward 1 ")
    monkeypatch.undo()
    assert replay(run.folder).differences[-1] == "it was made by 2 processes"


@pytest.mark.usefixtures("small")
def test_a_restart_by_torchrun_goes_on_with_the_run_of_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(model=ModelConfig(SMALL, width=4))
    with monkeypatch.context() as patch:
        interrupt_at(5, AdvMoE, patch)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "run", quiet=True)
    with pytest.raises(RunError, match="holds a run already"):  # a new job is no restart
        train(config, tmp_path / "run", quiet=True)
    unbroken = train(config, tmp_path / "unbroken", quiet=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(RunError, match="holds a run of other settings"):
        train(dataclasses.replace(config, seed=1), tmp_path / "run", quiet=True)
    again = train(config, tmp_path / "run", quiet=True)
    assert_same_run(again, unbroken)


@pytest.mark.nightly
def test_torchrun_restarts_a_killed_process_and_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL of one worker in the second epoch; the same command begins and goes on."""
    words = ["--method", "at", "--share-epochs", "0", "--epochs", "4", *COMMON, "--train-limit", "256"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2", "-m", "advmoe", "train", *words]
    for name in ("run", "unbroken"):
        run = tmp_path / name
        port = f"--master-port={several.free_port()}"
        process = subprocess.Popen(
            [sys.executable, *command[:2], port, *command[2:], "--out", str(run)],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        until = time.monotonic() + 240
        workers: list[int] = []
        while name == "run" and time.monotonic() < until and process.poll() is None:
            workers = workers if len(workers) == 2 else children(process.pid)
            if len(workers) == 2 and (run / "metrics.jsonl").exists():
                os.kill(workers[1], signal.SIGKILL)
                break
            time.sleep(0.05)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert out.count("done: ") == 1
        assert ("exitcode: -9" in err or "Signal 9" in err or "-9" in err) == (name == "run")
    assert_same_run(Run(tmp_path / "run"), Run(tmp_path / "unbroken"))


STEADY = """
import sys

from small_runs import SMALL, small_architecture, tiny

import advmoe.training.engine as engine
from advmoe.config import DataConfig, ModelConfig
from advmoe.memory import keep_freed_memory

keep_freed_memory()
steps, original = 0, engine.Trainer._step


def step(self, batches):
    global steps
    steps += 1
    if steps in (200, 1000, 2000):
        print(steps, open("/proc/self/statm").read().split()[1], flush=True)
    return original(self, batches)


engine.Trainer._step = step
with small_architecture():
    data = DataConfig("digits", train_limit=320, validation=32)
    model = ModelConfig(SMALL, width=4)
    engine.train(tiny(model=model, data=data, batch_size=16, epochs=100, threads=1), sys.argv[1], quiet=True)
"""


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat_over_2000_steps(tmp_path: Path) -> None:
    """AdvMoE over 100 epochs, each with its validation and checkpoints; pages in memory after 200 steps and 2,000."""
    folder = os.pathsep.join([str(HERE), str(HERE.parents[1])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": folder}
    command = [sys.executable, "-c", STEADY, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr
    pages = {int(steps): int(pages) for steps, pages in (line.split() for line in done.stdout.splitlines())}
    print(pages)
    assert pages[2000] <= 1.02 * pages[200]
