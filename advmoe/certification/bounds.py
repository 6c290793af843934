# SPDX-License-Identifier: Apache-2.0
"""Certified radii of mixtures of networks and of the Dual-Model: Theorems 5.4 and 5.5 of "Optimizing Robustness and
Accuracy in Mixture of Experts" (Zhang et al. 2025), as printed and as they hold. Derivations: docs/certified.md."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..registry import unknown_name
from ..routers import Router, observe_routers
from .lipschitz import METHODS, LipschitzBounds
from .norms import SLACK
from .routes import distances, linear_map, route_radii, softmax_constants

__all__ = ["VARIANTS", "Certificates", "Certifier", "certify", "denominator", "dual_radius", "moe_radius"]

VARIANTS = {
    "sound": "constants of the difference of two outputs",
    "twice": "twice the printed denominator",
    "paper": "as printed, which is no certificate",
}
_GLOBAL_STEPS, _LOCAL_STEPS = 60, 12  # halvings, on a logarithmic scale, of where a radius may lie


def denominator(gates: Tensor, experts: Tensor, routers: Tensor, bound: float | Tensor = 1.0) -> Tensor:
    """``sum_i (r_i M_i + a_i L_i)``, Theorem 5.4's, ``[...]``.

    Args:
        gates: a ``[..., k]``, at the clean image.
        experts, routers: L and r, Lipschitz constants of the experts' outputs and of the gates, ``[..., k]``.
        bound: M: of the outputs' absolute values.
    """
    return (routers * bound + gates * experts).sum(-1)


def moe_radius(margin: Tensor, denominator: Tensor, variant: str = "sound") -> Tensor:
    """Theorem 5.4: ``margin / denominator``, not below 0.

    Args:
        margin: ``F^(y) - F^(j)``.
        denominator: for ``"paper"`` and ``"twice"`` of constants of single outputs; for ``"sound"`` of the experts'
            differences ``f_i^(y) - f_i^(j)``.
    """
    if variant not in VARIANTS:
        raise unknown_name("variant", variant, tuple(VARIANTS))
    radius = margin / ((2 if variant == "twice" else 1) * denominator)
    return torch.where(margin > 0, radius, 0.0)  # also where both are 0


def dual_radius(margin: Tensor, denominator: Tensor, alpha: float, variant: str = "sound") -> Tensor:
    """Theorem 5.5: ``(margin - (1 - alpha) / alpha) / denominator``, not below 0, of ``(1 - alpha) F_S + alpha F_R``
    where both are probabilities, whatever F_S is; margin and denominator are F_R's, as in :func:`moe_radius`.

    Raises:
        ValueError: for an ``alpha`` outside of (0, 1]; below a half no margin of probabilities is large enough.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha: expected a number above 0, at most 1, got {alpha}")
    return moe_radius(margin - (1 - alpha) / alpha, denominator, variant)


@dataclass(frozen=True)
class Certificates:
    """Of n images, float64 ``[n]``: within ``radius``, in ``norm``, no image is classified otherwise.

    Args:
        radius: ``min(route_radius, margin / denominator)``; with method ``"interval"`` it may be less, where a larger
            ball has much larger constants; 0 where the image is not classified as its label says.
        margin: of the outputs that the denominator is of, to the class that is reached first; of the Dual-Model, what is
            left of it by Theorem 5.5.
        denominator: by how much the margin falls at most on a unit of length, within ``radius``.
        route_radius: where the choice of experts is certain to stay.
        norm, variant, method: as they were asked for.
        sound: whether these are certificates: neither the printed variant nor made of estimates.
        note: in words.
    """

    radius: Tensor
    margin: Tensor
    denominator: Tensor
    route_radius: Tensor
    norm: str
    variant: str
    method: str
    sound: bool
    note: str

    def certified(self, epsilon: float) -> float:
        """The share of images of a radius above ``epsilon``."""
        return float((self.radius > epsilon).double().mean())


def certify(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    norm: str = "linf",
    variant: str = "sound",
    method: str = "product",
    batch_size: int = 32,
) -> Certificates:
    """Certified radii of a mixture of networks, a Dual-Model of such, or a single network; see :class:`Certifier`.

    Args:
        images: ``[n, 3, S, S]``; labels: int64 ``[n]``.
    """
    return Certifier(model, norm, method, tuple(images.shape[1:])).certify(images, labels, variant, batch_size)


class _Form(NamedTuple):
    """One way to a certificate: ``margin [n, C]`` over the class's own (infinite there), by how much it falls on a
    unit of length for a radius ``[n]``, and where that holds."""

    margin: Tensor
    falls: Callable[[Tensor, bool], Tensor]
    limit: Tensor


class Certifier:
    """Certifies images of one model; what depends on its weights alone is computed once, in float64, on the CPU.

    Args:
        model: kind network_moe with a linear router; a Dual-Model (``standard``, ``robust``, ``alpha``, ``on``) of two
            models; or any network that :func:`lipschitz` takes.
        norm: ``"linf"`` or ``"l2"``.
        method: of the experts' constants, see :func:`lipschitz`. ``"interval"``: in the ball that is certified, of which
            the greatest is searched for.
        shape: of one image.

    One expert for an image: within the radius in which its choice is certain, the mixture is that expert; the sound form
    is of its logits, whose margins give the larger radii. Of several experts, softmax over the chosen (all of them, or
    within the radius in which they stay the same), mixed as probabilities or, sound form alone, as logits. The
    Dual-Model: of probabilities, Theorem 5.5, and in the sound form the larger of it and of ``margin / (alpha K_R + (1 -
    alpha) K_S)``; of logits the latter alone.

    Raises:
        ValueError: for a router of which nothing is certain, an unknown name, and as :func:`lipschitz`.
    """

    def __init__(
        self, model: nn.Module, norm: str = "linf", method: str = "product", shape: tuple[int, ...] = (3, 32, 32)
    ) -> None:
        self.norm, self.method = norm, method
        whole: Any = copy.deepcopy(model).to("cpu", torch.float64).eval()
        self.alpha: float | None = None
        if hasattr(whole, "standard") and hasattr(whole, "robust"):
            self.alpha, self.on = float(whole.alpha), str(whole.on)
            self.members = [_Mixture(m, norm, method, shape) for m in (whole.robust, whole.standard)]
            if not self.alpha:
                self.alpha, self.members = None, self.members[1:]
            elif self.alpha != 1 and any(member.scaled for member in self.members):
                raise ValueError(
                    "gate: of a Dual-Model, expected mixtures without the softmax gate of a single choice; it scales the "
                    "logits, of which no bound is known"
                )
        else:
            self.members = [_Mixture(whole, norm, method, shape)]

    @property
    def operations(self) -> int:
        """Multiply-accumulates of an expert, of the largest there is."""
        return max(bounds.network.operations for member in self.members for bounds in member.bounds)

    def certify(self, images: Tensor, labels: Tensor, variant: str = "sound", batch_size: int = 32) -> Certificates:
        """Radii of ``images [n, 3, S, S]`` with ``labels [n]``.

        Raises:
            ValueError: for an unknown variant, the printed theorem of what it is not about, or no images.
        """
        if not len(images):
            raise ValueError(f"images: expected at least one, got shape {tuple(images.shape)}")
        if variant not in VARIANTS:
            raise unknown_name("variant", variant, tuple(VARIANTS))
        images, labels = images.detach().to("cpu", torch.float64), labels.cpu()
        with torch.no_grad():
            parts = [
                self._batch(some, which, variant)
                for some, which in zip(images.split(batch_size), labels.split(batch_size), strict=True)
            ]
        radius, margin, falls, limit = (torch.cat(column) for column in zip(*parts, strict=True))
        sound = variant != "paper" and METHODS[self.method]
        about = "upper bounds" if METHODS[self.method] else "estimates, so that nothing is certified"
        note = f"{self.norm}, {VARIANTS[variant]}; Lipschitz constants by {self.method}: {about}"
        return Certificates(radius, margin, falls, limit, self.norm, variant, self.method, sound, note)

    def _batch(self, images: Tensor, labels: Tensor, variant: str) -> tuple[Tensor, ...]:
        forms = self._forms([member.look(images, labels) for member in self.members], variant)
        margins = torch.stack([form.margin.amin(1) for form in forms])
        limits = torch.stack([form.limit for form in forms])
        nothing = torch.zeros_like(limits)
        found = torch.stack([nothing, margins, torch.full_like(nothing, math.inf), limits])  # [4, forms, n]
        rows = (margins > 0).any(0)  # no bound is needed of what is not right
        if bool(rows.any()):
            looks = [member.look(images[rows], labels[rows]) for member in self.members]
            found[:, :, rows] = torch.stack([self._radius(form) for form in self._forms(looks, variant)], 1)
        best = found[0].argmax(0)
        return tuple(found[:, best, torch.arange(len(images))])

    def _forms(self, looks: list[_Look], variant: str) -> list[_Form]:
        robust = looks[0]
        if self.alpha is None or self.alpha == 1:
            return [robust.form("logits" if variant == "sound" and robust.mixes_logits else "probabilities", variant)]
        alpha, standard = self.alpha, looks[1]
        forms = []
        if self.on == "probabilities":  # Theorem 5.5
            form = robust.form("probabilities", variant)
            forms.append(form._replace(margin=form.margin - (1 - alpha) / alpha))
            if variant != "sound":
                return forms
        elif variant != "sound":
            raise ValueError(f"variant: Theorem 5.5 is about probabilities, the Dual-Model mixes logits; got {variant!r}")
        r, s = (look.form(self.on, variant) for look in (robust, standard))

        def falls(radius: Tensor, everywhere: bool) -> Tensor:
            return alpha * r.falls(radius, everywhere) + (1 - alpha) * s.falls(radius, everywhere)

        forms.append(_Form(alpha * r.margin + (1 - alpha) * s.margin, falls, torch.minimum(r.limit, s.limit)))
        return forms

    def _radius(self, form: _Form) -> Tensor:
        """Radius, margin, denominator and limit: ``[4, n]``.

        The margin's fall holds in a ball and grows with it: each radius r that is tried certifies ``min(r, what r's
        constants give)``, so that a search by halving only adds certificates. None beyond the limit is tried.
        """
        margin, limit = form.margin, form.limit
        best = torch.zeros_like(limit)
        denominators, margins = torch.full_like(limit, math.inf), margin.amin(1)

        def reach(radius: Tensor, everywhere: bool) -> Tensor:
            nonlocal best, margins, denominators
            falls = form.falls(radius, everywhere)
            far, first = moe_radius(margin, falls).min(1)
            known = torch.minimum(far, radius) / SLACK
            better = (known > best) | denominators.isinf()
            best = torch.where(better, known, best)
            denominators = torch.where(better, falls.gather(1, first[:, None])[:, 0], denominators)
            margins = torch.where(better, margin.gather(1, first[:, None])[:, 0], margins)
            return far

        for everywhere, steps in ((True, _GLOBAL_STEPS), (False, _LOCAL_STEPS)):
            if not everywhere and self.method != "interval":
                break
            high = torch.minimum(reach(torch.zeros_like(limit), everywhere), limit)
            low = torch.where(best > 0, best, high * 1e-30)
            for _ in range(steps):
                middle = torch.where(high.isfinite(), (low * high).sqrt(), torch.inf)
                far = reach(middle, everywhere)
                low, high = torch.where(far >= middle, middle, low), torch.where(far >= middle, high, middle)
                if bool((high <= low * (1 + 1e-9)).all()):
                    break
        return torch.stack([best, margins, denominators, limit])


class _Mixture:
    """A model's experts with their bounds, and its linear router; a single network is its own expert."""

    def __init__(self, model: Any, norm: str, method: str, shape: tuple[int, ...]) -> None:
        self.model, self.norm = model, norm
        self.lengths = torch.zeros(1, 1, dtype=torch.float64)
        self.weight: Tensor | None = None
        self.mix = "logits"
        self.scaled = False  # a single choice's logits by its gate, which leaves its own class, but not a sum's
        networks = [model]
        if isinstance(getattr(model, "router", None), Router) and hasattr(model, "expert"):
            self.weight = linear_map(model)
            self.lengths = distances(self.weight, norm)
            self.mix = model.spec.mix
            self.scaled = model.router.options.top_k == 1 and model.router.options.gate == "softmax"
            networks = [model.expert(i) for i in range(len(self.weight))]
        self.bounds = [LipschitzBounds(network, norm, method, shape) for network in networks]

    def look(self, images: Tensor, labels: Tensor) -> _Look:
        n = len(images)
        if self.weight is None:
            expert, gates = torch.zeros(n, 1, dtype=torch.int64), torch.ones(n, 1, dtype=torch.float64)
            limit, softmax = torch.full((n,), torch.inf, dtype=torch.float64), False
        else:
            seen: list[Tensor] = []

            def note(router: Any, scores: Tensor, routing: Any) -> None:
                seen.append(scores)

            with observe_routers(self.model, note):
                routing = self.model.route(images)
            expert = routing.expert.reshape(n, -1)
            limit = route_radii(self.weight, seen[0], self.norm, expert.shape[1])
            softmax = routing.gate is not None and expert.shape[1] > 1
            gates = torch.ones(expert.shape, dtype=torch.float64)
            if softmax:
                gates = routing.gate.reshape(n, -1)
            elif self.mix == "probabilities":
                gates = gates / expert.shape[1]
        logits = torch.stack([bounds.network(images) for bounds in self.bounds], 1)  # [n, N, C]
        logits = logits.gather(1, expert[:, :, None].expand(-1, -1, logits.shape[2]))
        lengths = self.lengths[expert[:, :, None], expert[:, None]] * float(softmax)
        return _Look(self, images, labels, expert, gates, lengths, limit, logits)


@dataclass(frozen=True)
class _Look:
    """A mixture at n images: the chosen experts ``[n, k]``, their gates, the distances of their rows in the router
    ``[n, k, k]`` (0: the gates are constant), where the choice is certain, and the experts' logits ``[n, k, C]``."""

    mixture: _Mixture
    images: Tensor
    labels: Tensor
    expert: Tensor
    gates: Tensor
    lengths: Tensor
    limit: Tensor
    logits: Tensor
    known: list[Tensor] = field(default_factory=list)  # the constants everywhere, once they were asked for

    @property
    def single(self) -> bool:
        return self.expert.shape[1] == 1

    @property
    def mixes_logits(self) -> bool:
        return self.single or self.mixture.mix == "logits"

    def form(self, space: str, variant: str) -> _Form:
        """Of the mixture's logits or probabilities."""
        own = torch.nn.functional.one_hot(self.labels, self.logits.shape[2]).bool()
        if space == "logits" and not self.mixes_logits:
            raise ValueError("on: expected 'probabilities' for a mixture of probabilities, got 'logits'")
        if space == "logits" or self.single or self.mixture.mix == "probabilities":
            values = self.logits if space == "logits" else self.logits.softmax(2)
            between = values.gather(2, self.labels[:, None, None].expand(-1, values.shape[1], 1)) - values
            margin = (self.gates[:, :, None] * between).sum(1)

            def falls(radius: Tensor, everywhere: bool) -> Tensor:
                constants = self._constants(radius, everywhere)
                if space == "logits":
                    return self._falls(between, constants, radius, math.inf, "sound")
                return self._falls(between, _of_softmax(constants), radius, 1.0, variant)

        elif variant != "sound":
            raise ValueError(f"variant: Theorem 5.4 is about mixtures of probabilities, not of logits; got {variant!r}")
        else:  # softmax of the mixed logits
            inner = self.form("logits", variant)
            values = (self.gates[:, :, None] * self.logits).sum(1).softmax(1)
            margin = values.gather(1, self.labels[:, None]) - values

            def falls(radius: Tensor, everywhere: bool) -> Tensor:
                return _of_softmax(inner.falls(radius, everywhere))

        margin = margin - (SLACK - 1) * values.abs().flatten(1).amax(1, keepdim=True)  # rounding
        return _Form(margin.masked_fill(own, math.inf), falls, self.limit)

    def _falls(self, between: Tensor, constants: Tensor, radius: Tensor, bound: float, variant: str) -> Tensor:
        """Theorem 5.4's denominator for each class, ``[n, C]``.

        Args:
            between: ``h_i = f_i^(y) - f_i^(j)``, ``[n, k, C]``; constants: of these; bound: of their absolute values.
        """
        each, joint = softmax_constants(self.lengths)
        gates = self.gates[:, None]  # [n, 1, k]
        if variant != "sound":
            falls = denominator(gates, constants.mT / 2, each[:, None], bound)
            return 2 * falls if variant == "twice" else falls
        experts = denominator(gates, constants.mT, torch.zeros_like(each)[:, None])
        if not bool(joint.any()):
            return experts
        # M need hold in the ball alone; h may be shifted, for changes of the gates add up to 0
        moved = radius[:, None, None] * constants
        high, low = ((between + moved).clamp_max(bound), (between - moved).clamp_min(-bound))
        apart = denominator(torch.zeros_like(gates), constants.mT, each[:, None], torch.maximum(high, -low).mT)
        together = joint[:, None] * (high.amax(1) - low.amin(1)) / 2
        return experts + torch.minimum(apart, together)

    def _constants(self, radius: Tensor, everywhere: bool) -> Tensor:
        """Of ``z_y - z_j`` of each chosen expert, ``[n, k, C]``: everywhere, by the product, or in the balls."""
        if everywhere and self.known:
            return self.known[0]
        classes = self.logits.shape[2]
        identity = torch.eye(classes, dtype=torch.float64)
        heads = identity[self.labels][:, None] - identity  # [n, C, C]
        found = torch.zeros_like(self.logits)
        for index, bounds in enumerate(self.mixture.bounds):
            rows, at = (self.expert == index).nonzero(as_tuple=True)
            if len(rows):
                found[rows, at] = bounds.of(heads[rows], self.images[rows], radius[rows], plain=everywhere)
        if everywhere:
            self.known.append(found)
        return found


def _of_softmax(constants: Tensor) -> Tensor:
    """Constants of ``p_y - p_j`` for every j, from those of ``z_y - z_j`` in the last dimension: half of the greatest."""
    return (constants.amax(-1, keepdim=True) / 2).expand_as(constants)
