# SPDX-License-Identifier: Apache-2.0
"""The settings of a run: small frozen rooms, one file. Defaults are AdvMoE's paper's recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import yaml

from .files import write_text
from .models.base import default_gate, default_router, read_gate
from .objectives import BALANCE_LOSSES
from .registry import shown, unknown_name

__all__ = ["AttackConfig", "DataConfig", "MethodConfig", "ModelConfig", "OptimConfig", "RoutingConfig", "RunConfig"]

METHODS = ("standard", "at", "free-at", "fast-at", "at_sparse", "advmoe", "rt-er", "jtdmoe")
ALIASES = {"rt_er": "rt-er", "free_at": "free-at", "fast_at": "fast-at"}  # of methods
ONE_STEP = ("free-at", "fast-at")  # methods whose attack is one step along one gradient
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("sgd", "adam")
SCHEDULES = ("cosine", "cyclic", "polynomial")
ROBUST_EXPERTS = ("second", "another", "all")
_LARGEST = 1 << 20  # bytes of a file
_MOST = 1024  # threads, processes or experts


@dataclass(frozen=True)
class ModelConfig:
    """What goes to ``create_model``, whose own defaults stand for a router or gate of None; mean and std of the data set
    are resolved at the start of a run."""

    arch: str = "resnet18"
    kind: str = "moe"
    num_experts: int = 2
    ratio: float = 0.5
    width: int | None = None
    layout: str = "partition"
    router: str | None = None
    route_per: str | None = None
    moe_at: tuple[int | str, ...] | None = None
    bn: str | None = None
    gate: str | None = None
    gate_after: str = "conv"
    temperature: float = 1.0
    noise: float = 0.0
    standardize: bool | None = None
    top_k: int = 1
    capacity: float | None = None
    mix: str = "logits"
    frozen_router: bool = False
    stem: str | None = None
    normalize: bool = True
    num_classes: int | None = None
    image_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    alpha: float = 0.7
    dual_on: str = "logits"

    def __post_init__(self) -> None:
        if self.num_experts > _MOST:
            raise ValueError(f"num_experts: expected at most {_MOST}, got {self.num_experts}")
        for name, asked in zip(("router", "gate"), read_gate(self.kind, self.router, self.gate), strict=True):
            object.__setattr__(self, name, asked)
        for name, value in (("router", default_router(self.kind)), ("gate", default_gate(self.top_k))):
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


@dataclass(frozen=True)
class DataConfig:
    """Which images, and what training does to them: moved and mirrored, where ``augment`` is True, as the data set has
    it, or by up to ``shift`` pixels; brightness, contrast, saturation and hue drawn anew, by up to ``color_jitter`` each
    (:func:`advmoe.data.color_jitter`; 0: as they are); a square of ``cutout`` pixels' side becomes the data's mean (0:
    none)."""

    name: str = "digits"
    folder: str | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    validation: int = 500
    augment: bool = True
    shift: int | None = None
    cutout: int = 0
    workers: int | None = None  # processes that decode images ahead; for images in files one for each core but one
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers: expected at least 0, got {self.workers}")
        if self.workers is not None and self.workers > _MOST:
            raise ValueError(f"workers: expected at most {_MOST}, got {self.workers}")
        _require(self, ("shift", "cutout"))
        if not 0 <= self.color_jitter <= 0.5:  # hues are a circle: half of it is all of them
            raise ValueError(f"color_jitter: expected a number from 0 to 0.5, got {self.color_jitter}")
        if not self.augment and (self.cutout or self.color_jitter or self.shift is not None):
            name = "cutout" if self.cutout else "color_jitter" if self.color_jitter else "shift"
            raise ValueError(f"{name}: without effect with augment False")


@dataclass(frozen=True)
class AttackConfig:
    """The attack in training; epsilon and step_size in units of the pixel range, the data set's own by default (8/255 and
    5/255 for CIFAR-10); two steps by default; loss by default what goes with the objective: KL for TRADES, cross-entropy
    for PGD-AT.

    Methods free-at and fast-at take one step, by default of epsilon and of 1.25 epsilon, and no other loss than
    cross-entropy."""

    epsilon: float | None = None
    step_size: float | None = None
    steps: int | None = None
    loss: str | None = None
    random_start: bool | str = True

    def __post_init__(self) -> None:
        _require(self, ("epsilon", "step_size"))


@dataclass(frozen=True)
class OptimConfig:
    """SGD with a cosine schedule to 0, stepped every batch; the routers' own rate is the backbone's by default.

    Args:
        lr: the highest rate of the schedule.
        momentum: of SGD; Adam's first beta (the second is 0.999).
        weight_decay: added to the gradient, of both optimisers.
        accumulate: parts of a batch that go through the model one after the other, attack included; each has batch
            statistics of its own.
        precision: of forwards in training, ``float32`` or ``bfloat16`` (autocast); routers, losses and weights are
            float32.
        compile: the model's forward in training and its attacks goes through ``torch.compile``; for one process, and
            without settings that look at the routers of each forward. Results differ in the last digits.
        optimizer: ``sgd`` or ``adam``, for which see :meth:`cyclic_adam`.
        schedule: ``cosine``, or ``cyclic``: a triangle from ``low_lr`` (half of ``lr`` by default) to ``lr`` and back,
            ``cycle_steps`` steps each way, over and over (Smith 2017); or ``polynomial``: ``lr * (1 - t) ** power``, t
            from 0 to 1 over the run. The routers' own rate goes along.
        nesterov: SGD's momentum in Nesterov's form.
    """

    lr: float = 0.1
    router_lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    freeze_unused: bool = False
    accumulate: int = 1
    precision: str = "float32"
    compile: bool = False
    optimizer: str = "sgd"
    schedule: str = "cosine"
    low_lr: float | None = None
    cycle_steps: int = 500
    nesterov: bool = False
    power: float = 0.9

    def __post_init__(self) -> None:
        _require(self, ("lr", "router_lr", "weight_decay", "low_lr", "power"))
        for name, known in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        if self.low_lr is not None and (self.schedule != "cyclic" or self.low_lr > self.lr):
            what = "with schedule 'cyclic'" if self.schedule != "cyclic" else f"at most lr, {self.lr:g}"
            raise ValueError(f"low_lr: expected one {what}, got {self.low_lr:g}")
        if self.power != type(self).power and self.schedule != "polynomial":
            raise ValueError(f"power: without effect with schedule {self.schedule!r}")
        if self.nesterov and (self.optimizer != "sgd" or not self.momentum):
            what = "a momentum above 0" if self.optimizer == "sgd" else f"optimizer 'sgd', got {self.optimizer!r}"
            raise ValueError(f"nesterov: needs {what}")
        if self.cycle_steps < 1:
            raise ValueError(f"cycle_steps: expected at least 1, got {self.cycle_steps}")
        if self.precision not in PRECISIONS:
            raise unknown_name("precision", self.precision, PRECISIONS)
        if self.accumulate < 1:
            raise ValueError(f"accumulate: expected at least 1, got {self.accumulate}")
        _require(self, ("momentum",), below=1)

    @classmethod
    def cyclic_adam(cls, **others: Any) -> OptimConfig:
        """RT-ER's released recipe: Adam, 5e-5 to 1e-4 and back in 1000 steps, without weight decay."""
        given: dict[str, Any] = {"lr": 1e-4, "weight_decay": 0.0, "optimizer": "adam", "schedule": "cyclic"}
        return cls(**{**given, **others})


@dataclass(frozen=True)
class RoutingConfig:
    """What keeps routers alive in training; settings of a model with routers only.

    Args:
        balance: ``none`` or a loss of :func:`advmoe.objectives.balance_loss`, added with ``balance_weight`` wherever
            routers are trained, as the mean over all choices of the step's training forwards.
        experts: ``apart``, or ``alike``: all experts begin as copies of the first.
        share_epochs: for the first so many epochs every sample trains the first expert, and the others are its copies:
            the shared part of learning is done once, and routing begins with alike experts. None: three quarters of the
            epochs where routers are trained and experts can be copies of each other (layout partition) and are,
            unless ``init`` has trained them apart, else 0; docs/routing.md says why.
    """

    balance: str = "none"
    balance_weight: float = 0.1
    experts: str = "apart"
    share_epochs: int | None = None

    def __post_init__(self) -> None:
        for name, known in (("balance", ("none", *BALANCE_LOSSES)), ("experts", ("apart", "alike"))):
            if getattr(self, name) not in known:
                raise unknown_name(name, getattr(self, name), known)
        _require(self, ("balance_weight", "share_epochs"))
        if self.balance == "none" and self.balance_weight != type(self).balance_weight:
            raise ValueError("balance_weight: without effect with balance 'none'")


@dataclass(frozen=True)
class MethodConfig:
    """``standard`` (no attack), ``at`` (adversarial training, routers and backbone together), ``free-at`` and
    ``fast-at`` (the same with one gradient for each image; ``free_at`` and ``fast_at`` are the same), ``at_sparse``
    (HYDRA's structured mask, on kind sparse), ``advmoe`` (Algorithm 1), ``rt-er`` (on kind network_moe; ``rt_er`` is the
    same), ``jtdmoe`` (on kind dual_moe).

    Args:
        objective: of at, at_sparse and advmoe: ``trades``, or ``cross_entropy`` on adversarial images (PGD-AT).
        beta: TRADES' weight; RT-ER's.
        order, batches, router_objective, attack_routers: Algorithm 1 as printed by default (``router_first``, ``two``,
            ``trades``, False); ``backbone_first``, ``one``, ``pseudo_label``, True are what the released code does.
        share_attack: of advmoe: one batch and one attack for both levels.
        router_every: of advmoe: the lower level in every so many steps.
        part: of at: ``all``, ``routers`` (the backbone rests) or ``experts`` (all but the routers).
        pretrain_epochs, mask_epochs: of at_sparse; the remaining epochs fine-tune.
        robust_experts: of rt-er and jtdmoe: which experts are made robust besides the mixture: each sample's ``second``
            by the router's clean scores, ``another`` than its first, drawn at random, or ``all`` (as the released code of
            JTDMoE has it).
        replays: of free-at: steps that each batch makes, one behind the other.
        reset_noise: of free-at: how likely the perturbation begins at 0 again with a batch.
        keep_start: of fast-at: the step goes from the random start, where its gradient is taken; False: from the image.
    """

    name: str = "advmoe"
    objective: str = "trades"
    beta: float = 6.0
    order: str = "router_first"
    batches: str = "two"
    router_objective: str = "trades"
    router_alpha: float = 6.0
    attack_routers: bool = False
    share_attack: bool = False
    router_every: int = 1
    part: str = "all"
    pretrain_epochs: int = 0
    mask_epochs: int = 0
    robust_experts: str = "second"
    replays: int = 4
    reset_noise: float = 0.0
    keep_start: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", ALIASES.get(self.name, self.name))
        for name, known in (
            ("name", METHODS),
            ("objective", ("trades", "cross_entropy")),
            ("order", ("router_first", "backbone_first")),
            ("batches", ("two", "one")),
            ("router_objective", ("trades", "pseudo_label")),
            ("part", ("all", "routers", "experts")),
            ("robust_experts", ROBUST_EXPERTS),
        ):
            if getattr(self, name) not in known:
                raise unknown_name("method" if name == "name" else name, getattr(self, name), known)
        _require(self, ("beta", "router_alpha", "pretrain_epochs", "mask_epochs"))
        for name in ("router_every", "replays"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 <= self.reset_noise <= 1:
            raise ValueError(f"reset_noise: expected a number from 0 to 1, got {self.reset_noise}")

    @classmethod
    def as_released(cls, **others: Any) -> MethodConfig:
        """AdvMoE as its released code trains it: one batch, the backbone first, the routers by a pseudo-label."""
        return cls(
            "advmoe", order="backbone_first", batches="one", router_objective="pseudo_label", attack_routers=True,
            **others,
        )  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's weights, and how they are looked at on the way."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    attack: AttackConfig = field(default_factory=AttackConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    init: str | None = None  # a run or checkpoint whose weights to begin with
    standard_run: str | None = None  # of kind dual_moe: a run or checkpoint of its standard MoE, and of its robust one
    robust_run: str | None = None
    epochs: int = 100
    batch_size: int = 128
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    validation_attack: str = "pgd10"
    tensorboard: bool = False  # the epochs' metrics as scalars in RUN/tensorboard too

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.threads is not None and self.threads > _MOST:
            raise ValueError(f"threads: expected at most {_MOST}, got {self.threads}")
        if self.batch_size % self.optim.accumulate:
            raise ValueError(
                f"accumulate: expected a divisor of the batch size {self.batch_size}, got {self.optim.accumulate}"
            )
        shared = self.routing.share_epochs
        if shared and shared >= self.epochs:
            raise ValueError(f"share_epochs: expected less than the {self.epochs} epochs, got {shared}")
        m = self.method
        watching = {
            "balance": self.routing.balance != "none",
            "freeze_unused": self.optim.freeze_unused,
            "attack_routers": m.attack_routers,
            "router_objective": m.router_objective != "trades",
            "at_sparse": m.name == "at_sparse",
            "jtdmoe": m.name == "jtdmoe",
        }
        if self.optim.compile and any(watching.values()):
            name = next(name for name, given in watching.items() if given)
            raise ValueError(f"compile: not with {name}, which looks into the model's forwards")
        for name in ("standard_run", "robust_run"):
            if getattr(self, name) is not None and (self.model.kind != "dual_moe" or self.init is not None):
                why = "with init" if self.init is not None else f"with kind {self.model.kind!r}"
                raise ValueError(f"{name}: one of the two MoEs of kind dual_moe begins with it, got it {why}")
        phases = self.method.pretrain_epochs + self.method.mask_epochs
        if phases > self.epochs:
            raise ValueError(f"pretrain_epochs + mask_epochs: expected at most the {self.epochs} epochs, got {phases}")

    def save(self, path: Path) -> None:
        write_text(path, yaml.safe_dump(_plain(self), sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> RunConfig:
        """Reads a ``config.yaml``.

        Raises:
            ValueError: if it is not YAML, has a key that no setting has, or a value of another type; in one line.
        """
        return read_room(cls, read_yaml(path), str(path))


class _OneOfEach(yaml.SafeLoader):
    """Plain values alone, and no key twice: the last one would win unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ValueError(f"the key {shown(key.value)} is there twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> Any:
    """The plain values of a file.

    Raises:
        ValueError: if it is not YAML, or names anything else.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"expected at most {_LARGEST} bytes")
        return yaml.load(path.read_text(), _OneOfEach)
    except RecursionError as error:
        raise ValueError(f"{path}: not YAML: it is too deep") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # PyYAML raises nearly anything for a tag whose value does not fit
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not YAML: {reason[:300] or type(error).__name__}") from error


def _require(room: object, names: tuple[str, ...], below: float = math.inf) -> None:
    """That these settings are numbers from 0 on, or None."""
    for name in names:
        value = getattr(room, name)
        if value is not None and not 0 <= value < below:  # NaN is not, either
            expected = "a finite number of at least 0" if below == math.inf else f"a number from 0 to below {below:g}"
            raise ValueError(f"{name}: expected {expected}, got {value}")


T = TypeVar("T")


_ROOMS = {
    "model": ModelConfig,
    "data": DataConfig,
    "attack": AttackConfig,
    "optim": OptimConfig,
    "method": MethodConfig,
    "routing": RoutingConfig,
}


def _plain(config: Any) -> Any:
    if dataclasses.is_dataclass(config):
        return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    return list(config) if isinstance(config, tuple) else config


def read_room(cls: type[T], values: Any, where: str) -> T:
    """A room of settings from a plain mapping; ``where`` names it in messages.

    Raises:
        ValueError: for a key that no setting has, or a value of another type.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected a mapping of settings, got {type(values).__name__}")
    known = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    types = typing.get_type_hints(cls)
    arguments = {}
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"{where}: setting", key, known)
        room = _ROOMS.get(key) if cls is RunConfig else None
        read = _typed if room is None else read_room
        arguments[key] = read(room or types[key], value, f"{where}: {key}")
    return cls(**arguments)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """The value as the setting's type has it: a whole number where a float is meant, and the text "1e-4", which YAML 1.1
    does not read as a number, become floats; a list becomes a tuple."""
    for kind in typing.get_args(hint) if isinstance(hint, UnionType) else (hint,):
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError, OverflowError):
                return float(value)
        elif typing.get_origin(kind) is tuple and isinstance(value, list):
            return tuple(_typed(typing.get_args(kind)[0], each, where) for each in value)
        elif kind is int and type(value) is int and abs(value) >> 63:
            raise ValueError(f"{where}: expected a number of at most 63 bits, got {shown(value)}")
        elif isinstance(kind, type) and type(value) is kind:
            return value
    raise ValueError(f"{where}: expected {hint.__name__ if isinstance(hint, type) else hint}, got {shown(value)}")
