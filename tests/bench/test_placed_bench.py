# SPDX-License-Identifier: Apache-2.0
"""The ways to compute mixtures in chosen places, which are timed against each other, compute the same."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from bench import placed
from bench.models import images
from bench.placed import KINDS, build, contender, cost, loop_of, measure, top_share

SETTING = ("resnet18", 4, 3)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loop_and_the_fused_form_give_the_same_logits(kind: str, top_k: int) -> None:
    x = images(9)
    expected = contender("mixture", kind, *SETTING, top_k)(x)
    for name in ("loop", "mixture fused"):
        torch.testing.assert_close(contender(name, kind, *SETTING, top_k)(x), expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(contender("dense", kind, *SETTING, top_k)(x), expected, rtol=1e-3, atol=1e-5)


def test_the_loops_modules_are_the_mixtures_experts() -> None:
    """Another expert's weights give other logits: none is held by two modules."""
    model = build("block_moe", *SETTING, 1)
    loop = loop_of(model, build("dense", *SETTING[:2]))
    whole = model.layer4[1].experts.conv2.weight
    for e, module in enumerate(loop.layer4[1].experts):
        assert torch.equal(module.conv2.weight, whole.chunk(3)[e])
    assert len({module.conv2.weight.data_ptr() for module in loop.layer4[1].experts}) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_count_follows_k(kind: str) -> None:
    dense, one, many = (
        cost("dense", "resnet18", 8, 1, 1),
        cost(kind, "resnet18", 8, 4, 1),
        cost(kind, "resnet18", 8, 16, 1),
    )
    assert one["gflop"] - one["router_gflop"] == pytest.approx(dense["gflop"])
    assert many["gflop"] - many["router_gflop"] == pytest.approx(dense["gflop"])
    assert many["router_gflop"] == pytest.approx(4 * one["router_gflop"]) and many["params"] > 2 * one["params"]
    assert cost(kind, "resnet18", 8, 4, 4)["gflop"] > cost(kind, "resnet18", 8, 4, 2)["gflop"] > one["gflop"]


def test_experts_are_used_alike() -> None:
    assert all(top_share(kind, "resnet18", 8, 4, k, 128) < 0.8 for kind in KINDS for k in (1, 2))


def test_the_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(measure("conv_moe", *SETTING, 1, 4, 1, 1)) == {*placed.CONTENDERS, "A/A"}
    path = tmp_path / "figures.json"
    options = ["--width", "4", "--kinds", "block_moe", "--experts", "2", "4", "--top-k", "2", "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["placed", *options, "--repeats", "1", "--tries", "1", "--json", str(path)])
    placed.main()
    counting = ["--width", "4", "--kinds", "conv_moe", "--experts", "1", "4", "16", "--top-k", "1", "--count-only"]
    drawn = tmp_path / "flops.png"
    monkeypatch.setattr(sys, "argv", ["placed", *counting, "--picture", str(drawn)])
    placed.main()
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert "loop/it" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert [(c["experts"], c["top_k"]) for c in record["counted"]] == [(2, 1), (2, 2), (4, 2), (4, 4)]
    assert [(m["experts"], m["top_k"]) for m in record["measured"]] == [(2, 2), (4, 2)]
    monkeypatch.setattr(sys, "argv", ["placed", "--experts", "4", "--top-k", "5"])
    with pytest.raises(SystemExit):
        placed.main()
