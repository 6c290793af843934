# SPDX-License-Identifier: Apache-2.0
"""A ResNet of one's own, converted to four experts a layer from the start or after a while, beside itself as it was.

python examples/convert_resnet.py --data tiny_imagenet --data-dir DIR --epochs 10
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.data import Batches, BatchStream, DataSet, batches_in_order, load
from moe_kernels import SelfRoutedConv2d, convert


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.down = nn.Conv2d(channels, out, 1, stride, bias=False) if stride > 1 or channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.down(x))


class MyResNet(nn.Module):
    """Nothing in it knows of experts."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.blocks = nn.Sequential(*(Block(widths[i], widths[i + 1], 1 if i == 0 else 2) for i in range(4)))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x - 0.5)).mean((2, 3)))


def train(model: nn.Module, data: DataSet, first: int, last: int, epochs: int, batch_size: int) -> None:
    """Cross-entropy for epochs ``first`` to ``last`` of a run of ``epochs``: SGD, its rate a cosine over all."""
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    order = Batches(len(data.train), batch_size, 0, "train")
    order.epoch = first
    batches, steps = BatchStream(data.train, order, augment=True), epochs * len(order)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for step in range(first * len(order), last * len(order)):
        optimizer.param_groups[0]["lr"] = 0.025 * (1 + math.cos(math.pi * step / steps))
        images, labels = batches.next()
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: DataSet) -> float:
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches_in_order(data.test, 256))
    return right / len(data.test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--train-limit", type=int)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    data = load(o.data, o.data_dir, o.train_limit, seed=o.seed)

    def run(name: str, width: int, num_experts: int | None, ratio: float | None, at: int) -> None:
        """Trains as a dense network until epoch ``at``, then as a routed one."""
        torch.manual_seed(o.seed)
        model = MyResNet(data.num_classes, width)
        start = time.perf_counter()
        train(model, data, 0, at, o.epochs, o.batch_size)
        if num_experts is not None:
            convert(model, num_experts, ratio)
            train(model, data, at, o.epochs, o.epochs, o.batch_size)
        seconds = time.perf_counter() - start
        layers = sum(isinstance(m, SelfRoutedConv2d) for m in model.modules())
        print(f"{name}: {layers} routed layers, test accuracy {accuracy(model, data):.1%}, trained in {seconds:.0f} s")

    late = o.epochs * 3 // 4
    run("as it was", o.width, None, None, o.epochs)
    run("4 experts from the start", o.width, 4, None, 0)
    run("4 experts for the last quarter", o.width, 4, None, late)
    run("twice as wide, 4 experts of half for the last quarter", 2 * o.width, 4, 0.5, late)


if __name__ == "__main__":
    main()
