# SPDX-License-Identifier: Apache-2.0
"""Python threads, worker processes and the number of OpenMP threads."""

from __future__ import annotations

import threading

import pytest
import torch
from processes import python
from torch import Tensor

from moe_kernels import RoutedBatchNorm2d, RoutedConv2d, Routing


def test_the_interpreter_runs_while_a_kernel_does() -> None:
    torch.set_num_threads(1)
    layer = RoutedConv2d(64, 64, 3, num_experts=2, padding=1).requires_grad_(False)
    x = torch.randn(64, 64, 32, 32)
    routing = Routing(torch.arange(64) % 2, num_experts=2)
    entered = threading.Event()

    def work() -> None:
        entered.set()  # nobody waiting for this can go on while a kernel holds the interpreter
        for _ in range(3):
            layer(x, routing)

    worker = threading.Thread(target=work)
    worker.start()
    entered.wait()
    rounds = 0
    while worker.is_alive():
        rounds += 1
        worker.join(1e-4)
    # between calls the lock changes hands a few times at most; a kernel takes tens of milliseconds
    assert rounds > 30


def _step(layers: tuple[RoutedConv2d, RoutedBatchNorm2d], x: Tensor, routing: Routing) -> list[Tensor]:
    conv, norm = layers
    x = x.clone().requires_grad_()
    y = norm(conv(x, routing), routing).relu()
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *conv.parameters(), *norm.parameters()])]


@pytest.mark.parametrize("openmp", [1, 2])
def test_eight_threads_with_one_module_get_the_bits_of_one(openmp: int) -> None:
    torch.set_num_threads(openmp)
    layers = RoutedConv2d(16, 24, 3, num_experts=2, padding=1), RoutedBatchNorm2d(24, num_experts=2).eval()
    batches = []
    for n in range(8):
        expert = torch.arange(n + 1) % 2
        batches.append((torch.randn(n + 1, 16, 9, 9), Routing(expert, num_experts=2)))
    expected = [_step(layers, *batch) for batch in batches]
    start = threading.Barrier(8)
    found: list[list[list[Tensor]]] = [[] for _ in batches]

    def work(index: int) -> None:
        torch.set_num_threads(openmp)  # a new thread may begin with the machine's number
        start.wait()
        found[index] = [_step(layers, *batches[index]) for _ in range(10)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for mine, right in zip(found, expected, strict=True):
        assert len(mine) == 10
        for each in mine:
            assert all(a.equal(b) for a, b in zip(each, right, strict=True))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_workers_run_kernels_after_the_parent_did(method: str) -> None:
    """An OpenMP runtime that was forked with its threads would wait for them for ever; workers have one, as torch's."""
    code = """
import sys
import torch
from kernel_steps import KernelData, step
torch.set_num_threads(2)
expected = step()
loader = torch.utils.data.DataLoader(KernelData(), batch_size=2, num_workers=1, multiprocessing_context=sys.argv[1])
batches = list(loader)
assert len(batches) == 3 and all(y.equal(expected) for batch in batches for y in batch)
assert step().equal(expected)
print("done")
"""
    assert python(code, method).split() == ["done"]


def test_as_many_openmp_threads_as_torch_says() -> None:
    code = """
import os
import torch
from kernel_steps import step
counts = []
for threads in (1, 2, 5):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    with torch.no_grad():
        step(backward=False)
    counts.append(len(os.listdir("/proc/self/task")) - before)
print(*counts)
"""
    assert python(code).split() == ["0", "1", "3"]
