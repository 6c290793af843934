# SPDX-License-Identifier: Apache-2.0
"""Runs of a second, steps of a tenth of one, what two equal runs have in common, and a small CIFAR-10."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from advmoe.attacks import PGD
from advmoe.config import DataConfig, MethodConfig, ModelConfig, OptimConfig, RoutingConfig, RunConfig
from advmoe.data import stream_generator
from advmoe.models import create_model
from advmoe.models.base import _MODELS, register_model
from advmoe.models.resnet import BasicBlock, ResNet
from advmoe.training import Run, engine
from advmoe.training.methods import Batch, Method, StepResult
from advmoe.training.runs import build_model

ATTACK = PGD(0.15, 0.1, 2, loss="kl")
SMALL = "test_small"


@contextmanager
def small_architecture() -> Iterator[None]:
    """Meanwhile there is an architecture ``SMALL``: a ResNet of two blocks, with four routed convolutions."""
    register_model(SMALL)(lambda spec: ResNet(spec, BasicBlock, (1, 1)))
    try:
        yield
    finally:
        del _MODELS._entries[SMALL]


def tiny(method: str = "advmoe", kind: str = "moe", /, **changes: Any) -> RunConfig:
    """Two epochs of three steps; no expert is shared."""
    config = RunConfig(
        model=ModelConfig(kind=kind, width=8),
        data=DataConfig("digits", train_limit=96, validation=16),
        optim=OptimConfig(lr=0.05),
        method=MethodConfig(method),
        routing=RoutingConfig(share_epochs=0),
        epochs=2,
        batch_size=32,
        validation_attack="pgd2",
    )
    return dataclasses.replace(config, **changes)


def batch(seed: int = 0, count: int = 16, size: int = 8) -> Batch:
    g = stream_generator(seed)
    return Batch(torch.rand(count, 3, size, size, generator=g), torch.randint(0, 10, (count,), generator=g), g)


def model(arch: str = "resnet18", **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(arch, **{"kind": "moe", "width": 8, "image_size": 8, **options}).train()


def snapshot(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [t.detach().clone() for t in tensors]


def same(before: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def interrupt_at(step: int, method: type[Method], monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT) -> None:
    """Ctrl-C, or another signal, in the middle of that step of the process."""
    original = method.step
    count = 0

    def interrupted(self: Method, batches: Sequence[Batch]) -> StepResult:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), number)
        return original(self, batches)

    monkeypatch.setattr(method, "step", interrupted)


class _Spoil(torch.autograd.Function):
    """Passes values on, and makes one NaN: of the values or of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backward: bool) -> Tensor:
        ctx.backward = backward
        y = x.clone()
        if not backward:
            y[(0,) * y.dim()] = torch.nan
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone()
        if ctx.backward:
            grad[(0,) * grad.dim()] = torch.nan
        return grad, None


def spoil(layer: str, backward: bool, monkeypatch: pytest.MonkeyPatch, when: Callable[[nn.Module], bool]) -> None:
    """Runs have this fault in that layer's output, where ``when`` is so of the model."""

    def build(config: ModelConfig) -> nn.Module:
        built = build_model(config)
        place = built.get_submodule(layer)
        forward = place.forward

        def spoiled(*args: Any, **kwargs: Any) -> Any:
            out = forward(*args, **kwargs)
            return _Spoil.apply(out, backward) if when(built) else out

        place.forward = spoiled  # type: ignore[method-assign]
        return built

    monkeypatch.setattr(engine, "build_model", build)


def after(forwards: int) -> Callable[[nn.Module], bool]:
    """In the training forwards behind the first so many; a function of the model, whose BatchNorm counts them."""
    return lambda net: net.training and int(net.get_buffer("bn1.num_batches_tracked")) > forwards


def assert_same_run(first: Run, second: Run) -> None:
    """Weights, optimisers, positions and metrics, but for times."""
    one, two = (torch.load(r.checkpoint(), weights_only=True) for r in (first, second))
    for a, b in zip(one["model"].values(), two["model"].values(), strict=True):
        assert torch.equal(a, b)
    for name, state in one["optimizers"].items():
        both = (state["state"], two["optimizers"][name]["state"])
        buffers = [[t for v in s.values() for t in v.values() if torch.is_tensor(t)] for s in both]
        assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True)) and buffers[0]
    assert one["batches"] == two["batches"]
    assert torch.equal(one["torch_rng"], two["torch_rng"])
    timing = ("images_per_second", "seconds")
    strip = [[{k: v for k, v in line.items() if k not in timing} for line in r.metrics()] for r in (first, second)]
    assert strip[0] == strip[1] and strip[0]
    best = [torch.load(r.checkpoint("best"), weights_only=True) for r in (first, second)]
    assert best[0]["epoch"] == best[1]["epoch"]
    for r in (first, second):
        assert not list(r.folder.glob("*.tmp"))


CIFAR10_FILES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def write_cifar10(parent: Path) -> None:
    """CIFAR-10's layout in ``parent`` with 20 images a file, written as the official files are: bytes as keys."""
    folder = parent / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in CIFAR10_FILES:
        data = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        content = {b"data": data, b"labels": [i % 10 for i in range(20)], b"batch_label": name.encode()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def unpacked(name: str, folder: Path) -> Path:
    """The folder, with a real data set in its official layout, where there is one beside the repository."""
    script = Path(__file__).parents[3] / "shared" / "data" / "unpack.py"
    if not script.exists():
        pytest.skip("there is no ../shared/data/unpack.py beside the repository")
    subprocess.run([sys.executable, str(script), str(folder), "--only", name], check=True)
    return folder
