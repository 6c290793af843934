# SPDX-License-Identifier: Apache-2.0
"""Projected gradient descent in an L-infinity or L2 ball (Madry et al. 2018), on the prediction or on the routing."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modes import undisturbed
from ..objectives import cross_entropy, dlr_loss, kl_divergence, margin_loss
from ..registry import unknown_name
from .balls import Ball, SharedGenerator, require_batch
from .routing import AGAINST, RoutingView

__all__ = ["LOSSES", "PGD", "AttackResult", "NonFiniteGradientError"]

LOSSES = ("ce", "kl", "margin", "dlr")
# a choice that has been changed by this much is left alone, so that the gradient goes to the others
_ENOUGH = 0.1


class NonFiniteGradientError(RuntimeError):
    """The gradient of an attack is NaN or infinite. sign(NaN) is 0, so that going on would be no attack at all."""


@dataclass(frozen=True)
class AttackResult:
    """images ``[B, 3, H, W]`` in the ball and in [0, 1]; ``zero_gradient [B]``: True where the gradient was exactly zero
    at every step of the first start, which says that the attack had nothing to follow there."""

    images: Tensor
    zero_gradient: Tensor


@dataclass(frozen=True)
class PGD:
    """PGD: ``steps`` ascents of ``step_size`` along the gradient's sign (L2: its direction), projected onto the ball and
    [0, 1].

    Args:
        epsilon: radius, in units of the pixel range [0, 1]; for L2 of the whole image.
        step_size: in the same units.
        steps: gradient steps for each start.
        restarts: starts; from the second on only samples that are not fooled yet are attacked.
        loss: ``"ce"`` (cross-entropy with the label), ``"margin"`` (logit margin), ``"dlr"`` (difference of logits ratio)
            or ``"kl"`` (KL from the model's own clean prediction, TRADES' inner maximisation; the clean logits are
            computed once and detached).
        random_start: True: uniform in the ball; ``"gaussian"``: 0.001 * N(0, 1), TRADES' own; False: the clean image.
            Every start is projected onto the ball and [0, 1] before the first gradient.
        mode: ``"eval"``: the model is attacked in eval mode, and every module's mode is restored; ``"keep"``: as it is.
        norm: ``"linf"`` or ``"l2"``.
        against: what is attacked, of :data:`advmoe.attacks.AGAINST`. ``"router"`` and ``"flip"`` ascend, instead of the
            loss, the sum over all choices of ``min(best other score - lowest chosen score, 0.1)``, where "chosen" is
            meant of the clean image; ``"joint"`` ascends the loss plus ``router_weight`` times the mean over the choices.
        eot: forwards whose gradients are averaged in each step (expectation over transformation, Athalye et al. 2018),
            for models that draw something in eval mode. A sample then counts as fooled where all of them are wrong.
        retire: leave a sample alone from the first iterate on that fools the model, which is returned: the attack is as
            strong and cheaper, of a model that draws nothing. Without it every start ends at its last iterate, as attacks
            in training do. Of no effect against ``"experts"``, whose forwards hold the routing.
        keep_start: False: the one step goes from the image and not from the random start, where its gradient is taken.

    Raises:
        ValueError: for a setting that is unknown or out of range, for ``keep_start=False`` with several steps or without
            a random start, and for ``loss="kl"`` without one: at the clean image itself KL from the clean prediction has
            no gradient.

    "Fooled" is a wrong prediction of the model as it is, also where the attack holds its routing; for ``against="flip"``,
    that all choices of the sample have changed.

    A call leaves modes, ``requires_grad``, BatchNorm statistics and ``.grad`` as they were, also when it raises. It
    computes no gradient of any parameter. Under autocast to float16 it computes in float32 all the same: there is no
    scaling of the loss here, and what underflows in float16 has no sign.
    """

    epsilon: float
    step_size: float
    steps: int
    restarts: int = 1
    loss: str = "ce"
    random_start: bool | str = True
    mode: str = "eval"
    norm: str = "linf"
    against: str = "prediction"
    router_weight: float = 0.1
    eot: int = 1
    retire: bool = False
    keep_start: bool = True

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown_name("loss", self.loss, LOSSES)
        if not isinstance(self.random_start, bool) and self.random_start != "gaussian":
            raise ValueError(f"random_start: expected True, False or 'gaussian', got {self.random_start!r}")
        for name, known in (("mode", ("eval", "keep")), ("against", tuple(AGAINST))):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        Ball(self.epsilon, self.norm)  # says what is wrong with them
        for name in ("step_size", "router_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number of at least 0, got {getattr(self, name)}")
        if self.loss == "kl" and self.random_start is False:
            raise ValueError(
                "random_start: expected True or 'gaussian' with loss 'kl', which is flat at the clean image; got False"
            )
        if not self.keep_start and self.steps != 1:
            raise ValueError(f"keep_start: False is of one step, got {self.steps}")
        if not self.keep_start and self.random_start is False:
            raise ValueError("keep_start: False is without effect where random_start is False")
        for name in ("steps", "restarts", "eot"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def _retires(self) -> bool:
        return self.retire and self.against != "experts"

    def describe(self) -> str:
        start = {True: "uniform start", False: "no random start", "gaussian": "Gaussian start"}[self.random_start]
        what = self.loss if self.against not in ("router", "flip") else "choices"
        norm = {"linf": "L-inf", "l2": "L2"}[self.norm]
        parts = [f"PGD-{self.steps} ({what}), {norm} epsilon {self.epsilon:.4g}, step {self.step_size:.4g}, {start}"]
        if not self.keep_start:
            parts.append("the step from the image")
        if self.restarts > 1:
            parts.append(f"{self.restarts} restarts")
        if self.eot > 1:
            parts.append(f"each gradient the mean of {self.eot}")
        if self.against != "prediction":
            parts.append(f"against {AGAINST[self.against]}")
        return ", ".join(parts)

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator | SharedGenerator | None = None
    ) -> Tensor:
        """Adversarial images for ``images [B, 3, H, W]`` in [0, 1] and ``labels [B]``; see :meth:`run`."""
        return self.run(model, images, labels, generator).images

    def run(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        generator: torch.Generator | SharedGenerator | None = None,
        extra_loss: Callable[[Tensor], Tensor] | None = None,
        batch_size: int | None = None,
    ) -> AttackResult:
        """The attack with its diagnosis.

        For several restarts a sample's first image that fools the model is returned, else the one of highest loss.

        Args:
            generator: for the random start; the same state gives the same images.
            extra_loss: of the images, to ``[]``; added to the summed loss that the attack ascends, and asked for behind
                the attack's own forward of these images. With one start and without ``retire`` only: else it would get
                fewer images.
            batch_size: at most so many images go through the model at once, all by default. Each start makes its batches
                of the images that are left, so that they are full.

        Raises:
            ValueError: for images or labels that are none (:func:`advmoe.attacks.balls.require_batch`), if ``extra_loss``
                comes with several restarts, ``retire`` or ``batch_size``, if the attack is against routers and the model
                has none, or if there are too few classes for the loss.
            NonFiniteGradientError: if a gradient is NaN or infinite.
        """
        if extra_loss is not None and (self.restarts > 1 or self.retire or batch_size is not None):
            raise ValueError(
                "extra_loss: expected restarts=1, retire=False and batch_size=None with it, got "
                f"{self.restarts}, {self.retire} and {batch_size}"
            )
        require_batch(images, labels)
        images, labels = images.detach(), labels.detach()
        if not len(images):
            return AttackResult(images, torch.zeros(0, dtype=torch.bool, device=images.device))
        size = len(images) if batch_size is None else batch_size
        view = RoutingView(model, self.against)
        calm = undisturbed(model, eval_mode=self.mode == "eval")
        with calm, torch.enable_grad(), _not_in_float16(images.device.type), view:
            view.learn(images, size)
            clean_logits = None
            if self.loss == "kl":
                with torch.no_grad():
                    clean_logits = torch.cat([model(part) for part in images.split(size)])
            target = _Target(self, view, images, labels, clean_logits)
            rows = torch.arange(len(images), device=images.device)
            best, zero, fooled = self._starts(target, rows, size, generator, extra_loss)
            if self.restarts == 1:
                return AttackResult(best, zero)
            best_loss = best.new_full((len(best),), math.inf, dtype=torch.float32)
            left = (~fooled).nonzero().squeeze(1)
            if len(left):
                best_loss[left], fooled[left] = target.judge(best[left], left, size)
            for _ in range(self.restarts - 1):
                left = (~fooled).nonzero().squeeze(1)
                if not len(left):
                    break
                found, _, now = self._starts(target, left, size, generator, extra_loss)
                loss = best_loss.new_full((len(left),), math.inf)
                standing = (~now).nonzero().squeeze(1)
                if len(standing):
                    loss[standing], now[standing] = target.judge(found[standing], left[standing], size)
                better = now | (loss > best_loss[left])
                best[left[better]] = found[better]
                best_loss[left[better]] = loss[better]
                fooled[left] = now
            return AttackResult(best, zero)

    def _starts(self, target: _Target, rows: Tensor, size: int, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`_start` for so many images at a time."""
        first, second, third = zip(*(self._start(target, part, *more) for part in rows.split(size)), strict=True)
        return torch.cat(first), torch.cat(second), torch.cat(third)

    def _start(
        self,
        target: _Target,
        rows: Tensor,
        generator: torch.Generator | SharedGenerator | None,
        extra_loss: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One start for the images ``rows [n]``: where it ended, where the gradient was zero throughout, and which
        samples are known to be fooled: none but those that were retired."""
        ball = Ball(self.epsilon, self.norm)
        images = target.images[rows]
        x = ball.start(images, self.random_start, generator)
        found = x.clone()
        zero = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        fell = torch.zeros_like(zero)
        live = torch.arange(len(rows), device=rows.device)
        for _ in range(self.steps):
            grad, fooled = self._gradient(target, x, rows[live], extra_loss)
            if self._retires and bool(fooled.any()):
                gone = live[fooled]
                found[gone], fell[gone], zero[gone] = x[fooled], True, False
                live, x, grad = live[~fooled], x[~fooled], grad[~fooled]
                if not len(live):
                    break
            zero[live] &= grad.abs().flatten(1).amax(1) == 0
            x = ball.ascend(x if self.keep_start else images[live], grad, images[live], self.step_size)
        found[live] = x
        return found, zero, fell

    def _gradient(
        self, target: _Target, x: Tensor, rows: Tensor, extra_loss: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Of the summed loss with respect to ``x [n, ...]``, and which samples these images fool; zeros where all are to
        be retired."""
        x = x.detach().requires_grad_()
        total, fooled = torch.zeros_like(x), torch.ones(len(x), dtype=torch.bool, device=x.device)
        for _ in range(self.eot):
            loss, now = target.look(x, rows)
            fooled &= now
            if self._retires and self.eot == 1 and bool(now.all()):
                break
            summed = loss.sum()
            if extra_loss is not None:
                summed = summed + extra_loss(x)
            (grad,) = torch.autograd.grad(summed, x)
            flat = grad.abs().flatten(1).amax(1)
            if not bool(torch.isfinite(flat).all()):
                bad = int((~torch.isfinite(flat)).sum())
                raise NonFiniteGradientError(
                    f"the gradient of {bad} of {len(x)} samples is not finite ({self.describe()}); loss {summed.item()}"
                )
            total = grad if self.eot == 1 else total + grad / self.eot
        return total, fooled


def _not_in_float16(device: str) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if available and torch.get_autocast_dtype(device) == torch.float16:
        return torch.autocast(device, enabled=False)
    return nullcontext()


@dataclass
class _Target:
    """What is ascended, for a batch of images, and when a sample counts as fooled."""

    attack: PGD
    view: RoutingView
    images: Tensor
    labels: Tensor
    clean_logits: Tensor | None

    def look(self, x: Tensor, rows: Tensor, held: bool = True) -> tuple[Tensor, Tensor]:
        """Loss ``[n]`` and whether ``x``, the images ``rows``, fool the model, ``[n]``; against the experts with the
        routing held, unless not."""
        attack, total = self.attack, len(self.images)
        logits = self.view.logits(x, rows, total, held)
        labels = self.labels[rows]
        fooled = logits.detach().argmax(1) != labels
        if attack.against in ("router", "flip", "joint"):
            margins = self.view.margins(rows, total)
            if attack.against == "flip":
                fooled = (margins.detach() > 0).all(1)
            pushed = margins.clamp_max(_ENOUGH)
            if attack.against != "joint":
                return pushed.sum(1), fooled
            return self._loss(logits, labels, rows) + attack.router_weight * pushed.mean(1), fooled
        return self._loss(logits, labels, rows), fooled

    def judge(self, x: Tensor, rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """As :meth:`look`, without gradients, over all draws of ``eot``, and for so many images at a time."""
        losses, fooled = [], []
        with torch.no_grad():
            for part, which in zip(x.split(size), rows.split(size), strict=True):
                looks = [self.look(part, which, held=False) for _ in range(self.attack.eot)]
                losses.append(torch.stack([loss for loss, _ in looks]).mean(0).float())
                fooled.append(torch.stack([now for _, now in looks]).all(0))
        return torch.cat(losses), torch.cat(fooled)

    def _loss(self, logits: Tensor, labels: Tensor, rows: Tensor) -> Tensor:
        if self.attack.loss == "kl":
            assert self.clean_logits is not None
            return kl_divergence(self.clean_logits[rows], logits, reduction="none")
        losses = {"ce": cross_entropy, "margin": margin_loss, "dlr": dlr_loss}
        return losses[self.attack.loss](logits, labels, reduction="none")
