# SPDX-License-Identifier: Apache-2.0
"""One pass over images, clean and attacked, that the analyses share: the attack is run once for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from moe_kernels import Routing

from ..attacks import AttackResult
from ..data import Split, batches_in_order, stream_generator
from ..evaluation.measure import chosen_experts, scores_of
from ..models import record_routing
from ..modes import undisturbed
from ..routers import Router, observe_routers

__all__ = ["Attack", "Choice", "Observation", "observe"]


class Attack(Protocol):
    """What is asked of an attack; :class:`advmoe.attacks.PGD` is one."""

    @property
    def epsilon(self) -> float: ...

    def describe(self) -> str: ...

    def run(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> AttackResult: ...


@dataclass(frozen=True)
class Choice:
    """What one router chose for each of n images, for one layer or for several that share the choice.

    Args:
        layers: names of the routed layers that follow it, in their order.
        num_experts: N.
        clean, attacked: int16 or int32 ``[n, T, k]``: the experts of each of an image's T tokens (1 for convolutions);
            those of a top-k choice in order of their numbers, for another order of the same experts is no flip.
        scores: ``[n, N]``, as the router chooses by them, on clean images; None where there is a score for each token, or
            no :class:`advmoe.routers.Router` chose.
        entropy: of the softmax of the scores, in nats, ``[n]`` on clean and on attacked images, mean over an image's
            tokens; None without scores.
    """

    layers: tuple[str, ...]
    num_experts: int
    clean: Tensor
    attacked: Tensor
    scores: Tensor | None = None
    entropy: tuple[Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        """The first layer's, and how many more there are; of a mixture in a place of its own, without its ``experts``."""
        return self.layers[0].replace(".experts", "") + (
            f" + {len(self.layers) - 1} more" if len(self.layers) > 1 else ""
        )

    def flipped(self) -> Tensor:
        """``[n, T]``: whether the attack changed the choice."""
        return (self.clean != self.attacked).any(2)

    def usage(self, attacked: bool = False) -> Tensor:
        """Each expert's share of all choices, float64 ``[N]``."""
        chosen = self.attacked if attacked else self.clean
        count = torch.bincount(chosen.reshape(-1).long(), minlength=self.num_experts).double()
        return count / count.sum()


@dataclass(frozen=True)
class Observation:
    """A model on n images, clean and attacked.

    Args:
        labels, clean, attacked: int64 ``[n]``: classes, and the predictions.
        zero_gradient: bool ``[n]``: the attack's gradient was exactly zero at each step of its first start.
        choices: of the routers, in the order of the layers.
        attack: in words; epsilon: its radius.
        others: predictions ``[n]`` of other models on the images that were attacked on this one, by their labels, and
            this one's own.
        losses: ``[n]``, the cross-entropy of each attacked image.
    """

    labels: Tensor
    clean: Tensor
    attacked: Tensor
    zero_gradient: Tensor
    choices: tuple[Choice, ...]
    attack: str
    epsilon: float
    others: Mapping[str, Tensor] = field(default_factory=dict)
    losses: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sa(self) -> float:
        return float((self.clean == self.labels).double().mean())

    @property
    def ra(self) -> float:
        """The share of images that are classified rightly clean and attacked."""
        return float(((self.clean == self.labels) & (self.attacked == self.labels)).double().mean())

    def flipped(self) -> Tensor:
        """``[n]``: whether any choice of any router changed.

        Raises:
            ValueError: for a model without routed layers.
        """
        return torch.stack([choice.flipped().any(1) for choice in self.routed()]).any(0)

    def routed(self) -> tuple[Choice, ...]:
        """The choices.

        Raises:
            ValueError: if there are none.
        """
        if not self.choices:
            raise ValueError("model: expected one with routed layers, got none")
        return self.choices

    def note(self) -> str:
        """The images and the attack, and what speaks against it."""
        text = f"{len(self)} images; {self.attack}"
        blind = float(self.zero_gradient.double().mean())
        return f"{text}; {100 * blind:.1f} % of the images gave it no gradient" if blind else text


def observe(
    models: Mapping[str, nn.Module],
    split: Split,
    attack: Attack,
    batch_size: int = 128,
    seed: int = 0,
    cross: bool = False,
    progress: bool = False,
    workers: int | None = None,
) -> dict[str, Observation]:
    """Runs each model in eval mode on the clean images, attacks it, and runs it on what the attack found.

    Args:
        models: by label; every model's modes and parameters are left as they were.
        seed: of the random starts, which are the same for each model.
        cross: run every model on the images attacked on every other one too.
        workers: processes that decode images ahead; the split's own choice by default.

    Raises:
        ValueError: if there are no images or models, ``batch_size`` is below 1, or a model's output is no scores for the
            labels' classes.
        NonFiniteGradientError: as the attack.
    """
    if not len(split) or not models:
        raise ValueError(f"split and models: expected at least one of each, got {len(split)} and {len(models)}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    devices = {
        label: next((p.device for p in model.parameters()), torch.device("cpu")) for label, model in models.items()
    }
    records: dict[str, _Records] = {label: _Records() for label in models}
    starts = range(0, len(split), batch_size)
    pin = any(device.type == "cuda" for device in devices.values())
    batches = zip(starts, batches_in_order(split, batch_size, workers, pin), strict=True)
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(undisturbed(model))
        for start, batch in tqdm(
            batches, "observe", len(starts), unit="batch", disable=None if progress else True, leave=False
        ):
            for label, model in models.items():
                images, labels = (each.to(devices[label], non_blocking=True) for each in batch)
                clean = _look(model, images, labels)
                found = attack.run(model, images, labels, stream_generator(seed, "analyze", start))
                record = records[label]
                record.add(labels, clean, _look(model, found.images, labels), found.zero_gradient)
                for other, judge in models.items() if cross else ():
                    seen = found.images.to(devices[other])
                    record.others.setdefault(other, []).append(scores_of(judge, seen, labels).argmax(1).cpu())
    return {label: record.observation(attack) for label, record in records.items()}


@dataclass(frozen=True)
class _Look:
    """One forward: predictions and cross-entropy ``[B]``, and each routed layer's routing and, where there are any,
    scores."""

    predicted: Tensor
    losses: Tensor
    routings: dict[str, Routing]
    scores: dict[str, Tensor]


def _look(model: nn.Module, images: Tensor, labels: Tensor) -> _Look:
    asked: list[tuple[Tensor, Tensor]] = []

    def note(router: Router, scores: Tensor, routing: Routing) -> None:
        asked.append((routing.expert, scores))

    with record_routing(model) as recorded, observe_routers(model, note):
        logits = scores_of(model, images, labels)
        routings = dict(recorded)
    # a layer's choice is its router's where it is the same memory
    by_memory = {expert.data_ptr(): scores for expert, scores in asked}
    scores = {n: by_memory[r.expert.data_ptr()] for n, r in routings.items() if r.expert.data_ptr() in by_memory}
    return _Look(logits.argmax(1), cross_entropy(logits, labels, reduction="none"), routings, scores)


def _chosen(routing: Routing, images: int) -> Tensor:
    fits = routing.num_experts <= torch.iinfo(torch.int16).max
    return chosen_experts(routing, images).to(torch.int16 if fits else torch.int32).cpu()


def _entropy(scores: Tensor, images: int) -> Tensor:
    """Of the softmax of ``scores [images * T, N]``, mean over T: ``[images]``, in nats."""
    logs = scores.double().log_softmax(1)
    return -(logs.exp() * logs).sum(1).reshape(images, -1).mean(1).cpu()


class _Records:
    """One model's batches."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Tensor]] = {}
        self.others: dict[str, list[Tensor]] = {}
        self.sites: dict[str, tuple[tuple[str, ...], int]] = {}  # the first layer of each choice: its layers, and N

    def add(self, labels: Tensor, clean: _Look, attacked: _Look, zero_gradient: Tensor) -> None:
        if not self.columns:
            self.sites = _sites(clean.routings)
        count = len(labels)
        columns = {
            "labels": labels,
            "clean": clean.predicted,
            "attacked": attacked.predicted,
            "zero_gradient": zero_gradient,
            "losses": attacked.losses,
        }
        for site in self.sites:
            columns[f"clean {site}"] = _chosen(clean.routings[site], count)
            columns[f"attacked {site}"] = _chosen(attacked.routings[site], count)
            if site in clean.scores:
                columns[f"clean entropy {site}"] = _entropy(clean.scores[site], count)
                columns[f"attacked entropy {site}"] = _entropy(attacked.scores[site], count)
                if len(clean.scores[site]) == count:
                    columns[f"scores {site}"] = clean.scores[site].detach()
        for name, column in columns.items():
            self.columns.setdefault(name, []).append(column.cpu())

    def observation(self, attack: Attack) -> Observation:
        joined = {name: torch.cat(parts) for name, parts in self.columns.items()}
        choices = []
        for site, (layers, num_experts) in self.sites.items():
            entropy = None
            if f"clean entropy {site}" in joined:
                entropy = joined[f"clean entropy {site}"], joined[f"attacked entropy {site}"]
            choices.append(
                Choice(
                    layers,
                    num_experts,
                    joined[f"clean {site}"],
                    joined[f"attacked {site}"],
                    joined.get(f"scores {site}"),
                    entropy,
                )
            )
        return Observation(
            joined["labels"],
            joined["clean"],
            joined["attacked"],
            joined["zero_gradient"],
            tuple(choices),
            attack.describe(),
            attack.epsilon,
            {label: torch.cat(parts) for label, parts in self.others.items()},
            joined["losses"],
        )


def _sites(routings: Mapping[str, Routing]) -> dict[str, tuple[tuple[str, ...], int]]:
    """Layers that share a choice, one router's for a block, a stage or the network, are one site."""
    groups: dict[int, list[str]] = {}
    for name, routing in routings.items():
        groups.setdefault(routing.expert.data_ptr(), []).append(name)
    named: Sequence[list[str]] = list(groups.values())
    return {names[0]: (tuple(names), routings[names[0]].num_experts) for names in named}
