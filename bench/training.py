# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.training``: what a training step costs, method against method, in turn in one process.

The unit is an image that the step trains the backbone on: AdvMoE as printed draws a second batch for its routers, which
costs time and is not counted, so that the figures are costs of equal epochs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from advmoe.attacks import PGD
from advmoe.config import MethodConfig, ModelConfig, OptimConfig
from advmoe.memory import keep_freed_memory
from advmoe.models import router_parameters
from advmoe.registry import unknown_name
from advmoe.tables import table
from advmoe.training.methods import AdvMoE, Batch, Method, build_method
from advmoe.training.runs import build_model

from .machine import describe


@dataclass(frozen=True)
class Contender:
    name: str
    kind: str = "moe"
    method: MethodConfig = field(default_factory=lambda: MethodConfig("advmoe"))
    all_gradients: bool = False  # the router step also computes the backbone's gradients, and throws them away


CONTENDERS = (
    Contender("AT (MoE)", method=MethodConfig("at")),
    Contender("AT (S-Dense)", "s_dense", MethodConfig("at")),
    Contender("AT (Dense)", "dense", MethodConfig("at")),
    Contender("AdvMoE"),
    Contender("AdvMoE, router step with all gradients", all_gradients=True),
    Contender("AdvMoE, share_attack", method=MethodConfig("advmoe", share_attack=True)),
    Contender("AdvMoE, router_every 2", method=MethodConfig("advmoe", router_every=2)),
    Contender("AdvMoE, router_every 4", method=MethodConfig("advmoe", router_every=4)),
    Contender("AdvMoE, share_attack, router_every 2", method=MethodConfig("advmoe", share_attack=True, router_every=2)),
    Contender("AdvMoE as released", method=MethodConfig.as_released()),
)
PERIOD = 4  # steps after which every contender has done the same share of router steps


class _AllGradients(AdvMoE):
    def _routers_alone(self) -> AbstractContextManager[None]:
        return nullcontext()


def make(contender: Contender, model: ModelConfig) -> Method:
    torch.manual_seed(0)
    network = build_model(replace(model, kind=contender.kind)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    attack = PGD(8 / 255, 5 / 255, 2, loss="kl")
    if contender.all_gradients:
        return _AllGradients(network, contender.method, OptimConfig(), attack)
    assert contender.kind != "moe" or router_parameters(network)
    return build_method(network, contender.method, OptimConfig(), attack)


def measure(
    model: ModelConfig, batch_size: int, rounds: int, contenders: Sequence[Contender] = CONTENDERS, period: int = PERIOD
) -> dict[str, list[float]]:
    """Seconds of ``period`` steps of each contender, ``rounds`` times in turn."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((batch_size, 3, 32, 32), generator=generator).contiguous(memory_format=torch.channels_last)
    batch = Batch(images, torch.randint(0, 10, (batch_size,), generator=generator), generator)
    methods = {c.name: make(c, model) for c in contenders}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for round in range(rounds + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            for step in range(period if round else 1):  # a first step, with all that it has to do, is the warm-up
                method.position = step
                method.step([batch] * method.batches_per_step)
            if round:
                times[name].append(time.perf_counter() - start)
    return times


def chosen(names: Sequence[str] | None) -> list[Contender]:
    """The contenders of these names, in their own order; all without names.

    Raises:
        ValueError: for a name that is none's.
    """
    known = [c.name for c in CONTENDERS]
    for name in names or ():
        if name not in known:
            raise unknown_name("method", name, known)
    return [c for c in CONTENDERS if not names or c.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default=ModelConfig().arch)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--router", default=ModelConfig().router)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="of the table's first column; all by default")
    parser.add_argument(
        "--period", type=int, default=PERIOD, help=f"steps in turn ({PERIOD}); a multiple of each router_every"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    keep_freed_memory()  # as the command does, for all contenders
    model = ModelConfig(arch=o.arch, width=o.width, router=o.router)
    contenders = chosen(o.methods)
    times = measure(model, o.batch_size, o.rounds, contenders, o.period)
    medians = {name: statistics.median(each) for name, each in times.items()}
    first = contenders[0].name
    unit = medians[first]
    images = o.period * o.batch_size
    rows = [
        [name, f"{images / t:.0f}", f"{t / unit:.2f}", f"{min(times[name]) / unit:.2f} .. {max(times[name]) / unit:.2f}"]
        for name, t in medians.items()
    ]
    print(table(["method", "images/s", "cost", "range"], rows))
    machine = describe()
    print(
        f"\n{o.arch} of width {o.width}, N = 2, r = 0.5, router {o.router}, batch {o.batch_size}, TRADES, K = 2; "
        f"{o.period} steps in turn, medians of n = {o.rounds}; cost against {first}\n"
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}, float32"
    )
    if o.json is not None:
        record = {"machine": machine, "settings": {k: v for k, v in vars(o).items() if k != "json"}, "seconds": times}
        o.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
