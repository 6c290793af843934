# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.threads``: what more OpenMP threads than cores cost a routed convolution, and Python threads that
call it at once; times in turn, round by round."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable

import torch

from advmoe.tables import table
from moe_kernels import RoutedConv2d, Routing

from .machine import describe
from .timing import medians

CALLERS = (1, 2, 4)
OPENMP = (1, 2, 4, 8)


def calls(callers: int, openmp: int, each: int) -> Callable[[], None]:
    """So many Python threads, each making ``each`` calls of one layer with ``openmp`` threads."""
    layer = RoutedConv2d(64, 64, 3, num_experts=2, padding=1).requires_grad_(False)
    x = torch.randn(32, 64, 16, 16).contiguous(memory_format=torch.channels_last)
    routing = Routing(torch.arange(32) % 2, num_experts=2)

    def work() -> None:
        torch.set_num_threads(openmp)
        for _ in range(each):
            layer(x, routing)

    def run() -> None:
        workers = [threading.Thread(target=work) for _ in range(callers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="timings of each, in turn (7)")
    parser.add_argument(
        "--calls",
        type=int,
        default=16,
        help="calls in each timing, of all callers together, rounded up (16)",
    )
    o = parser.parse_args()
    settings = [(callers, openmp) for callers in CALLERS for openmp in OPENMP]
    each = [-(-o.calls // callers) for callers, _ in settings]
    taken = medians([calls(*setting, n) for setting, n in zip(settings, each, strict=True)], o.repeats)
    seconds = [s / (callers * n) for (callers, _), n, s in zip(settings, each, taken, strict=True)]
    rows = [
        [str(callers), str(openmp), f"{1e3 * s:.2f}", f"{s / seconds[0]:.2f}"]
        for (callers, openmp), s in zip(settings, seconds, strict=True)
    ]
    print(table(["Python threads", "OpenMP threads each", "ms a call", "of one and one"], rows))
    machine = describe()
    print(f"{machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}, n = {o.repeats}")


if __name__ == "__main__":
    main()
