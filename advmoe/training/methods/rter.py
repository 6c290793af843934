# SPDX-License-Identifier: Apache-2.0
"""RT-ER and JTDMoE (arXiv 2502.06832): a mixture of networks whose second choice is robust too, alone and in a
Dual-Model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import Routing

from ...attacks import SharedGenerator
from ...models import DualModel, NetworkMoE
from ...modes import undisturbed
from ...objectives import cross_entropy, rt_er_loss
from .base import Batch, Method, StepResult, only

__all__ = ["RTER", "JTDMoE"]


class _Held(nn.Module):
    """A mixture of networks that chooses so, whatever it sees: each sample's expert by itself."""

    def __init__(self, model: NetworkMoE, routing: Routing) -> None:
        super().__init__()
        self.model = model
        self.routing = routing

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images, self.routing)


@dataclass(frozen=True)
class _Attacked:
    """images: against the whole mixture; apart: a choice of experts, each with the images that were attacked on these
    experts by themselves."""

    images: Tensor
    apart: tuple[tuple[Routing, Tensor], ...]


class _Robust(Method):
    """What both do to a mixture of networks: cross-entropy under an attack on the whole, and KL between clean and
    attacked images of an expert by itself, attacked by itself.

    The whole mixture is given one choice for each sample, so that the samples of an expert go through it together.
    """

    moe: NetworkMoE

    def _require(self, model: object, kind: str) -> NetworkMoE:
        if not isinstance(model, NetworkMoE):
            raise ValueError(f"method: {self.config.name} needs a model of kind {kind}")
        if model.num_experts < 2:
            raise ValueError(f"experts: {self.config.name} makes a second one robust; expected at least 2, got 1")
        if self.share_epochs:
            raise ValueError(f"share_epochs: {self.config.name} tells the experts apart from the first epoch on")
        return model

    def _choices(self, batch: Batch) -> list[Routing]:
        """The experts to be made robust besides the mixture's own: one choice for all samples each."""
        experts, count = self.moe.num_experts, len(batch.labels)
        if self.config.robust_experts == "all":
            return [Routing(torch.full_like(batch.labels, i), num_experts=experts) for i in range(experts)]
        with torch.no_grad(), undisturbed(self.moe):
            scores = self.moe.scores(batch.images)
        ranked = scores.argsort(stable=True, dim=1, descending=True)  # [B, N]
        rank = torch.ones_like(batch.labels)
        if self.config.robust_experts == "another":
            shared = batch.generator
            if not isinstance(shared, SharedGenerator):
                shared = SharedGenerator(shared, 0, count)
            generator = shared.generator
            drawn = torch.randint(1, experts, (shared.total,), generator=generator, device=generator.device)
            rank = drawn[shared.start : shared.start + count].to(rank.device)
        return [Routing(ranked.gather(1, rank[:, None]).squeeze(1), num_experts=experts)]

    def _hardened(self, batch: Batch) -> _Attacked:
        with self._autocast():
            images = self.attack.run(self.moe, batch.images, batch.labels, batch.generator).images
            apart = [
                (routing, self.attack.run(_Held(self.moe, routing), batch.images, batch.labels, batch.generator).images)
                for routing in self._choices(batch)
            ]
        return _Attacked(images, tuple(apart))

    def _robust_objective(self, batch: Batch, attacked: _Attacked) -> tuple[Tensor, Tensor]:
        """The loss and the logits of the attacked images."""
        logits = self.moe(attacked.images)
        pairs = [(self.moe(batch.images, routing), self.moe(images, routing)) for routing, images in attacked.apart]
        return rt_er_loss(logits, batch.labels, pairs, self.config.beta), logits

    def _descend_robust(self, optimizer: torch.optim.Optimizer, parts: Sequence[Batch], **more: Any) -> StepResult:
        attacked = [self._hardened(part) for part in parts]
        return self._descend(optimizer, parts, self._robust_objective, attacked, **more)


class RTER(_Robust):
    """Robust training with experts' robustification: the loss of the paper's section 4, on a model of kind network_moe.

    ``CE(F(x_adv), y) + beta * mean KL(f_2(x) || f_2(x_adv2))``: f_2 is the expert that each sample's router ranks second
    when clean (``robust_experts``: or another, or all), x_adv an attack on the mixture, x_adv2 one on f_2 alone.
    """

    accuracy = "ra"

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.moe = self._require(model, "network_moe")

    def step(self, batches: Sequence[Batch]) -> StepResult:
        with self._idle_frozen():
            return self._descend_robust(self.optimizers["all"], self._parts(batches[0]), balanced=True)


class JTDMoE(_Robust):
    """Joint training of the Dual-Model (Algorithm 1), on a model of kind dual_moe: in each step first the robust mixture
    goes down RT-ER's loss, then the standard one down the cross-entropy of the two together on clean images.

    Each level has an optimiser and gradients of its own. At the upper level the robust mixture is as in use: in eval
    mode, and its statistics too stay as they are.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not isinstance(model, DualModel):
            raise ValueError("method: jtdmoe needs a model of kind dual_moe")
        if model.alpha in (0, 1):
            which = "standard" if model.alpha else "robust"
            raise ValueError(
                f"alpha: at {model.alpha:g} the {which} mixture has no part in the Dual-Model that is trained"
            )
        self.dual = model
        super().__init__(model, *args, **kwargs)
        self.moe = self._require(model.robust, "dual_moe")

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        levels = {"robust": self.dual.robust, "standard": self.dual.standard}
        return {name: self._optimizer(self._groups(level)) for name, level in levels.items()}

    def step(self, batches: Sequence[Batch]) -> StepResult:
        parts = self._parts(batches[0])
        with self._idle_frozen():
            with only(self.model, list(self.dual.robust.parameters())):
                lower = self._descend_robust(self.optimizers["robust"], parts, balanced=True, name="robust_loss")
            with only(self.model, list(self.dual.standard.parameters())):
                robust = [self._robust_logits(part) for part in parts]
                upper = self._descend(self.optimizers["standard"], parts, self._dual_objective, robust, balanced=True)
        return StepResult({**lower.losses, **upper.losses}, upper.correct, upper.count)

    def _robust_logits(self, batch: Batch) -> Tensor:
        with torch.no_grad(), self._autocast(), undisturbed(self.dual.robust):
            logits: Tensor = self.dual.robust(batch.images)
        return logits

    def _dual_objective(self, batch: Batch, robust: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.dual.mixed(self.dual.standard(batch.images), robust)
        return cross_entropy(logits, batch.labels), logits
