# SPDX-License-Identifier: Apache-2.0
"""Steps of a method by one process, or by several that share each batch: ``python parallel_steps.py OUT``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from small_runs import ATTACK, SMALL, small_architecture
from torch import Tensor, nn

from advmoe.attacks import PGD, SharedGenerator
from advmoe.config import ONE_STEP, MethodConfig, OptimConfig, RoutingConfig
from advmoe.data import stream_generator
from advmoe.models import create_model
from advmoe.routers import Router
from advmoe.training.methods import Batch, build_method
from advmoe.training.parallel import World, joined

STEPS, BATCH = 20, 16


@dataclass(frozen=True)
class Case:
    method: MethodConfig
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)  # of the model
    bright: bool = False
    balance: str = "none"
    share_epochs: int = 0
    accumulate: int = 1
    freeze_unused: bool = False
    precision: str = "float32"

    @property
    def tolerance(self) -> float:
        """Of the weights, against one process's: 8 bits of a mantissa and an attack's signs for bfloat16."""
        if self.precision == "bfloat16":
            return 0.02
        return 1e-5 if self.dtype == torch.float32 else 1e-9


CASES = {
    # in float32 with choices that are no matter of rounding
    "standard": Case(MethodConfig("standard"), torch.float32, bright=True),
    "standard per_expert": Case(MethodConfig("standard"), torch.float32, {"bn": "per_expert"}, bright=True),
    "standard, any choices": Case(MethodConfig("standard")),
    "at": Case(MethodConfig("at")),
    "at per_expert balanced": Case(MethodConfig("at"), options={"bn": "per_expert"}, balance="switch"),
    "at windows": Case(MethodConfig("at"), options={"layout": "windows"}),
    "free-at in parts": Case(MethodConfig("free-at", replays=2, reset_noise=0.2), balance="switch", accumulate=2),
    "free-at one expert unused": Case(MethodConfig("free-at", replays=2), bright=True),
    "fast-at": Case(MethodConfig("fast-at"), options={"bn": "per_expert"}, balance="switch"),
    "at sparse": Case(MethodConfig("at_sparse", mask_epochs=1), options={"kind": "sparse"}),
    "advmoe": Case(MethodConfig("advmoe")),
    "advmoe shared": Case(MethodConfig("advmoe"), share_epochs=1),
    "advmoe one expert unused": Case(MethodConfig("advmoe"), bright=True),
    "at in parts": Case(MethodConfig("at"), accumulate=2),
    "advmoe in parts, one attack": Case(MethodConfig("advmoe", share_attack=True), accumulate=2),
    "advmoe unused frozen": Case(MethodConfig("advmoe"), bright=True, freeze_unused=True),
    "standard bfloat16": Case(MethodConfig("standard"), torch.float32, bright=True, precision="bfloat16"),
    "at bfloat16": Case(MethodConfig("at"), torch.float32, bright=True, precision="bfloat16"),
    "rt-er another in parts": Case(
        MethodConfig("rt-er", robust_experts="another"),
        options={"kind": "network_moe", "num_experts": 3},
        accumulate=2,
    ),
    "jtdmoe": Case(MethodConfig("jtdmoe"), options={"kind": "dual_moe", "num_experts": 3, "frozen_router": True}),
    "at one expert unused per_expert": Case(MethodConfig("at"), options={"bn": "per_expert"}, bright=True),
}


class Brightness(Router):
    """Bright images to one expert, dark ones to the other."""

    level = "image"

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3)) * self.scale
        return torch.stack([bright, -bright], 1)


def network(case: Case) -> nn.Module:
    torch.manual_seed(0)
    options = {"kind": "moe", **case.options}
    if case.bright:
        options |= {"router": "image", "standardize": False}
    if options["kind"] == "sparse":
        options.pop("router", None)
    with small_architecture():
        model = create_model(SMALL, num_classes=10, image_size=8, width=4, **options)
    if case.bright:
        model.router = Brightness()
    return model.to(case.dtype)


def shared_batch(case: Case, step: int, level: int, world: World, count: int = BATCH) -> Batch:
    """This process's part of so many images; the first half of them is bright, the second dark."""
    generator = stream_generator("images", step, level)
    images = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    if case.bright:
        images[: count // 2] = 0.7 + 0.3 * images[: count // 2]
        images[count // 2 :] *= 0.3
    labels = torch.randint(0, 10, (count,), generator=generator)
    part = world.part(count, case.accumulate)
    attack: Any = stream_generator("attack", step, level)
    if world.size > 1:
        share = count // world.size
        attack = SharedGenerator(attack, world.rank * share, count)
    return Batch(images[part].to(case.dtype), labels[part], attack)


def run(name: str, world: World, steps: int = STEPS, count: int = BATCH) -> dict[str, Any]:
    """The state after so many steps of two epochs, and the losses of the last, as this process has them."""
    case = CASES[name]
    model = network(case)
    world.prepare(model)
    routing = RoutingConfig(balance=case.balance, share_epochs=case.share_epochs)
    optim = OptimConfig(lr=0.02, accumulate=case.accumulate, freeze_unused=case.freeze_unused, precision=case.precision)
    attack = PGD(0.15, 0.15, 1) if case.method.name in ONE_STEP else ATTACK
    method = build_method(model, case.method, optim, attack, routing, world)
    losses: dict[str, float] = {}
    for step in range(steps):
        epoch = step // (steps // 2)
        method.enter_epoch(epoch)
        if step % (steps // 2) == 0:
            method.begin_epoch(epoch)
        model.train()
        method.position = step
        batches = [shared_batch(case, step, k, world, count) for k in range(method.batches_per_step)]
        losses = method.step(batches).losses
    method.settle()
    # a method's own state is that of all processes
    kept = {name: value for name, value in method.state_dict().items() if value is not None}
    return {"state": {**model.state_dict(), **kept}, "losses": losses}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as world:
        results: dict[str, Any] = {name: run(name, world) for name in CASES}
        results["total"] = world.total(torch.tensor([world.rank, 2 + world.rank]))
        torch.save(results, f"{sys.argv[1]}/{world.rank}.pt")
