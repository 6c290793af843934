# SPDX-License-Identifier: Apache-2.0
"""RoutedConv2d dropped into a small model of one's own, with a router of one's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.data import Batches, load
from moe_kernels import RoutedConv2d, Routing, ScoreNorm


class QuadrantRouter(nn.Module):
    """Scores experts by how much ink lies in each quarter of the image: anything that gives [B, num_experts] will do."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, num_experts)
        self.norm = ScoreNorm(num_experts)  # without it most images soon go to one or two experts

    def forward(self, images: Tensor) -> Routing:
        ink = F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2).flatten(1)
        return Routing.from_scores(self.norm(self.linear(F.layer_norm(ink, (4,)))))


class SmallNet(nn.Module):
    def __init__(self, num_experts: int = 4) -> None:
        super().__init__()
        self.router = QuadrantRouter(num_experts)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.routed = RoutedConv2d(16, 32, 3, stride=2, padding=1, num_experts=num_experts)  # was nn.Conv2d(16, 32, …)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        routing = self.router(images)
        x = F.relu(self.stem(images))
        x = F.relu(self.routed(x, routing))  # each image meets its own expert's 32 channels, and no other's
        return self.head(x.mean((2, 3)))


def main() -> None:
    torch.manual_seed(0)
    data = load("digits")
    model = SmallNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = Batches(len(data.train), 64, 0, "train")
    losses = []
    for _ in range(20 * len(batches)):
        images, labels = data.train.batch(batches.next()[0])
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        images, labels = data.test.batch(torch.arange(len(data.test)))
        accuracy = (model(images).argmax(1) == labels).float().mean().item()
        usage = torch.bincount(model.router(images).expert, minlength=4).tolist()
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, test accuracy {accuracy:.1%}, images for each expert {usage}")


if __name__ == "__main__":
    main()
