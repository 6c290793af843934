# SPDX-License-Identifier: Apache-2.0
"""bench.gpu's logic, rehearsed on the CPU: timing, means, counting tests, the budget, what is printed and written."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu import Budget, Clock, Scope, count_tests, report, summarize_layers, summarize_models, targets

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():  # the command makes errors of some
        yield
    torch.set_num_threads(threads)


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every section, every contender, and a file that holds each row."""
    path = tmp_path / "results" / "gpu.json"
    assert gpu.main(["--device", "cpu", "--quick", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert not [r for r in record["rows"] if "failed" in r] and record["left_out"] == []
    layers = {(r["dtype"], r["direction"], r["contender"]) for r in record["rows"] if r["section"] == "layers"}
    assert len(layers) == 2 * 2 * len(gpu.CONTENDERS)
    models = {(r["direction"], r["contender"]) for r in record["rows"] if r["section"] == "models"}
    assert models == {(d, kind) for d in ("inference", "training step") for kind in gpu.KINDS}
    for row in record["rows"]:
        assert row["n"] == 3 and 0 < row["low_us"] <= row["median_us"] <= row["high_us"]
    assert [t["met"] for t in record["targets"]] == [None] * len(gpu.TARGETS)
    printed = capsys.readouterr().out
    assert "not measured" in printed and "left out: nothing" in printed and len(printed.splitlines()) <= 60


def test_what_the_budget_leaves_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--quick", "--budget", "0", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["rows"] == []
    assert "layers, bf16 forward, B = 2: 2 of 2 shapes" in record["left_out"]
    assert "resnet18 inference, B = 2" in record["left_out"] and "resnet18 training step, B = 4" in record["left_out"]
    assert "left out: layers, bf16 forward" in capsys.readouterr().out


def test_clock_and_budget() -> None:
    clock, calls = Clock(CPU), {"slow": lambda: time.sleep(2e-3), "fast": lambda: None}
    times = clock.paired(calls, 3)
    assert [len(t) for t in times.values()] == [3, 3] and min(times["slow"]) >= 2e-3 > max(times["fast"])
    assert clock.copies(1, 8) == 8 and clock.copies(1 << 40, 8) == 2
    assert clock.copies(clock.cache_bytes // 2, 8) == 4
    budget = Budget(100)
    assert budget.allows("this") and not budget.allows("that", 1000) and budget.left_out == ["that"]


def _layer(shape: str, contender: str, mode: str, median: float) -> gpu.Row:
    of = {"section": "layers", "dtype": "bf16", "direction": "forward", "batch": 128}
    return {**of, "shape": shape, "contender": contender, "mode": mode, "median_us": median}


def test_geometric_means_are_over_the_shapes_that_have_both() -> None:
    rows = [
        _layer("a", "routed", "graph", 2.0), _layer("a", "floor", "graph", 1.0), _layer("a", "dense", "graph", 4.0),
        _layer("b", "routed", "graph", 8.0), _layer("b", "floor", "graph", 1.0),
        {"section": "layers", "shape": "b", "contender": "dense", "failed": "out of memory"},
    ]  # fmt: skip
    (row,) = summarize_layers(rows)
    assert row["shapes"] == 2 and row["routed/floor graph"] == pytest.approx(4.0)
    assert row["dense/routed graph"] == pytest.approx(2.0)
    assert row["routed/floor eager"] is None


def test_targets_are_read_from_what_was_measured() -> None:
    rows = [_layer("a", "routed", "graph", 1.1), _layer("a", "floor", "graph", 1.0)]
    of = {"section": "models", "arch": "resnet18", "batch": 1024, "mode": "graph", "largest_share": 0.5}
    rows += [{**of, "direction": "inference", "contender": k, "median_us": v} for k, v in (("moe", 1.0), ("dense", 1.9))]
    found = targets(summarize_layers(rows), summarize_models(rows))
    assert [t["met"] for t in found] == [True, None, False, None]
    assert found[0]["measured"] == pytest.approx(1.1) and found[2]["measured"] == pytest.approx(1.9)


def test_tests_are_counted_also_where_they_were_cut_short() -> None:
    alone = """tests/gpu/test_a.py::test_one[x y] PASSED      [  1%]
tests/gpu/test_a.py::test_two FAILED       [  2%]
tests/gpu/test_a.py::test_three SKIPPED (no tool) [  3%]
tests/gpu/test_a.py::test_four """
    found = count_tests(alone)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert found["failures"] == ["tests/gpu/test_a.py::test_two"]
    together = """[gw0] [ 10%] PASSED tests/gpu/test_a.py::test_one
[gw1] [ 20%] ERROR tests/gpu/test_a.py::test_two[a-b]
=================================== FAILURES ===================================
FAILED tests/gpu/test_a.py::test_one - not to be counted twice"""
    found = count_tests(together)
    assert (found["passed"], found["failed"]) == (1, 1) and found["failures"] == ["tests/gpu/test_a.py::test_two[a-b]"]


def test_report_names_failures() -> None:
    tests = {"passed": 1, "failed": 10, "skipped": 2, "failures": [f"t{i}" for i in range(10)], "status": None}
    record = {
        "machine": gpu.describe(CPU), "tests": tests, "layers": [], "models": [], "rounds": 3, "notes": ["a note"],
        "targets": [], "rows": [{"case": "layers, B = 1", "failed": "RuntimeError: no"}], "left_out": ["the rest"],
        "seconds": {"total": 1.0},
    }  # fmt: skip
    text = "\n".join(report(record))
    assert "1 passed, 10 failed, 2 skipped, cut short" in text and "and 2 more" in text
    assert "failed: layers, B = 1" in text and "left out: the rest" in text and "a note" in text


def test_routers_are_balanced() -> None:
    scope = Scope.of(CPU, True)
    model = gpu.make_model("resnet18", "moe", scope, CPU).eval()
    assert gpu._largest_share(model, gpu._images(scope, 64, torch.float32, CPU)) < 1


def test_builds_tests_and_compiles_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that fails is one line; tests that take too long are ended, counted and named."""
    monkeypatch.setattr(gpu, "_build_command", lambda: [sys.executable, "-c", "raise SystemExit('error: no pybind11')"])
    start = gpu._start

    def instead(command: Sequence[str], log: Path) -> subprocess.Popen[str]:
        if "pytest" in command:
            lines = "tests/gpu/test_a.py::test_one PASSED\ntests/gpu/test_a.py::test_two FAILED"
            command = [sys.executable, "-c", f"import time; print({lines!r}, flush=True); time.sleep(60)"]
        elif "bench.gpu" in command:
            command = [sys.executable, "-c", "raise ValueError('no')"]
        return start(command, log)

    monkeypatch.setattr(gpu, "_start", instead)
    budget, record = Budget(100), {"notes": [], "seconds": {}}
    options = argparse.Namespace(skip_tests=False, quick=False, test_seconds=2.0)
    gpu._prepare(options, Scope(), budget, record)
    assert budget.spent() < 20
    tests = record["tests"]
    assert (tests["passed"], tests["failed"], tests["status"]) == (1, 1, None)
    assert budget.left_out == ["the tests that were not done when their time was over (2 were)"]
    assert "native module moe_kernels._C: not built (error: no pybind11); Triton needs none" in record["notes"]
    assert any("ValueError: no" in note for note in record["notes"])
