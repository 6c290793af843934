# SPDX-License-Identifier: Apache-2.0
"""SA, RA, router flip rate and expert usage of a model on a split."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moe_kernels import Routing

from ..attacks import PGD, Attack, AutoAttack, NonFiniteGradientError
from ..data import Split, batches_in_order, stream_generator
from ..files import WriteError
from ..locks import locked
from ..models import record_routing
from ..modes import undisturbed
from ..world import ALONE, World

__all__ = ["AttackOutcome", "Evaluation", "Measured", "chosen_experts", "evaluate", "measure", "scores_of", "wilson"]

_CHUNK = 4  # batches that are attacked together
_Z95 = 1.959964  # of the standard normal distribution, two-sided 95 %


@dataclass(frozen=True)
class AttackOutcome:
    """Of one attack; shares of ``images``, where nothing else is said.

    Args:
        images: so many, the first ones.
        ra: robust accuracy: right on the clean and on the attacked image.
        interval: 95 % interval of ``ra`` by the number of images alone (Wilson's).
        class_ra: of each class' images; None for a class without images.
        flip_rate: of the attacked images (those that are right when clean), for which any routed layer's expert changes;
            None without routed layers, if no image was attacked, and for AutoAttack, which returns robust images as they
            were.
        layer_flip_rate: the same for each layer.
        zero_gradient: of the attacked images, whose gradient was exactly zero at every step of the first start. Far above
            0 the attack was blind, and its RA says nothing. None for AutoAttack, which has warnings instead.
        stages: of AutoAttack: RA after each of its attacks and those before it.
        warnings: against the figure: AutoAttack's, and that the model draws something.
    """

    description: str
    images: int
    ra: float
    interval: tuple[float, float]
    class_ra: list[float | None]
    flip_rate: float | None
    layer_flip_rate: dict[str, float]
    zero_gradient: float | None
    stages: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluation:
    """sa: standard accuracy, with its 95 % interval, and of each class; usage: each routed layer's share of images for
    each expert, on clean images."""

    images: int
    sa: float
    sa_interval: tuple[float, float]
    class_sa: list[float | None]
    attacks: dict[str, AttackOutcome]
    usage: dict[str, list[float]]

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass
class Measured:
    """Image by image: labels int64 ``[n]``, right bool ``[n]`` when clean, robust bool ``[m]`` for each attack on the
    first m images."""

    labels: Tensor
    right: Tensor
    robust: dict[str, Tensor]
    evaluation: Evaluation


def wilson(count: int, total: int) -> tuple[float, float]:
    """95 % interval of a share by Wilson's score: ``count`` of ``total``."""
    if count in (0, total):  # exactly, where rounding would be off by a digit
        end = _Z95**2 / (total + _Z95**2)
        return (0.0, end) if count == 0 else (1 - end, 1.0)
    share, z2 = count / total, _Z95**2
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return middle - half, middle + half


def evaluate(
    model: nn.Module,
    split: Split,
    attacks: Mapping[str, Attack],
    batch_size: int = 128,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = False,
    workers: int | None = None,
    limits: Mapping[str, int] | None = None,
    state: Path | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Accuracy in eval mode on the clean images and under each attack on the model's prediction; modes are restored.

    Only images that are right when clean are attacked: the others are not robust anyway. Of a model that draws something
    in eval mode (two forwards of the first batch differ) no image is left alone before an attack's end, for one unlucky
    draw is no fall.

    Args:
        limit: the first so many images only.
        seed: of the attacks' random starts; the result is a function of it, the model, the images, ``batch_size`` and the
            attacks' names.
        workers: processes that decode images ahead; the split's own choice by default.
        limits: for some attacks fewer images than ``limit``, at least 1.
        state: a folder for what AutoAttack goes on from if it is interrupted; none by default. One evaluation at a time.
        world: processes that share the work, each with the whole model and all images. What is attacked together in one
            process is in several too, from the same random starts: the outcome is the same, in all of them, but of a
            model that draws something.

    Raises:
        ValueError: if there are no images, ``limit`` or ``batch_size`` is below 1, the model has no score for a
            class that an image is of, or another evaluation with AutoAttack has the folder ``state``.
        NonFiniteGradientError: if scores or an attack's gradient are NaN or infinite.
        ProcessLost: if another process has ended.
        WriteError: if AutoAttack's file cannot be written.
    """
    own = isinstance(attacks, Mapping) and any(isinstance(attack, AutoAttack) for attack in attacks.values())
    with _alone_in(state if own and world.first else None):
        return measure(model, split, attacks, batch_size, limit, seed, progress, workers, limits, state, world).evaluation


@contextmanager
def _alone_in(folder: Path | None) -> Iterator[None]:
    """From the first image on: that another one writes AutoAttack's files is not to be found behind hours of attacks."""
    with ExitStack() as stack:
        if folder is not None:
            path = folder / "autoattack.lock"
            try:
                stack.enter_context(locked(path))
            except BlockingIOError as error:
                raise ValueError(
                    f"{folder}: {error.strerror} evaluates with AutoAttack there; wait for its end"
                ) from error
            except OSError as error:
                raise WriteError(path, error) from error
        yield


def measure(
    model: nn.Module,
    split: Split,
    attacks: Mapping[str, Attack],
    batch_size: int = 128,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = False,
    workers: int | None = None,
    limits: Mapping[str, int] | None = None,
    state: Path | None = None,
    world: World = ALONE,
) -> Measured:
    """As :func:`evaluate`, with the outcome for each image."""
    if not isinstance(attacks, Mapping):
        raise ValueError(f"attacks: expected attacks by name, such as {{'pgd20': PGD(…)}}, got {type(attacks).__name__}")
    if not isinstance(split, Split):
        raise ValueError(f"split: expected an advmoe.data.Split, such as TensorSplit, got {type(split).__name__}")
    split = split.first(limit)
    total = len(split)
    if total == 0:
        raise ValueError("split: expected at least one image, got none")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    counts = {name: min(total, (limits or {}).get(name, total)) for name in attacks}
    for name, images_of_it in counts.items():
        if images_of_it < 1:
            raise ValueError(f"limits: expected at least 1 for {name}, got {images_of_it}")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    pinned = device.type == "cuda"
    share = _Share(total, counts)
    places, mine = torch.arange(total), split
    if world.size > 1:  # whole chunks, in turn
        places = places[places // (_CHUNK * batch_size) % world.size == world.rank]
        mine = split.select(places)
    starts = places[::batch_size].tolist()
    batches = zip(starts, batches_in_order(mine, batch_size, workers, pinned), strict=True)
    hidden = None if progress else True
    with undisturbed(model), record_routing(model) as routings:
        chunk = _Chunk(model, routings)
        for start, batch in tqdm(batches, "evaluate", len(starts), unit="batch", disable=hidden, leave=False):
            x, y = (each.to(device, non_blocking=True) for each in batch)
            scores = scores_of(model, x, y)
            if start == starts[0]:
                share.classes = scores.shape[1]
                share.drawing = not torch.equal(scores, scores_of(model, x, y))
                for name, attack in attacks.items():
                    if isinstance(attack, AutoAttack):  # not only behind hours of others
                        attack.require(share.classes)
                        attack.refuse_stale(_state_file(state, name), model, seed, batch_size, world)
            good = scores.argmax(1) == y
            share.right[start : start + len(x)] = good.cpu()
            clean = {name: chosen_experts(r, len(x)) for name, r in routings.items()}
            for name, routing in routings.items():
                count = torch.bincount(routing.expert.reshape(-1), minlength=routing.num_experts).cpu()
                share.used[name] = share.used[name] + count if name in share.used else count
            chunk.add(start, x, y, good, clean)
            if len(chunk) == _CHUNK or start == starts[-1]:
                for name, attack in attacks.items():
                    if isinstance(attack, PGD) and counts[name] > chunk.start:
                        attack = dataclasses.replace(attack, retire=attack.retire and not share.drawing)
                        generator = stream_generator(seed, "evaluate", name, chunk.start)
                        share.tallies[name].add(chunk, attack, counts[name] - chunk.start, batch_size, generator)
                chunk = _Chunk(model, routings)
    share = _Share.of_all(world.each(share))
    all_labels, classes = split.labels[:total].cpu(), share.classes
    outcomes = {}
    for name, attack in attacks.items():
        tally, n = share.tallies[name], counts[name]
        if isinstance(attack, AutoAttack):  # which takes its images all at once
            file = _state_file(state, name)
            parts = batches_in_order(split.first(n), batch_size, workers, pinned)
            images, labels = (torch.cat(each).to(device) for each in zip(*parts, strict=True))
            tally.found = attack.run(model, images, labels, seed, batch_size, file, progress, world)
            tally.robust = tally.found.robust.cpu()
        outcomes[name] = tally.outcome(attack, all_labels[:n], classes, share.drawing)
    correct = int(share.right.sum())
    usage = {name: (count.double() / count.sum()).tolist() for name, count in share.used.items()}
    by_class = _by_class(share.right, all_labels, classes)
    evaluation = Evaluation(total, correct / total, wilson(correct, total), by_class, outcomes, usage)
    return Measured(all_labels, share.right, {name: tally.robust for name, tally in share.tallies.items()}, evaluation)


def scores_of(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The model's scores of these images, without a graph, ``[B, classes]``.

    Raises:
        ValueError: if what it gives are no scores, or there is none for a label's class.
        NonFiniteGradientError: if a score is NaN or infinite.
    """
    with torch.no_grad():
        scores = model(images)
    fits = isinstance(scores, Tensor) and scores.dim() == 2 and len(scores) == len(labels)
    if not fits or scores.shape[1] <= int(labels.max()):
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        wanted = f"[{len(labels)}, classes] with a score for class {int(labels.max())}"
        raise ValueError(f"model: expected scores {wanted}, got {found} for images {tuple(images.shape)}")
    finite = torch.isfinite(scores).all(1)
    if not bool(finite.all()):  # the highest of NaN is class 0, which may be right
        bad = int((~finite).sum())
        raise NonFiniteGradientError(f"the scores of {bad} of {len(scores)} images are not finite")
    return scores


def chosen_experts(routing: Routing, images: int) -> Tensor:
    """``[images, T, k]``: the experts of each of an image's T tokens (1 for convolutions); those of a top-k choice in
    order of their numbers: another order of the same experts is no flip."""
    return routing.expert.reshape(images, -1, routing.top_k * routing.choices).sort(2).values


def _by_class(flags: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    there = torch.bincount(labels, minlength=classes).tolist()
    true = torch.bincount(labels[flags], minlength=classes).tolist()
    return [t / n if n else None for t, n in zip(true, there, strict=True)]


def _state_file(folder: Path | None, name: str) -> Path | None:
    return None if folder is None else folder / f"{name}.state.pt"


class _Chunk:
    """Some batches that are attacked together: those of their images that are left after one start make full batches for
    the next."""

    def __init__(self, model: nn.Module, routings: Mapping[str, Routing]) -> None:
        self.model, self.routings = model, routings  # routings: of the model's last forward
        self.start = 0  # the first image's place
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []
        self._clean: dict[str, list[Tensor]] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def add(self, start: int, images: Tensor, labels: Tensor, right: Tensor, clean: dict[str, Tensor]) -> None:
        self.start = self.start if self._batches else start
        self._batches.append((images, labels, right))
        for name, chosen in clean.items():
            self._clean.setdefault(name, []).append(chosen)

    def attacked(
        self, attack: PGD, limit: int, batch_size: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Of the first ``limit`` images which are robust, and of those that were attacked which choices flipped, by
        layer, and which gave no gradient."""
        images, labels, right = (torch.cat(each)[:limit] for each in zip(*self._batches, strict=True))
        clean = {name: torch.cat(chosen) for name, chosen in self._clean.items()}
        robust = torch.zeros_like(right)
        rows = right.nonzero().squeeze(1)
        if not len(rows):
            return robust, {}, robust[:0]
        result = attack.run(self.model, images[rows], labels[rows], generator, batch_size=batch_size)
        flips: dict[str, list[Tensor]] = {}
        for found, part in zip(result.images.split(batch_size), rows.split(batch_size), strict=True):
            robust[part] = scores_of(self.model, found, labels[part]).argmax(1) == labels[part]
            for name, routing in self.routings.items():
                changed = chosen_experts(routing, len(part)) != clean[name][part]
                flips.setdefault(name, []).append(changed.flatten(1).any(1))
        return robust, {name: torch.cat(parts) for name, parts in flips.items()}, result.zero_gradient


class _Tally:
    """What is counted of one attack over the chunks of its first ``images`` images."""

    def __init__(self, images: int) -> None:
        self.robust = torch.zeros(images, dtype=torch.bool)
        self.found: Any = None  # of AutoAttack
        self.flipped = self.zero = self.attacked = 0
        self.layers: dict[str, int] = {}

    def add(self, chunk: _Chunk, attack: PGD, limit: int, batch_size: int, generator: torch.Generator) -> None:
        robust, flips, zero = chunk.attacked(attack, limit, batch_size, generator)
        self.robust[chunk.start : chunk.start + len(robust)] = robust.cpu()
        self.attacked += len(zero)
        self.zero += int(zero.sum())
        for name, flip in flips.items():
            self.layers[name] = self.layers.get(name, 0) + int(flip.sum())
        if flips:
            self.flipped += int(torch.stack(list(flips.values())).any(0).sum())

    def include(self, other: _Tally) -> None:
        self.robust |= other.robust
        self.attacked += other.attacked
        self.zero += other.zero
        self.flipped += other.flipped
        for name, flips in other.layers.items():
            self.layers[name] = self.layers.get(name, 0) + flips

    def outcome(self, attack: Attack, labels: Tensor, classes: int, drawing: bool) -> AttackOutcome:
        total = len(labels)
        count, attacked = int(self.robust.sum()), max(1, self.attacked)
        own = self.found is not None
        warnings = list(self.found.warnings) if own else []
        if drawing and (attack.version != "rand" if isinstance(attack, AutoAttack) else attack.eot == 1):
            warnings.append("the model draws something: pgd50-eot20, say, or autoattack-rand average over it")
        return AttackOutcome(
            attack.describe(),
            total,
            count / total,
            wilson(count, total),
            _by_class(self.robust, labels, classes),
            self.flipped / attacked if self.layers else None,
            {name: flips / attacked for name, flips in self.layers.items()},
            None if own else self.zero / attacked,
            self.found.stages() if own else {},
            warnings,
        )


class _Share:
    """What one process has found of the ``images`` images; False and nothing where others are at work."""

    def __init__(self, images: int, counts: Mapping[str, int]) -> None:
        self.classes, self.drawing = 0, False
        self.right = torch.zeros(images, dtype=torch.bool)
        self.used: dict[str, Tensor] = {}
        self.tallies = {name: _Tally(count) for name, count in counts.items()}

    @staticmethod
    def of_all(shares: list[_Share]) -> _Share:
        first, *others = shares
        for other in others:
            first.classes = max(first.classes, other.classes)
            first.drawing |= other.drawing
            first.right |= other.right
            for name, count in other.used.items():
                first.used[name] = first.used[name] + count if name in first.used else count
            for name, tally in other.tallies.items():
                first.tallies[name].include(tally)
        return first
