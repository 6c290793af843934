# SPDX-License-Identifier: Apache-2.0
"""Exported files: the same model again, and a sparse one really smaller."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from advmoe import cli
from advmoe.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, RunConfig
from advmoe.export import export, load_exported
from advmoe.profiling import profile
from advmoe.training import RunError, load_model, train


def trained(folder: Path, method: MethodConfig, epochs: int = 1, **model: object) -> Path:
    config = RunConfig(
        model=ModelConfig(width=8, **model),  # type: ignore[arg-type]
        data=DataConfig("digits", train_limit=64, validation=16),
        optim=OptimConfig(lr=0.05),
        method=method,
        epochs=epochs,
        batch_size=32,
        validation_attack="pgd2",
    )
    train(config, folder, quiet=True)
    return folder


@pytest.mark.parametrize("layout", ["partition", "windows"])
def test_an_exported_model_comes_back(tmp_path: Path, layout: str) -> None:
    run = trained(tmp_path / "run", MethodConfig("at"), kind="moe", layout=layout)
    path = tmp_path / "model.safetensors"
    assert cli.main(["export", str(run), "--out", str(path)]) == 0
    model, config = load_exported(path)
    expected, whole = load_model(run)
    assert whole is not None and config == whole.model
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(x), expected(x))
    assert not model.training


def test_a_sparse_network_is_smaller_when_exported(tmp_path: Path) -> None:
    method = MethodConfig("at_sparse", pretrain_epochs=1, mask_epochs=1)
    run = trained(tmp_path / "run", method, epochs=3, kind="sparse", ratio=0.5)
    assert cli.main(["evaluate", str(run), "--checks", "0", "--attack", "pgd2", "--limit", "20"]) == 0
    path = tmp_path / "model.safetensors"
    export(run, path)
    model, _ = load_exported(path)
    masked, _ = load_model(run)
    x = torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), masked(x))
    dense = sum(p.numel() for n, p in masked.named_parameters() if not n.endswith(".scores"))
    assert sum(p.numel() for p in model.parameters()) < 0.5 * dense
    assert profile(model, 8).gflops < 0.5 * profile(masked, 8).gflops
    assert path.stat().st_size < 0.5 * (run / "best.pt").stat().st_size


def test_what_is_no_exported_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"absent.safetensors cannot be read"):
        load_exported(tmp_path / "absent.safetensors")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\x10" * 40)
    with pytest.raises(RunError, match="cannot be read"):
        load_exported(torn)
    from safetensors.torch import save_file

    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(2)}, other)
    with pytest.raises(RunError, match="advmoe-1"):
        load_exported(other)
    save_file({"weight": torch.zeros(2)}, other, metadata={"format": "advmoe-1", "model": json.dumps({"width": 8})})
    with pytest.raises(RunError, match="does not fit"):
        load_exported(other)
    with pytest.raises(RunError, match="expected a run folder or its checkpoint file"):
        export("tests.advmoe.test_export:something", tmp_path / "x.safetensors")


def something() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)
