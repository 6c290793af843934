# SPDX-License-Identifier: Apache-2.0
"""AutoAttack (Croce and Hein 2020) by its authors' package ``pyautoattack``, with the right number of classes, and
resumable."""

from __future__ import annotations

import hashlib
import logging
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..files import write_whole
from ..modes import undisturbed
from ..registry import unknown_name
from ..stored import read_stored
from ..world import ALONE, World
from .balls import Ball, require_batch
from .pgd import NonFiniteGradientError

logger = logging.getLogger(__name__)

__all__ = ["ATTACKS", "VERSIONS", "AutoAttack", "AutoAttackResult"]

VERSIONS = ("standard", "rand", "plus")
ATTACKS = ("apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square")
_CLASSES = {"apgd-t": 4, "apgd-dlr": 3}  # at least, for the ratio of DLR
_STANDING = -1
_STALE = "{} was made with other weights, images or settings; remove it to attack anew"


@dataclass(frozen=True)
class AutoAttackResult:
    """
    Args:
        images: ``[n, 3, H, W]``: adversarial where an attack succeeded, the clean ones elsewhere.
        fell_to: ``[n]``: the index in ``attacks`` of the one that a sample fell to, -1 if to none, -2 if it was wrong
            already.
        attacks: their names, in the order in which they came.
        warnings: what the package has to say against the figure, each once.
    """

    images: Tensor
    fell_to: Tensor
    attacks: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def robust(self) -> Tensor:
        return self.fell_to == _STANDING

    def stages(self) -> dict[str, float]:
        """Robust accuracy after each attack and those before it."""
        index, total = self.fell_to, max(1, len(self.fell_to))
        return {name: ((index == _STANDING) | (index > i)).sum().item() / total for i, name in enumerate(self.attacks)}


@dataclass(frozen=True)
class AutoAttack:
    """AutoAttack, or some of its attacks: ``AutoAttack(8 / 255)(model, images, labels)`` gives adversarial images,
    :meth:`run` also which attack each sample fell to.

    Args:
        epsilon: radius, in units of the pixel range [0, 1].
        norm: ``"linf"`` or ``"l2"``.
        version: ``"standard"`` (APGD on cross-entropy, targeted APGD on DLR, targeted FAB, Square, 5,000 queries),
            ``"rand"`` (for models that draw something: APGD on both losses, 20 forwards averaged) or ``"plus"``.
        attacks: some of :data:`ATTACKS` instead, with the settings of the version ``standard``.
        queries: of Square; 5,000 by default.
        steps: of ``apgd-ce``, ``apgd-dlr`` and ``apgd-t``; 100 by default.

    Targets are the ``min(9, classes - 1)`` most likely other classes.

    Raises:
        ValueError: for an unknown name, or fewer steps than one.
    """

    epsilon: float
    norm: str = "linf"
    version: str = "standard"
    attacks: tuple[str, ...] | None = None
    queries: int = 5000
    steps: int = 100

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            raise unknown_name("version", self.version, VERSIONS)
        Ball(self.epsilon, self.norm)
        if self.attacks == ():
            raise ValueError("attacks: expected some, or None for the version's; got none")
        for attack in self.attacks or ():
            if attack not in ATTACKS:
                raise unknown_name("attack", attack, ATTACKS)
        if self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}")

    def describe(self) -> str:
        what = f"AutoAttack {self.version}" if self.attacks is None else ", ".join(self.attacks)
        norm = {"linf": "L-inf", "l2": "L2"}[self.norm]
        what += "" if self.queries == 5000 else f", {self.queries} queries"
        what += "" if self.steps == 100 else f", APGD's {self.steps} steps"
        return f"{what}, {norm} epsilon {self.epsilon:.4g}, pyautoattack {version_of('pyautoattack')}"

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Tensor:
        """Adversarial images where an attack succeeded, the clean ones elsewhere; see :meth:`run`."""
        return self.run(model, images, labels, seed).images

    def run(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        seed: int = 0,
        batch_size: int = 128,
        state: Path | None = None,
        progress: bool = False,
        world: World = ALONE,
    ) -> AutoAttackResult:
        """Attacks ``images [n, 3, H, W]`` in [0, 1] with ``labels [n]``, sample by sample as the package itself does with
        the same seed and batch size. All images at once, since an attack's batches are made of those that are left.

        Args:
            seed: of the package's random numbers; those of the process are left as they were.
            state: a file to which each batch's outcome goes, and from which an interrupted call goes on, to the outcome
                of an unbroken one; removed at the end. It belongs to these weights (the ``state_dict``), images and
                settings alone. Each of several processes has one of its own, with its number in its name.
            world: processes that share the batches of each attack; all have the same model, images and outcome.

        Raises:
            ValueError: for images or labels that are none, if there are too few classes for an attack, or if the file
                belongs to something else.
            NonFiniteGradientError: if a score, or the gradient at the images, is NaN or infinite.
            ProcessLost: if another process has ended.
        """
        require_batch(images, labels)
        images, labels = images.detach().contiguous(), labels.detach()  # the package makes views of them
        with undisturbed(model), _quiet_globals() as warnings:
            watched = _Finite(model, self.describe())
            classes, right = _predictions(watched, images, labels, batch_size)
            self.require(classes)
            adversary = self._adversary(watched, classes, seed, images.device)
            names = tuple(adversary.attacks_to_run)
            fell_to = torch.where(right, _STANDING, -2)
            found = images.clone()
            key = ["", ""]
            state = _own(state, world)
            if state is not None:
                key = [self._settings(model, seed, batch_size), _digest("", {"images": images, "labels": labels})]
            done = (0, 0)
            if state is not None and state.exists():
                done = _resume(state, key, fell_to, found)
            for index, name in enumerate(names):
                adversary.attacks_to_run = [name]
                batches = self._batches(fell_to, index, batch_size)
                hidden = None if progress else True
                for number, rows in enumerate(tqdm(batches, name, unit="batch", disable=hidden, leave=False)):
                    if number % world.size != world.rank or (index, number) < done:
                        continue
                    # what a model draws before the package seeds is the same in a resumed call
                    torch.manual_seed(seed * 1_000_003 + index * 10_007 + number)
                    self._attack(adversary, images, labels, rows, index, fell_to, found)
                    if state is not None:
                        _save(state, key, (index, number + 1), fell_to, found)
                world.largest(fell_to)  # elsewhere what stands is at -1
            changed = torch.where(found == images, -1.0, found)  # only where this process's images fell
            found = torch.where(world.largest(changed) < 0, images, changed)
            warnings = [warning for each in world.each(warnings) for warning in each]
        if state is not None:
            state.unlink(missing_ok=True)
        last = (fell_to == len(names) - 1).double().mean().item()
        if names[-1] == "square" and len(names) > 1 and last > 0.002:  # the package's own bound, over all batches
            warnings.append(f"Square lowered RA by {100 * last:.1f} points behind the others, which follow gradients")
        return AutoAttackResult(found, fell_to, names, tuple(dict.fromkeys(warnings)))

    def _adversary(self, model: nn.Module, classes: int, seed: int, device: torch.device) -> Any:
        from pyautoattack import AutoAttack as Package  # imported when it is wanted: it costs a second

        norm = {"linf": "Linf", "l2": "L2"}[self.norm]
        adversary = Package(model, norm=norm, eps=self.epsilon, seed=seed, version=self.version, device=device)
        adversary.verbose = False
        adversary.square.n_queries = self.queries
        for apgd in (adversary.apgd, adversary.apgd_targeted):
            apgd.n_iter = apgd.n_iter_orig = self.steps
        if self.attacks is not None:
            adversary.attacks_to_run = list(self.attacks)
        targets = min(9, classes - 1)
        adversary.apgd_targeted.n_target_classes = adversary.fab.n_target_classes = targets
        return adversary

    @staticmethod
    def _batches(fell_to: Tensor, index: int, batch_size: int) -> tuple[Tensor, ...]:
        """The samples that stood when the attack of this index began, also where it has begun already."""
        rows = ((fell_to == _STANDING) | (fell_to == index)).nonzero().squeeze(1)
        return rows.split(batch_size) if len(rows) else ()

    @staticmethod
    def _attack(
        adversary: Any, images: Tensor, labels: Tensor, rows: Tensor, index: int, fell_to: Tensor, found: Tensor
    ) -> None:
        adversarial, predicted = adversary.run_standard_evaluation(images[rows], labels[rows], batch_size=len(rows))
        fallen = predicted != labels[rows]
        fell_to[rows[fallen]] = index
        found[rows[fallen]] = adversarial[fallen]

    def require(self, classes: int) -> None:
        """
        Raises:
            ValueError: if a model of so few classes cannot be attacked: DLR is a ratio of three or four scores.
        """
        names = self.attacks or {"standard": ("apgd-t",), "rand": ("apgd-dlr",), "plus": ("apgd-t",)}[self.version]
        for name in names:
            least = _CLASSES.get(name, 2)
            if classes < least:
                raise ValueError(f"{name}: expected a model of at least {least} classes, got {classes}")

    def refuse_stale(
        self, state: Path | None, model: nn.Module, seed: int, batch_size: int, world: World = ALONE
    ) -> None:
        """
        Raises:
            ValueError: if there is such a file of other weights or settings; which images, only the attack itself sees.
        """
        state = _own(state, world)
        if state is not None and state.exists() and _read(state)["key"][0] != self._settings(model, seed, batch_size):
            raise ValueError(_STALE.format(state))

    def _settings(self, model: nn.Module, seed: int, batch_size: int) -> str:
        return _digest(repr((self.describe(), self.epsilon, seed, batch_size)), model.state_dict())


class _Finite(nn.Module):
    """The model, with an eye on its scores and on the gradient at its images."""

    def __init__(self, model: nn.Module, attack: str) -> None:
        super().__init__()
        self.model = model
        self.attack = attack

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            x = x.view_as(x)
            x.register_hook(self._look)
        logits = self.model(x)
        self._require(logits, "the scores")
        return logits

    def _look(self, grad: Tensor) -> Tensor:
        self._require(grad, "the gradient")
        return grad.contiguous()  # the package makes views of it

    def _require(self, values: Tensor, what: str) -> None:
        finite = torch.isfinite(values.detach()).flatten(1).all(1)
        if not bool(finite.all()):
            bad = int((~finite).sum())
            raise NonFiniteGradientError(f"{what} of {bad} of {len(finite)} samples is not finite ({self.attack})")


@contextmanager
def _quiet_globals() -> Iterator[list[str]]:
    """What the package warns of; its seeds and its trace function do not stay with the process."""
    warnings: list[str] = []
    logger = logging.getLogger("auto-attack")
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    propagate, trace = logger.propagate, sys.gettrace()
    states = np.random.get_state(), random.getstate()
    level = logger.level
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    try:
        with torch.random.fork_rng():
            yield warnings
    finally:
        np.random.set_state(states[0])
        random.setstate(states[1])
        sys.settrace(trace)
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def _predictions(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> tuple[int, Tensor]:
    """The number of classes, and which predictions are right."""
    right, classes = [], 0
    with torch.no_grad():
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            logits = model(x)
            classes = logits.shape[1]
            right.append(logits.argmax(1) == y)
    return classes, torch.cat(right)


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, value in tensors.items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _own(state: Path | None, world: World) -> Path | None:
    """The file of this process. Another number of processes shares the batches in another way."""
    if state is None or world.size == 1:
        return state
    return state.with_name(f"{state.stem}-{world.rank + 1}-of-{world.size}{state.suffix}")


def _save(path: Path, key: list[str], done: tuple[int, int], fell_to: Tensor, found: Tensor) -> None:
    fallen = fell_to >= 0
    state = {"key": key, "done": done, "fell_to": fell_to.cpu(), "found": found[fallen].cpu()}
    write_whole(path, lambda file: torch.save(state, file))


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = read_stored(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; remove it to attack anew") from error
    names = ("key", "done", "fell_to", "found")
    key = saved.get("key") if isinstance(saved, dict) else None
    named = isinstance(key, list) and len(key) == 2 and all(type(each) is str for each in key)
    if not named or any(name not in saved for name in names):
        raise ValueError(f"{path} cannot be read: it is no state of AutoAttack; remove it to attack anew")
    return {name: saved[name] for name in names}


def _resume(path: Path, key: list[str], fell_to: Tensor, found: Tensor) -> tuple[int, int]:
    """Writes what was found before into ``fell_to`` and ``found``, and returns the place to go on from."""
    saved = _read(path)
    if saved["key"] != key:
        raise ValueError(_STALE.format(path))
    fallen, images, done = saved["fell_to"], saved["found"], saved["done"]
    fits = isinstance(fallen, Tensor) and fallen.dtype == fell_to.dtype and fallen.shape == fell_to.shape
    wanted = (int((fallen >= 0).sum()), *found.shape[1:]) if fits else None
    fits = fits and isinstance(images, Tensor) and tuple(images.shape) == wanted and images.dtype == found.dtype
    place = isinstance(done, (list, tuple)) and len(done) == 2 and all(type(each) is int and each >= 0 for each in done)
    if not fits or not place:
        raise ValueError(f"{path} cannot be read: it does not fit its own images; remove it to attack anew")
    fell_to.copy_(fallen)
    found[fell_to >= 0] = images.to(found.device)
    # whose file it is it cannot say: images that stood are taken from it as they are
    logger.info("AutoAttack goes on from %s, at attack %d, batch %d", path, done[0] + 1, done[1] + 1)
    return done[0], done[1]
