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

import moe_kernels
from bench import gpu
from bench.gpu import (
    Budget,
    Build,
    Clock,
    Scope,
    count_tests,
    fastest_backends,
    report,
    summarize_layers,
    summarize_models,
    table_for_auto,
    targets,
)

CPU = torch.device("cpu")
NAMES = ("triton", "cuda")


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
    """Every section, every contender with each backend, and a file that holds each row."""
    path = tmp_path / "results" / "gpu.json"
    assert gpu.main(["--device", "cpu", "--quick", "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert not [r for r in record["rows"] if "failed" in r] and record["left_out"] == []
    reasons = {name: moe_kernels.available_backends()[name] for name in gpu.BACKENDS["cpu"]}
    names = record["backends"]
    assert names == [name for name, reason in reasons.items() if reason is None] and names[0] == "cpu"
    assert all(f"not measured, backend {name}: {why}" in record["notes"] for name, why in reasons.items() if why)
    layers = {(r["dtype"], r["direction"], r["contender"]) for r in record["rows"] if r["section"] == "layers"}
    assert len(layers) == 2 * 2 * (len(gpu.CONTENDERS) + len(names)) + 2 + len(names)
    models = {(r["direction"], r["contender"]) for r in record["rows"] if r["section"] == "models"}
    kinds = [*gpu.KINDS, *(f"moe {name}" for name in names)]
    fused = {("inference", f"fused {name}") for name in names}
    assert models == {(d, kind) for d in ("inference", "training step") for kind in kinds} | fused
    assert all(row["cpu/floor eager"] > 0 for row in record["layers"])
    if len(names) > 1:
        assert len(record["fastest"]) == 5 * 2 and all(set(r["us"]) == set(names) for r in record["fastest"])
        assert set(table_for_auto(record)) == {(d, "2 .. 16") for d in gpu.DIRECTIONS}
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


def _layer(shape: str, contender: str, mode: str, median: float, batch: int = 128) -> gpu.Row:
    of = {"section": "layers", "dtype": "bf16", "direction": "forward", "batch": batch}
    return {**of, "shape": shape, "contender": contender, "mode": mode, "median_us": median}


def test_geometric_means_are_over_the_shapes_that_have_both() -> None:
    rows = [
        _layer("a", "triton", "graph", 2.0), _layer("a", "floor", "graph", 1.0), _layer("a", "dense", "graph", 4.0),
        _layer("b", "triton", "graph", 8.0), _layer("b", "floor", "graph", 1.0), _layer("b", "cuda", "graph", 2.0),
        {"section": "layers", "shape": "b", "contender": "dense", "failed": "out of memory"},
    ]  # fmt: skip
    (row,) = summarize_layers(rows, NAMES)
    assert row["shapes"] == 2 and row["routed/floor graph"] == pytest.approx(4.0)
    assert row["dense/routed graph"] == pytest.approx(2.0) and row["triton/floor graph"] == pytest.approx(4.0)
    assert row["cuda/floor graph"] == pytest.approx(2.0) and row["cuda/triton graph"] == pytest.approx(0.25)
    assert row["routed/floor eager"] is None


def test_targets_are_read_from_what_was_measured() -> None:
    rows = [_layer("a", name, "graph", time) for name, time in (("triton", 1.1), ("cuda", 1.4), ("floor", 1.0))]
    rows += [_layer("a", name, "eager", time, batch=8) for name, time in (("triton", 2.0), ("cuda", 1.0))]
    of = {"section": "models", "arch": "resnet18", "batch": 1024, "mode": "graph", "largest_share": 0.5}
    times = (("moe triton", 1.0), ("moe cuda", 5.0), ("dense", 1.9), ("fused triton", 0.5), ("dense compiled", 1.5))
    rows += [{**of, "direction": "inference", "contender": k, "median_us": v} for k, v in times]
    found = targets(summarize_layers(rows, NAMES), summarize_models(rows, NAMES))
    assert [t["met"] for t in found] == [True, False, None, None, True, None, None, None, False, None, None, True]
    assert found[0]["measured"] == pytest.approx(1.1) and found[1]["measured"] == pytest.approx(1.4)
    assert found[4]["measured"] == pytest.approx(0.5) and found[8]["measured"] == pytest.approx(1.9)
    assert found[11]["measured"] == pytest.approx(3.0)


def test_the_table_for_auto_is_of_eager_means_over_what_all_backends_computed() -> None:
    rows = [
        _layer("a", "triton", "eager", 4.0, 1), _layer("a", "cuda", "eager", 2.0, 1),
        _layer("a", "floor", "eager", 1.0, 1),
        _layer("b", "triton", "eager", 4.0, 1), _layer("b", "cuda", "eager", 6.0, 1),
        _layer("a", "triton", "graph", 1.0, 1), _layer("a", "cuda", "graph", 9.0, 1),
        _layer("a", "triton", "eager", 4.0, 512), _layer("a", "cuda", "eager", 5.0, 512),
        _layer("a", "cuda", "eager", 1.0, 8),
    ]  # fmt: skip
    record = {"backends": list(NAMES), "fastest": fastest_backends(rows, NAMES)}
    assert [r["fastest"] for r in record["fastest"]] == ["cuda", "triton", "triton", "triton"]
    assert table_for_auto(record) == {("forward", "1"): "cuda", ("forward", "129 .."): "triton"}


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
        "machine": gpu.describe(CPU), "tests": {"cuda": tests}, "layers": [], "models": [], "rounds": 3, "fastest": [],
        "backends": [], "notes": ["a note"], "targets": [],
        "rows": [{"case": "layers, B = 1", "failed": "RuntimeError: no"}], "left_out": ["the rest"],
        "seconds": {"total": 1.0},
    }  # fmt: skip
    text = "\n".join(report(record))
    assert "tests/gpu, cuda: 1 passed, 10 failed, 2 skipped, cut short" in text and "and 2 more" in text
    assert "failed: layers, B = 1" in text and "left out: the rest" in text and "a note" in text


def test_routers_are_balanced() -> None:
    scope = Scope.of(CPU, True)
    model = gpu.make_model("resnet18", "moe cpu", scope, CPU).eval()
    assert gpu._largest_share(model, gpu._images(scope, 64, torch.float32, CPU)) < 1


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
    """What is started, by its module's name, and its environment; in its place runs something that fails or hangs."""
    seen: list[tuple[str, dict[str, str]]] = []
    start = gpu._start

    def instead(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
        seen.append((command[2], environment or {}))
        if "pytest" in command:
            lines = "tests/gpu/test_a.py::test_one PASSED\ntests/gpu/test_a.py::test_two FAILED"
            command = [sys.executable, "-c", f"import time; print({lines!r}, flush=True); time.sleep(60)"]
        elif "bench.gpu" in command:
            command = [sys.executable, "-c", "raise ValueError('no')"]
        return start(command, log, environment)

    monkeypatch.setattr(gpu, "_start", instead)
    monkeypatch.setattr(moe_kernels, "available_backends", lambda: {"triton": None, "cuda": "not built"})
    return seen


OPTIONS = argparse.Namespace(skip_tests=False, quick=False, test_seconds=2.0)


def test_builds_tests_and_compiles_side_by_side(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, dict[str, str]]]
) -> None:
    """A build that fails is one line; tests that take too long are ended, counted and named."""
    build = Build([sys.executable, "-c", "raise SystemExit('error: no pybind11')"], {"MOE_KERNELS_CUDA": "1"})
    monkeypatch.setattr(gpu, "_build", lambda device, notes: build)
    budget, record = Budget(100), {"notes": [], "seconds": {}}
    assert not gpu._prepare(OPTIONS, CPU, budget, record)
    assert budget.spent() < 20
    tests = record["tests"]["triton"]
    assert (tests["passed"], tests["failed"], tests["status"]) == (1, 1, None)
    assert list(record["tests"]) == ["triton"], "without its kernels CUDA's tests would all be skipped"
    assert budget.left_out == ["the tests of triton that were not done when their time was over (2 were)"]
    note = "native module moe_kernels._C, MOE_KERNELS_CUDA=1: not built (error: no pybind11); Triton needs none"
    assert note in record["notes"]
    assert any("ValueError: no" in note for note in record["notes"])


def test_a_build_is_tested_and_measured_by_other_processes(
    monkeypatch: pytest.MonkeyPatch, started: list[tuple[str, dict[str, str]]], tmp_path: Path
) -> None:
    """This one has imported the native module that was there before."""
    build = Build([sys.executable, "-c", ""], {"MOE_KERNELS_CUDA": "1"})
    monkeypatch.setattr(gpu, "_build", lambda device, notes: build)
    budget, record = Budget(100), {"notes": [], "seconds": {}}
    assert gpu._prepare(OPTIONS, CPU, budget, record)
    assert list(record["tests"]) == ["triton", "cuda"]
    asked = [environment for module, environment in started if module == "pytest"]
    assert asked == [{"MOE_KERNELS_BACKEND": "triton"}, {"MOE_KERNELS_BACKEND": "cuda"}]

    def call(command: Sequence[str]) -> int:
        assert command[3:6] == ["--device", "cpu", "--quick"] and command[-2] == "--prepared"
        return gpu.main([*command[3:], "--budget", "0", "--json", str(tmp_path / "gpu.json")])

    monkeypatch.setattr(gpu.subprocess, "call", call)
    assert gpu._go_on(["--device", "cpu", "--quick"], budget, {**record, "machine": gpu.describe(CPU)}) == 1
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["tests"] == record["tests"] and written["left_out"][:2] == budget.left_out


def test_the_build_is_for_this_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_KERNELS_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "_nvcc", lambda: "/usr/bin/nvcc")
    notes: list[str] = []
    for module, simulator in ((None, "0"), (argparse.Namespace(cuda_sim=1), "1"), (argparse.Namespace(), "0")):
        monkeypatch.setattr(gpu.native, "module", module)
        build = gpu._build(CPU, notes)
        assert build is not None and build.command[:3] == [sys.executable, "-m", "pip"]
        assert build.environment == {
            "MOE_KERNELS_CUDA": "1", "MOE_KERNELS_SIMULATOR": simulator, "MOE_KERNELS_CUDA_ARCHS": "90-real",
        }  # fmt: skip
    monkeypatch.setattr(gpu.native, "module", argparse.Namespace(cuda=1))
    assert gpu._build(CPU, notes) is None and not notes
    monkeypatch.setattr(gpu, "_nvcc", lambda: None)
    monkeypatch.setattr(gpu.native, "module", argparse.Namespace())
    assert gpu._build(CPU, notes) is None and "nvcc is in none of" in notes[0]
