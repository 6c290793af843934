# SPDX-License-Identifier: Apache-2.0
"""Standard and adversarial training of one network, all of its parameters together or a part of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...models import backbone_parameters, router_parameters
from ...objectives import cross_entropy
from ...routers import routers_of
from .base import Batch, Method, StepResult, only

__all__ = ["AT", "Standard"]


class Standard(Method):
    """Cross-entropy on clean images."""

    def step(self, batches: Sequence[Batch]) -> StepResult:
        def objective(part: Batch, images: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.model(images)
            return cross_entropy(logits, part.labels), logits

        parts = self._parts(batches[0])
        clean = [part.images for part in parts]
        with self._idle_frozen():
            return self._descend(self.optimizers["all"], parts, objective, clean, balanced=True)


class AT(Method):
    """Adversarial training of all parameters together; on a MoE the routers learn through their straight-through gates
    (the paper's baseline AT (MoE)).

    With ``part="routers"`` only the routers are trained, and the backbone stays as it is, the statistics of its
    BatchNorms included (the paper's θ̄ of Figures 3 to 5); with ``part="experts"`` all but the routers, which stay as they
    are (θ̿).
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        if self.config.part != "all" and not router_parameters(model):
            raise ValueError(f"part: {self.config.part!r} needs a model with trainable routers (kind moe)")
        if self.config.part != "all" and self.share_epochs:
            raise ValueError("share_epochs: sharing comes before routers and experts are trained apart; give part='all'")
        if self.config.part == "experts" and self.routing.balance != "none":
            raise ValueError("balance: a loss of the routers, without effect with part='experts'")

    def _routers_learn_without_gates(self) -> bool:
        return self.config.part == "experts" or super()._routers_learn_without_gates()

    def step(self, batches: Sequence[Batch]) -> StepResult:
        parts = self._parts(batches[0])
        with self._part(), self._idle_frozen():
            return self._descend(self.optimizers["all"], parts, self._objective, balanced=True)

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        if self.config.part == "all":
            return super()._optimizers()
        routers = self.config.part == "routers"
        lr = self.optim.router_lr if routers and self.optim.router_lr is not None else self.optim.lr
        parameters = router_parameters(self.model) if routers else backbone_parameters(self.model)
        return {"all": self._optimizer([(parameters, lr)])}

    @contextmanager
    def _part(self) -> Iterator[None]:
        if self.config.part == "all":
            yield
            return
        routers = self.config.part == "routers"
        parameters = router_parameters(self.model) if routers else backbone_parameters(self.model)
        modes = [(module, module.training) for module in self.model.modules()]
        # in eval mode the statistics of what rests do so too
        if routers:
            self.model.eval()
        for router in routers_of(self.model).values():
            router.train(routers)
        try:
            with only(self.model, parameters):
                yield
        finally:
            for module, mode in modes:
                module.training = mode
