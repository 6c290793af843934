# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.paired_attacks RUN --attacks pgd50 soft50``: two attacks on the same images, image by image."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from advmoe.attacks import from_name
from advmoe.evaluation import measure, sign_test
from advmoe.tables import table
from advmoe.training.evaluation import open_source

from .machine import describe


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--attacks", nargs=2, default=["pgd50", "soft50"])
    parser.add_argument("--limit", type=int, default=1000, help="the first so many test images")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data-dir")
    o = parser.parse_args(arguments)
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    opened = open_source(o.run, data_dir=o.data_dir)
    attacks = {name: from_name(name, opened.epsilon) for name in o.attacks}
    found = measure(opened.model, opened.data.test, attacks, limit=o.limit)
    first, second = (found.robust[name] for name in o.attacks)
    only_second, only_first = int((first & ~second).sum()), int((second & ~first).sum())
    rows = [
        [f"RA, {o.attacks[0]}", f"{100 * first.double().mean():.1f} %"],
        [f"RA, {o.attacks[1]}", f"{100 * second.double().mean():.1f} %"],
        ["neither fells", f"{100 * (first & second).double().mean():.1f} %"],
        [f"only {o.attacks[1]} fells", str(only_second)],
        [f"only {o.attacks[0]} fells", str(only_first)],
        ["by chance (one-sided sign test)", f"{sign_test(only_second, only_first):.3f}"],
    ]
    print(table([f"{len(first)} images", ""], rows))
    print(", ".join(f"{key} {value}" for key, value in describe().items()))


if __name__ == "__main__":
    main()
