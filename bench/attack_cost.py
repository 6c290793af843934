# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.attack_cost RUN``: what it saves to leave images alone that have fallen.

PGD with restarts on a run's first test images, in three ways that give the same kind of figure: every image to the end of
every start; each left alone once it has fallen; and that only for images that are right when clean and with later starts'
batches made of what is left of four batches, as ``advmoe evaluate`` does. Counted are images through the network; the
times are of alternating calls.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from advmoe.attacks import PGD, from_name
from advmoe.data import stream_generator
from advmoe.tables import table
from advmoe.training.evaluation import open_source

from .machine import describe


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run")
    parser.add_argument("--attack", default="pgd50x5")
    parser.add_argument("--images", type=int, default=128, help="in four batches")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--data-dir")
    o = parser.parse_args(arguments)
    if o.threads is not None:
        torch.set_num_threads(o.threads)
    opened = open_source(o.run, data_dir=o.data_dir)
    images, labels = opened.data.test.first(o.images).batch(torch.arange(o.images))
    attack = from_name(o.attack, opened.epsilon)
    if not isinstance(attack, PGD):
        raise SystemExit(f"--attack: expected a PGD, got {o.attack}")
    model = opened.model.eval()
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    whole = dataclasses.replace(attack, retire=False)
    size = max(1, o.images // 4)
    everything = torch.arange(o.images)
    ways = {  # the attack, and the images that it gets at once
        "every image to the end": (whole, everything.split(size)),
        "left alone once fallen": (attack, everything.split(size)),
        "right when clean only, batches filled up": (attack, [everything[right]]),
    }
    counted: dict[str, int] = {}
    robust: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(o.repeats):
        for name, (way, parts) in ways.items():
            seen = stand = 0

            def count(module: object, args: tuple[Tensor, ...]) -> None:
                nonlocal seen
                seen += len(args[0])

            handle = model.register_forward_pre_hook(count)
            start = time.perf_counter()
            results = [way.run(model, images[rows], labels[rows], stream_generator(0), batch_size=size) for rows in parts]
            times[name].append(time.perf_counter() - start)
            handle.remove()
            counted[name] = seen
            for rows, result in zip(parts, results, strict=True):
                with torch.no_grad():
                    stand += int(((model(result.images).argmax(1) == labels[rows]) & right[rows]).sum())
            robust[name] = stand / o.images
    first = next(iter(ways))
    rows = [
        [
            name,
            f"{100 * robust[name]:.1f} %",
            f"{counted[name]}",
            f"{counted[name] / counted[first]:.2f}",
            f"{statistics.median(times[name]):.1f}",
            f"{statistics.median(times[name]) / statistics.median(times[first]):.2f}",
        ]
        for name in ways
    ]
    print(table(["", "RA", "images", "ratio", "seconds", "ratio"], rows))
    print(f"{o.images} images, {100 * right.float().mean():.1f} % right when clean; {attack.describe()}; n = {o.repeats}")
    print(", ".join(f"{key} {value}" for key, value in describe().items()))


if __name__ == "__main__":
    main()
