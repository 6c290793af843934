# SPDX-License-Identifier: Apache-2.0
"""Adversarial training with one gradient for each image: for free (Shafahi et al. 2019) and fast (Wong et al. 2020)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...attacks import NonFiniteGradientError, SharedGenerator
from .base import Batch, Method, StepResult

__all__ = ["FastAT", "FreeAT"]


class _OneStep(Method):
    """Cross-entropy on attacked images alone, with the routers' balancing loss."""

    accuracy = "ra"

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        name = self.config.name
        if self.attack.steps != 1:
            raise ValueError(f"attack.steps: {name} takes one step along a gradient, got {self.attack.steps}")
        if self.attack.loss != "ce":
            raise ValueError(f"attack.loss: {name} attacks by cross-entropy, got {self.attack.loss!r}")


class FreeAT(_OneStep):
    """Free adversarial training (Shafahi et al. 2019, Algorithm 1): each batch is replayed ``replays`` times. A replay is
    one forward and one backward, in training mode, of the images and a perturbation; the parameters' gradient makes a
    step of the optimiser, the perturbation's one of the attack's ``step_size`` (the paper's: epsilon) along its sign.

    The perturbation, one for each place in a batch, begins at 0, is kept from batch to batch, and is clipped to epsilon;
    images with it are clipped to [0, 1], and where that is so the gradient is 0, as in the authors' code. Its loss is the
    parameters' own, the balancing loss included, which is counted once (robust-sparse-moes' code counts it twice).

    An epoch costs that of ``replays`` epochs of standard training: the paper gives so many times fewer. Each replay
    counts in losses, accuracy and images a second.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        if self.attack.random_start is not True:
            raise ValueError(
                "attack.random_start: without effect on free-at, whose perturbation is kept from batch to batch"
            )
        self.updates = self.config.replays
        self.delta: Tensor | None = None  # [B, C, H, W] of this process's part of a batch, once there was one

    def step(self, batches: Sequence[Batch]) -> StepResult:
        parts = self._parts(batches[0])
        delta = self._kept(batches[0])
        losses: dict[str, float] = {}
        correct = count = 0
        for replay in range(self.updates):
            self.set_rates(replay)
            with self._idle_frozen():
                result = self._replay(parts, delta)
            for name, value in result.losses.items():
                losses[name] = losses.get(name, 0.0) + value / self.updates
            correct, count = correct + result.correct, count + result.count
        return StepResult(losses, correct, count)

    def _replay(self, parts: Sequence[Batch], delta: Tensor) -> StepResult:
        """One step of the optimiser, and one of ``delta`` in place."""
        split = delta.split(len(parts[0].labels))
        # in the images' memory format, whatever a checkpoint has made of the perturbation's
        added = [torch.empty_like(p.images).copy_(d).requires_grad_() for p, d in zip(parts, split, strict=True)]

        def require_finite() -> None:
            """sign(NaN) is 0: that would be no attack."""
            bad = sum(int((~torch.isfinite(_gradient(each)).flatten(1).all(1)).sum()) for each in added)
            if bad:
                raise NonFiniteGradientError(f"the gradient of {bad} of {len(delta)} samples is not finite (free-at)")

        result = self._descend(self.optimizers["all"], parts, self._perturbed, added, balanced=True, check=require_finite)
        signs = torch.cat([_gradient(each).sign() for each in added])
        delta.add_(signs, alpha=self.attack.step_size).clamp_(-self.attack.epsilon, self.attack.epsilon)
        return result

    def _perturbed(self, batch: Batch, added: Tensor) -> tuple[Tensor, Tensor]:
        return self._cross_entropy(batch, (batch.images + added).clamp(0.0, 1.0))

    def _kept(self, batch: Batch) -> Tensor:
        """The perturbation of these images: a view, the first rows where there are fewer of them than before."""
        images = batch.images
        if self.delta is None:
            self.delta = torch.zeros_like(images)
        elif self.delta.shape[1:] != images.shape[1:]:
            shape, kept = list(images.shape[1:]), list(self.delta.shape[1:])
            raise ValueError(f"images: expected {kept} each, as the perturbation of free-at has it, got {shape}")
        elif len(self.delta) < len(images):
            self.delta = torch.cat([self.delta, torch.zeros_like(images[len(self.delta) :])])
        if self.config.reset_noise:
            generator = batch.generator
            if isinstance(generator, SharedGenerator):
                generator = generator.generator
            drawn = torch.rand((), generator=generator, device=generator.device)
            if drawn.item() < self.config.reset_noise:
                self.delta.zero_()
        return self.delta[: len(images)]

    def state_dict(self) -> dict[str, Any]:
        world = self.reduced.world
        if self.delta is None or world.size == 1:
            return {"delta": self.delta}
        whole = self.delta.new_zeros((len(self.delta) * world.size, *self.delta.shape[1:]))
        whole[world.part(len(whole), self.optim.accumulate)] = self.delta
        return {"delta": world.total(whole)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        world, delta = self.reduced.world, state.get("delta")
        if delta is not None:
            whole = isinstance(delta, Tensor) and delta.dim() == 4 and delta.dtype == torch.float32
            if not whole or delta.nbytes > delta.untyped_storage().nbytes():  # one number, a million times over
                raise ValueError("delta: expected a perturbation, float32 [B, C, H, W]")
            delta = delta if world.size == 1 else delta[world.part(len(delta), self.optim.accumulate)]
            delta = delta.to(next(self.model.parameters()).device, copy=True)
        self.delta = delta


class FastAT(_OneStep):
    """Fast adversarial training (Wong et al. 2020): FGSM from a uniform start in the ball, one step of the attack's
    ``step_size`` (the paper's: 1.25 epsilon), projected onto the ball and [0, 1].

    The attack's forward is in eval mode, as all attacks here; the paper's code leaves it in training mode. With
    ``keep_start=False`` the step goes from the image, with the gradient taken at the start: so robust-sparse-moes' code,
    whose step is epsilon.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.attack = dataclasses.replace(self.attack, keep_start=self.config.keep_start)

    def step(self, batches: Sequence[Batch]) -> StepResult:
        with self._idle_frozen():
            parts = self._parts(batches[0])
            return self._descend(self.optimizers["all"], parts, self._cross_entropy, balanced=True)


def _gradient(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad
