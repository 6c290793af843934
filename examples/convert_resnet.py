# SPDX-License-Identifier: Apache-2.0
"""A ResNet of one's own, converted to four experts a layer and trained, beside itself as it was.

python examples/convert_resnet.py --data tiny_imagenet --data-dir DIR --epochs 10
"""

from __future__ import annotations

import argparse
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


def train(model: nn.Module, data: DataSet, epochs: int, batch_size: int) -> float:
    """Cross-entropy, SGD with a cosine; returns the seconds that it took."""
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    order = Batches(len(data.train), batch_size, 0, "train")
    batches = BatchStream(data.train, order, augment=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(order))
    start = time.perf_counter()
    for _ in range(epochs * len(order)):
        images, labels = batches.next()
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, data: DataSet) -> float:
    model.eval()
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches_in_order(data.test, 256))
    return right / len(data.test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    data = load(o.data, o.data_dir, seed=o.seed)

    torch.manual_seed(o.seed)
    dense = MyResNet(data.num_classes, o.width)

    torch.manual_seed(o.seed)
    routed = MyResNet(data.num_classes, o.width)
    convert(routed, num_experts=4)  # the same cost, four times the weights

    torch.manual_seed(o.seed)
    narrow = MyResNet(data.num_classes, 2 * o.width)
    convert(narrow, num_experts=4, ratio=0.5)  # pathways of width o.width out of a network of twice that

    for name, model in (("as it was", dense), ("4 experts", routed), ("twice as wide, 4 experts of half", narrow)):
        seconds = train(model, data, o.epochs, o.batch_size)
        layers = sum(isinstance(m, SelfRoutedConv2d) for m in model.modules())
        print(f"{name}: {layers} routed layers, test accuracy {accuracy(model, data):.1%}, trained in {seconds:.0f} s")


if __name__ == "__main__":
    main()
