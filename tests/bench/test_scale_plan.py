# SPDX-License-Identifier: Apache-2.0
"""The counts of ``python -m bench.scale_plan``: against steps that are made, sums by hand, and the tables in the docs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from advmoe.attacks import PGD
from advmoe.config import MethodConfig, OptimConfig, RoutingConfig
from advmoe.data import stream_generator
from advmoe.models import create_model
from advmoe.training.methods import Batch, build_method
from bench.scale_plan import _saved, main, network, passes, ring_seconds, tables
from moe_kernels import RoutedConv2d, use_backend
from moe_kernels.backends.reference import ReferenceBackend
from moe_kernels.sync import synchronize_batch_norms

DOCS = Path(__file__).parents[2] / "docs" / "scale.md"


def small() -> nn.Module:
    torch.manual_seed(0)
    return create_model("resnet18", "moe", 10, 8, 2, 0.5, width=4, gate="straight_through").train()


@pytest.mark.parametrize(("method", "steps"), [("AT", 1), ("AT", 3), ("AdvMoE", 2)])
def test_passes_are_those_of_a_step(method: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = small(), Counter[str]()
    for name in ("grad_input", "grad_weight"):
        original = getattr(ReferenceBackend, name)

        def count(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
            counts[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(ReferenceBackend, name, count)
    generator = stream_generator(0)
    batch = Batch(torch.rand(4, 3, 8, 8, generator=generator), torch.randint(0, 10, (4,), generator=generator), generator)
    made = build_method(
        model, MethodConfig(method.lower()), OptimConfig(), PGD(0.1, 0.1, steps, loss="kl"), RoutingConfig(share_epochs=0)
    )
    made.enter_epoch(0)
    made.begin_epoch(0)
    forwards = []
    handle = model.register_forward_hook(lambda module, args, output: forwards.append(module.training))
    with use_backend("reference"):
        made.step([batch] * made.batches_per_step)
    handle.remove()
    expected, layers = passes(method, steps), sum(isinstance(m, RoutedConv2d) for m in model.modules())
    assert len(forwards) == expected.forwards and sum(forwards) == expected.in_training_mode
    # what is in front of the first one is not trained with the routers
    unasked = 2 if method == "AdvMoE" else 0
    assert counts["grad_input"] == layers * expected.input_gradients - unasked
    assert counts["grad_weight"] == layers * expected.weight_gradients
    assert made.batches_per_step == expected.images


def test_parameters_grow_with_the_experts_and_nothing_else() -> None:
    few, many = (network("resnet18", "moe", n, 32, 8) for n in (2, 16))
    assert many.params - few.params >= 7 * few.expert_params and many.expert_params == 8 * few.expert_params
    assert many.macs == pytest.approx(few.macs, rel=0.01) and many.saved == pytest.approx(few.saved, rel=0.02)
    weights = sum(p.numel() for p in create_model("resnet18", "moe", 1000, 32, 2, 0.5, width=8).parameters())
    assert few.params == weights and few.state == 16 * weights


def test_what_several_processes_save_is_a_batch_norms_output_more(tmp_path: Path) -> None:
    x = torch.rand(4, 3, 32, 32)
    plain, outputs = _saved(create_model("resnet18", "dense", 10, 32, width=8).train(), x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        synced, _ = _saved(synchronize_batch_norms(create_model("resnet18", "dense", 10, 32, width=8).train()), x)
    finally:
        dist.destroy_process_group()
    assert synced - plain == pytest.approx(outputs, rel=0.02)


def test_a_ring_sends_each_byte_almost_twice() -> None:
    assert ring_seconds(8e9, 2, 1e9) == 8.0
    assert ring_seconds(8e9, 8, 1e9) == 14.0


def test_the_tables_of_the_docs_are_what_the_script_prints(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    printed, text = capsys.readouterr().out, DOCS.read_text()
    for name, each in tables().items():
        assert each in text and each in printed, name
    assert text.count("\n|-") == len(tables())  # and no others
