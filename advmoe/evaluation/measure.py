# SPDX-License-Identifier: Apache-2.0
"""SA, RA, router flip rate and expert usage of a model on a split."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moe_kernels import Routing

from ..attacks import PGD
from ..data import Split, batches_in_order, stream_generator
from ..models import record_routing
from ..modes import undisturbed

__all__ = ["AttackOutcome", "Evaluation", "evaluate"]


@dataclass(frozen=True)
class AttackOutcome:
    """Of one attack; shares of all images.

    Args:
        ra: robust accuracy: right on the clean and on the attacked image.
        flip_rate: images for which any routed layer's expert changes under attack; None without routed layers.
        layer_flip_rate: the same for each layer.
        zero_gradient: images whose gradient was exactly zero at every step of the first start. Far above 0 the attack was
            blind, and its RA says nothing.
    """

    description: str
    ra: float
    flip_rate: float | None
    layer_flip_rate: dict[str, float]
    zero_gradient: float


@dataclass(frozen=True)
class Evaluation:
    """sa: standard accuracy; usage: each routed layer's share of images for each expert, on clean images."""

    images: int
    sa: float
    attacks: dict[str, AttackOutcome]
    usage: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def evaluate(
    model: nn.Module,
    split: Split,
    attacks: Mapping[str, PGD],
    batch_size: int = 128,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = False,
    workers: int | None = None,
) -> Evaluation:
    """Accuracy in eval mode on the clean images and under each attack on the model's prediction; modes are restored.

    Args:
        limit: the first so many images only.
        seed: of the attacks' random starts; the result is a function of it, the model and the images.
        workers: processes that decode images ahead; the split's own choice by default.

    Raises:
        ValueError: if there are no images, ``limit`` or ``batch_size`` is below 1, or the model has no score for a
            class that an image is of.
        NonFiniteGradientError: if an attack's gradient is NaN or infinite.
    """
    split = split.first(limit)
    total = len(split)
    if total == 0:
        raise ValueError("split: expected at least one image, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    correct = 0
    used: dict[str, Tensor] = {}
    tallies = {name: _Tally() for name in attacks}
    starts = range(0, total, batch_size)
    batches = zip(starts, batches_in_order(split, batch_size, workers, device.type == "cuda"), strict=True)
    hidden = None if progress else True
    with undisturbed(model), record_routing(model) as routings:
        for start, batch in tqdm(batches, "evaluate", len(starts), unit="batch", disable=hidden, leave=False):
            images, labels = (each.to(device, non_blocking=True) for each in batch)
            right = _right(model, images, labels)
            correct += int(right.sum())
            clean = {name: _chosen(r, len(images)) for name, r in routings.items()}
            for name, routing in routings.items():
                count = torch.bincount(routing.expert.reshape(-1), minlength=routing.num_experts)
                used[name] = used[name] + count if name in used else count
            for name, attack in attacks.items():
                found = attack.run(model, images, labels, stream_generator(seed, "evaluate", name, start))
                robust = right & _right(model, found.images, labels)
                flips = {n: (_chosen(r, len(images)) != clean[n]).any(1) for n, r in routings.items()}
                tallies[name].add(robust, flips, found.zero_gradient)
    outcomes = {name: tallies[name].outcome(attack.describe(), total) for name, attack in attacks.items()}
    usage = {name: (count.double() / count.sum()).tolist() for name, count in used.items()}
    return Evaluation(total, correct / total, outcomes, usage)


def _right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        scores = model(images)
    fits = isinstance(scores, Tensor) and scores.dim() == 2 and len(scores) == len(labels)
    if not fits or scores.shape[1] <= int(labels.max()):
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        wanted = f"[{len(labels)}, classes] with a score for class {int(labels.max())}"
        raise ValueError(f"model: expected scores {wanted}, got {found} for images {tuple(images.shape)}")
    return scores.argmax(1) == labels


def _chosen(routing: Routing, images: int) -> Tensor:
    """The experts of each image, ``[images, choices]``; those of a top-k choice in order of their numbers: another
    order of the same experts is no flip."""
    return routing.expert.reshape(-1, routing.top_k * routing.choices).sort(1).values.reshape(images, -1)


class _Tally:
    """Counts of one attack over the batches."""

    def __init__(self) -> None:
        self.robust = self.flipped = self.zero = 0
        self.layers: dict[str, int] = {}
        self.routed = False

    def add(self, robust: Tensor, flips: dict[str, Tensor], zero: Tensor) -> None:
        self.robust += int(robust.sum())
        self.zero += int(zero.sum())
        for name, flip in flips.items():
            self.layers[name] = self.layers.get(name, 0) + int(flip.sum())
        if flips:
            self.routed = True
            self.flipped += int(torch.stack(list(flips.values())).any(0).sum())

    def outcome(self, description: str, total: int) -> AttackOutcome:
        layers = {name: count / total for name, count in self.layers.items()}
        flip_rate = self.flipped / total if self.routed else None
        return AttackOutcome(description, self.robust / total, flip_rate, layers, self.zero / total)
