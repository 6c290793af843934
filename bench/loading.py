# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.loading DIR``: images a second that processes decode and cut for training on ImageNet, or on what
``bench.made_imagenet`` writes; ``--data cifar10`` and its kin likewise move and mirror those."""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from advmoe.data import Batches, BatchStream, DataSet, load
from advmoe.tables import table

from .machine import describe

BATCHES = 8  # timed; as many before, so that what was made ahead is used up


def images_per_second(data: DataSet, workers: int, batch_size: int) -> float:
    stream = BatchStream(data.train, Batches(len(data.train), batch_size, 0, "train"), augment=True, workers=workers)
    for _ in range(BATCHES):
        stream.next()
    start = time.perf_counter()
    for _ in range(BATCHES):
        stream.next()
    seconds = time.perf_counter() - start
    stream.close()
    return BATCHES * batch_size / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", default="imagenet", help="the data set (imagenet)")
    parser.add_argument("--batch-size", type=int, default=64, help="images (64)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of processes (0 1 2)")
    parser.add_argument("--repeats", type=int, default=3, help="timings of each, in turn (3)")
    o = parser.parse_args()
    torch.set_num_threads(1)
    data = load(o.data, o.folder)
    rates: dict[int, list[float]] = {workers: [] for workers in o.workers}
    for _ in range(o.repeats):
        for workers in o.workers:
            rates[workers].append(images_per_second(data, workers, o.batch_size))
    rows = [
        [
            str(w),
            f"{statistics.median(r):.0f}",
            f"{1000 * o.batch_size / statistics.median(r):.1f}",
            " ".join(f"{x:.0f}" for x in r),
        ]
        for w, r in rates.items()
    ]
    print(table(["processes", "images/s", "ms a batch", "each"], rows))
    machine = describe()
    print(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}")


if __name__ == "__main__":
    main()
