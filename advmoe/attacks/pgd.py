# SPDX-License-Identifier: Apache-2.0
"""Projected gradient descent in the L-infinity ball (Madry et al. 2018)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..modes import undisturbed
from ..objectives import cross_entropy, kl_divergence, margin_loss

__all__ = ["PGD", "AttackResult", "NonFiniteGradientError", "SharedGenerator", "from_name"]

_NAME = re.compile(r"pgd(?P<steps>\d+)(?:x(?P<restarts>\d+))?(?:-(?P<loss>ce|kl|margin))?")


class NonFiniteGradientError(RuntimeError):
    """The gradient of an attack is NaN or infinite. sign(NaN) is 0, so that going on would be no attack at all."""


@dataclass(frozen=True)
class AttackResult:
    """images ``[B, 3, H, W]`` in the ball and in [0, 1]; ``zero_gradient [B]``: True where the gradient was exactly zero
    at every step of the first start, which says that the attack had nothing to follow there."""

    images: Tensor
    zero_gradient: Tensor


@dataclass(frozen=True)
class SharedGenerator:
    """Draws for a batch of ``total`` images that several processes share; this one has those from ``start`` on."""

    generator: torch.Generator
    start: int
    total: int


@dataclass(frozen=True)
class PGD:
    """L-infinity PGD: ``steps`` ascents of ``step_size * sign(gradient)``, projected onto the ball and [0, 1].

    Args:
        epsilon: radius, in units of the pixel range [0, 1].
        step_size: in the same units.
        steps: gradient steps for each start.
        restarts: starts; from the second on only samples that are not fooled yet are attacked.
        loss: ``"ce"`` (cross-entropy with the label), ``"margin"`` (logit margin) or ``"kl"`` (KL from the model's own
            clean prediction, TRADES' inner maximisation; the clean logits are computed once and detached).
        random_start: True: uniform in the ball; ``"gaussian"``: 0.001 * N(0, 1), TRADES' own; False: the clean image.
            Every start is projected onto the ball and [0, 1] before the first gradient.
        mode: ``"eval"``: the model is attacked in eval mode, and every module's mode is restored; ``"keep"``: as it is.

    Raises:
        ValueError: for a setting that is unknown or out of range, and for ``loss="kl"`` without a random start: at the
            clean image itself KL from the clean prediction has no gradient.

    A call leaves modes, ``requires_grad``, BatchNorm statistics and ``.grad`` as they were, also when it raises. It
    computes no gradient of any parameter.
    """

    epsilon: float
    step_size: float
    steps: int
    restarts: int = 1
    loss: str = "ce"
    random_start: bool | str = True
    mode: str = "eval"

    def __post_init__(self) -> None:
        if self.loss not in ("ce", "kl", "margin"):
            raise ValueError(f"loss: expected ce, kl or margin, got {self.loss!r}")
        if not isinstance(self.random_start, bool) and self.random_start != "gaussian":
            raise ValueError(f"random_start: expected True, False or 'gaussian', got {self.random_start!r}")
        if self.mode not in ("eval", "keep"):
            raise ValueError(f"mode: expected eval or keep, got {self.mode!r}")
        if not (0 <= self.epsilon < math.inf and 0 <= self.step_size < math.inf):
            raise ValueError(
                f"epsilon and step_size: expected finite numbers of at least 0, got {self.epsilon} and {self.step_size}"
            )
        if self.loss == "kl" and self.random_start is False:
            raise ValueError(
                "random_start: expected True or 'gaussian' with loss 'kl', which is flat at the clean image; got False"
            )
        if self.steps < 1 or self.restarts < 1:
            raise ValueError(f"steps and restarts: expected at least 1, got {self.steps} and {self.restarts}")

    def describe(self) -> str:
        start = {True: "uniform start", False: "no random start", "gaussian": "Gaussian start"}[self.random_start]
        text = f"PGD-{self.steps} ({self.loss}), L-inf epsilon {self.epsilon:.4g}, step {self.step_size:.4g}, {start}"
        return text if self.restarts == 1 else f"{text}, {self.restarts} restarts"

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
    ) -> AttackResult:
        """The attack with its diagnosis.

        For several restarts a sample's first image that fools the model is returned, else the one of highest loss.

        Args:
            generator: for the random start; the same state gives the same images.
            extra_loss: of the images, to ``[]``; added to the summed loss that the attack ascends, and asked for behind
                the attack's own forward of these images. With one start only: later ones attack fewer images.

        Raises:
            ValueError: if ``extra_loss`` comes with several restarts.
            NonFiniteGradientError: if a gradient is NaN or infinite.
        """
        if extra_loss is not None and self.restarts > 1:
            raise ValueError(f"extra_loss: expected restarts=1 with it, got restarts={self.restarts}")
        images, labels = images.detach(), labels.detach()
        with undisturbed(model, eval_mode=self.mode == "eval"), torch.enable_grad():
            clean_logits = None
            if self.loss == "kl":
                with torch.no_grad():
                    clean_logits = model(images)
            best, zero = self._ascend(model, images, labels, clean_logits, generator, extra_loss)
            if self.restarts == 1:
                return AttackResult(best, zero)
            with torch.no_grad():
                logits = model(best)
            best_loss = self._each(logits, labels, clean_logits)
            fooled = logits.argmax(1) != labels
            for _ in range(self.restarts - 1):
                left = (~fooled).nonzero().squeeze(1)
                if not len(left):
                    break
                clean_left = None if clean_logits is None else clean_logits[left]
                found, _ = self._ascend(model, images[left], labels[left], clean_left, generator, extra_loss)
                with torch.no_grad():
                    logits = model(found)
                loss = self._each(logits, labels[left], clean_left)
                now_fooled = logits.argmax(1) != labels[left]
                better = now_fooled | (loss > best_loss[left])
                best[left[better]] = found[better]
                best_loss[left[better]] = loss[better]
                fooled[left] = now_fooled
            return AttackResult(best, zero)

    def _each(self, logits: Tensor, labels: Tensor, clean_logits: Tensor | None) -> Tensor:
        """The attack's loss of each sample, ``[B]``."""
        if self.loss == "ce":
            return cross_entropy(logits, labels, reduction="none")
        if self.loss == "margin":
            return margin_loss(logits, labels, reduction="none")
        assert clean_logits is not None
        return kl_divergence(clean_logits, logits, reduction="none")

    def _ascend(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        clean_logits: Tensor | None,
        generator: torch.Generator | SharedGenerator | None,
        extra_loss: Callable[[Tensor], Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        low, high = (images - self.epsilon).clamp_min_(0.0), (images + self.epsilon).clamp_max_(1.0)
        x = torch.clamp(images + self._noise(images, generator), low, high)
        zero = torch.ones(len(images), dtype=torch.bool, device=images.device)
        for _ in range(self.steps):
            x = x.detach().requires_grad_()
            loss = self._each(model(x), labels, clean_logits).sum()
            if extra_loss is not None:
                loss = loss + extra_loss(x)
            (grad,) = torch.autograd.grad(loss, x)
            flat = grad.abs().flatten(1).amax(1) if len(x) else grad.new_zeros(0)
            if not bool(torch.isfinite(flat).all()):
                bad = int((~torch.isfinite(flat)).sum())
                raise NonFiniteGradientError(
                    f"the gradient of {bad} of {len(x)} samples is not finite ({self.describe()}); loss {loss.item()}"
                )
            zero &= flat == 0
            x = torch.clamp(x.detach() + self.step_size * grad.sign(), low, high)
        return x.detach(), zero

    def _noise(self, images: Tensor, generator: torch.Generator | SharedGenerator | None) -> Tensor:
        if self.random_start is False:
            return torch.zeros_like(images)
        rows, part = len(images), slice(None)
        if isinstance(generator, SharedGenerator):
            rows, part = generator.total, slice(generator.start, generator.start + len(images))
            generator = generator.generator
        device = images.device if generator is None else generator.device  # a CPU generator serves any device
        noise = torch.empty(
            (rows, *images.shape[1:]), dtype=images.dtype, device=device
        )  # contiguous: one order of numbers
        if self.random_start == "gaussian":
            noise.normal_(generator=generator).mul_(0.001)
        else:
            noise.uniform_(-self.epsilon, self.epsilon, generator=generator)
        return noise[part].to(images.device)


def from_name(name: str, epsilon: float, step_size: float | None = None) -> PGD:
    """An attack by its name: ``pgd<steps>[x<restarts>][-ce|-kl|-margin]``, such as ``pgd50x2`` or ``pgd20-margin``.

    The step is epsilon / 4 by default (2/255 at 8/255).

    Raises:
        ValueError: if the name does not read so.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"attack: expected pgd<steps>[x<restarts>][-ce|-kl|-margin], such as pgd50x2, got {name!r}")
    attack = PGD(epsilon, epsilon / 4 if step_size is None else step_size, int(match["steps"]))
    return replace(attack, restarts=int(match["restarts"] or 1), loss=match["loss"] or "ce")
