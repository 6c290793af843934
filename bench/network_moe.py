# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.network_moe``: N whole networks as one module against a loop over the samples, and against one of the
networks alone, all in turn in one process; float32, channels_last.

``loop`` is the released way (arXiv 2502.06832): the router's indices, and for each sample of the batch a forward of the
chosen network on it alone. ``expert`` is one expert's network on the whole batch: what routing would cost were it free.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from advmoe.models import NetworkMoE
from advmoe.tables import table

from .machine import describe
from .models import Form, Setting, as_it_is, build, compiled, fused, images, timed
from .timing import LIMITS, quiet_medians

__all__ = ["CONTENDERS", "Loop", "main", "measure", "shares"]


class Loop(nn.Module):
    """The networks of a mixture, each sample by itself through the one that the router chooses."""

    def __init__(self, model: NetworkMoE) -> None:
        super().__init__()
        self.normalize, self.router = model.normalize, model.router
        like = next(model.parameters())
        experts = [model.expert(i).to(like.device, memory_format=torch.channels_last) for i in range(model.num_experts)]  # type: ignore[call-overload]
        self.experts = nn.ModuleList(experts)

    def forward(self, images: Tensor) -> Tensor:
        chosen = self.router.route(self.normalize(images)).expert.tolist()
        return torch.cat([self.experts[e](images[i : i + 1]) for i, e in enumerate(chosen)])


def _loop(model: nn.Module, x: Tensor) -> nn.Module:
    assert isinstance(model, NetworkMoE)
    return Loop(model)


CONTENDERS: dict[str, dict[str, tuple[str, Form]]] = {
    "forward": {
        "network_moe": ("network_moe", as_it_is),
        "network_moe fused": ("network_moe", fused),
        "expert": ("dense", as_it_is),
        "expert compiled": ("dense", compiled),
        "expert fused": ("dense", fused),
        "loop": ("network_moe", _loop),
    },
    "train": {
        "network_moe": ("network_moe", as_it_is),
        "expert": ("dense", as_it_is),
        "loop": ("network_moe", _loop),
    },
}


def measure(setting: Setting, batch: int, repeats: int, direction: str = "forward", tries: int = 3) -> dict[str, float]:
    """Median seconds of each contender, and under ``A/A`` the first one's second median against its first."""
    contenders = CONTENDERS[direction]
    functions = [timed(kind, form, setting, batch, direction) for kind, form in contenders.values()]
    timing = quiet_medians(functions, repeats, tries)
    return {**dict(zip(contenders, timing.seconds, strict=True)), "A/A": timing.a_a}


@torch.no_grad()
def shares(setting: Setting, batch: int) -> list[float]:
    """Of the images that go to each expert."""
    model = build("network_moe", setting)
    assert isinstance(model, NetworkMoE)
    counts = torch.bincount(model.route(images(batch)).expert, minlength=model.num_experts)
    return (counts / batch).tolist()


def _rows(record: dict[str, float], what: Sequence[str]) -> list[list[str]]:
    rows = []
    for name in (n for n in record if n.startswith("network_moe")):
        alone = [f"{record[name] / record[other]:.2f}" if other in record else "" for other in _ALONE]
        loop = f"{record['loop'] / record[name]:.1f}"
        rows.append([*what, name, f"{1e3 * record[name]:.1f}", loop, *alone, f"{record['A/A']:.2f}"])
    return rows


_ALONE = ("expert", "expert compiled", "expert fused")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tries", type=int, default=3, help="at most, until the A/A ratio is quiet")
    parser.add_argument("--directions", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    o = parser.parse_args()
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    records, rows = [], []
    for width in o.widths:
        setting = Setting(o.arch, o.experts, 1.0, width)
        used = shares(setting, o.batch_size)
        for direction in o.directions:
            seconds = measure(setting, o.batch_size, o.repeats, direction, o.tries)
            records.append({"width": width, "direction": direction, "shares": used, "seconds": seconds})
            rows += _rows(seconds, [str(width), direction])
            print(records[-1], flush=True)
    print(table(["width", "direction", "model", "ms", "loop/it", *(f"it/{name}" for name in _ALONE), "A/A"], rows))
    machine = describe()
    print(
        f"\n{o.arch}, N = {o.experts}, batch {o.batch_size}, images of 32 pixels; medians of n = {o.repeats} in turn, "
        f"the first one twice (A/A; outside {LIMITS[0]} .. {LIMITS[1]} measured again, {o.tries} times at most)\n"
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}"
    )
    if o.json is not None:
        settings = {k: v for k, v in vars(o).items() if k != "json"}
        o.json.write_text(json.dumps({"machine": machine, "settings": settings, "measured": records}, indent=1) + "\n")


if __name__ == "__main__":
    main()
