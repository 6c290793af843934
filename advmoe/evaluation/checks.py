# SPDX-License-Identifier: Apache-2.0
"""Whether a robustness figure can be believed: the signs of gradient masking that Athalye et al. (2018), Carlini et al.
(2019) and Croce et al. (2022) name, and one of routed models' own."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moe_kernels import RoutedConv2d, RoutedLinear

from ..attacks import PGD, Attack, AutoAttack
from ..data import Split
from ..routers import routers_of
from ..world import ALONE, World
from .measure import Measured, measure

__all__ = ["SUSPECT", "Check", "Curve", "Scrutiny", "scrutinize", "sign_test", "suspect"]

SUSPECT = "suspect: gradient masking"
# of the attack's radius, in the curve; the last is one at which any image can be turned grey
RADII = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0)
_QUERIES = 1000
_BLIND = 0.01
_CHANCE = 0.02
_MORE = 8
_FEWEST = 8  # images that are right when clean; the sign test takes five that differ


@dataclass(frozen=True)
class Check:
    """
    Args:
        passed: None where it could not be asked.
        measured: what was found.
        means: what it says if it is red.
    """

    name: str
    passed: bool | None
    measured: str
    means: str


@dataclass(frozen=True)
class Curve:
    """RA against the radius of the attack, in units of the pixel range."""

    attack: str
    images: int
    epsilons: tuple[float, ...]
    ra: tuple[float, ...]


@dataclass(frozen=True)
class Scrutiny:
    checks: tuple[Check, ...]
    curve: Curve


def suspect(checks: Sequence[Check]) -> list[str]:
    """The names of those that are red and speak of gradient masking: all but ``converged``, which speaks of an attack
    that was too weak."""
    return [check.name for check in checks if check.passed is False and check.name != "converged"]


def scrutinize(
    model: nn.Module,
    split: Split,
    attack: PGD,
    limit: int = 128,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = False,
    world: World = ALONE,
) -> Scrutiny:
    """Attacks the first ``limit`` images in other ways, and compares. With RA that of ``attack`` with one start:

    - ``gradient``: of less than 1 % of the attacked images the gradient is zero at every step;
    - ``radius``: RA falls to at most 2 % at the largest radius, and nowhere rises with the radius;
    - ``strength``: twice the steps and two starts do not give a higher RA;
    - ``converged``: nor one lower by more than two points;
    - ``black_box``: Square (Andriushchenko et al. 2020, 1,000 queries), which needs no gradient, is not stronger than
      that attack of twice the steps and two starts;
    - ``surrogate``: of routed models: gradients through the softmax mixture of all experts are not stronger. It is asked
      of eight times as many images, since it is a matter of points.

    A check that could not be red, because too few images are right when clean, is not asked.

    "Higher", "rises" and "stronger" mean: by more than a point, and by more than chance would have it, image by image
    (one-sided sign test at 5 %, which takes five images that differ at least).

    Args:
        world: processes that share the work, as :func:`advmoe.evaluation.evaluate`'s.

    Raises:
        ValueError: if the attack is no PGD.
        NonFiniteGradientError, NonFiniteRouterError: if the model is not finite somewhere; there is no figure then.
    """
    if not isinstance(attack, PGD):
        raise ValueError(f"attack: expected a PGD, with which others are compared, got {type(attack).__name__}")
    base = dataclasses.replace(attack, restarts=1, retire=True)
    whole = 0.5 if attack.norm == "linf" else 32.0  # L2 of an image: all of CIFAR-10's are nearer to grey
    last = max(whole, base.epsilon)
    epsilons = sorted({*(factor * base.epsilon for factor in RADII if factor * base.epsilon < last), last})
    attacks: dict[str, Attack] = {"base": base}
    for epsilon in epsilons:
        ratio = base.step_size / base.epsilon if base.epsilon else 0.25
        attacks[f"radius {epsilon}"] = dataclasses.replace(base, epsilon=epsilon, step_size=ratio * epsilon)
    attacks["strong"] = dataclasses.replace(base, steps=2 * base.steps, restarts=2)
    attacks["square"] = AutoAttack(base.epsilon, base.norm, attacks=("square",), queries=_QUERIES)
    routers = [router for router in routers_of(model).values() if router.num_experts > 1]
    routed = bool(routers) and all(router.options.top_k == 1 for router in routers)
    found = measure(model, split, attacks, batch_size, limit, seed, progress, world=world)
    ras = {name: outcome.ra for name, outcome in found.evaluation.attacks.items()}
    curve = Curve(base.describe(), found.evaluation.images, tuple(epsilons), tuple(ras[f"radius {e}"] for e in epsilons))
    names = [f"radius {epsilon}" for epsilon in epsilons]
    checks: tuple[Check, ...] = (
        _gradient(found),
        _radius(found, curve, names),
        _not_beyond(found, "strength", "strong", "base", _WEAKER),
        _converged(found, base),
        _not_beyond(found, "black_box", "strong", "square", _BLACK_BOX),
    )
    checks = _asked(found, checks)
    if routed:
        attacks = {"base": base, "soft": dataclasses.replace(base, against="soft")}
        more = min(len(split), _MORE * limit)
        found = measure(model, split, attacks, batch_size, more, seed, progress, world=world)
        checks += _asked(found, [_not_beyond(found, "surrogate", "base", "soft", _SURROGATE)])
    else:
        layers = any(isinstance(m, RoutedConv2d | RoutedLinear) for m in model.modules())
        none = "the model has no routers that choose one of several experts"
        if layers:
            none = "its routed layers have no advmoe.routers.Router with one choice, and other routers are not seen"
        checks += (Check("surrogate", None, none, _SURROGATE),)
    return Scrutiny(checks, curve)


def _asked(found: Measured, checks: Sequence[Check]) -> tuple[Check, ...]:
    """The checks, if there are images enough for an answer."""
    right = int(found.right.sum())
    if right >= _FEWEST:
        return tuple(checks)
    few = f"{right} of {len(found.right)} images are right when clean: too few to tell"
    return tuple(Check(check.name, None, few, check.means) for check in checks)


_WEAKER = "a stronger attack finds less: what it follows is no gradient of the prediction"
_BLACK_BOX = "an attack that needs no gradient finds more: the gradients lead astray"
_SURROGATE = "the routers hide from the gradient what a mixture of the experts shows"
_NAMES = {
    "base": "the attack",
    "strong": "twice the steps and two starts",
    "square": f"Square, {_QUERIES} queries",
    "soft": "the surrogate",
}


def sign_test(more: int, less: int) -> float:
    """How often chance alone, one half for each that differs, gives ``more`` or more of ``more + less`` (one-sided)."""
    differing = more + less
    return sum(math.comb(differing, k) for k in range(more, differing + 1)) / 2**differing


def _finds_more(found: Measured, stronger: str, weaker: str, points: float = 0.01) -> bool:
    """Whether the one attack's RA is lower than the other's by more than so much, and by more than chance."""
    first, second = found.robust[stronger], found.robust[weaker]
    more, less = int((second & ~first).sum()), int((first & ~second).sum())
    if more - less <= points * len(first):
        return False
    return sign_test(more, less) < 0.05


def _gradient(found: Measured) -> Check:
    share = found.evaluation.attacks["base"].zero_gradient or 0.0
    measured = f"{100 * share:.1f} % of the attacked images gave no gradient"
    return Check("gradient", share < _BLIND, measured, "the attack had nothing to follow")


def _radius(found: Measured, curve: Curve, names: Sequence[str]) -> Check:
    rises = any(_finds_more(found, small, large) for small, large in itertools.pairwise(names))
    steps = ", ".join(f"{100 * ra:.1f} % at {e:.3g}" for e, ra in zip(curve.epsilons, curve.ra, strict=True))
    means = "a large enough change of the image fools any model: the attack fails"
    return Check("radius", curve.ra[-1] <= _CHANCE and not rises, f"RA {steps}", means)


def _not_beyond(found: Measured, name: str, weaker: str, stronger: str, means: str) -> Check:
    """That the second attack's RA is not lower than the first's."""
    attacks = found.evaluation.attacks
    measured = ", ".join(f"{_NAMES[n]}: RA {100 * attacks[n].ra:.1f} %" for n in (weaker, stronger))
    measured += f" ({found.evaluation.images} images)"
    return Check(name, not _finds_more(found, stronger, weaker), measured, means)


def _converged(found: Measured, base: PGD) -> Check:
    attacks = found.evaluation.attacks
    lost = 100 * (attacks["base"].ra - attacks["strong"].ra)
    measured = f"RA lower by {lost:.1f} points with PGD-{2 * base.steps} of two starts ({len(found.right)} images)"
    return Check("converged", not _finds_more(found, "strong", "base", 0.02), measured, "more steps would find more")
