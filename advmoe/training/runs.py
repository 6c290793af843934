# SPDX-License-Identifier: Apache-2.0
"""A run is a folder: config.yaml, metrics.jsonl, last.pt, best.pt, log.txt; while it is trained also a file lock."""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ModelConfig, RunConfig
from ..files import WriteError, add_line, open_own, write_text, write_whole
from ..locks import locked
from ..models import MODEL_OPTIONS, create_model
from ..registry import imported, shown
from ..stored import load_weights, read_stored, require_version

__all__ = ["Run", "RunError", "build_model", "load_checkpoint", "load_model"]

FORMAT = 1


class RunError(ValueError):
    """A run folder or checkpoint is missing, damaged or of another format."""


class Run:
    """The folder of one run. Files are written whole under a temporary name and then renamed, and are on the disk before
    what depends on them is written."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def config_path(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def fault_path(self) -> Path:
        return self.folder / "fault.pt"

    def checkpoint(self, name: str = "last") -> Path:
        return self.folder / f"{name}.pt"

    def create(self, config: RunConfig) -> None:
        """Makes the folder.

        Raises:
            RunError: if it holds a run already, or cannot be made.
        """
        try:
            if self.config_path.exists():
                raise RunError(f"{self.folder} holds a run already; choose another --out, or continue it with --resume")
            self.folder.mkdir(parents=True, exist_ok=True)
            self.fault_path.unlink(missing_ok=True)  # of a run that has failed here
            config.save(self.config_path)  # first of all: a folder without it is no run
        except OSError as error:
            with contextlib.suppress(OSError):  # it may be there, where only the folder could not be synchronised
                self.config_path.unlink(missing_ok=True)
            raise RunError(f"{self.folder} cannot be written: {error.strerror}; choose another --out") from error

    @contextlib.contextmanager
    def locked(self, new: bool = False) -> Iterator[None]:
        """Keeps other processes from training here meanwhile, also on other machines where their file system has locks.

        Args:
            new: makes the folder, if it is not there.

        Raises:
            RunError: if one does, or if nothing can be written here.
        """
        with contextlib.ExitStack() as stack:
            try:
                if new:
                    self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.folder / "lock"))
            except BlockingIOError as error:
                rest = "wait for its end, or choose another --out" if new else "wait for its end"
                raise RunError(f"{self.folder} is in use by {error.strerror}; {rest}") from error
            except OSError as error:
                raise RunError(str(WriteError(self.folder, error, "or choose another --out" if new else ""))) from error
            written = (self.config_path, self.metrics_path, self.checkpoint(), self.checkpoint("best"))
            left = [path.with_name(path.name + ".tmp") for path in written]
            for path in (*left, *self.folder.glob("fault.pt.*.tmp")):  # by a process that was killed meanwhile
                path.unlink(missing_ok=True)
            yield

    def config(self) -> RunConfig:
        if not self.config_path.is_file():
            raise RunError(f"{self.folder} is no run: it has no config.yaml")
        return RunConfig.load(self.config_path)

    def save(self, state: dict[str, Any], name: str = "last") -> None:
        """Writes a checkpoint: whole, or not at all.

        Raises:
            WriteError: if that fails.
        """
        write_whole(self.checkpoint(name), lambda file: torch.save({"format": FORMAT, **state}, file))

    def save_fault(self, fault: dict[str, Any], rank: int = 0) -> None:
        """Writes what a step that failed is made again from; each of several processes may.

        Raises:
            WriteError: if that fails.
        """
        write_whole(self.fault_path, lambda file: torch.save({"format": FORMAT, **fault}, file), f".{rank}.tmp")

    def metrics(self) -> list[dict[str, Any]]:
        """
        Raises:
            RunError: if a line is no mapping.
        """
        if not self.metrics_path.exists():
            return []
        whole, _, _ = self.metrics_path.read_text(errors="replace").rpartition("\n")  # a line without its end was torn
        lines = [line for line in whole.splitlines() if line.strip()]
        found = []
        for number, line in enumerate(lines, 1):
            try:
                found.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise RunError(f"{self.metrics_path}, line {number}: cannot be read: {error}") from error
            if not isinstance(found[-1], dict):
                raise RunError(f"{self.metrics_path}, line {number}: expected a mapping, got {shown(found[-1])}")
        return found

    def add_metrics(self, line: dict[str, Any]) -> None:
        add_line(self.metrics_path, json.dumps(line))

    def cut_metrics(self, epochs: int) -> None:
        """Keeps the first epochs' lines: what a checkpoint knows of."""
        # as text: a line behind the checkpoint may be torn, if the machine went down while it was written
        lines = self.metrics_path.read_text(errors="replace").splitlines()[:epochs] if self.metrics_path.exists() else []
        write_text(self.metrics_path, "".join(line + "\n" for line in lines))

    @contextlib.contextmanager
    def log(self, logger: logging.Logger) -> Any:
        """Copies the logger's messages to log.txt meanwhile, also where nobody has configured logging."""
        path = self.folder / "log.txt"
        try:
            handler = _LogFile(path)
        except OSError as error:
            raise WriteError(path, error) from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(handler)
        level = logger.level
        if level == logging.NOTSET and not logger.isEnabledFor(logging.INFO):
            logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # said already
                handler.close()


class _LogFile(logging.FileHandler):
    """Says once where it cannot be written, and lets the run go on."""

    _failed = False

    def _open(self) -> io.TextIOWrapper:
        return open(self.baseFilename, "a", encoding="utf-8", opener=open_own)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            print(f"advmoe: {WriteError(Path(self.baseFilename), error)}", file=sys.stderr)


def require_own_code(config: ModelConfig | RunConfig, where: str | Path) -> None:
    """That what a file names as ``module:name`` may be imported. A run folder of someone else's is data: a module's own
    code would run, and be looked for in the working folder too. So the environment's ADVMOE_IMPORT has to name the module
    (several with commas between them), unless it is a router's and has been imported already.

    Raises:
        RunError: if it may not.
    """
    model = config.model if isinstance(config, RunConfig) else config
    named = [model.router] if model.router and model.router.partition(":")[0] not in sys.modules else []
    if isinstance(config, RunConfig):  # functions, which are called too
        sources = (config.init, config.standard_run, config.robust_run)
        named += [source for source in sources if source and not Path(source).exists()]
    allowed = os.environ.get("ADVMOE_IMPORT", "").split(",")
    for name in named:
        module, colon, _ = name.partition(":")
        if colon and module not in allowed:
            raise RunError(
                f"{where}: names code, {name}, which is imported for a file only if you trust it: set "
                f"ADVMOE_IMPORT={module} in the environment"
            )


def build_model(config: ModelConfig) -> nn.Module:
    """The model of a resolved config.

    Raises:
        ValueError: for settings that do not fit each other.
        RunError: if there is no memory for it.
    """
    options = {name: getattr(config, name) for name in MODEL_OPTIONS.get(config.kind, ())}
    try:
        return _create(config, options)
    except (RuntimeError, MemoryError, OverflowError) as error:  # sizes; one that torch cannot say is any of them
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"model: there is no memory for one of these settings ({first[:200]})") from error


def _create(config: ModelConfig, options: dict[str, Any]) -> nn.Module:
    return create_model(
        config.arch,
        config.kind,
        num_classes=10 if config.num_classes is None else config.num_classes,
        image_size=32 if config.image_size is None else config.image_size,
        num_experts=config.num_experts,
        ratio=config.ratio,
        width=config.width,
        layout=config.layout,
        router=config.router,
        normalize=config.normalize,
        **options,
    )


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, read with ``weights_only=True``; what is in it is of the right kinds.

    Raises:
        RunError: if it is missing, damaged or of another format.
    """
    if not path.is_file():
        raise RunError(f"{path}: there is no such checkpoint")
    try:
        state = read_stored(path)
    except ValueError as error:
        raise RunError(f"{path} cannot be read as a checkpoint: {error}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise RunError(f"{path}: expected a checkpoint of format {FORMAT}, got none")
    try:
        require_version(state["format"], FORMAT, str(path))
    except ValueError as error:
        raise RunError(str(error)) from error
    require_kinds(state, path)
    return state


def require_kinds(state: Mapping[str, Any], path: Path) -> None:
    """
    Raises:
        RunError: if something in a checkpoint's state is of another kind than a run writes.
    """
    for name, (what, fits) in _KINDS.items():
        if name in state and not fits(state[name]):
            raise RunError(f"{path}: {name}: expected {what}, got {shown(state[name])}")


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and -(2.0**63) < value < 2.0**63  # NaN compares false


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _generator(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.uint8


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "model": ("a mapping of weights", lambda v: isinstance(v, Mapping)),
    "optimizers": ("a mapping", lambda v: isinstance(v, dict)),
    "batches": ("a list of mappings", lambda v: isinstance(v, list) and all(isinstance(x, dict) for x in v)),
    "torch_rng": ("a generator's state", _generator),
    "device_rng": ("a generator's state or none", lambda v: v is None or _generator(v)),
    "epoch": ("a whole number of at least 0", _count),
    "step": ("a whole number of at least 0", _count),
    "sums": (
        "finite numbers by name",
        lambda v: isinstance(v, dict) and all(type(k) is str and _finite(x) for k, x in v.items()),
    ),
    "seconds": ("a finite number", _finite),
    "best": ("a finite number", _finite),
    "method": ("a mapping", lambda v: isinstance(v, dict)),
}


def load_model(source: str | Path, checkpoint: str = "best") -> tuple[nn.Module, RunConfig | None]:
    """A model in eval mode from a run folder, a checkpoint file, or ``module:function`` returning an nn.Module (then
    without config). ``module`` is imported, from the working folder too; a router ``module:Class`` of a run's config only
    where :func:`require_own_code` lets it.

    Raises:
        RunError: if there is nothing of the kind.
    """
    path = Path(source)
    if path.is_dir():
        run = Run(path)
        ours = run.config()
        path = run.checkpoint(checkpoint)
        if not path.exists() and checkpoint == "best" and run.checkpoint("last").exists():
            done, before = len(run.metrics()), ours.method.pretrain_epochs + ours.method.mask_epochs
            before = max(before, ours.routing.share_epochs or 0)
            why = "no epoch has been validated yet"
            if done:
                why = "it is not there"
            if 0 < done <= before:
                why = f"the best is chosen behind the first {before} epochs, which share experts or learn a mask"
            raise RunError(f"{path}: {why}; evaluate the last state with --checkpoint last")
        if not path.exists():
            raise RunError(f"{path}: the run has no such checkpoint yet")
    if not path.is_file():
        module, _, function = str(source).partition(":")
        if function and "/" not in module:
            return _from_function(str(source)), None
        raise RunError(f"{source}: expected a run folder, a checkpoint file or module:function")
    if path.suffix == ".py":
        raise RunError(
            f"{source}: expected a run folder, a checkpoint file or module:function, such as {path.stem}:model"
        )
    config = Run(path.parent).config()
    require_own_code(config.model, path.parent / "config.yaml")
    model = build_model(config.model)
    state = load_checkpoint(path)
    try:
        load_weights(model, state.get("model"))
    except ValueError as error:
        raise RunError(f"{path} does not fit the model of {path.parent / 'config.yaml'}: {error}") from error
    model.eval()
    return model, config


def _from_function(name: str) -> nn.Module:
    try:
        function = imported(name)
    except ValueError as error:
        raise RunError(str(error)) from error
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise RunError(f"{name}: expected a function that is called without arguments: {error}") from error
    except ValueError:  # it does not say what it takes
        pass
    try:
        model = function()
    except Exception as error:
        raise RunError(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise RunError(f"{name} returned {type(model).__name__}, expected an nn.Module")
    model.eval()
    return model
