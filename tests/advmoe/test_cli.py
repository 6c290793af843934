# SPDX-License-Identifier: Apache-2.0
"""The command, end to end on tiny runs, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from advmoe.cli import main
from advmoe.training.methods import AT, Batch, Method, StepResult

TINY = ["--width", "8", "--train-limit", "64", "--batch-size", "32", "--epochs", "1", "--validation-attack", "pgd2"]


def train(out: Path, *more: str) -> int:
    return main(["train", "--method", "at", "--out", str(out), *TINY, *more])


def test_train_evaluate_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train(run) == 0
    assert f"next: advmoe evaluate {run}" in capsys.readouterr().out
    assert main(["evaluate", str(run), "--attack", "pgd3", "--attack", "pgd2-margin", "--limit", "20"]) == 0
    out = capsys.readouterr().out
    assert "| pgd3 " in out and "| pgd2-margin" in out and "20 test images" in out and "epsilon 0.15" in out
    record = json.loads((run / "evaluation.json").read_text())
    assert record["images"] == 20 and set(record["attacks"]) == {"pgd3", "pgd2-margin"}
    assert record["attacks"]["pgd3"]["ra"] <= record["sa"]
    assert main(["evaluate", str(run / "last.pt"), "--attack", "pgd2", "--limit", "5"]) == 0
    assert main(["profile", "--width", "8", "--batch-size", "1", "--repeats", "2", "--layers"]) == 0
    out = capsys.readouterr().out
    assert "layer1.0.conv1.router.linear" in out and "multiply-accumulate as 1" in out


def test_evaluate_takes_any_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\ndef build():\n    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["evaluate", "mine:build", "--data", "digits", "--attack", "pgd2", "--limit", "10"]) == 0
    assert "flip rate" in capsys.readouterr().out
    assert main(["evaluate", "mine:build", "--attack", "pgd2"]) == 2
    assert "--data is needed" in capsys.readouterr().err
    assert main(["evaluate", "mine:absent", "--data", "digits"]) == 2


def test_interrupted_is_3_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = AT.step

    def step(self: Method, batches: Sequence[Batch]) -> StepResult:
        os.kill(os.getpid(), signal.SIGINT)
        return original(self, batches)  # type: ignore[arg-type]

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(AT, "step", step)
        assert train(run) == 3
    assert f"advmoe train --resume {run}" in capsys.readouterr().err
    assert main(["train", "--resume", str(run)]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_fault_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "--kind", "dense", "--lr", "1e30", "--train-limit", "256") == 1
    assert "not finite" in (err := capsys.readouterr().err) or "loss is nan at epoch 1" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--out RUN is needed"),
        (["train", "--out", "RUN", "--arch", "resnet81"], "did you mean resnet18"),
        (["train", "--out", "RUN", "--router", "lite"], "did you mean light"),
        (["train", "--out", "RUN", "--data", "cifar10"], "no folder given"),
        (["train", "--out", "RUN", "--data", "cifar10", "--data-dir", "nowhere"], "nowhere has no data_batch_1"),
        (["train", "--out", "RUN", "--kind", "dense"], "advmoe needs a model with trainable routers"),
        (["train", "--resume", "RUN"], "is no run"),
        (["evaluate", "RUN"], "expected a run folder, a checkpoint file or module:function"),
        (["profile", "--ratio", "2"], "ratio: expected 0 < ratio <= 1"),
    ],
)
def test_usage_is_2_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    run = tmp_path / "run"
    assert main([str(run) if a == "RUN" else a for a in arguments]) == 2
    assert message in capsys.readouterr().err
    assert not run.exists()


def test_help_and_unknown_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["demo"], ["train"], ["evaluate"], ["profile"]):
        with pytest.raises(SystemExit) as done:
            main([*command, "--help"])
        assert done.value.code == 0
    assert "pgd<steps>" in capsys.readouterr().out
    with pytest.raises(SystemExit) as done:
        main(["train", "--epoch-count", "3"])
    assert done.value.code == 2


def test_the_demo_refuses_a_folder_that_is_not_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["demo", "--fast", "--out", str(tmp_path)]) == 2
    assert "is not empty and no earlier demo's" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()
