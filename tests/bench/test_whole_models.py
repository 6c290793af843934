# SPDX-License-Identifier: Apache-2.0
"""The whole networks that are timed against each other compute the same; what is made of their times; the gate."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gate, model_table, models
from bench.models import CONTENDERS, Setting, gigaflops, largest_share, make

NETWORKS = [Setting("resnet18", 3, width=8), Setting("wrn28_10", 3, width=40), Setting("vgg16_bn", 3, width=8)]
NETWORKS += [Setting("densenet40", 3, width=4)]


@pytest.mark.parametrize("setting", NETWORKS, ids=lambda s: s.arch)
def test_every_way_to_compute_the_moe_gives_its_logits(setting: Setting) -> None:
    expected = make("moe", setting, 5)()
    for name in ("moe fused", "compute all and mask", "index_select"):
        torch.testing.assert_close(
            make(name, setting, 5)(), expected, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_what_is_compiled_gives_the_logits() -> None:
    torch._dynamo.reset()
    setting = Setting(width=8)
    expected = make("s_dense", setting, 2)()
    compiled = make("s_dense compiled", setting, 2)
    with torch._dynamo.config.patch(error_on_recompile=True):  # also where it is called from elsewhere later
        torch.testing.assert_close(compiled(), expected, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


def test_training_steps_have_the_same_loss_and_weights() -> None:
    setting = Setting(width=8)
    expected = make("moe", setting, 4, "train")()
    for name in ("compute all and mask", "index_select"):
        torch.testing.assert_close(make(name, setting, 4, "train")(), expected)
    step = make("dense", setting, 4, "train")
    assert torch.isfinite(step()) and torch.equal(step(), step())


def test_what_is_not_trained_is_refused() -> None:
    with pytest.raises(ValueError, match="moe fused has no 'train'"):
        make("moe fused", Setting(width=8), 1, "train")
    with pytest.raises(ValueError, match="backward"):
        make("moe", Setting(width=8), 1, "backward")


def test_experts_are_used_alike() -> None:
    assert largest_share(Setting(width=16), 64) < 0.9
    assert largest_share(Setting(width=16, experts=8), 64) < 0.5


def test_the_moe_needs_a_pathway_and_its_routers() -> None:
    setting = Setting(width=16)
    assert gigaflops("s_dense", setting) < gigaflops("moe", setting) < gigaflops("dense", setting) / 3
    assert gigaflops("compute all and mask", setting) == gigaflops("moe fused", setting)


def made(what: str, direction: str = "forward", batch: int = 32) -> dict[str, Any]:
    """A case of made-up times: each contender takes as many ms as its network's GFLOP."""
    base = Setting(width=8)
    field = model_table.entrants(
        what, direction, base, model_table.USUAL[direction], 16, (0.25, 0.5, 0.75, 1.0), (2, 4, 8, 16)
    )
    rows = []
    for e in field:
        experts = e.setting.experts if CONTENDERS[e.name][0] == "moe" else 1
        g = gigaflops(e.name, e.setting)
        rows.append(
            {
                "contender": e.name,
                "experts": experts,
                "ratio": e.setting.ratio,
                "ms": g,
                "gflop": g,
                "largest_share": None,
            }
        )
    return {
        "what": what, "direction": direction, "arch": "resnet18", "width": 8, "batch": batch, "n": 3, "a_a": 1.1,
        "tries": 3, "quiet": False, "peak_gflops": 2000.0, "rows": rows,
    }  # fmt: skip


@pytest.fixture
def record() -> dict[str, Any]:
    cases = [made("batch", batch=1), made("batch"), made("ratio"), made("experts"), made("batch", "train")]
    memory = {"contender": "moe fused", "forward": 2_000_000, "weights": 3_000_000}
    of = {"direction": "forward", "arch": "resnet18", "width": 8, "batch": 128}
    return {"machine": model_table.describe(), "cases": [*cases, {**of, "what": "memory", "n": 1, "rows": [memory]}]}


def test_report(record: dict[str, Any]) -> None:
    text = model_table.report(record)
    full, pathway = (gigaflops(name, Setting(width=8)) for name in ("dense", "moe"))
    row = next(line for line in text.splitlines() if line.startswith("| resnet18, width 8 |     1 |") and "1.10" in line)
    assert [cell.strip() for cell in row.split("|")][4:6] == [f"{full / pathway:.2f}"] * 2
    assert "1000 (50.0 %)" in text
    assert "A/A left 0.95 .. 1.05 3 times: resnet18, width 8 batch B=1 (A/A 1.10)" in text
    assert "| moe fused |     2.0 |     3.0 |" in text
    assert "| 0.25 |" in text and "| 16 |" in text


def test_csv_has_a_line_for_each_timing(record: dict[str, Any], tmp_path: Path) -> None:
    model_table.write_csv(record, tmp_path / "a.csv")
    with (tmp_path / "a.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == sum(len(case["rows"]) for case in record["cases"] if case["what"] != "memory")
    assert {float(line["gflops"]) for line in lines} == {1000.0}
    assert {float(line["share_of_peak"]) for line in lines} == {0.5}
    assert {line["torch"] for line in lines} == {torch.__version__}


def test_picture(record: dict[str, Any], tmp_path: Path) -> None:
    model_table.picture(record, "forward", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_results_are_added_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(model_table, "measure", lambda what, direction, batch, *_: made(what, direction, batch))
    file = tmp_path / "a.json"
    for arguments in (["--batch", "1", "8"], ["--batch", "8"], ["--measure", "experts"], ["--measure"]):
        model_table.main("model", [*arguments, "--width", "8", "--json", str(file)])
    assert sorted(c["what"] for c in model_table.json.loads(file.read_text())["cases"]) == ["batch", "batch", "experts"]
    model_table.main("training", ["--json", str(file), "--batch", "4", "--width", "8"])
    assert "moe/s_dense" in capsys.readouterr().out
    for arguments, error in (
        (["--batch", "0"], "--batch: expected at least 1"),
        (["--measure", "--picture", "a.png", "--json", str(file)], "no results of ratio"),
    ):
        with pytest.raises(SystemExit):
            model_table.main("model", arguments)
        assert error in capsys.readouterr().err


def test_memory_of_a_forward() -> None:
    few, many = (models.memory_of_forward("moe", Setting(width=8), batch) for batch in (1, 256))
    assert few.weights == many.weights > 0
    assert many.forward > few.forward + 256 * 3 * 8 * 32 * 32  # at least what a convolution reads and writes


@pytest.mark.parametrize("ratios, tries, status", [([1.0], 1, 0), ([1.3, 1.1], 2, 0), ([1.3, 1.4, 1.3], 3, 1)])
def test_the_gate_closes_when_a_pair_is_slow_three_times(
    ratios: list[float], tries: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    left = list(ratios)
    pairs = [gate.Pair("a layer", lambda name: lambda: None, "routed", "floor", 1.2)]
    assert gate.gate(pairs, lambda pair: left.pop(0)) == status
    assert len(ratios) - len(left) == tries
    assert ("too slow" in capsys.readouterr().out) == bool(status)


def test_the_gate_closes_when_any_of_its_own_pairs_is_slow() -> None:
    for slow in gate.PAIRS:
        measured = {pair: 0.99 * pair.limit for pair in gate.PAIRS} | {slow: 1.01 * slow.limit}
        assert gate.gate(gate.PAIRS, measured.__getitem__) == 1
    assert gate.gate(gate.PAIRS, lambda pair: 0.99 * pair.limit) == 0


def test_the_gates_pairs_can_be_made() -> None:
    for pair in gate.PAIRS:
        assert pair.make(pair.one)() is not None and pair.make(pair.other)() is not None
