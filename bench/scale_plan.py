# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.scale_plan``: adversarial training on ImageNet by 8 GPUs and more, by counting; the tables of
docs/scale.md.

Parameters, multiply-accumulates and what autograd saves are counted on the meta device; passes are those of a step with
the TRADES objective, in which AdvMoE trains routers and backbone. Rates of links and GPUs are the makers', the share of
the peak that is reached is an assumption. Nothing is run on a GPU and nothing is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advmoe.models import create_model
from advmoe.profiling import profile
from advmoe.tables import percent, table
from moe_kernels import RoutedBatchNorm2d, RoutedConv2d

__all__ = ["METHODS", "Network", "Passes", "main", "network", "passes", "ring_seconds", "tables"]

ARCHS = ("resnet18", "resnet50")
EXPERTS = (2, 4, 8, 16)
CLASSES, SIZE, RATIO = 1000, 224, 0.5
METHODS = (("AT", 2), ("AT", 10), ("AdvMoE", 2), ("AdvMoE", 10))
PEAK = 989e12  # bf16 FLOP/s of an H200 without sparsity, as its data sheet has it
MEMORY = 141e9  # bytes of it
REACHED = 0.05  # of the peak: an assumption; times are inverse to it
LATENCY = 20e-6  # seconds of a small all-reduce: an assumption
SHARE = 64  # images of each GPU in a step: a batch of 512 on eight, the recipe's
IMAGES = 1_281_167
JPEG = 147_897_477_120 / IMAGES  # bytes: of ILSVRC2012_img_train.tar
DECODED_A_SECOND = 400  # by a core: docs/training.md
GPUS = 8  # of a machine
WITHIN = {"NVLink 4, 450 GB/s": 450e9, "PCIe 4 x16, 32 GB/s": 32e9}  # bytes/s that a GPU sends, as the makers state them
# Bytes/s that a machine sends. A ring through the GPUs of one after the other enters and leaves it once, so that all its
# cards together serve its rings.
ACROSS = {"eight cards of 400 Gb/s": 8 * 400e9 / 8, "one card of 100 Gb/s": 100e9 / 8}
NORM_COLLECTIVES = 5  # a BatchNorm's in training: count, sums and squares forward, two backward


@dataclass(frozen=True)
class Passes:
    """Through the network for each image that the backbone is trained on; each costs about what a forward does."""

    forwards: int
    input_gradients: int
    weight_gradients: int
    images: int = 1  # that are read
    in_training_mode: int = 2  # of the forwards: attacks are in eval mode

    @property
    def total(self) -> int:
        return self.forwards + self.input_gradients + self.weight_gradients


def passes(method: str, steps: int) -> Passes:
    """Of a step with TRADES: the attack's clean forward and its steps, then a clean and an attacked forward and backward.
    AdvMoE does so once more with another batch for the routers, whose backward asks for no expert's weights."""
    attack, trained = (1 + steps, steps), 2
    once = Passes(attack[0] + trained, attack[1] + trained, trained)
    if method == "AT":
        return once
    return Passes(2 * once.forwards, 2 * once.input_gradients, trained, images=2, in_training_mode=4)


@dataclass(frozen=True)
class Network:
    """saved: bytes that a float32 forward in training keeps for its backward, for each image; synchronized: where
    BatchNorms have the statistics of all processes, which keep one value more of each of their outputs."""

    name: str
    params: int
    expert_params: int
    macs: int
    saved: float
    synchronized: float
    norms: int

    @property
    def state(self) -> int:
        """Bytes: float32 weights, gradients, momenta and DistributedDataParallel's buckets."""
        return 16 * self.params


@cache
def network(arch: str, kind: str, experts: int = 1, size: int = SIZE, width: int | None = None) -> Network:
    batch = 8
    with torch.device("meta"):
        model = create_model(arch, kind, CLASSES, size, experts, RATIO, width=width).train()
        cost = profile(model, size)
        x = torch.empty(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    saved, normalised = _saved(model, x)
    title = {"dense": "Dense", "s_dense": "S-Dense", "moe": f"MoE, N = {experts}"}[kind]
    routed = sum(m.weight.numel() for m in model.modules() if isinstance(m, RoutedConv2d))
    norms = sum(isinstance(m, _BatchNorm | RoutedBatchNorm2d) for m in model.modules())
    name = {"resnet18": "ResNet-18", "resnet50": "ResNet-50"}.get(arch, arch)
    macs = round(cost.gflops * 1e9)
    return Network(f"{name} {title}", cost.params, routed, macs, saved / batch, (saved + normalised) / batch, norms)


def _saved(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Bytes of the storages that a forward saves, but parameters and buffers; and of all BatchNorms' outputs."""
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice
    outputs = []

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return t

    def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output.numel() * output.element_size())

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, _BatchNorm | RoutedBatchNorm2d)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    for hook in hooks:
        hook.remove()
    return sum(storage.nbytes() for storage in found.values()), sum(outputs)


def ring_seconds(size: float, processes: int, rate: float) -> float:
    """A ring's all-reduce: over each of its links go ``2 (K - 1) / K`` times the bytes, at the rate of the slowest;
    latencies are left out. Several rings share bytes and links."""
    return 2 * (processes - 1) / processes * size / rate


def images_a_second(net: Network, method: str, steps: int) -> float:
    """Of one GPU at the assumed share of its peak; a multiply-accumulate is two FLOP."""
    return REACHED * PEAK / (2 * net.macs * passes(method, steps).total)


def _networks(arch: str) -> list[Network]:
    return [network(arch, "dense"), network(arch, "s_dense"), *(network(arch, "moe", n) for n in EXPERTS)]


def tables() -> dict[str, str]:
    """By what they are of, as Markdown."""
    return {
        "passes": _passes(),
        "networks": _table_of_networks(),
        "all-reduce": _all_reduce(),
        "rates": _rates(),
        "beyond": _beyond(),
        "unused": _unused(),
    }


def _passes() -> str:
    rows = []
    for method, steps in METHODS:
        p = passes(method, steps)
        rows.append(
            [f"{method}, {steps} steps"]
            + [str(v) for v in (p.forwards, p.input_gradients, p.weight_gradients, p.total, p.images, p.in_training_mode)]
        )
    head = ["step", "forwards", "input gradients", "weight gradients", "sum", "images read", "forwards in training mode"]
    return table(head, rows)


def _table_of_networks() -> str:
    rows = []
    for net in (net for arch in ARCHS for net in _networks(arch)):
        # TRADES keeps the clean and the attacked forward until its backward
        fits = (0.8 * MEMORY - net.state) / (2 * net.synchronized)
        rows.append([
            net.name, f"{net.params / 1e6:.1f}", percent(net.expert_params / net.params), f"{net.macs / 1e9:.2f}",
            f"{net.state / 1e9:.2f}", f"{net.saved / 1e6:.1f}", f"{net.synchronized / 1e6:.1f}", f"{int(fits)}",
        ])  # fmt: skip
    head = ["network", "parameters, M", "experts'", "GMAC an image", "state, GB", "saved an image, MB",
            "in several processes, MB", "images that fit"]  # fmt: skip
    return table(head, rows)


def _all_reduce() -> str:
    rows = []
    for arch in ARCHS:
        for net in _networks(arch):
            size = 4 * net.params
            links = [(rate, GPUS) for rate in WITHIN.values()] + [(rate, 2 * GPUS) for rate in ACROSS.values()]
            times = [f"{1e3 * ring_seconds(size, processes, rate):.1f}" for rate, processes in links]
            rows.append([net.name, f"{size / 1e6:.0f}", f"{size / 2e6:.0f}", *times])
    head = [f"eight, {name}: ms" for name in WITHIN] + [f"two machines, {name} each: ms" for name in ACROSS]
    return table(["network", "float32, MB", "bfloat16, MB", *head], rows)


def _rates() -> str:
    rows = []
    for arch in ARCHS:
        for net, method, steps in [
            *((network(arch, "dense"), "AT", k) for k in (2, 10)),
            *((network(arch, "moe", 2), m, k) for m, k in METHODS),
        ]:
            p, rate = passes(method, steps), images_a_second(net, method, steps)
            read = GPUS * rate * p.images
            norms = net.norms * NORM_COLLECTIVES * p.in_training_mode
            rows.append([
                f"{net.name}, {method}, {steps} steps", f"{2 * net.macs * p.total / 1e9:.0f}", f"{rate:.0f}",
                f"{GPUS * rate:.0f}", f"{1e3 * SHARE / rate:.0f}", f"{IMAGES / (GPUS * rate) / 60:.1f}",
                f"{read * JPEG / 1e6:.0f}", f"{read / DECODED_A_SECOND:.0f}",
                str(norms), f"{1e3 * norms * LATENCY:.0f}",
            ])  # fmt: skip
    head = ["network and step", "GFLOP an image", "images/s, a GPU", "eight", "step, ms", "epoch, min", "read, MB/s",
            "cores that decode", "BatchNorms' all-reduces a step", "of 20 µs each, ms"]  # fmt: skip
    return table(head, rows)


def _beyond() -> str:
    rows = []
    for arch in ARCHS:
        for experts in (2, 16):
            net = network(arch, "moe", experts)
            step = SHARE / images_a_second(net, "AdvMoE", 2)
            for name, rate in ACROSS.items():
                shares = []
                for processes in (2 * GPUS, 64, 256):
                    sent = ring_seconds(4 * net.params, processes, rate)
                    shares.append(percent(step / (step + sent)))
                rows.append([f"{net.name}, {name}", *shares])
    return table(["network and a machine's links", "16 GPUs", "64", "256"], rows)


def _unused() -> str:
    """How likely none of a process's images chooses an expert, where all are as likely."""
    shares = (8, 16, 32, SHARE, 128)
    rows = [[f"N = {n}", *(percent((1 - 1 / n) ** share) for share in shares)] for n in EXPERTS]
    return table(["experts", *(f"{share} images" for share in shares)], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    for name, text in tables().items():
        print(f"{name}\n\n{text}\n")
    print("Counted, not measured: a plan.")


if __name__ == "__main__":
    main()
