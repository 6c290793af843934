# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.routing_study``: which routing makes a MoE-CNN as good as the S-Dense network of its pathways.

Each configuration is a line of options for ``advmoe train``; ``--run`` trains and evaluates what is not there yet (a run
folder each, resumed where it was interrupted), and the table is made from the folders.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe import cli
from advmoe.tables import table
from advmoe.training import Run

COMMON = "--arch resnet18 --width 16 --data cifar10 --train-limit 10000 --epochs 8"
ATTACK, IMAGES = "pgd20", 2000
AT_MOE = "--method at --kind moe"
SWITCH = "--balance switch --balance-weight 0.5"


@dataclass(frozen=True)
class Configuration:
    """``options`` of ``advmoe train``, beside :data:`COMMON`; ``what`` is tried."""

    name: str
    options: str
    what: str


CONFIGURATIONS = (
    Configuration("sdense", "--method at --kind s_dense", "the network of a pathway's width"),
    Configuration("moe-light", f"{AT_MOE} --router light --route-per layer", "a light router in each layer, left alone"),
    Configuration("moe-light-perexpert", f"{AT_MOE} --bn per_expert", "a BatchNorm of each expert's own"),
    Configuration("light-sw", f"{AT_MOE} {SWITCH}", "a balancing loss"),
    Configuration("light-sw-share4", f"{AT_MOE} {SWITCH} --share-epochs 4", "one expert for 4 epochs, then copies"),
    Configuration("stage-sw", f"{AT_MOE} --route-per stage {SWITCH}", "a choice for each stage"),
    Configuration("stage-sw-share4", f"{AT_MOE} --route-per stage {SWITCH} --share-epochs 4", "the same, shared first"),
    Configuration("image-sw", f"{AT_MOE} --router image {SWITCH}", "one choice for each image"),
    Configuration("image-sw-share4", f"{AT_MOE} --router image {SWITCH} --share-epochs 4", "the same, shared first"),
    Configuration(
        "network-sw-share4", f"{AT_MOE} --route-per network {SWITCH} --share-epochs 4", "one light router behind the stem"
    ),
    Configuration(
        "image-ent-share4",
        f"{AT_MOE} --router image --balance entropy --balance-weight 0.5 --share-epochs 4",
        "the balancing loss that also asks for decided routers",
    ),
    Configuration("adv-light", "--method advmoe --kind moe", "AdvMoE, a light router in each layer, left alone"),
)


def command(configuration: Configuration, seed: int, out: Path, data_dir: str, threads: int) -> list[str]:
    given = f"{COMMON} {configuration.options} --seed {seed} --threads {threads}".split()
    return ["train", *given, "--data-dir", data_dir, "--out", str(out)]


def run(configuration: Configuration, seed: int, folder: Path, data_dir: str, threads: int) -> None:
    """Trains and evaluates one run, as far as that has not been done."""
    out = folder / f"{configuration.name}-s{seed}"
    if (out / "evaluation-last.json").exists():
        return
    if Run(out).config_path.exists():
        code = cli.main(["train", "--resume", str(out)])
    else:
        code = cli.main(command(configuration, seed, out, data_dir, threads))
    if code == 0:
        evaluation = ["--attack", ATTACK, "--limit", str(IMAGES), "--threads", str(threads), "--checkpoint", "last"]
        code = cli.main(["evaluate", str(out), *evaluation])
    if code:
        sys.exit(code)


def _entropy_share(usage: dict[str, list[float]]) -> float | None:
    """Mean over the layers of the usage's entropy against its maximum, log N."""
    each = [-sum(u * math.log(u) for u in shares if u > 0) / math.log(len(shares)) for shares in usage.values()]
    return statistics.mean(each) if each else None


def rows(folder: Path) -> list[list[str]]:
    lines = []
    for configuration in CONFIGURATIONS:
        records: list[dict[str, Any]] = []
        for path in sorted(folder.glob(f"{configuration.name}-s[0-9]*/evaluation-last.json")):
            records.append(json.loads(path.read_text()))
        if not records:
            continue
        attacks = [r["attacks"][ATTACK] for r in records]
        entropies = [_entropy_share(r["usage"]) for r in records]
        flips = [a["flip_rate"] for a in attacks]
        lines.append(
            [
                configuration.what,
                str(len(records)),
                _spread([100 * r["sa"] for r in records]),
                _spread([100 * a["ra"] for a in attacks]),
                "-" if entropies[0] is None else f"{statistics.mean(e for e in entropies if e is not None):.2f}",
                "-" if flips[0] is None else f"{100 * statistics.mean(flips):.0f} %",
            ]
        )
    return lines


def _spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.1f}" if len(values) == 1 else f"{mean:.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/routing"))
    parser.add_argument("--run", nargs="*", metavar="NAME", help="train and evaluate these configurations, or all")
    parser.add_argument("--data-dir", help="CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="the configurations and their options")
    o = parser.parse_args()
    if o.list:
        print(table(["configuration", "options"], [[c.name, c.options] for c in CONFIGURATIONS]))
        return
    if o.run is not None:
        unknown = set(o.run) - {c.name for c in CONFIGURATIONS}
        if unknown or o.data_dir is None:
            parser.error(f"unknown configurations: {', '.join(sorted(unknown))}" if unknown else "--data-dir is needed")
        for seed in o.seeds:
            for configuration in CONFIGURATIONS:
                if not o.run or configuration.name in o.run:
                    run(configuration, seed, o.out, o.data_dir, o.threads)
    print(table(["routing", "n", "SA", f"RA ({ATTACK})", "usage entropy", "flipped"], rows(o.out)))


if __name__ == "__main__":
    main()
