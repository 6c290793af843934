# SPDX-License-Identifier: Apache-2.0
"""``advmoe evaluate``, ``analyze`` and ``report`` on one small run, and AutoAttack interrupted under the command."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from small_runs import SMALL, small_architecture, tiny

from advmoe.attacks import AutoAttack
from advmoe.cli import main
from advmoe.locks import locked
from advmoe.training import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = tiny("standard")
    with small_architecture():
        model = dataclasses.replace(config.model, arch=SMALL)
        data = dataclasses.replace(config.data, train_limit=1200)
        train(dataclasses.replace(config, model=model, data=data, epochs=8), folder, quiet=True)
    return folder


def command(*arguments: str) -> int:
    with small_architecture():
        return main(list(arguments))


def test_evaluate_says_it_all(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--attack", "pgd3x2", "--attack", "soft2", "--limit", "40", "--checks", "32", "--checkpoint", "last"]
    assert command("evaluate", str(run), *arguments) == 0
    out = capsys.readouterr().out
    record = json.loads((run / "evaluation-last.json").read_text())
    assert [c["name"] for c in record["checks"]] == [
        "gradient", "radius", "strength", "converged", "black_box", "surrogate",
    ]  # fmt: skip
    assert all(f"{c['name']}: {c['measured']}" in out for c in record["checks"])
    assert record["checks"][-1]["passed"] is not None  # the model is routed
    for name in ("pgd3x2", "soft2"):
        outcome = record["attacks"][name]
        low, high = outcome["interval"]
        assert low <= outcome["ra"] <= high and outcome["images"] == 40
        classes = [share for share in outcome["class_ra"] if share is not None]
        assert len(outcome["class_ra"]) == 10 and min(classes) <= outcome["ra"] <= max(classes)
    assert len(record["curve"]["ra"]) == len(record["curve"]["epsilons"]) >= 7
    assert record["params"] > 0 and record["gflops"] == record["pathway_gflops"] + record["router_gflops"]
    assert "| class |" not in out  # of 40 images the shares of ten classes say nothing
    assert "GFLOPs an image" in out and "ms for a batch of 32" in out
    assert "written to" in out


def test_autoattack_by_the_command_goes_on_where_it_was(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = AutoAttack._attack
    calls = 0

    def attack(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        original(*arguments)  # type: ignore[arg-type]

    wanted = ["evaluate", str(run), "--attack", "square", "--attack", "pgd1", "--limit", "24", "--batch-size", "1"]
    wanted += ["--autoattack-limit", "20", "--checks", "0", "--checkpoint", "last"]
    with monkeypatch.context() as patch:
        patch.setattr(AutoAttack, "_attack", staticmethod(attack))
        patch.setattr(AutoAttack, "queries", 20)
        assert command(*wanted) == 130
    state = run / "square.state.pt"
    assert state.exists()
    assert command(*wanted, "--seed", "1") == 2
    assert "square.state.pt was made with other weights, images or settings; remove it" in capsys.readouterr().err
    before = calls
    with monkeypatch.context() as patch:
        patch.setattr(AutoAttack, "_attack", staticmethod(attack))
        assert command(*wanted) == 0
    assert not state.exists() and calls > before
    record = json.loads((run / "evaluation-last.json").read_text())
    assert record["attacks"]["square"]["images"] == 20 and record["attacks"]["pgd1"]["images"] == 24
    assert list(record["attacks"]["square"]["stages"]) == ["square"]
    assert record["attacks"]["square"]["flip_rate"] is None and record["attacks"]["square"]["zero_gradient"] is None


def test_a_second_evaluation_with_autoattack_is_refused_meanwhile(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["evaluate", str(run), "--limit", "4", "--checks", "0", "--checkpoint", "last"]
    with locked(run / "autoattack.lock"):
        assert command(*wanted, "--attack", "square") == 2
        assert f"process {os.getpid()} on" in (said := capsys.readouterr().err) and "evaluates with AutoAttack" in said
        assert command(*wanted, "--attack", "pgd1") == 0  # which writes none of its files
    assert not (run / "autoattack.lock").exists()


def test_analyze_and_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--limit", "12", "--attack", "pgd2", "--checkpoint", "last", "--threads", "1"]
    assert command("analyze", str(run), "--only", "dissection", "transfer", *short) == 0
    captured = capsys.readouterr()
    assert str(run / "analysis-last" / "dissection.csv") in captured.out and "dissection.png" in captured.out
    assert "left out: transfer: it compares several runs, got one" in captured.err
    assert (run / "analysis-last" / "dissection.png").read_bytes()[:4] == b"\x89PNG"
    assert command("analyze", str(run), "--only", "disection", *short) == 2
    assert "did you mean dissection?" in capsys.readouterr().err
    assert command("analyze", "--list") == 0
    assert "figures 4 and 5" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert command("report", str(run), "--out", str(page), "--examples", "2", *short) == 0
    assert f"written: {page}" in capsys.readouterr().out
    text = page.read_text()
    assert text.count("data:image/png;base64") > 5 and "What the attack fools" in text
