# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.placed``: mixtures in chosen places of a dense network, against the number of experts E: what a
forward of one image costs by counting, and how long one of a batch takes beside the loop over expert modules and the
dense network, all in turn in one process; float32, channels_last.

``loop`` is the released way (arXiv 2509.05086): a list of modules, and each expert on the samples that chose it, which
are gathered and put back. Its modules share the mixture's weights.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advmoe.analysis.style import figure, line_style
from advmoe.models import create_model, record_routing
from advmoe.models.layers import Path as FeaturePath
from advmoe.models.placed import Mixture
from advmoe.profiling import profile
from advmoe.tables import table

from .machine import describe
from .models import CLASSES, SIZE, calibrated, fused, images
from .timing import LIMITS, quiet_medians

__all__ = [
    "CONTENDERS",
    "KINDS",
    "Loop",
    "build",
    "contender",
    "cost",
    "loop_of",
    "main",
    "measure",
    "picture",
    "top_share",
]

KINDS = ("block_moe", "conv_moe")
CONTENDERS = ("mixture", "loop", "dense", "mixture fused", "dense fused")


class Loop(nn.Module):
    """A mixture as a list of modules, for inference.

    Args:
        blocks: the modules are residual blocks, which take a path too.
    """

    def __init__(self, mixture: Mixture, experts: Sequence[nn.Module], blocks: bool) -> None:
        super().__init__()
        self.router = mixture.router
        self.experts = nn.ModuleList(experts)
        self.blocks = blocks

    def forward(self, x: Tensor, *outside: Any) -> Tensor:
        routing = self.router.route(x)
        chosen = routing.expert.reshape(len(x), -1)
        total: Tensor | None = None
        for e, module in enumerate(self.experts):
            mine, choice = (chosen == e).nonzero(as_tuple=True)
            if not len(mine):
                continue
            y = module(x[mine], FeaturePath()) if self.blocks else module(x[mine])
            if total is None:
                total = torch.zeros((len(x), *y.shape[1:]), dtype=y.dtype).contiguous(memory_format=torch.channels_last)
            if chosen.shape[1] == 1:  # the gate's value is 1
                total[mine] = y
            else:
                assert routing.gate is not None
                total.index_add_(0, mine, y * routing.gate[mine, choice][:, None, None, None])
        assert total is not None
        return total


def build(kind: str, arch: str, width: int | None, experts: int = 1, top_k: int = 1) -> nn.Module:
    """A model in eval mode, channels_last, the same weights at each call; its experts are used about alike, as a trained
    model's are: the routers' scores are standardised by made images."""
    torch.manual_seed(0)
    options: dict[str, Any] = {} if kind == "dense" else {"top_k": top_k, "standardize": True, "num_experts": experts}
    model = create_model(arch, kind, CLASSES, SIZE, width=width, **options).eval()
    return calibrated(model.to(memory_format=torch.channels_last))  # type: ignore[call-overload]


def loop_of(model: nn.Module, dense: nn.Module) -> nn.Module:
    """The model with lists of ordinary modules, made as ``dense`` has them in these places."""
    result = copy.deepcopy(model)
    for name, mixture in list(result.named_modules()):
        if not isinstance(mixture, Mixture):
            continue
        place = dense.get_submodule(name)
        modules = []
        for e in range(mixture.router.num_experts):
            module = copy.deepcopy(place)
            for own, value in mixture.experts.state_dict().items():
                if value.is_floating_point():  # all but how many batches a BatchNorm has seen
                    holder, _, attribute = own.rpartition(".")
                    owner, part = module.get_submodule(holder), value.chunk(mixture.router.num_experts)[e]
                    setattr(owner, attribute, nn.Parameter(part, False) if attribute in owner._parameters else part)
            modules.append(module)
        result.set_submodule(name, Loop(mixture, modules, blocks=not isinstance(place, nn.Conv2d)))
    return result.eval()


def contender(name: str, kind: str, arch: str, width: int | None, experts: int, top_k: int) -> Callable[[Tensor], Tensor]:
    """One of :data:`CONTENDERS`, of images."""
    what, _, form = name.partition(" ")
    dense = build("dense", arch, width)
    if what == "dense":
        model = dense
    else:
        model = build(kind, arch, width, experts, top_k)
        if what == "loop":
            model = loop_of(model, dense)
    return fused(model, images(1)) if form == "fused" else model


def measure(
    kind: str, arch: str, width: int | None, experts: int, top_k: int, batch: int, repeats: int, tries: int = 3
) -> dict[str, float]:
    """Median seconds of a forward by each contender, and under ``A/A`` the mixture's second median against its first."""
    x = images(batch)

    def timed(name: str) -> Callable[[], Tensor]:
        network = contender(name, kind, arch, width, experts, top_k)

        def forward() -> Tensor:
            with torch.no_grad():
                return network(x)

        return forward

    timing = quiet_medians([timed(name) for name in CONTENDERS], repeats, tries)
    return {**dict(zip(CONTENDERS, timing.seconds, strict=True)), "A/A": timing.a_a}


def cost(kind: str, arch: str, width: int | None, experts: int, top_k: int) -> dict[str, float]:
    """Of a forward of one image, counted: billions of floating-point operations, two for each multiply-accumulate of
    convolutions and linear layers, the routers' among them; and millions of parameters."""
    with torch.device("meta"):
        options: dict[str, Any] = {} if kind == "dense" else {"top_k": top_k, "num_experts": experts}
        counted = profile(create_model(arch, kind, CLASSES, SIZE, width=width, **options), SIZE)
    return {"gflop": 2 * counted.gflops, "router_gflop": 2 * counted.router_gflops, "params": counted.params / 1e6}


@torch.no_grad()
def top_share(kind: str, arch: str, width: int | None, experts: int, top_k: int, batch: int) -> float:
    """Of the choices that go to one expert, the largest over the layers."""
    model = build(kind, arch, width, experts, top_k)
    with record_routing(model) as routings:
        model(images(batch))
    counts = [torch.bincount(r.expert.reshape(-1), minlength=r.num_experts).double() for r in routings.values()]
    return max(float(c.max() / c.sum()) for c in counts)


def picture(counted: Sequence[dict[str, Any]], dense: float, path: Path) -> None:
    """Operations of a forward of one image against E, a panel for each kind: a line for each k that all E have, for
    half of the experts and for all of them; those of the dense network are dashed.

    Args:
        counted: of ``kind``, ``experts``, ``top_k`` and ``gflop`` each.
        dense: GFLOP of the dense network.
    """
    kinds = list(dict.fromkeys(c["kind"] for c in counted))
    experts = sorted({c["experts"] for c in counted})
    had = {(c["experts"], c["top_k"]) for c in counted}
    fixed = [k for k in sorted({c["top_k"] for c in counted}) if all((e, k) in had for e in experts)]
    lines = {f"k = {k}": [(e, k) for e in experts] for k in fixed}
    lines |= {"k = E / 2": [(e, e // 2) for e in experts if e > 1], "k = E": [(e, e) for e in experts]}
    with figure(9.5, 4.0, ncols=len(kinds)) as (fig, axes):
        panels = [axes] if len(kinds) == 1 else list(axes)
        for axis, kind in zip(panels, kinds, strict=True):
            gflop = {(c["experts"], c["top_k"]): c["gflop"] for c in counted if c["kind"] == kind}
            for at, (label, points) in enumerate(lines.items()):
                axis.plot([e for e, _ in points], [gflop[p] for p in points], label=label, **line_style(at))
            axis.axhline(dense, color="black", linestyle="--", linewidth=1.2, label="dense network", zorder=1)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.set_xticks(experts, map(str, experts))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
            axis.minorticks_off()
            axis.set(xlabel="experts E", ylabel="GFLOP of an image")
            axis.set_title(kind, loc="left")
        fig.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(lines) + 1)
        fig.savefig(path, dpi=110)


def _choices(experts: int, asked: Sequence[int]) -> list[int]:
    """The paper's k: those that are asked for, half of the experts and all."""
    return sorted({k for k in (*asked, experts // 2, experts) if 1 <= k <= experts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=int)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tries", type=int, default=3, help="at most, until the A/A ratio is quiet")
    parser.add_argument("--count-only", action="store_true", help="nothing is timed")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="a PNG file of the counted operations against E")
    o = parser.parse_args()
    if max(o.top_k) > min(o.experts):
        parser.error(f"--top-k: expected at most the {min(o.experts)} experts, got {max(o.top_k)}")
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    dense = cost("dense", o.arch, o.width, 1, 1)
    counted = [
        {"kind": kind, "experts": e, "top_k": k, **cost(kind, o.arch, o.width, e, k)}
        for kind in o.kinds
        for e in o.experts
        for k in _choices(e, o.top_k)
    ]
    rows = [
        [c["kind"], str(c["experts"]), str(c["top_k"]), f"{c['gflop']:.4g}", f"{c['gflop'] / dense['gflop']:.3f}",
         f"{100 * c['router_gflop'] / c['gflop']:.3f}", f"{c['params']:.2f}"]
        for c in counted
    ]  # fmt: skip
    print(table(["kind", "E", "k", "GFLOP", "it/dense", "routers, %", "M parameters"], rows))
    if o.picture is not None:
        picture(counted, dense["gflop"], o.picture)
    measured, rows = [], []
    for kind in [] if o.count_only else o.kinds:
        for k in o.top_k:
            for e in o.experts:
                setting = kind, o.arch, o.width, e, k
                seconds = measure(*setting, o.batch_size, o.repeats, o.tries)
                share = top_share(*setting, o.batch_size)
                measured.append({"kind": kind, "experts": e, "top_k": k, "top_share": share, "seconds": seconds})
                print(measured[-1], flush=True)
                rows.append([kind, str(k), str(e), *_ratios(seconds), f"{share:.2f}", f"{seconds['A/A']:.2f}"])
    machine = describe()
    if rows:
        heads = ["kind", "k", "E", "ms", "loop/it", "it/dense", "fused/dense fused", "top share", "A/A"]
        print(table(heads, rows))
        print(
            f"\n{o.arch}, batch {o.batch_size}, images of {SIZE} pixels; medians of n = {o.repeats} in turn, the first "
            f"one twice (A/A; outside {LIMITS[0]} .. {LIMITS[1]} measured again, {o.tries} times at most)\n"
            f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}"
        )
    if o.json is not None:
        settings = {k: v for k, v in vars(o).items() if k not in ("json", "picture")}
        record = {"machine": machine, "settings": settings, "dense": dense, "counted": counted, "measured": measured}
        o.json.write_text(json.dumps(record, indent=1) + "\n")


def _ratios(seconds: dict[str, float]) -> list[str]:
    own = seconds["mixture"]
    return [
        f"{1e3 * own:.1f}",
        f"{seconds['loop'] / own:.2f}",
        f"{own / seconds['dense']:.2f}",
        f"{seconds['mixture fused'] / seconds['dense fused']:.2f}",
    ]


if __name__ == "__main__":
    main()
