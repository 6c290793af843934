# SPDX-License-Identifier: Apache-2.0
"""Two processes against one with the joined batch; a process that is lost; the command under torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import parallel_steps
import pytest
import torch

from advmoe.training import Run
from advmoe.training.engine import _ctrl_c
from advmoe.training.parallel import ALONE, World, lost, resume_command, sigterm_interrupts

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def torchrun(*words: str, count: int = 2) -> list[str]:
    port = f"--master-port={free_port()}"
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}", port, *words]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has of every case."""
    out = tmp_path_factory.mktemp("by_two")
    command = torchrun(str(HERE / "parallel_steps.py"), str(out))
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=600)
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", parallel_steps.CASES)
def test_two_processes_are_one_with_the_joined_batch(by_two: list[dict[str, Any]], name: str) -> None:
    alone = parallel_steps.run(name, ALONE)
    tolerance = parallel_steps.CASES[name].tolerance
    first, second = (each[name] for each in by_two)
    assert set(first["state"]) == set(alone["state"])
    for key, value in alone["state"].items():
        assert torch.equal(first["state"][key], second["state"][key]), key
        if value.is_floating_point():
            scale = value.abs().max().clamp_min(1).item()
            assert (first["state"][key] - value).abs().max().item() <= tolerance * scale, key
        else:
            assert torch.equal(first["state"][key], value), key
    for key, value in alone["losses"].items():
        assert (first["losses"][key] + second["losses"][key]) / 2 == pytest.approx(value, rel=max(1e-4, tolerance))


def test_a_sum_is_over_both(by_two: list[dict[str, Any]]) -> None:
    assert [each["total"].tolist() for each in by_two] == [[1, 5], [1, 5]]


def test_sigterm_is_an_interruption_and_no_matter_behind_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sends it to what is left when a process is lost, at any time."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # while it is said: nothing comes of it
        signal.signal(signal.SIGTERM, before)
        with sigterm_interrupts():
            pass
        assert signal.getsignal(signal.SIGTERM) == before
        with sigterm_interrupts(), pytest.raises(ValueError), _ctrl_c(several=True) as interrupted:
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupted()  # a step ends first
            raise ValueError
    finally:
        signal.signal(signal.SIGTERM, before)
    assert resume_command("RUN") == "advmoe train --resume RUN"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resume_command("RUN") == "torchrun … -m advmoe train --resume RUN"


def test_an_expert_is_really_unused_on_one_of_them() -> None:
    case = parallel_steps.CASES["advmoe one expert unused"]
    model = parallel_steps.network(case)
    for rank, expert in ((0, 0), (1, 1)):
        images = parallel_steps.shared_batch(case, 0, 0, World(rank, 2)).images
        assert set(model.router.route(model.normalize(images)).expert.tolist()) == {expert}


COMMON = ["--arch", "resnet18", "--width", "4", "--data", "digits", "--train-limit", "512", "--batch-size", "32",
          "--validation-attack", "pgd1", "--device", "cpu"]  # fmt: skip


def advmoe(*words: str, count: int = 2, **more: Any) -> subprocess.Popen[str]:
    command = torchrun("-m", "advmoe", "train", *words, count=count)
    return subprocess.Popen(
        command,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        **more,
    )


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    """One log, one run folder, images counted once; what one process computes with the joined batch but for rounding."""
    words = ["--method", "standard", "--kind", "s_dense", "--epochs", "2", "--lr", "0.01", *COMMON]
    two = advmoe(*words, "--out", str(tmp_path / "two"))
    out, err = two.communicate(timeout=300)
    assert two.returncode == 0, err
    assert out.count("done: ") == 1 and err.count("epoch 1/2") == 1
    one = advmoe(*words, "--out", str(tmp_path / "one"), count=1)
    assert one.communicate(timeout=300) and one.returncode == 0
    a, b = (Run(tmp_path / name).metrics() for name in ("two", "one"))
    assert len(a) == len(b) == 2
    for first, second in zip(a, b, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-3)
        assert first["train_sa"] == pytest.approx(second["train_sa"], abs=0.01)
        assert first["validation_sa"] == pytest.approx(second["validation_sa"], abs=0.03)


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return sorted(int(each) for each in listed.split())


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.nightly), 1])
def test_a_lost_process_ends_the_run_resumably(tmp_path: Path, victim: int) -> None:
    """Resumed by as many processes it ends with the weights of an unbroken run, bit for bit."""
    words = ["--method", "at", "--share-epochs", "0", "--epochs", "4", *COMMON, "--train-limit", "256"]
    run = tmp_path / "run"
    process = advmoe(*words, "--out", str(run))
    until = time.monotonic() + 120
    workers: list[int] = []
    while not (run / "metrics.jsonl").exists() and time.monotonic() < until and process.poll() is None:
        workers = workers if len(workers) == 2 else children(process.pid)
        time.sleep(0.05)
    os.kill(workers[victim], signal.SIGKILL)
    assert (run / "last.pt").exists()
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert 1 <= len(Run(run).metrics()) < 4
    if victim == 1:  # of the two the first reports, what it sees first: the other gone, or torchrun's SIGTERM
        assert "another of the 2 processes has ended" in err or "interrupted; go on with" in err
        assert f"torchrun … -m advmoe train --resume {run}" in err
    for rest in (["--resume", str(run)], [*words, "--out", str(tmp_path / "unbroken")]):
        again = advmoe(*rest)
        _, err = again.communicate(timeout=300)
        assert again.returncode == 0, err
    broken, unbroken = (torch.load(tmp_path / name / "last.pt", weights_only=False) for name in ("run", "unbroken"))
    assert broken["epoch"] == unbroken["epoch"] == 4
    assert set(broken["model"]) == set(unbroken["model"])
    assert all(torch.equal(broken["model"][key], value) for key, value in unbroken["model"].items())


def test_what_does_not_divide_is_refused(tmp_path: Path) -> None:
    process = advmoe("--method", "standard", *COMMON, "--batch-size", "33", "--out", str(tmp_path / "run"))
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "batch_size: expected a multiple of the 2 processes, got 33" in err
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_which_errors_say_that_a_process_is_gone() -> None:
    assert lost(
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1")
    )
    assert lost(RuntimeError("NCCL communicator was aborted on rank 1"))
    assert not lost(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    assert not lost(ValueError("gloo"))
