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
ADVMOE = "--method advmoe --kind moe"
FAST = "--share-attack --router-every 2"
ALONE = "--no-standardize --share-epochs 0"
SWITCH = "--no-standardize --balance switch --balance-weight 0.5"


@dataclass(frozen=True)
class Configuration:
    """``options`` of ``advmoe train``, beside :data:`COMMON`; ``what`` is tried."""

    name: str
    options: str
    what: str


CONFIGURATIONS = (
    Configuration("sdense", "--method at --kind s_dense", "S-Dense, the network of a pathway's width"),
    Configuration("moe-light", f"{AT_MOE} {ALONE}", "a light router for each layer, left alone"),
    Configuration(
        "moe-light-perexpert", f"{AT_MOE} {ALONE} --bn per_expert", "the same, BatchNorms of each expert's own"
    ),
    Configuration("light-std", f"{AT_MOE} --standardize --share-epochs 0", "layer; standardised scores"),
    Configuration(
        "light-std-share4", f"{AT_MOE} --standardize --share-epochs 4", "layer; standardised; shared for 4 of 8"
    ),
    Configuration(
        "light-std-share6", f"{AT_MOE} --standardize --share-epochs 6", "layer; standardised; shared for 6 of 8"
    ),
    Configuration("light-sw-share4", f"{AT_MOE} {SWITCH} --share-epochs 4", "layer; balancing loss; shared for 4 of 8"),
    Configuration(
        "light-alike",
        f"{AT_MOE} --standardize --experts-start alike --share-epochs 0",
        "layer; standardised; alike",
    ),
    Configuration(
        "stage-sw-share4",
        f"{AT_MOE} --route-per stage {SWITCH} --share-epochs 4",
        "stage; balancing loss; shared for 4 of 8",
    ),
    Configuration(
        "stage-std", f"{AT_MOE} --route-per stage --standardize --share-epochs 0", "stage; standardised scores"
    ),
    Configuration(
        "stage-std-share4",
        f"{AT_MOE} --route-per stage --standardize --share-epochs 4",
        "stage; standardised; shared for 4 of 8",
    ),
    Configuration(
        "stage-std-share6",
        f"{AT_MOE} --route-per stage --standardize --share-epochs 6",
        "stage; standardised; shared for 6 of 8",
    ),
    Configuration(
        "block-std-share6",
        f"{AT_MOE} --route-per block --standardize --share-epochs 6",
        "block; standardised; shared for 6 of 8",
    ),
    Configuration(
        "network-std-share6",
        f"{AT_MOE} --route-per network --standardize --share-epochs 6",
        "one light router behind the stem; standardised; shared for 6 of 8",
    ),
    Configuration(
        "image-share4",
        f"{AT_MOE} --router image --no-standardize --share-epochs 4",
        "one choice for each image; shared for 4 of 8",
    ),
    Configuration(
        "image-sw-share4",
        f"{AT_MOE} --router image {SWITCH} --share-epochs 4",
        "image; balancing loss; shared for 4 of 8",
    ),
    Configuration("image-std", f"{AT_MOE} --router image --standardize --share-epochs 0", "image; standardised scores"),
    Configuration(
        "image-std-share4",
        f"{AT_MOE} --router image --standardize --share-epochs 4",
        "image; standardised; shared for 4 of 8",
    ),
    Configuration(
        "image-std-share6",
        f"{AT_MOE} --router image --standardize --share-epochs 6",
        "image; standardised; shared for 6 of 8",
    ),
    Configuration(
        "light-std-share6-temperature",
        f"{AT_MOE} --standardize --share-epochs 6 --temperature 4",
        "layer; standardised; shared for 6 of 8; temperature 4",
    ),
    Configuration(
        "light-std-share6-noise",
        f"{AT_MOE} --standardize --share-epochs 6 --noise 0.5",
        "layer; standardised; shared for 6 of 8; noise 0.5",
    ),
    Configuration(
        "light-std-share6-lr",
        f"{AT_MOE} --standardize --share-epochs 6 --router-lr 0.01",
        "layer; standardised; shared for 6 of 8; a tenth of the rate for routers",
    ),
    Configuration(
        "light-std-share6-norm",
        f"{AT_MOE} --standardize --share-epochs 6 --gate-after norm",
        "layer; standardised; shared for 6 of 8; gate behind the BatchNorm",
    ),
    Configuration("adv-light", f"{ADVMOE} {ALONE}", "AdvMoE: a light router for each layer, left alone"),
    Configuration("adv-light-std", f"{ADVMOE} --standardize --share-epochs 0", "AdvMoE: layer; standardised scores"),
    Configuration(
        "adv-light-std-fast",
        f"{ADVMOE} --standardize --share-epochs 0 {FAST}",
        "fast AdvMoE: layer; standardised scores",
    ),
    Configuration(
        "adv-light-std-share4",
        f"{ADVMOE} --standardize --share-epochs 4",
        "AdvMoE: layer; standardised; shared for 4 of 8",
    ),
    Configuration(
        "adv-light-std-share6",
        f"{ADVMOE} --standardize --share-epochs 6",
        "AdvMoE: layer; standardised; shared for 6 of 8",
    ),
    Configuration(
        "adv-light-std-share6-fast",
        f"{ADVMOE} --standardize --share-epochs 6 {FAST}",
        "fast AdvMoE: layer; standardised; shared for 6 of 8",
    ),
    Configuration(
        "adv-light-std-share6-lr",
        f"{ADVMOE} --standardize --share-epochs 6 --router-lr 0.01",
        "AdvMoE: layer; standardised; shared for 6 of 8; a tenth of the rate for routers",
    ),
    Configuration(
        "adv-block-std-share6",
        f"{ADVMOE} --route-per block --standardize --share-epochs 6",
        "AdvMoE: block; standardised; shared for 6 of 8",
    ),
    Configuration(
        "adv-stage-std-share4",
        f"{ADVMOE} --route-per stage --standardize --share-epochs 4",
        "AdvMoE: stage; standardised; shared for 4 of 8",
    ),
    Configuration(
        "adv-stage-std-share6",
        f"{ADVMOE} --route-per stage --standardize --share-epochs 6",
        "AdvMoE: stage; standardised; shared for 6 of 8",
    ),
    Configuration(
        "adv-image-std-share4",
        f"{ADVMOE} --router image --standardize --share-epochs 4",
        "AdvMoE: image; standardised; shared for 4 of 8",
    ),
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
        code = cli.main(["train", "--resume", str(out), "--data-dir", data_dir])
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


def collect(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The evaluations of all runs, by configuration."""
    found = {}
    for configuration in CONFIGURATIONS:
        paths = sorted(folder.glob(f"{configuration.name}-s[0-9]/evaluation-last.json"))
        if paths:
            runs = [json.loads(path.read_text()) for path in paths]
            found[configuration.name] = [{**r, "run": path.parent.name} for r, path in zip(runs, paths, strict=True)]
    return found


def merged(
    earlier: dict[str, list[dict[str, Any]]], later: dict[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The records of both, the later one of a run that both have."""
    together = {}
    for configuration in CONFIGURATIONS:
        records = [*earlier.get(configuration.name, []), *later.get(configuration.name, [])]
        if records:
            by_run = {record["run"]: record for record in records}
            together[configuration.name] = [by_run[name] for name in sorted(by_run)]
    return together


def rows(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    lines = []
    for configuration in CONFIGURATIONS:
        records = found.get(configuration.name, [])
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
    parser.add_argument("--json", type=Path, help="a file of evaluations: read, those of --out added, and written")
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
    found = collect(o.out)
    if o.json is not None:
        earlier = json.loads(o.json.read_text()) if o.json.exists() else {}
        found = merged(earlier, found)
        o.json.write_text(json.dumps(found) + "\n")
    print(table(["routing", "n", "SA", f"RA ({ATTACK})", "usage entropy", "flipped"], rows(found)))


if __name__ == "__main__":
    main()
