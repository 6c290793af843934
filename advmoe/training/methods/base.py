# SPDX-License-Identifier: Apache-2.0
"""What the training methods share: the attack, the objective, a step of one optimiser, and whose parameters move."""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import ExpertSlices, RoutedConv2d, RoutedLinear

from ...attacks import PGD, SharedGenerator
from ...config import MethodConfig, OptimConfig, RoutingConfig
from ...models import backbone_parameters, router_parameters
from ...modes import undisturbed
from ...objectives import balance_loss, cross_entropy, kl_divergence, trades_loss
from ...routers import Router, observe_routers, record_scores, routers_of
from ..parallel import ALONE, Reduced, World

__all__ = [
    "Batch",
    "Method",
    "NonFiniteLossError",
    "StepResult",
    "only",
    "tie_experts",
    "unused_frozen",
]


class NonFiniteLossError(RuntimeError):
    """A training loss or its gradient is NaN or infinite; no parameter has been moved by it."""


@dataclass(frozen=True)
class Batch:
    """images ``[B, 3, H, W]`` in [0, 1], labels ``[B]``, and a generator for the attack on them."""

    images: Tensor
    labels: Tensor
    generator: torch.Generator | SharedGenerator

    def parts(self, count: int) -> list[Batch]:
        """Equal parts, one after the other; their attacks draw from the one generator in turn.

        Raises:
            ValueError: if the images do not divide.
        """
        if count == 1:
            return [self]
        size, rest = divmod(len(self.labels), count)
        if rest:
            raise ValueError(f"accumulate: expected a divisor of the batch's {len(self.labels)} images, got {count}")
        generator = self.generator
        if isinstance(generator, SharedGenerator):
            generator = SharedGenerator(generator.generator, generator.start // count, generator.total // count)
        pairs = zip(self.images.split(size), self.labels.split(size), strict=True)
        return [Batch(images, labels, generator) for images, labels in pairs]


@dataclass(frozen=True)
class StepResult:
    """losses: named scalars; correct: training images predicted rightly, of count: clean ones, but see
    :attr:`Method.accuracy`."""

    losses: dict[str, float]
    correct: int
    count: int


class Method(ABC):
    """What the methods share.

    Raises:
        ValueError: if the settings do not go with the model.
    """

    batches_per_step = 1
    trains_in_turn = False  # some of the parameters that are trained have no gradient in some of the forwards
    # of StepResult.correct: sa on clean images, ra on attacked ones where the loss sees no other
    accuracy = "sa"
    updates = 1  # of each optimiser in a step, one behind the other

    def __init__(
        self,
        model: nn.Module,
        config: MethodConfig,
        optim: OptimConfig,
        attack: PGD,
        routing: RoutingConfig | None = None,
        world: World | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.optim = optim
        self.attack = attack
        self.routing = RoutingConfig() if routing is None else routing
        self.position = 0  # steps made since the run's start; the engine keeps it
        # before each of several updates: the rate is one of them; the engine's
        self.set_rates: Callable[[int], None] = lambda update: None
        self.reduced = Reduced(model, ALONE if world is None else world)
        if config.objective == "cross_entropy" and config.name != "standard":
            self.accuracy = "ra"
        asked = dataclasses.replace(self.routing, share_epochs=self.routing.share_epochs or None)
        if asked != RoutingConfig() and not routers_of(model):
            setting = next(f.name for f in dataclasses.fields(asked) if getattr(asked, f.name) != f.default)
            raise ValueError(f"routing.{setting}: a setting of routers, without effect on a model that has none")
        if self.routing.balance != "none" and not router_parameters(model):
            raise ValueError("balance: without effect on routers that have no parameters, or frozen ones")
        self.share_epochs = self.routing.share_epochs or 0
        # those of several experts are 1 in sum
        if self.share_epochs and any(
            r.options.gate == "softmax" and r.options.top_k == 1 for r in routers_of(model).values()
        ):
            raise ValueError("share_epochs: a shared expert has no gate, and those of 'softmax' would change the network")
        unreached = {r.options.gate for r in routers_of(model).values()} == {"none"} and bool(router_parameters(model))
        if unreached and not self._routers_learn_without_gates():
            raise ValueError("gate: 'none' lets no gradient of the loss reach the routers, which would not be trained")
        if self.routing.experts == "alike" or self.share_epochs:
            tie_experts(model)
        self.optimizers = self._optimizers()

    def _routers_learn_without_gates(self) -> bool:
        """Whether something else than the gates' gradients trains the routers, or they are not to be trained."""
        return self.routing.balance != "none"

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"all": self._optimizer(self._groups(self.model))}

    def _groups(self, model: nn.Module) -> list[tuple[Sequence[nn.Parameter], float]]:
        """All parameters of a model or a part of it, with their rates."""
        routers = router_parameters(model)
        if self.optim.router_lr is None or not routers:
            return [(list(model.parameters()), self.optim.lr)]
        return [(backbone_parameters(model), self.optim.lr), (routers, self.optim.router_lr)]

    def _optimizer(self, groups: Sequence[tuple[Sequence[nn.Parameter], float]]) -> torch.optim.Optimizer:
        """Groups of parameters with their rates, each kept as ``base_lr``, which the schedule scales."""
        o = self.optim
        each = [{"params": list(parameters), "lr": lr, "base_lr": lr} for parameters, lr in groups]
        if o.optimizer == "adam":
            return torch.optim.Adam(each, betas=(o.momentum, 0.999), weight_decay=o.weight_decay)
        return torch.optim.SGD(each, momentum=o.momentum, weight_decay=o.weight_decay, nesterov=o.nesterov)

    # --- what a checkpoint holds besides the model and the optimisers ---------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What the method keeps from step to step; all processes must ask."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 - most methods keep nothing
        """Goes on with what :meth:`state_dict` gave, in as many processes or another number of them."""

    # --- phases of a run ------------------------------------------------------------------------------------------------

    def schedule(self, epoch: int, epochs: int) -> tuple[int, int]:
        """First epoch and end of the schedule that ``epoch`` lies in."""
        return 0, epochs

    def enter_epoch(self, epoch: int) -> None:
        """Puts the model in the state of this epoch's phase; also called when a run is resumed within the epoch."""
        shared = epoch < self.share_epochs
        for router in routers_of(self.model).values():
            router.only = 0 if shared else None

    def begin_epoch(self, epoch: int) -> None:  # noqa: B027 - most methods have nothing to do there
        """What happens once, before an epoch's first step."""

    def may_be_best(self, epoch: int, epochs: int) -> bool:
        """Whether what this epoch gives may become the run's ``best``: not while the experts are one."""
        return epoch >= self.share_epochs

    def settle(self) -> None:
        """Called before the state is saved or validated. While experts are shared only the first has been trained: the
        others become its copies, so that whoever loads the checkpoint may route as the routers say."""
        if self.sharing:
            tie_experts(self.model, list(self.optimizers.values()))

    @property
    def sharing(self) -> bool:
        """Whether all samples train one expert now."""
        return any(router.only is not None for router in routers_of(self.model).values())

    @abstractmethod
    def step(self, batches: Sequence[Batch]) -> StepResult:
        """One step of training on ``batches_per_step`` batches."""

    # --- parts of a step ------------------------------------------------------------------------------------------------

    def _adversarial(self, batch: Batch) -> Tensor:
        with self._autocast():
            return self._attacked(batch)

    def _autocast(self) -> AbstractContextManager[Any]:
        """Forwards in the precision that is set; routers and losses are float32 all the same."""
        if self.optim.precision == "float32":
            return nullcontext()
        device = next(self.model.parameters()).device.type
        return torch.autocast(device, getattr(torch, self.optim.precision))

    def _attacked(self, batch: Batch) -> Tensor:
        model = self.model
        if not self.config.attack_routers or self.sharing:
            return self.attack.run(model, batch.images, batch.labels, batch.generator).images
        with torch.no_grad(), undisturbed(model), record_scores(model) as scores:
            model(batch.images)
            clean = dict(scores)

        with record_scores(model) as now:

            def divergence(attacked: Tensor) -> Tensor:
                """The released attack's second term: KL between the routers' scores of the clean and the attacked images,
                summed; the attack's own forward has just left the latter."""
                return torch.stack([kl_divergence(s, now[name], reduction="sum") for name, s in clean.items()]).sum()

            return self.attack.run(model, batch.images, batch.labels, batch.generator, divergence).images

    def _objective(self, batch: Batch, adversarial: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the clean logits (for PGD-AT, which has none, the adversarial ones).

        Clean and adversarial images go through the model separately, clean first: each has its own batch statistics in a
        shared BatchNorm, and both update the running ones, as in TRADES' and AdvMoE's released code.
        """
        if self.config.objective == "cross_entropy":
            return self._cross_entropy(batch, adversarial)
        clean = self.model(batch.images)
        return trades_loss(clean, self.model(adversarial), batch.labels, self.config.beta), clean

    def _cross_entropy(self, batch: Batch, images: Tensor) -> tuple[Tensor, Tensor]:
        """Its mean over ``images``, and the logits."""
        logits = self.model(images)
        return cross_entropy(logits, batch.labels), logits

    def _balanced(self, objective: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, dict[str, float]]:
        """The objective's loss plus the routers' balancing loss, its mean over all choices made in its forwards; the
        logits; and the balancing loss by name, where there is one."""
        if self.routing.balance == "none" or self.sharing:
            return *objective(), {}
        losses: list[Tensor] = []

        def observe(router: Router, scores: Tensor, routing: Any) -> None:
            losses.append(balance_loss(self.reduced.world.gathered(scores), self.routing.balance))

        with observe_routers(self.model, observe):
            loss, logits = objective()
        balance = torch.stack(losses).mean()
        return loss + self.routing.balance_weight * balance, logits, {"balance": balance.item()}

    def _idle_frozen(self) -> AbstractContextManager[None]:
        return unused_frozen(self.model, self.optim.freeze_unused, self.reduced.world)

    def _parts(self, batch: Batch) -> list[Batch]:
        """What one forward gets; the gradients of all are summed before a step."""
        return batch.parts(self.optim.accumulate)

    def _descend(
        self,
        optimizer: torch.optim.Optimizer,
        parts: Sequence[Batch],
        objective: Callable[[Batch, Any], tuple[Tensor, Tensor]],
        attacked: Sequence[Any] | None = None,
        balanced: bool = False,
        name: str = "loss",
        check: Callable[[], None] | None = None,
    ) -> StepResult:
        """One step of an optimiser down the mean of an objective over the parts of a batch.

        Args:
            objective: of a part and its attacked images, to the loss and the logits whose accuracy is counted.
            attacked: the attacked images of each part, or what else the objective takes for them; found here by default.
            balanced: adds the routers' balancing loss.
            name: of the loss.
            check: called where the gradients are there and nothing has been moved.

        Raises:
            NonFiniteLossError: if the loss or its gradient is NaN or infinite.
        """
        optimizer.zero_grad(set_to_none=True)
        losses: dict[str, float] = {}
        correct = count = 0
        for i, part in enumerate(parts):
            images = self._adversarial(part) if attacked is None else attacked[i]
            forward = functools.partial(self._forward, part, images, objective, balanced)
            loss, logits, extra = self.reduced(forward, last=i == len(parts) - 1)
            for key, value in {name: loss.item(), **extra}.items():
                losses[key] = losses.get(key, 0.0) + value / len(parts)
            if not math.isfinite(losses[name]):
                raise NonFiniteLossError(f"{name} is {losses[name]}")
            (loss / len(parts) if len(parts) > 1 else loss).backward()
            correct += int((logits.detach().argmax(1) == part.labels).sum())
            count += len(part.labels)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        largest = torch.nn.utils.get_total_norm(gradients, math.inf).item()
        if not math.isfinite(largest):
            raise NonFiniteLossError(f"the gradient of {name} ({losses[name]:.4g}) has the entry {largest}")
        if check is not None:
            check()
        optimizer.step()
        return StepResult(losses, correct, count)

    def _forward(
        self,
        part: Batch,
        attacked: Any,
        objective: Callable[[Batch, Any], tuple[Tensor, Tensor]],
        balanced: bool,
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        with self._autocast():
            if balanced:
                return self._balanced(lambda: objective(part, attacked))
            return *objective(part, attacked), {}


@contextmanager
def only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
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


def tie_experts(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
    """Makes all experts copies of the first, optimisers' state included. Partition layout.

    Raises:
        ValueError: if slices overlap or have two sliced sides: then the first expert's weights are not its own.
    """
    states = {id(p): optimizer.state[p] for optimizer in optimizers for p in optimizer.state}
    with torch.no_grad():
        for name, module in model.named_modules():
            slices = _slices_of(module)
            if slices is None:
                continue
            if isinstance(module, RoutedConv2d | RoutedLinear) and not (
                slices.is_partition and module.in_slices.is_whole
            ):
                raise ValueError(f"experts: only those of layout 'partition' can be made alike; {name} has windows")
            own: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            own += [v for p in list(own) for v in states.get(id(p), {}).values() if isinstance(v, Tensor) and v.dim()]
            for value in own:
                first = value[: slices.width].clone()
                for start in slices.starts[1:]:
                    value[start : start + slices.width] = first


def _slices_of(module: nn.Module) -> ExpertSlices | None:
    """Of a module whose own parameters have one for each expert: where."""
    if isinstance(module, RoutedConv2d | RoutedLinear):
        return module.out_slices
    slices = getattr(module, "slices", None)  # norms, and a transformer's class token and positions
    return slices if isinstance(slices, ExpertSlices) else None


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))


@contextmanager
def unused_frozen(model: nn.Module, wanted: bool, world: World = ALONE) -> Iterator[None]:
    """Keeps the slices of experts that no sample of the step chose as they are, BatchNorms of their own included: without
    it weight decay and momentum still move them. Of windows the channels that no chosen expert has; their momentum is
    left to go on afterwards."""
    if not wanted:
        yield
        return
    used: dict[nn.Module, Tensor] = {}
    sides = {module: _slices_of(module) for module in model.modules()}
    layers = {module: slices for module, slices in sides.items() if slices is not None and not slices.is_whole}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:  # an attack's forward
            return
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
        for module, slices in layers.items():
            # by all processes together; each asks for each layer
            none = torch.zeros(slices.num_experts, dtype=torch.int64, device=_device(module))
            # one that holds values of its own beside routed layers, as a transformer does, goes with the first of these
            count = world.total(next((used[m] for m in module.modules() if m in used), none))
            if not int(count.sum()):
                continue
            idle = torch.ones(slices.total, dtype=torch.bool, device=count.device)
            for expert in count.nonzero().squeeze(1).tolist():
                idle[slices.starts[expert] : slices.starts[expert] + slices.width] = False
            for name, p in module.named_parameters(recurse=False):
                p[idle] = before[module][name][idle]
