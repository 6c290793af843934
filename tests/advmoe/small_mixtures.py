# SPDX-License-Identifier: Apache-2.0
"""Mixtures of small networks, and searches for what breaks their certificates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from advmoe.models.base import Normalize
from advmoe.routers import LinearRouter, RouterOptions, ScoreNorm
from moe_kernels import Routing


class Mixture(nn.Module):
    """What certification asks of kind network_moe, with any experts, by a plain loop.

    Args:
        experts: of images ``[B, C, S, S]``, normalised here.
    """

    def __init__(
        self,
        experts: Sequence[nn.Module],
        channels: int = 2,
        size: int = 1,
        top_k: int = 1,
        gate: str = "none",
        mix: str = "logits",
        normalize: bool = False,
        temperature: float = 1.0,
        standardize: bool = False,
    ) -> None:
        super().__init__()
        self.spec = SimpleNamespace(mix=mix)
        self.normalize = Normalize([0.4] * channels, [0.25] * channels) if normalize else nn.Identity()
        self.router = LinearRouter(channels, len(experts), size)
        self.router.options = RouterOptions(gate=gate, temperature=temperature, top_k=top_k)
        if standardize:
            self.router.score_norm = ScoreNorm(len(experts))
        self.experts = nn.ModuleList(experts)

    def expert(self, index: int) -> nn.Module:
        return nn.Sequential(self.normalize, self.experts[index])

    def scores(self, images: Tensor) -> Tensor:
        return self.router.scores(self.normalize(images))

    def route(self, images: Tensor) -> Routing:
        return self.router.route(self.normalize(images))

    def forward(self, images: Tensor) -> Tensor:
        routing, x = self.route(images), self.normalize(images)
        each = torch.stack([expert(x) for expert in self.experts], 1)
        chosen = routing.expert.reshape(len(images), -1)
        each = each.gather(1, chosen[:, :, None].expand(-1, -1, each.shape[2]))
        gate = torch.ones(chosen.shape, dtype=x.dtype) if routing.gate is None else routing.gate.reshape(chosen.shape)
        if self.spec.mix == "probabilities":
            return (gate[:, :, None] * each.softmax(2)).sum(1).log()
        return (gate[:, :, None] * each).sum(1)


def plain(classes: int = 3, width: int = 8, inputs: int = 2, depth: int = 2) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, classes))


def convolutional(classes: int = 3, channels: int = 2, size: int = 5) -> nn.Sequential:
    network = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2, 1),
        nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes),
    )  # fmt: skip
    return settled(network)


def settled(network: nn.Module) -> nn.Module:
    """BatchNorms as after some training."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return network


def fit(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 60, rate: float = 0.02) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


def margins(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Of the class over all others, ``[n]``: not positive where the image is misclassified."""
    scores = model(images)
    own = scores.gather(1, labels[:, None])[:, 0]
    return own - scores.scatter(1, labels[:, None], -torch.inf).amax(1)


def on_grid(model: nn.Module, images: Tensor, labels: Tensor, radius: Tensor, norm: str, steps: int = 41) -> Tensor:
    """The least margin, ``[n]``, on a grid of the ball of each of ``images [n, 2, 1, 1]``, its border and corners too."""
    line = torch.linspace(-1, 1, steps, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    if norm == "l2":
        angles = torch.linspace(0, 2 * torch.pi, 8 * steps, dtype=torch.float64)
        grid = torch.cat([grid[grid.norm(dim=1) <= 1], torch.stack([angles.cos(), angles.sin()], 1)])
    points = images[:, None] + radius[:, None, None, None, None] * grid.reshape(1, -1, 2, 1, 1)
    found = margins(model, points.flatten(0, 1), labels.repeat_interleave(len(grid)))
    return found.unflatten(0, (len(images), -1)).amin(1)


def attacked(
    model: nn.Module, images: Tensor, labels: Tensor, radius: Tensor, norm: str, restarts: int = 10, steps: int = 25
) -> Tensor:
    """The least margin, ``[n]``, that gradient descent on it finds in each image's ball, from many starts."""
    n = len(images)
    many, which = images.repeat(restarts, 1, 1, 1), labels.repeat(restarts)
    reach = radius.repeat(restarts).reshape(-1, 1, 1, 1)
    delta = torch.empty_like(many).uniform_(-1, 1)
    delta[: n * restarts // 2] = delta[: n * restarts // 2].sign()
    delta = _into(delta * reach, reach, norm)
    least = torch.full((len(many),), torch.inf, dtype=torch.float64)
    for step in range(steps + 1):
        delta.requires_grad_()
        found = margins(model, many + delta, which)
        least = torch.minimum(least, found.detach())
        (grad,) = torch.autograd.grad(found.sum(), delta)
        way = grad.sign() if norm == "linf" else grad / grad.flatten(1).norm(dim=1).clamp_min(1e-30).reshape(-1, 1, 1, 1)
        delta = _into(delta.detach() - reach * (0.5 * 0.9**step) * way, reach, norm)
    return least.unflatten(0, (restarts, n)).amin(0)


def _into(delta: Tensor, reach: Tensor, norm: str) -> Tensor:
    if norm == "linf":
        return torch.maximum(torch.minimum(delta, reach), -reach)
    length = delta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
    return delta * (reach / length.clamp_min(1e-300)).clamp_max(1)


def steepest(network: Callable[[Tensor], Tensor], points: Tensor, head: Tensor, norm: str) -> Tensor:
    """The dual norm of the gradient of ``head @ z`` at each point, ``[n]``: none may be above a Lipschitz constant."""
    points = points.detach().requires_grad_()
    (grad,) = torch.autograd.grad((network(points) @ head).sum(), points)
    return grad.flatten(1).norm(1 if norm == "linf" else 2, dim=1)
