# SPDX-License-Identifier: Apache-2.0
"""A number that is not finite: the step before which all was well, kept for replay, and the layer where it began."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..attacks import NonFiniteGradientError
from ..files import WriteError
from ..routers import NonFiniteRouterError
from .methods import Batch, NonFiniteLossError

if TYPE_CHECKING:
    from .engine import Trainer

__all__ = ["NON_FINITE", "Attempt", "Probe", "StateBefore", "attempt", "keep", "require_finite_state"]

NON_FINITE = (NonFiniteLossError, NonFiniteGradientError, NonFiniteRouterError)
_TRAIL = 6  # layers before the first that is not finite


class StateBefore:
    """Copies of what a step changes, taken before it into the same memory each time: models, optimizers, what the method
    keeps and torch's generators. One that fails may have moved some of it: AdvMoE's routers, BatchNorm's statistics."""

    def __init__(self) -> None:
        self._copies: dict[str, Any] = {}
        self._rest: dict[str, Any] = {}

    def take(self, trainer: Trainer) -> None:
        now: dict[str, Any] = {
            "model": dict(trainer.model.state_dict()),
            "optimizers": {name: o.state_dict() for name, o in trainer.method.optimizers.items()},
            # of several processes each has its own part of what a method keeps
            "method": trainer.method.state_dict() if trainer.world.size == 1 else {},
        }
        self._copies = _copied(now, self._copies)
        cuda = trainer.device.type == "cuda"
        self._rest = {
            "batches": [b.state_dict() for b in trainer.batches],
            "torch_rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state(trainer.device) if cuda else None,
            "epoch": trainer.epoch,
            "step": trainer.step,
            "sums": {},
            "seconds": trainer.seconds,
            "best": trainer.best,
        }

    def state(self) -> dict[str, Any] | None:
        """As a checkpoint has it; None before the first step."""
        return {**self._copies, **self._rest} if self._rest else None


def _copied(value: Any, into: Any) -> Any:
    """A copy of tensors in dicts, lists and tuples, written into an earlier copy where that has the same form."""
    if isinstance(value, Tensor):
        old = into if isinstance(into, Tensor) else None
        if old is None or (old.shape, old.dtype, old.device, old.stride()) != (
            value.shape, value.dtype, value.device, value.stride(),
        ):  # fmt: skip
            return value.detach().clone()
        return old.copy_(value.detach())
    if isinstance(value, dict):
        into = into if isinstance(into, dict) else {}
        return {key: _copied(each, into.get(key)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        into = into if isinstance(into, (list, tuple)) and len(into) == len(value) else [None] * len(value)
        return type(value)(_copied(each, old) for each, old in zip(value, into, strict=True))
    return value


# --- which number is the first ---


@dataclass
class Probe:
    """What a step's layers give, looked at one after the other.

    Args:
        first: where the first value appears that is not finite.
        trail: of the layers before it, the largest magnitudes.
    """

    model: nn.Module
    first: str | None = None
    trail: deque[str] = field(default_factory=lambda: deque(maxlen=_TRAIL))
    _forward: int = 0
    _depth: int = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile forwards, their backwards and the gradients of weights are looked at."""
        with ExitStack() as stack:
            for name, module in self.model.named_modules():
                for handle in (
                    module.register_forward_pre_hook(self._before(name), with_kwargs=True),
                    module.register_forward_hook(self._behind(name), always_call=True),
                ):
                    stack.callback(handle.remove)
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    handle = parameter.register_post_accumulate_grad_hook(self._arrived(name))
                    stack.callback(handle.remove)
            yield

    def look(self, what: str, values: Any) -> None:
        """Notes it, if it is the first that is not finite."""
        if self.first is not None:
            return
        floats = [t.detach() for t in _tensors(values) if t.is_floating_point() and t.numel()]
        largest = max(
            (float(t.abs().amax()) for t in floats), default=0.0, key=lambda v: math.inf if math.isnan(v) else v
        )
        if math.isfinite(largest):
            self.trail.append(f"{what}: largest {largest:.4g}")
            return
        entries = sum(t.numel() for t in floats)
        nan, inf = (sum(int(test(t).sum()) for t in floats) for test in (torch.isnan, torch.isinf))
        self.first = f"{what} ({nan} NaN and {inf} infinite of {entries} values)"

    def _before(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._depth:
                self._forward += 1
            self._depth += 1
            # between two layers lie functions that are none
            self.look(f"the input of {name or 'the network'}{self._in()}", (args, kwargs))

        return hook

    def _behind(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._depth -= 1
            if output is None:  # it raised
                return
            here = f"{name or 'the network'}{self._in()}"
            self.look(f"the output of {here}", output)
            if self.first is None:
                for t in _tensors(output):
                    if t.requires_grad and t.is_floating_point():
                        t.register_hook(lambda g: self.look(f"the gradient at the output of {here}", g))

        return hook

    def _in(self) -> str:
        return f", forward {self._forward} of the step ({'training' if self.model.training else 'eval'} mode)"

    def _arrived(self, name: str) -> Callable[[Tensor], None]:
        return lambda parameter: self.look(f"the gradient of {name}", parameter.grad)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from _tensors(getattr(value, f.name, None))


def _state_tensors(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint has of numbers that have to be finite."""
    names = {id(p): name for name, p in model.named_parameters()}
    yield from model.named_parameters()
    yield from ((name, b) for name, b in model.named_buffers() if b.is_floating_point())
    for label, optimizer in optimizers.items():
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield f"{key} of {names.get(id(parameter), 'a parameter')} (optimizer {label})", value


def require_finite_state(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Weights, statistics of BatchNorms and what optimizers keep; one wait for the device.

    Raises:
        NonFiniteLossError: if one is not finite; the message names the first.
    """
    with torch.no_grad():
        named = list(_state_tensors(model, optimizers))
        if math.isfinite(torch.nn.utils.get_total_norm([t for _, t in named], math.inf).item()):
            return
        name, value = next((n, t) for n, t in named if not bool(torch.isfinite(t).all()))
    entry = value[~torch.isfinite(value)][0].item()
    raise NonFiniteLossError(f"a weight is {entry} after the last step, or what goes with it: {name}")


# --- the step once more ---


@dataclass
class Attempt:
    """A step made from the state before it.

    Args:
        error: what it ended with; None where it went through.
        where: the first value that is not finite.
        trail: what the layers before it gave.
        indices: of the images in each of the step's batches.
        digests: of these images, moved and mirrored as they were, and of their labels.
    """

    error: RuntimeError | None
    where: str | None
    trail: list[str]
    indices: list[Tensor]
    digests: list[str]


def attempt(trainer: Trainer, state: dict[str, Any]) -> Attempt:
    """Puts the trainer back before the step and makes it as the run did, bit for bit; where it fails, then once more with
    a look at each layer: kernels that compute several layers at once stand back for that, and round in another way."""
    error, batches = _made(trainer, state)
    seen = Attempt(error, None, [], _indices(trainer, state), [_digest(b) for b in batches])
    if error is None:
        return seen
    probe = Probe(trainer.model)
    again, _ = _made(trainer, state, probe)
    optimizers = trainer.method.optimizers
    if probe.first is None and again is None:
        probe.first = "nothing, where layers are looked at one by one"
    elif probe.first is None:
        ruined = next(
            (n for n, t in _state_tensors(trainer.model, optimizers) if not bool(torch.isfinite(t).all())), None
        )
        probe.first = "the loss, of scores that are finite" if ruined is None else f"{ruined}, after the step"
    return dataclasses.replace(seen, where=probe.first, trail=list(probe.trail))


def _made(trainer: Trainer, state: dict[str, Any], probe: Probe | None = None) -> tuple[RuntimeError | None, list[Batch]]:
    """The step from this state: what it ended with, None where all was finite, and its batches."""
    trainer.load_state_dict(_copied(state, None))  # an optimizer goes on in the tensors that it is given
    trainer.model.train()
    trainer.method.enter_epoch(trainer.epoch)
    trainer._set_rates()
    batches = [trainer._batch(b) for b in trainer.batches]
    optimizers = trainer.method.optimizers
    if probe is not None:
        for name, value in _state_tensors(trainer.model, optimizers):
            probe.look(f"{name}, before the step", value)
        for b in batches:
            probe.look("the images", b.images)
        probe.trail.clear()
    # of a compiled model hooks see the layers where its forwards are made eagerly
    watched = ExitStack()
    if probe is not None:
        watched.enter_context(torch.compiler.set_stance("force_eager"))
        watched.enter_context(probe.watching())
    with watched:
        try:
            trainer.method.step(batches)
            require_finite_state(trainer.model, optimizers)
        except NON_FINITE as error:
            return error, batches
    return None, batches


def keep(trainer: Trainer, state: dict[str, Any] | None, error: RuntimeError) -> str:
    """Keeps the step that failed in the run's folder, and says where its first value is that is not finite: a part of the
    error's message.

    Args:
        state: before the step.
    """
    if state is None:
        return "No step was made, so none can be made again"
    several = trainer.world.size > 1
    if several and trainer.config.method.name == "free-at":
        return "The step is not kept: each process has a part of what free-at goes on from"
    seen, said = None, "No layer was looked at, as there are several processes"
    if not several:
        try:
            seen = attempt(trainer, state)
            said = f"First not finite: {seen.where}"
            if seen.error is None:
                said = "Made again at once, the step went through"
        except Exception as failure:  # the fault at hand is to be told, whatever else fails
            said = f"Made again at once, the step failed in another way ({type(failure).__name__}: {failure})"
    fault = {
        "config": json.loads(json.dumps(dataclasses.asdict(trainer.config))),
        "processes": trainer.world.size,
        "threads": torch.get_num_threads(),
        "device": trainer.device.type,
        "torch": str(torch.__version__),
        "error": type(error).__name__,
        "message": str(error),
        "where": seen and seen.where,
        "indices": _indices(trainer, state),
        "digests": seen.digests if seen else [],
        "state": state,
    }
    try:
        trainer.run.save_fault(fault, trainer.world.rank)
    except WriteError as failure:
        return f"{said}. The step is not kept: {failure}"
    return f"{said}. To make the step again: advmoe replay {trainer.run.folder}"


def _indices(trainer: Trainer, state: dict[str, Any]) -> list[Tensor]:
    places = zip((b.order for b in trainer.batches), state["batches"], strict=True)
    return [order.indices(place["epoch"], place["index"]).clone() for order, place in places]


def _digest(batch: Batch) -> str:
    both = hashlib.blake2b(digest_size=16)
    for t in (batch.images, batch.labels):
        both.update(t.detach().cpu().contiguous().numpy().tobytes())
    return both.hexdigest()
