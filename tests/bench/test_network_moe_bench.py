# SPDX-License-Identifier: Apache-2.0
"""The ways to compute a mixture of whole networks, which are timed against each other, compute the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import network_moe
from bench.models import Setting, timed
from bench.network_moe import CONTENDERS, measure, shares

SETTING = Setting("resnet18", 3, 1.0, 4)


def test_the_loop_gives_the_same_logits_and_is_trained_by_the_same_loss() -> None:
    one = timed(*CONTENDERS["forward"]["network_moe"], SETTING, 6, "forward")()
    for name in ("network_moe fused", "loop"):
        torch.testing.assert_close(
            timed(*CONTENDERS["forward"][name], SETTING, 6, "forward")(), one, rtol=1e-3, atol=1e-5
        )
    assert torch.isfinite(timed(*CONTENDERS["train"]["loop"], SETTING, 6, "train")())


def test_experts_are_used_alike() -> None:
    assert (
        len(shares(SETTING, 64)) == 3 and max(shares(SETTING, 64)) < 0.7 and sum(shares(SETTING, 64)) == pytest.approx(1)
    )


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(measure(SETTING, 4, 1, "train", 1)) == {"network_moe", "expert", "loop", "A/A"}
    path = tmp_path / "figures.json"
    options = ["--widths", "4", "--experts", "2", "--batch-size", "4", "--repeats", "1", "--tries", "1", "--directions"]
    monkeypatch.setattr(sys, "argv", ["network_moe", *options, "train", "--json", str(path)])
    network_moe.main()
    assert "loop/it" in capsys.readouterr().out
    assert json.loads(path.read_text())["measured"][0]["width"] == 4
