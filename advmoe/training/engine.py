# SPDX-License-Identifier: Apache-2.0
"""The loop around a method, written once: data, schedule, metrics, checkpoints, interruption."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from moe_kernels.backends import choose

from ..attacks import PGD, SharedGenerator, from_name
from ..config import ONE_STEP, ModelConfig, RunConfig
from ..data import Batches, BatchStream, DataSet, load, stream_generator
from ..evaluation.measure import Evaluation, evaluate
from ..files import WriteError
from ..models import router_parameters, upcycle
from ..models.base import PLACED, ROUTED, WHOLE
from ..modes import undisturbed
from ..routers import FixedRouter, NonFiniteRouterError, RouterOptions, routers_of
from ..sparse import masked_convolutions
from ..stored import load_optimizer, load_weights
from . import faults, tensorboard
from .faults import NON_FINITE
from .methods import Batch, Method, StepResult, build_method
from .parallel import ALONE, ProcessLost, World, lost, restarted, resume_command
from .runs import Run, RunError, build_model, load_checkpoint, load_model, require_own_code
from .watch import COLLAPSED, RouterWatch

__all__ = ["Interrupted", "StepError", "Trainer", "load_data", "resume", "train", "without_sources"]

logger = logging.getLogger("advmoe")


class StepError(RuntimeError):
    """A step could not be made with the images and choices of its batch; the message names the epoch and the step."""


class Interrupted(Exception):
    """Ctrl-C came; there is a checkpoint and the run can be resumed. Its argument is the run's folder."""


class Trainer:
    """A run in progress: everything that decides its weights is here and in its checkpoint.

    Raises:
        ValueError: if settings do not fit each other or the data.
        BackendUnavailable: if no backend of the routed layers computes on the device.
    """

    def __init__(self, config: RunConfig, run: Run, data: DataSet, quiet: bool = False, world: World = ALONE) -> None:
        self.config = config
        self.run = run
        self.data = data
        self.quiet = quiet or not world.first
        self.world = world
        if config.batch_size > len(data.train):  # before a table of them is made
            count = len(data.train)
            raise ValueError(f"batch_size: expected at most the {count} training images, got {config.batch_size}")
        part = world.part(config.batch_size, config.optim.accumulate)
        if config.optim.compile and world.size > 1:
            raise ValueError(f"compile: for one process, got {world.size}")
        self.device = device_of(config.device)
        if config.model.kind in ROUTED:
            choose(self.device)
        torch.manual_seed(config.seed)
        model = build_model(config.model).to(self.device)
        self.model: nn.Module = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        a = config.attack
        assert a.epsilon is not None and a.step_size is not None and a.steps is not None and a.loss is not None
        attack = PGD(a.epsilon, a.step_size, a.steps, loss=a.loss, random_start=a.random_start)
        # what is wanted at an epoch's end must not fail only there
        self.validation_attack = from_name(config.validation_attack, a.epsilon)
        if not len(data.validation):
            raise ValueError("validation: the best checkpoint is chosen on held-out images, of which there are none")
        if config.tensorboard:
            tensorboard.require()
        if config.init is not None:
            _load_weights(self.model, config.init, config.model)
        for moe, source in (("standard", config.standard_run), ("robust", config.robust_run)):
            if source is not None:
                _load_weights(self.model.get_submodule(moe), source, config.model, f"{moe}_run")
        world.prepare(self.model)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):  # random routers draw
            shape = 1, len(data.mean), data.image_size, data.image_size
            _require_size(self.model, torch.zeros(shape, device=self.device))
        if config.optim.compile:
            _compile(self.model)
        self.method: Method = build_method(self.model, config.method, config.optim, attack, config.routing, world)
        if config.optim.compile and self.method.trains_in_turn and torch.__version__ < "2.13":
            raise ValueError(
                f"compile: expected torch 2.13 or later for {config.method.name}, which trains its parameters in turn, "
                f"got {torch.__version__}, whose compiled models keep the gradients that they were first asked for"
            )
        self.method.set_rates = self._set_rates
        self.watch = RouterWatch(self.model, world)
        names = ("upper",) if self.method.batches_per_step == 1 else ("lower", "upper")
        workers = config.data.workers
        if workers is None:  # the cores are for all streams of all processes on this machine
            streams = len(names) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = min(data.train.workers, max(1, data.train.workers // streams))
        d = config.data
        training = data.train.augmented(d.shift, d.cutout, data.mean, d.color_jitter)
        orders = [Batches(len(data.train), config.batch_size, config.seed, name) for name in names]
        self.batches = [
            BatchStream(training, order, config.data.augment, workers, self.device.type == "cuda", part)
            for order in orders
        ]
        self.steps_per_epoch = len(orders[-1])
        self.epoch = 0
        self.step = 0  # within the epoch
        self.sums: dict[str, float] = {}
        self.seconds = 0.0  # spent training in this epoch
        self.best = -1.0
        self.board: tensorboard.Board | None = None  # while :meth:`fit` writes one
        self.before = faults.StateBefore()

    # --- state ----------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        self.method.settle()
        return {
            "model": self.model.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in self.method.optimizers.items()},
            "batches": [b.state_dict() for b in self.batches],
            "torch_rng": torch.get_rng_state(),
            "device_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "epoch": self.epoch,
            "step": self.step,
            "sums": self.world.summed(self.sums, self.device),
            "seconds": self.seconds,
            "best": self.best,
            "method": self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        missing = [
            key for key in ("model", "optimizers", "batches", "torch_rng", "epoch", "step", "sums") if key not in state
        ]
        if missing:
            raise ValueError(f"there is no {missing[0]}")
        load_weights(self.model, state["model"])
        for name, optimizer in self.method.optimizers.items():
            load_optimizer(optimizer, state["optimizers"].get(name))
        for batches, position in zip(self.batches, state["batches"], strict=True):
            batches.load_state_dict(position)
        self.method.load_state_dict(state.get("method", {}))  # older checkpoints have none, of methods that keep nothing
        torch.set_rng_state(state["torch_rng"])
        if self.device.type == "cuda" and state["device_rng"] is not None:
            torch.cuda.set_rng_state(state["device_rng"], self.device)
        self.epoch, self.step = state["epoch"], state["step"]
        if self.step > self.steps_per_epoch:
            raise ValueError(f"step: expected at most the {self.steps_per_epoch} of an epoch, got {self.step}")
        self.seconds, self.best = state["seconds"], state["best"]
        self.sums = {name: value / self.world.size for name, value in state["sums"].items()}  # those of all processes

    # --- the loop -------------------------------------------------------------------------------------------------------

    def save(self, name: str = "last") -> None:
        """Writes a checkpoint; all processes must ask, and the first writes."""
        state = self.state_dict()
        if self.world.first:
            self.run.save(state, name)

    def fit(self) -> list[dict[str, Any]]:
        """Trains to the last epoch and returns the metrics of all epochs.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM. The state is saved after the step that it fell in; a second Ctrl-C, or
                one during a validation, leaves the checkpoint before.
            NonFiniteLossError, NonFiniteGradientError, NonFiniteRouterError: if a loss, the gradient of an attack or a
                router's scores are not finite; the message names the epoch and the step.
            StepError: if a step could not be made otherwise.
            WriteError: if a file could not be written; the checkpoint before is as it was.
            ProcessLost: if another process of the run has ended.
        """
        try:
            if self.world.size > 1 and not self.run.checkpoint().exists():
                self.save()  # a process may be lost at any time
            with self._writing() as self.board:
                while self.epoch < self.config.epochs:
                    self._train_epoch()
                    self._require_finite_weights("end")
                    self.save()  # an epoch's work is not lost to a Ctrl-C during its validation
                    self._finish_epoch()
        except KeyboardInterrupt as error:
            if self.run.checkpoint().exists():
                raise Interrupted(self.run.folder) from error
            raise
        except WriteError as error:
            again = (
                f"then go on with: {resume_command(self.run.folder)}"
                if self.run.checkpoint().exists()
                else "then begin anew"
            )
            error.then = f"{again}; {self._checkpointed()}"
            raise
        except RuntimeError as error:
            ours = isinstance(error, (*NON_FINITE, StepError))
            if self.world.size > 1 and not ours and (isinstance(error, ProcessLost) or lost(error)):
                first = str(error).strip().splitlines()[0]
                raise ProcessLost(
                    f"another of the {self.world.size} processes has ended ({first}); {self._checkpointed()}; go on "
                    f"with: {resume_command(self.run.folder)}"
                ) from error
            raise
        finally:
            for batches in self.batches:
                batches.close()
        return self.run.metrics()

    def _writing(self) -> AbstractContextManager[tensorboard.Board | None]:
        wanted = self.config.tensorboard and self.world.first and self.epoch < self.config.epochs
        return tensorboard.writing(self.run.folder / "tensorboard", self.epoch) if wanted else nullcontext()

    def _train_epoch(self) -> None:
        self.model.train()
        self.method.enter_epoch(self.epoch)
        if self.step == 0:
            self.method.begin_epoch(self.epoch)
        label = f"epoch {self.epoch + 1}/{self.config.epochs}"
        bar = tqdm(
            total=self.steps_per_epoch, initial=self.step, desc=label, disable=True if self.quiet else None, leave=False
        )
        with bar, _ctrl_c(several=self.world.size > 1) as interrupted:
            while self.step < self.steps_per_epoch:
                start = time.perf_counter()
                self.before.take(self)
                self._set_rates()
                result = self._step([self._batch(b) for b in self.batches])
                self.step += 1
                self.seconds += time.perf_counter() - start
                self._add(result)
                bar.update()
                bar.set_postfix_str(
                    f"loss {self._mean('loss'):.3f}, {self.method.accuracy.upper()} {self._accuracy():.1%}, "
                    f"{self._speed():.0f} images/s",
                    refresh=False,
                )
                self._stop_if(interrupted())
        self._stop_if(interrupted())  # between the last step and the end of its noting

    def _stop_if(self, interrupted: bool) -> None:
        """Saves and leaves, if any process has been interrupted; all of them must ask."""
        if self.world.any(interrupted, self.device):
            self._require_finite_weights(f"step {self.step}")
            self.save()
            raise Interrupted(self.run.folder)

    def _batch(self, batches: BatchStream) -> Batch:
        order = batches.order
        attack: Any = stream_generator(self.config.seed, "attack", order.name, order.epoch, order.index)
        if self.world.size > 1:
            share = order.batch_size // self.world.size
            attack = SharedGenerator(attack, self.world.rank * share, order.batch_size)
        images, labels = (each.to(self.device, non_blocking=True) for each in batches.next())
        return Batch(images, labels, attack)

    def _set_rates(self, update: int = 0) -> None:
        """Cosine or polynomial from the full rate to 0 over all steps of the method's phase (AdvMoE's released code steps
        its cosine once an epoch, in the same shape), or a triangle of so many steps over and over. A function of where
        the run is; steps are an optimiser's, and a batch may be worth several.

        Args:
            update: which of those it is.
        """
        start, end = self.method.schedule(self.epoch, self.config.epochs)
        updates = self.method.updates
        steps = ((self.epoch - start) * self.steps_per_epoch + self.step) * updates + update
        total = (end - start) * self.steps_per_epoch * updates
        o = self.config.optim
        if o.schedule == "cyclic":
            low = o.low_lr / o.lr if o.low_lr is not None and o.lr else 0.5
            way = steps / o.cycle_steps % 2
            factor = low + (1 - low) * min(way, 2 - way)
        elif o.schedule == "polynomial":
            factor = (1 - steps / total) ** o.power
        else:
            factor = 0.5 * (1 + math.cos(math.pi * steps / total))
        for optimizer in self.method.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * factor
        self.method.position = self.epoch * self.steps_per_epoch + self.step

    def _rates(self) -> dict[str, float]:
        """Of the last step, by optimizer; numbered where parts of the model have rates of their own."""
        groups = {name: optimizer.param_groups for name, optimizer in self.method.optimizers.items()}
        return {
            name if len(each) == 1 else f"{name}_{i}": group["lr"]
            for name, each in groups.items()
            for i, group in enumerate(each)
        }

    def _step(self, batches: list[Batch]) -> StepResult:
        try:
            # a compiled forward can be looked into only by breaking its graph at each router
            compiled = self.config.optim.compile
            with nullcontext() if compiled else self.watch.watching(self.method.position):
                return self.method.step(batches)
        except NON_FINITE as error:
            raise self._failed(self._cause(error, batches), f"step {self.step + 1}") from error
        except ValueError as error:  # one sample for an expert with a BatchNorm of its own, say
            here = f"epoch {self.epoch + 1}, step {self.step + 1}"
            raise StepError(f"{here}: {error}; {self._checkpointed()}") from error

    def _cause(self, error: RuntimeError, batches: list[Batch]) -> RuntimeError:
        """The fault of a router, where it is one that shows in the scores of the batch's clean images."""
        if self.world.size > 1:  # a forward more than the others make
            return error
        try:
            for batch in batches:
                self.watch.require_finite(batch.images)
        except NonFiniteRouterError as found:
            return found
        except ValueError:  # what a step may raise too; the error at hand says more
            pass
        return error

    def _require_finite_weights(self, where: str) -> None:
        """The last step's weights have met no loss yet; a checkpoint of ruined ones would fail at every resume."""
        try:
            faults.require_finite_state(self.model, self.method.optimizers)
        except NON_FINITE as error:
            raise self._failed(error, where) from None

    def _failed(self, error: RuntimeError, where: str) -> RuntimeError:
        """The error named, the step kept for replay. The trainer is before that step, or in it, afterwards."""
        named = self._named(error, where, ". A lower --lr usually helps")
        kept = faults.keep(self, self.before.state(), error)
        return type(error)(f"{named}. {kept}")

    def _named(self, error: RuntimeError, where: str, help: str) -> RuntimeError:
        return type(error)(f"epoch {self.epoch + 1}, {where}: {error}; {self._checkpointed()}{help}")

    def _checkpointed(self) -> str:
        path = self.run.checkpoint()
        return f"the last checkpoint is {path}" if path.exists() else "there is no checkpoint yet"

    def _add(self, result: StepResult) -> None:
        totals: dict[str, float] = {"correct": result.correct, "count": result.count}
        for name, value in result.losses.items():
            totals |= {f"sum_{name}": value, f"steps_{name}": 1}  # a loss need not be part of every step
        for key, value in totals.items():
            self.sums[key] = self.sums.get(key, 0.0) + value

    def _mean(self, loss: str) -> float:
        return self.sums.get(f"sum_{loss}", 0.0) / max(self.sums.get(f"steps_{loss}", 0), 1)

    def _accuracy(self) -> float:
        return self.sums.get("correct", 0.0) / max(self.sums.get("count", 0.0), 1.0)

    def _speed(self) -> float:
        """Images that the backbone is trained on, a second; AdvMoE's batch for the routers is not counted."""
        return self.sums.get("count", 0.0) / max(self.seconds, 1e-9)

    def _finish_epoch(self) -> None:
        self.method.settle()
        attack = self.config.validation_attack
        result = self.world.told(self._validate() if self.world.first else None)
        if self.world.size > 1:  # of which validation may have drawn
            torch.set_rng_state(self.world.told(torch.get_rng_state()))
        self.sums = self.world.summed(self.sums, self.device)
        robust = result.attacks[attack]
        line: dict[str, Any] = {
            "epoch": self.epoch + 1,
            **{key.removeprefix("sum_"): self._mean(key.removeprefix("sum_")) for key in self.sums if key[:4] == "sum_"},
            f"train_{self.method.accuracy}": self._accuracy(),
            "validation_sa": result.sa,
            "validation_ra": robust.ra,
            "images_per_second": round(self._speed(), 1),
            "seconds": round(self.seconds, 2),
            "zero_gradient": robust.zero_gradient,
        }
        if result.usage:
            line["flip_rate"] = robust.flip_rate
            line["expert_usage"] = {name: [round(u, 4) for u in usage] for name, usage in result.usage.items()}
            line["router_entropy"] = {name: round(_entropy(usage), 4) for name, usage in result.usage.items()}
        logger.info(
            "epoch %d/%d: loss %.3f, validation SA %.1f %%, RA %.1f %% (%s), %.0f images/s%s",
            self.epoch + 1, self.config.epochs, self._mean("loss"), 100 * result.sa, 100 * robust.ra, attack,
            self._speed(), ", experts shared" if self.method.sharing else "",
        )  # fmt: skip
        k = self.config.model.top_k
        collapsed = [n for n, use in result.usage.items() if len(use) > k and sum(sorted(use)[-k:]) >= COLLAPSED]
        fixed = any(isinstance(router, FixedRouter) for router in routers_of(self.model).values())
        if collapsed and not self.method.sharing and not fixed:
            everywhere = len(collapsed) == len(result.usage) > 1
            where = f"all {len(collapsed)} routed layers" if everywhere else ", ".join(collapsed)
            who = "one expert takes" if k == 1 else f"{k} experts take"
            logger.warning("epoch %d: %s all samples in %s", self.epoch + 1, who, where)
        # an undefended model's RA is noise near zero
        score = result.sa if self.config.method.name == "standard" else robust.ra
        improved = score > self.best and self.method.may_be_best(self.epoch, self.config.epochs)
        self.best = score if improved else self.best
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, {}, 0.0
        state = self.state_dict()
        if not self.world.first:
            return
        if improved:
            self.run.save(state, "best")
        # metrics first: a line too many is cut back when the run is resumed from the older checkpoint
        self.run.add_metrics(line)
        if self.board is not None:
            self.board.add(line, self._rates())
        self.run.save(state)

    def _validate(self) -> Evaluation:
        c = self.config
        attacks = {c.validation_attack: self.validation_attack}
        # a graph for each size of a batch there, and without gradients, would pay for itself nowhere
        eager = torch.compiler.set_stance("force_eager") if c.optim.compile else nullcontext()
        try:
            with eager:
                return evaluate(
                    self.model, self.data.validation, attacks, c.batch_size, seed=c.seed, workers=c.data.workers
                )
        except NON_FINITE as error:
            raise self._named(error, "validation", ". A lower --lr usually helps") from error


def _require_size(model: nn.Module, image: Tensor) -> None:
    """Images of this size reach the model's end: what a router or a pool cannot take is found before the first batch.

    Scores that are no numbers are the first step's to report, which knows the batch and keeps it."""
    with torch.no_grad(), undisturbed(model), suppress(NonFiniteRouterError):
        model(image)


def _compile(model: nn.Module) -> None:
    """In place. There is a graph for each of the ways in which a method's forwards differ (mode, whose gradients are
    wanted, whether an expert is shared): together maybe more than the eight that torch keeps by default."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    model.compile(dynamic=False)


def _load_weights(model: nn.Module, source: str, into: ModelConfig, setting: str = "init") -> None:
    """Begins with another run's weights; of kind upcycled with what becomes of a dense network's.

    Args:
        setting: that names the source.

    Raises:
        RunError: if they are not there or do not fit.
    """
    other, config = load_model(source)
    if routers_of(model) and not routers_of(other) and into.kind == "upcycled":
        options = {f.name: getattr(into, f.name) for f in dataclasses.fields(RouterOptions)}
        assert into.router is not None and into.gate is not None
        other = upcycle(other, into.num_experts, into.ratio, into.router, **options)
    given = other.state_dict()
    if masked_convolutions(model) and not masked_convolutions(other):
        # a network without masks: all its channels are there
        own = ("scores", "mask", "alive")
        given = {**{k: v for k, v in model.state_dict().items() if k.rpartition(".")[2] in own}, **given}
    try:
        model.load_state_dict(given)
    except RuntimeError as error:
        first = str(error).split("\n\t")[1]  # of a line for each; one may list all names
        first = first if len(first) < 300 else f"{first[:300]} …"
        theirs = "" if config is None else f" (kind {config.model.kind}, width {config.model.width or 'as it is'})"
        raise RunError(f"{setting}: the weights of {source}{theirs} do not fit this model: {first}") from error


def device_of(name: str) -> torch.device:
    """``auto`` is a CUDA device where torch sees one."""
    try:
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(auto if name == "auto" else name)
        torch.zeros(1, device=device).item()  # meta has no numbers
    except Exception as error:  # what a device that is not there raises is each backend's own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"device: expected auto or a device that torch can use here, got {name!r} ({reason})") from error
    return device


def _entropy(usage: list[float]) -> float:
    """Of the experts' shares, in nats; log N where all are used alike."""
    return sum(u * math.log(1 / u) for u in usage if u > 0)


def resolve(config: RunConfig, data: DataSet) -> RunConfig:
    """The config with what the data decides filled in."""
    mean, std = config.model.mean or data.mean, config.model.std or data.std
    apart = False
    if config.init is not None:
        network, other = load_model(config.init)
        apart = config.model.kind != "upcycled" or bool(routers_of(network))
        if other is not None and config.model.mean is None and other.model.mean and other.model.std:
            mean, std = other.model.mean, other.model.std  # of what its weights have seen
    given = [load_model(source)[1] for source in (config.standard_run, config.robust_run) if source is not None]
    seen = {(each.model.mean, each.model.std) for each in given if each is not None and each.model.mean}
    if len(seen) > 1:
        raise RunError("standard_run, robust_run: expected two that normalise images alike, got different mean or std")
    if seen and config.model.mean is None:
        mean, std = next((m, s) for m, s in seen if m and s)
    model = dataclasses.replace(
        config.model, num_classes=data.num_classes, image_size=data.image_size, mean=mean, std=std
    )
    name = config.method.name
    by_label = config.method.objective == "cross_entropy" or name in ("rt-er", "jtdmoe", *ONE_STEP)
    epsilon = data.epsilon if config.attack.epsilon is None else config.attack.epsilon
    step_size = {"free-at": epsilon, "fast-at": 1.25 * epsilon}.get(name, data.step_size)
    own_steps = 1 if name in ONE_STEP else 2
    attack = dataclasses.replace(
        config.attack,
        loss=config.attack.loss or ("ce" if by_label else "kl"),
        epsilon=epsilon,
        step_size=step_size if config.attack.step_size is None else config.attack.step_size,
        steps=own_steps if config.attack.steps is None else config.attack.steps,
    )
    routing = config.routing
    if config.model.kind in ROUTED and routing.share_epochs is None:
        # whole networks, blocks and mixed convolutions are trained apart from the start, as in their papers
        own = model.kind in (*WHOLE, *PLACED)
        can_share = not apart and not own and _can_share(dataclasses.replace(config, model=model))
        shared = config.epochs * 3 // 4 if can_share else 0
        routing = dataclasses.replace(routing, share_epochs=shared)
    threads = torch.get_num_threads() if config.threads is None else config.threads
    return dataclasses.replace(config, model=model, attack=attack, routing=routing, threads=threads)


def _doubts(config: RunConfig, model: nn.Module) -> Iterator[str]:
    """What can be trained and is hardly meant."""
    masks = [conv.mask for conv in masked_convolutions(model).values()]
    if masks and config.method.name != "at_sparse" and all(bool(mask.all()) for mask in masks):
        yield f"kind sparse: {config.method.name} removes no channel and no mask is set; at_sparse learns which to remove"
    if config.method.part != "all" and config.init is None:
        resting = "experts" if config.method.part == "routers" else "routers"
        yield f"part {config.method.part}: without init the {resting} rest as they were drawn"


def _can_share(config: RunConfig) -> bool:
    """Whether a run may begin with one shared expert: experts that can be copies, and routers that are to be trained."""
    one_gate = config.model.gate == "softmax" and config.model.top_k == 1
    copies = config.model.layout == "partition" and not one_gate
    if not copies or config.method.part != "all":
        return False
    with torch.device("meta"):
        return bool(router_parameters(build_model(config.model)))


def train(config: RunConfig, folder: str | Path, quiet: bool = False, world: World = ALONE) -> Run:
    """Trains from the start into a new run folder.

    Args:
        world: the processes that train together (:func:`advmoe.training.parallel.joined`).

    A fault before the first checkpoint leaves no run there, only its log; after Ctrl-C it can be resumed. Where torchrun
    has restarted the processes (``--max-restarts``), a run of these very settings in the folder is gone on with.

    Raises:
        ValueError: for settings or data that do not fit, and for a folder that holds a run, is in use or cannot be
            written (RunError, DataError among them).
        Interrupted, StepError, WriteError, NonFiniteLossError and its kin: see :meth:`Trainer.fit`.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = load_data(config, world)
    config = resolve(config, data)
    run = Run(folder)
    if restarted() and world.told(run.config_path.exists()):
        if run.config() != config:  # not what this command has begun
            raise RunError(f"{run.folder} holds a run of other settings; choose another --out")
        return resume(folder, quiet, world=world)
    trainer = Trainer(config, run, data, quiet, world)
    with _alone_in(run, world, new=True):
        if world.first:
            run.create(config)
        world.told()
        try:
            with _logged(run, world):
                for note in _doubts(config, trainer.model):
                    logger.warning(note)
                trainer.fit()
        except Exception:
            if world.first and not run.checkpoint().exists():  # no run yet: other settings may try the same folder
                with suppress(OSError):
                    run.config_path.unlink()
            raise
    return run


def _alone_in(run: Run, world: World, new: bool = False) -> AbstractContextManager[None]:
    """Of several processes the first holds the folder for all."""
    return run.locked(new) if world.first else nullcontext()


def _logged(run: Run, world: World) -> AbstractContextManager[Any]:
    """The first process's messages go to the run's log; what the others say is the same."""
    return run.log(logger) if world.first else nullcontext()


def resume(folder: str | Path, quiet: bool = False, data_dir: str | None = None, world: World = ALONE) -> Run:
    """Continues a run to the weights that it would have had unbroken, bit for bit on the same machine and threads.

    Args:
        data_dir: where the data is now, if not where it was; kept in the run's config.
        world: the processes that train together; as many as the run had, if it is to end with the same weights.

    Raises:
        RunError: if there is no run, or if another process trains it. Otherwise as :func:`train`.
    """
    run = Run(folder)
    run.config()  # a folder without it is none to hold
    try:
        with _alone_in(run, world):
            _continue(run, quiet, data_dir, world)
    except KeyboardInterrupt as error:  # before the first step
        if run.checkpoint().exists():
            raise Interrupted(run.folder) from error
        raise
    return run


def _continue(run: Run, quiet: bool, data_dir: str | None, world: World) -> None:
    config = run.config()
    if data_dir is not None:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, folder=data_dir))
    data = load_data(config, world)
    if data_dir is not None and world.first:
        config.save(run.config_path)  # for what comes after this command too
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    begun = run.checkpoint().exists()
    require_own_code(without_sources(config) if begun else config, run.config_path)
    # a checkpoint holds the weights; those that the run began with may be gone by now
    trainer = Trainer(without_sources(config) if begun else config, run, data, quiet, world)
    if begun:
        restore(trainer, load_checkpoint(run.checkpoint()), run.checkpoint())
    if world.first:
        run.cut_metrics(trainer.epoch)
        if trainer.epoch >= config.epochs:
            logger.info("%s has all of its %d epochs: nothing is trained", run.folder, config.epochs)
    with _logged(run, world):
        trainer.fit()


def restore(trainer: Trainer, state: dict[str, Any], source: Path) -> None:
    """
    Raises:
        RunError: if the state, of the file ``source``, is not one of this trainer's settings.
    """
    try:
        trainer.load_state_dict(state)
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise RunError(f"{source} does not fit {trainer.run.config_path}: {error}") from error


def without_sources(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, init=None, standard_run=None, robust_run=None)


def load_data(config: RunConfig, world: World = ALONE) -> DataSet:
    """The data set that a run is trained on; the first process reads it first, and may leave something for the others."""
    d = config.data
    with world.leading():
        return load(d.name, d.folder, d.train_limit, d.test_limit, d.validation, config.seed)


@contextmanager
def _ctrl_c(several: bool = False) -> Iterator[Any]:
    """Lets a step finish: the first Ctrl-C, or SIGTERM, which schedulers send, is noted and asked for; a second Ctrl-C
    raises as ever.

    Args:
        several: processes that torchrun ends by SIGTERM when one is lost: behind an error it is ignored.

    Where the process was started to ignore it, as a shell script's background jobs are, it goes on doing so.
    """
    seen = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen = True

    signals = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    try:
        before = {number: signal.signal(number, note) for number in signals}
    except ValueError:  # not in the main thread: whoever runs us handles signals
        before = {}
    try:
        yield lambda: seen
    except BaseException:
        if several and signal.SIGTERM in before:  # there is something to be said, and torchrun may send it at any time
            before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
