# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, find no room, may not write, are told to end, or meet another process in their folder."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import io
import json
import logging
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from file_operations import at_operation
from small_runs import SMALL, assert_same_run, interrupt_at, small_architecture, tiny

from advmoe import files, locks
from advmoe.cli import main
from advmoe.config import ModelConfig
from advmoe.data import loader
from advmoe.files import WriteError, add_line, write_text
from advmoe.training import AT, Interrupted, Run, RunError, engine, resume, runs, train
from advmoe.training.methods import Batch, StepResult
from advmoe.training.runs import load_checkpoint

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with small_architecture():
        yield


def config(**changes: Any) -> Any:
    return tiny("at", "dense", **{"model": ModelConfig(SMALL, "dense", width=4), "validation_attack": "pgd1", **changes})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, small: None) -> Run:
    """Two epochs."""
    state = torch.get_rng_state()
    try:
        return train(config(), tmp_path_factory.mktemp("unbroken") / "run", quiet=True)
    finally:
        torch.set_rng_state(state)


@pytest.fixture()
def half(tmp_path: Path) -> Run:
    """One of the two epochs, not yet validated."""
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(3, AT, patch)
        with pytest.raises(Interrupted):
            train(config(), tmp_path / "run", quiet=True)
    return Run(tmp_path / "run")


# --- SIGKILL ---


def killed(folder: Path, *words: str) -> tuple[list[str], list[str]]:
    path = f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(HERE / "killed_runs.py"), str(folder), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    somewhere, planted = json.loads(done.stdout)
    return somewhere, planted


def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Three times somewhere; then while it writes config.yaml, its first checkpoint, and best.pt."""
    somewhere, planted = killed(tmp_path, "3", "0", "1", "5", "11")
    assert len(somewhere) == 3
    assert [stage.split(", ")[1] for stage in planted] == ["config.yaml.tmp", "last.pt.tmp", "best.pt.tmp"]


@pytest.mark.nightly
def test_runs_killed_fifty_times_end_with_the_same_bits(tmp_path: Path) -> None:
    somewhere, _ = killed(tmp_path, "50", str(int(time.time())))
    assert len(somewhere) == 50 and len(set(somewhere)) > 2


@pytest.mark.nightly
def test_a_run_killed_in_the_middle_of_each_operation_on_files(tmp_path: Path) -> None:
    _, planted = killed(tmp_path, "0", "0", "each")
    assert len(planted) > 25


def test_files_are_on_the_disk_before_what_depends_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = at_operation(0, lambda: None, monkeypatch.setattr)
    train(config(epochs=1), tmp_path / "run", quiet=True)

    def whole(name: str) -> list[str]:
        return [f"write {name}.tmp", "fsync", f"rename {name}", "fsync"]  # the file's, and the folder's

    validation, line = (
        ["validation", "validated"],
        ["fsync", "fsync"],
    )  # the line's, and of the folder that got a new file
    last = whole("last.pt")
    assert made == [*whole("config.yaml"), *last, *validation, *whole("best.pt"), *line, *last]


def test_what_a_killed_process_left_is_no_obstacle(unbroken: Run, half: Run) -> None:
    for name in ("config.yaml", "metrics.jsonl", "last.pt", "best.pt"):
        (half.folder / f"{name}.tmp").write_bytes(b"half of it")
    (half.folder / "fault.pt.0.tmp").write_bytes(b"half of it")
    (half.folder / "lock").write_text("process 1 on another machine")
    half.metrics_path.write_text('{"epoch": 1, "lo')  # torn
    assert half.metrics() == []
    assert_same_run(unbroken, resume(half.folder, quiet=True))
    assert not (half.folder / "lock").exists()


# --- a full disk ---


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_a_checkpoint(unbroken: Run, half: Run, capsys: pytest.CaptureFixture[str]) -> None:
    last = half.checkpoint()
    before = last.read_bytes()
    with no_file_larger_than(last.stat().st_size // 2):
        assert main(["train", "--resume", str(half.folder)]) == 1
    said = capsys.readouterr().err
    assert f"advmoe: {last} cannot be written: File too large; the process or the file system allows no larger" in said
    assert f"(ulimit -f); then go on with: advmoe train --resume {half.folder}; the last checkpoint is {last}" in said
    assert last.read_bytes() == before and not list(half.folder.glob("*.tmp"))
    assert_same_run(unbroken, resume(half.folder, quiet=True))


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fails_at(number: int, unbroken: Run, folder: Path) -> str | None:
    """Trains until the disk is full in that operation, and goes on; what was said, None if there are fewer operations."""
    said = None
    with pytest.MonkeyPatch.context() as patch:
        made = at_operation(number, full, patch.setattr)
        try:
            train(config(), folder, quiet=True)
        except (WriteError, RunError) as error:
            said = f"{made[number - 1]}: {error}"
            assert str(folder) in str(error) and "No space left on device" in str(error)
    left = {path.name for path in folder.iterdir()}
    assert not any(name.endswith(".tmp") or name == "lock" for name in left)
    if said is None:
        return None
    if (folder / "last.pt").exists():
        assert "make room on that disk; then go on with: advmoe train --resume" in said
        torch.load(folder / "last.pt", weights_only=True)
        again = resume(folder, quiet=True)
    else:
        again = train(config(), folder, quiet=True)  # nothing is in its way
    assert_same_run(unbroken, again)
    return said


# config.yaml, its folder; the first checkpoint: its beginning, its renaming; best.pt, a line of metrics, the next one
@pytest.mark.parametrize("number", [1, 4, 5, 7, 11, 15, 17])
def test_a_disk_that_is_full_in_the_middle(tmp_path: Path, unbroken: Run, number: int) -> None:
    assert fails_at(number, unbroken, tmp_path / "run") is not None


@pytest.mark.nightly
def test_a_disk_that_is_full_at_each_operation(tmp_path: Path, unbroken: Run) -> None:
    said, number = [], 0
    while True:
        number += 1
        with pytest.MonkeyPatch.context() as patch:  # a validation writes nothing
            names = at_operation(0, lambda: None, patch.setattr)
            if number == 1:
                train(config(), tmp_path / "count", quiet=True)
                order = list(names)
        if number > len(order):
            break
        if not order[number - 1].startswith("validat"):
            said.append(fails_at(number, unbroken, tmp_path / str(number)))
    assert len(said) > 25 and None not in said


@pytest.fixture
def full_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run opens in its folder to write is a device that is full."""
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full")
    for module in (files, runs):
        monkeypatch.setattr(module, "open_own", lambda name, flags: os.open("/dev/full", os.O_WRONLY))


def test_a_real_full_device(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What torch.save makes of an error of its file says nothing of a disk."""
    run = Run(tmp_path)
    run.save({"value": 1})
    request.getfixturevalue("full_device")
    for write, name in (
        (lambda: run.save({"value": torch.zeros(100000)}), "last.pt"),
        (lambda: write_text(tmp_path / "a", "b"), "a"),
    ):
        with pytest.raises(
            WriteError, match=f"{name} cannot be written: No space left on device; make room on that disk"
        ):
            write()
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["value"] == 1
    with pytest.raises(WriteError, match="lines cannot be written: No space"):
        add_line(tmp_path / "lines", "{}")


def test_what_ends_a_write_is_not_hidden_by_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.save closes its archive then, and complains of that."""

    class Interrupted(io.FileIO):
        count = 0

        def write(self, data: Any) -> int:
            self.count += 1
            if self.count == 3:
                raise KeyboardInterrupt
            return super().write(data) or 0

    monkeypatch.setattr(files, "open", lambda path, mode, opener: Interrupted(path, mode), raising=False)
    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path).save({"value": torch.zeros(10)})
    assert not list(tmp_path.iterdir())


def test_a_line_is_appended_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    add_line(path, "first")
    with no_file_larger_than(9), pytest.raises(WriteError, match="File too large"):
        add_line(path, "second")
    assert path.read_text() == "first\n"
    add_line(path, "third")
    assert path.read_text() == "first\nthird\n"


@pytest.mark.usefixtures("full_device")
def test_a_log_that_cannot_be_written_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.Logger("alone")
    with Run(tmp_path).log(logger):
        logger.error("one")
        logger.error("two")
    said = capsys.readouterr().err
    assert said.count("log.txt cannot be written: No space left on device") == 1 and "Traceback" not in said


# --- a folder that may not be written ---


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Data(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def modes_hold() -> Iterator[None]:
    """Meanwhile folders' modes hold for root too: this thread goes without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    libc, header, data = ctypes.CDLL(None, use_errno=True), _Header(0x20080522, 0), (_Data * 2)()
    assert libc.capget(ctypes.byref(header), data) == 0
    before = data[0].effective
    data[0].effective = before & ~0b110
    assert libc.capset(ctypes.byref(header), data) == 0
    try:
        yield
    finally:
        data[0].effective = before
        assert libc.capset(ctypes.byref(header), data) == 0


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    folder.chmod(0o555)
    try:
        with modes_hold():
            with pytest.raises(PermissionError):
                (folder / "nothing").touch()
            yield
    finally:
        folder.chmod(0o755)


def test_nothing_begins_in_a_folder_that_may_not_be_written(
    tmp_path: Path, half: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with read_only(half.folder):
        assert main(["train", "--resume", str(half.folder)]) == 2
        assert f"{half.folder} cannot be written: Permission denied; make the folder writable" in capsys.readouterr().err
    with read_only(tmp_path):
        assert main(["train", "--method", "at", "--epochs", "1", "--out", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'new'} cannot be written: Permission denied" in said and "choose another --out" in said


def test_a_folder_that_may_no_longer_be_written(
    half: Run, unbroken: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_checkpoint(half.checkpoint())
    evaluate = engine.evaluate

    def last_chance(*args: Any, **kwargs: Any) -> Any:
        half.folder.chmod(0o555)
        return evaluate(*args, **kwargs)

    with monkeypatch.context() as patch, modes_hold():
        patch.setattr(engine, "evaluate", last_chance)
        assert main(["train", "--resume", str(half.folder)]) == 1
    half.folder.chmod(0o755)
    said = capsys.readouterr().err
    assert "best.pt cannot be written: Permission denied; make the folder writable; then go on with: advmoe train" in said
    after = load_checkpoint(half.checkpoint())
    assert (after["epoch"], after["step"]) == (before["epoch"], before["step"])
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())
    assert_same_run(unbroken, resume(half.folder, quiet=True))


# --- SIGTERM ---


@pytest.mark.parametrize("step", [2, 3])
def test_sigterm_lets_the_step_end_and_saves(
    tmp_path: Path, unbroken: Run, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        interrupt_at(step, AT, patch, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train(config(), tmp_path / "run", quiet=True)
    assert signal.getsignal(signal.SIGTERM) == before
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (0, step)
    assert_same_run(unbroken, resume(tmp_path / "run", quiet=True))


@pytest.mark.parametrize("place", ["validation", "between", "loading"])
def test_sigterm_outside_of_steps_is_3_too(
    half: Run, unbroken: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    name = {"validation": "evaluate", "between": "_ctrl_c", "loading": "load"}[place]
    original = getattr(engine, name)

    def told(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(engine, name, told)
        assert main(["train", "--resume", str(half.folder)]) == 3
    assert f"interrupted; go on with: advmoe train --resume {half.folder}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert_same_run(unbroken, resume(half.folder, quiet=True))


def test_sigterm_behind_the_last_look_of_an_epoch_is_heard(tmp_path: Path, unbroken: Run) -> None:
    original = engine.Trainer._stop_if
    count = 0

    def late(self: engine.Trainer, interrupted: bool) -> None:
        nonlocal count
        count += 1
        original(self, interrupted)
        if count == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.Trainer, "_stop_if", late)
        with pytest.raises(Interrupted):
            train(config(), tmp_path / "run", quiet=True)
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 3
    assert_same_run(unbroken, resume(tmp_path / "run", quiet=True))


def test_sigterm_ends_a_sweep_resumably(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("advmoe.recipes.sweep.train", told)
    sweep = ["reproduce", "table1/cifar10/resnet18/advmoe", "--out", str(tmp_path), "--data-dir", str(tmp_path)]
    assert main(sweep) == 3
    assert "interrupted; go on with: advmoe reproduce table1/cifar10/resnet18/advmoe" in capsys.readouterr().err


def waited(number: int) -> int:
    time.sleep(0.02)
    return number


def test_worker_processes_outlive_a_sigterm_of_all() -> None:
    """A scheduler sends it to the whole group; a batch that does not come would end the run without its checkpoint."""
    made = loader._each(waited, range(20), 1, False)
    first = next(made)
    workers = multiprocessing.active_children()
    assert len(workers) == 1
    for worker in workers:
        os.kill(worker.pid or 0, signal.SIGTERM)
    assert [first, *made] == list(range(20))


# --- two in one folder ---


def test_a_run_in_use_is_refused_and_sigterm_ends_it_resumably(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["--method", "standard", "--kind", "s_dense", "--width", "4", "--train-limit", "64", "--batch-size", "32",
                "--epochs", "100000", "--validation-attack", "pgd1", "--out", str(run)]  # fmt: skip
    command = [sys.executable, "-m", "advmoe", "train", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 120
        while not (run / "best.pt").exists() and time.monotonic() < until and process.poll() is None:
            time.sleep(0.05)
        for again in (["train", "--resume", str(run)], ["train", *words]):
            assert main(again) == 2
            assert f"{run} is in use by process {process.pid} on " in capsys.readouterr().err
        process.terminate()
        _, said = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 3 and f"interrupted; go on with: advmoe train --resume {run}" in said
    assert not list(run.glob("*.tmp")) and not (run / "lock").exists()


def test_a_lock_is_not_held_on_by_a_killed_process_s_children(tmp_path: Path) -> None:
    """Those that load images, say, which notice its end only after seconds."""
    reading, writing = os.pipe()
    holder = os.fork()
    if not holder:
        with locks.locked(tmp_path / "lock"):
            child = os.fork()
            if child:
                os.write(writing, str(child).encode())
            time.sleep(600)
            os._exit(0)
    child = int(os.read(reading, 20))
    try:
        with pytest.raises(BlockingIOError, match=f"process {holder} on"), locks.locked(tmp_path / "lock"):
            pass
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        with locks.locked(tmp_path / "lock"):
            os.kill(child, 0)  # it is still there
    finally:
        for pid in (holder, child):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os.close(reading)
        os.close(writing)


def test_a_lock_that_has_just_been_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the opening of the file and its locking its holder may end, and a third process make a new one."""
    path, lock = tmp_path / "lock", locks._lock
    count = 0

    def slow(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == 1:
            path.unlink()
        lock(descriptor)

    monkeypatch.setattr(locks, "_lock", slow)
    with locks.locked(path):
        assert count == 2 and path.exists()
        with pytest.raises(BlockingIOError), locks.locked(path):
            pass


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(descriptor: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks, "_lock", none)
    with caplog.at_level(logging.WARNING, logger="advmoe"):
        run = train(config(epochs=1), tmp_path / "run", quiet=True)
    assert any("this file system gives no locks (No locks available)" in r.getMessage() for r in caplog.records)
    assert len(run.metrics()) == 1


def test_a_run_ended_by_an_error_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: AT, batches: Sequence[Batch]) -> StepResult:
        raise KeyError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(AT, "step", step)
        with pytest.raises(KeyError):
            train(config(), tmp_path / "run", quiet=True)
    assert len(train(dataclasses.replace(config(), epochs=1), tmp_path / "run", quiet=True).metrics()) == 1
