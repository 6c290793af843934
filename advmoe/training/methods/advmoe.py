# SPDX-License-Identifier: Apache-2.0
"""AdvMoE (Zhang et al., ICCV 2023), as printed, as released, and in cheaper forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ...models import backbone_parameters, router_parameters
from ...objectives import router_pseudo_label_loss
from ...routers import record_scores
from .base import Batch, Method, StepResult, only

__all__ = ["AdvMoE"]


class AdvMoE(Method):
    """Algorithm 1 of AdvMoE (ICCV 2023): routers and backbone in turn, each on its own batch with its own attack.

    Lower level: the routers φ minimise TRADES through the network, the backbone ψ fixed; upper level: ψ minimises TRADES
    under the new routers. In each phase only that phase's parameters get gradients: the router step computes no gradient
    of any other weight.

    Two options of ours make it cheaper: ``share_attack`` (one batch and one attack serve both levels) and
    ``router_every=T`` (the lower level in every T-th step only).
    """

    trains_in_turn = True

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not router_parameters(model):
            raise ValueError(
                "method: advmoe needs a model with trainable routers (kind moe, or network_moe; router not random, fixed "
                "or frozen); at does not"
            )
        super().__init__(model, *args, **kwargs)
        two = self.config.batches == "two" and not self.config.share_attack
        self.batches_per_step = 2 if two else 1

    def _routers_learn_without_gates(self) -> bool:
        return self.config.router_objective != "trades" or super()._routers_learn_without_gates()

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        router_lr = self.optim.lr if self.optim.router_lr is None else self.optim.router_lr
        return {
            "router": self._optimizer([(router_parameters(self.model), router_lr)]),
            "backbone": self._optimizer([(backbone_parameters(self.model), self.optim.lr)]),
        }

    def step(self, batches: Sequence[Batch]) -> StepResult:
        lower, upper = self._parts(batches[0]), self._parts(batches[-1])
        shared = [self._adversarial(part) for part in upper] if self.config.share_attack else None
        phases: list[Callable[[], StepResult]] = [lambda: self._backbone_phase(upper, shared)]
        if self.position % self.config.router_every == 0 and not self.sharing:
            place = 0 if self.config.order == "router_first" else 1
            phases.insert(place, lambda: self._router_phase(lower, shared))
        results = [phase() for phase in phases]
        losses = {name: value for each in results for name, value in each.losses.items()}
        trained = next(each for each in results if "loss" in each.losses)  # the backbone's batch is what is counted
        return StepResult(losses, trained.correct, trained.count)

    def _router_phase(self, parts: Sequence[Batch], attacked: Sequence[Tensor] | None = None) -> StepResult:
        objective = self._objective if self.config.router_objective == "trades" else self._pseudo_label
        with self._routers_alone():
            return self._descend(self.optimizers["router"], parts, objective, attacked, balanced=True, name="router_loss")

    def _routers_alone(self) -> AbstractContextManager[None]:
        """The lower level's step backpropagates to the routers' parameters and to no other's."""
        return only(self.model, router_parameters(self.model))

    def _pseudo_label(self, batch: Batch, adversarial: Tensor) -> tuple[Tensor, Tensor]:
        with record_scores(self.model) as scores:
            logits = self.model(batch.images)
            clean = dict(scores)
            attacked = self.model(adversarial)
            losses = [
                router_pseudo_label_loss(s, scores[name], batch.labels, self.config.router_alpha, self.config.beta)
                for name, s in clean.items()
            ]
        return torch.stack(losses).mean(), attacked if self.accuracy == "ra" else logits

    def _backbone_phase(self, parts: Sequence[Batch], attacked: Sequence[Tensor] | None = None) -> StepResult:
        with only(self.model, backbone_parameters(self.model)), self._idle_frozen():
            return self._descend(self.optimizers["backbone"], parts, self._objective, attacked)
