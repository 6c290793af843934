# SPDX-License-Identifier: Apache-2.0
"""Training methods: a small class each, with one ``step``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import ExpertSlices, RoutedBatchNorm2d, RoutedConv2d

from ..attacks import PGD
from ..config import MethodConfig, OptimConfig
from ..models import backbone_parameters, router_parameters
from ..modes import undisturbed
from ..objectives import cross_entropy, kl_divergence, router_pseudo_label_loss, trades_loss
from ..routers import Router, record_scores

__all__ = ["AT", "AdvMoE", "Batch", "Method", "NonFiniteLossError", "Standard", "StepResult", "build_method"]


class NonFiniteLossError(RuntimeError):
    """A training loss or its gradient is NaN or infinite; no parameter has been moved by it."""


@dataclass(frozen=True)
class Batch:
    """images ``[B, 3, H, W]`` in [0, 1], labels ``[B]``, and a generator for the attack on them."""

    images: Tensor
    labels: Tensor
    generator: torch.Generator


@dataclass(frozen=True)
class StepResult:
    """losses: named scalars; correct: training images predicted rightly, of count: clean ones, but see
    :attr:`Method.accuracy`."""

    losses: dict[str, float]
    correct: int
    count: int


class Method(ABC):
    """What the methods share: the attack, the objective, and a step of one optimiser."""

    batches_per_step = 1
    # of StepResult.correct: sa on clean images, ra on attacked ones where the loss sees no other
    accuracy = "sa"

    def __init__(self, model: nn.Module, config: MethodConfig, optim: OptimConfig, attack: PGD) -> None:
        self.model = model
        self.config = config
        self.optim = optim
        self.attack = attack
        if config.objective == "cross_entropy" and config.name != "standard":
            self.accuracy = "ra"
        self.optimizers = self._optimizers()

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"all": self._sgd(list(self.model.parameters()), self.optim.lr)}

    def _sgd(self, parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=self.optim.momentum, weight_decay=self.optim.weight_decay)

    @abstractmethod
    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One step of training on ``batches_per_step`` batches."""

    def _adversarial(self, batch: Batch) -> Tensor:
        extra = _router_divergence(self.model, batch.images) if self.config.attack_routers else None
        return self.attack.run(self.model, batch.images, batch.labels, batch.generator, extra).images

    def _objective(self, batch: Batch, adversarial: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the clean logits (for PGD-AT, which has none, the adversarial ones).

        Clean and adversarial images go through the model separately, clean first: each has its own batch statistics in a
        shared BatchNorm, and both update the running ones, as in TRADES' and AdvMoE's released code.
        """
        if self.config.objective == "cross_entropy":
            logits = self.model(adversarial)
            return cross_entropy(logits, batch.labels), logits
        clean = self.model(batch.images)
        return trades_loss(clean, self.model(adversarial), batch.labels, self.config.beta), clean

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor, name: str = "loss") -> float:
        """One step down the loss.

        Raises:
            NonFiniteLossError: if the loss or its gradient is NaN or infinite.
        """
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteLossError(f"{name} is {value}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        largest = torch.nn.utils.get_total_norm(gradients, math.inf).item()
        if not math.isfinite(largest):
            raise NonFiniteLossError(f"the gradient of {name} ({value:.4g}) has the entry {largest}")
        optimizer.step()
        return value


class Standard(Method):
    """Cross-entropy on clean images."""

    def step(self, batches: Sequence[Batch]) -> StepResult:
        batch = batches[0]
        with _unused_frozen(self.model, self.optim.freeze_unused):
            logits = self.model(batch.images)
            loss = self._update(self.optimizers["all"], cross_entropy(logits, batch.labels))
        return _result({"loss": loss}, logits, batch.labels)


class AT(Method):
    """Adversarial training of all parameters together; on a MoE the routers learn through their straight-through gates
    (the paper's baseline AT (MoE))."""

    def step(self, batches: Sequence[Batch]) -> StepResult:
        batch = batches[0]
        adversarial = self._adversarial(batch)
        with _unused_frozen(self.model, self.optim.freeze_unused):
            loss, logits = self._objective(batch, adversarial)
            value = self._update(self.optimizers["all"], loss)
        return _result({"loss": value}, logits, batch.labels)


class AdvMoE(Method):
    """Algorithm 1 of AdvMoE (ICCV 2023): routers and backbone in turn, each on its own batch with its own attack.

    Lower level: the routers φ minimise TRADES through the network, the backbone ψ fixed; upper level: ψ minimises TRADES
    under the new routers. In each phase only that phase's parameters get gradients.
    """

    def __init__(self, model: nn.Module, config: MethodConfig, optim: OptimConfig, attack: PGD) -> None:
        if not router_parameters(model):
            raise ValueError("method: advmoe needs a model with trainable routers (kind moe); use at for this one")
        if config.router_objective == "trades" and all(
            router.gate == "none" for router in model.modules() if isinstance(router, Router)
        ):
            raise ValueError("gate: 'none' lets no gradient of TRADES reach the routers, which advmoe is to train")
        self.batches_per_step = 2 if config.batches == "two" else 1
        super().__init__(model, config, optim, attack)

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        router_lr = self.optim.lr if self.optim.router_lr is None else self.optim.router_lr
        return {
            "router": self._sgd(router_parameters(self.model), router_lr),
            "backbone": self._sgd(backbone_parameters(self.model), self.optim.lr),
        }

    def step(self, batches: Sequence[Batch]) -> StepResult:
        lower, upper = batches[0], batches[-1]
        phases: list[Callable[[], StepResult]] = [
            lambda: self._router_phase(lower),
            lambda: self._backbone_phase(upper),
        ]
        if self.config.order == "backbone_first":
            phases.reverse()
        results = [phase() for phase in phases]
        losses = {name: value for result in results for name, value in result.losses.items()}
        return StepResult(losses, sum(r.correct for r in results), sum(r.count for r in results))

    def _router_phase(self, batch: Batch) -> StepResult:
        adversarial = self._adversarial(batch)
        with _only(self.model, router_parameters(self.model)):
            if self.config.router_objective == "trades":
                loss, logits = self._objective(batch, adversarial)
            else:
                loss, logits = self._pseudo_label(batch, adversarial)
            value = self._update(self.optimizers["router"], loss, "router_loss")
        return _result({"router_loss": value}, logits, batch.labels)

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

    def _backbone_phase(self, batch: Batch) -> StepResult:
        adversarial = self._adversarial(batch)
        with _only(self.model, backbone_parameters(self.model)), _unused_frozen(self.model, self.optim.freeze_unused):
            loss, logits = self._objective(batch, adversarial)
            value = self._update(self.optimizers["backbone"], loss)
        return _result({"loss": value}, logits, batch.labels)


def build_method(model: nn.Module, config: MethodConfig, optim: OptimConfig, attack: PGD) -> Method:
    """The method named by the config.

    Raises:
        ValueError: if the method does not go with the model, or if a setting of advmoe or of the routers is given to a
            method or a model that has no use for it.
    """
    if config.name != "advmoe":
        plain = MethodConfig(config.name)
        names = ("order", "batches", "router_objective", "router_alpha")
        given = [name for name in names if getattr(config, name) != getattr(plain, name)]
        if optim.router_lr is not None:
            given.append("router_lr")
        if given:
            raise ValueError(f"{given[0]}: a setting of the method advmoe, without effect on {config.name}")
    if config.attack_routers and (config.name == "standard" or not router_parameters(model)):
        raise ValueError("attack_routers: without effect on a method without attack or a model without routers")
    methods: dict[str, type[Standard] | type[AT] | type[AdvMoE]] = {"standard": Standard, "at": AT, "advmoe": AdvMoE}
    return methods[config.name](model, config, optim, attack)


def _result(losses: dict[str, float], logits: Tensor, labels: Tensor) -> StepResult:
    return StepResult(losses, int((logits.detach().argmax(1) == labels).sum()), len(labels))


def _router_divergence(model: nn.Module, images: Tensor) -> Callable[[Tensor], Tensor]:
    """The released attack's second term: KL between the routers' scores of the clean and the attacked images, summed."""
    with torch.no_grad(), undisturbed(model), record_scores(model) as scores:
        model(images)
        clean = dict(scores)

    def divergence(attacked: Tensor) -> Tensor:
        with record_scores(model) as now:
            model(attacked)
        return torch.stack([kl_divergence(s, now[name], reduction="sum") for name, s in clean.items()]).sum()

    return divergence


@contextmanager
def _only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone."""
    chosen = {id(p) for p in parameters}
    others = [p for p in model.parameters() if id(p) not in chosen and p.requires_grad]
    try:
        for p in others:
            p.requires_grad_(False)
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


@contextmanager
def _unused_frozen(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keeps the slices of experts that no sample of the step chose as they are, BatchNorms of their own included: without
    it weight decay and momentum still move them. Partition layout; their momentum is left to go on afterwards."""
    if not wanted:
        yield
        return
    used: dict[nn.Module, Tensor] = {}
    layers: dict[nn.Module, ExpertSlices] = {}
    for module in model.modules():
        if isinstance(module, RoutedConv2d):
            layers[module] = module.out_slices
        elif isinstance(module, RoutedBatchNorm2d):
            layers[module] = module.slices

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        routing = args[1] if len(args) > 1 else kwargs["routing"]
        count = torch.bincount(routing.expert.reshape(-1), minlength=routing.num_experts)
        used[module] = used[module] + count if module in used else count

    handles = [m.register_forward_pre_hook(note, with_kwargs=True) for m in layers]
    before = {m: {name: p.detach().clone() for name, p in m.named_parameters(recurse=False)} for m in layers}
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for module, count in used.items():
            for expert in (count == 0).nonzero().squeeze(1).tolist():
                start = layers[module].starts[expert]
                rows = slice(start, start + layers[module].width)
                for name, p in module.named_parameters(recurse=False):
                    p[rows] = before[module][name][rows]
