# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.gpu --json FILE``: the tests and the figures of a GPU, in one command and under eight minutes.

Builds the native module with the CUDA kernels for this device where it has none and there is an nvcc (Triton needs no
module), runs ``tests/gpu`` with each backend while other processes compile the Triton kernels that will be timed, then
measures both backends, most wanted first: layers against cuDNN at one expert's width (the floor), the dense layer, all
experts with a mask, and a loop over experts; whole models and training steps against dense ones.

Functions of one case are timed in turn, round by round, by CUDA events. Each call of a timing has an input of its own,
and before each timing the L2 cache is overwritten. ``eager`` is what a program waits for, launches included; ``graph`` is
the same calls as one CUDA graph: the device's time. Printed are ratios of medians; what the budget has no time for is
named. With ``--device cpu --quick`` the same code runs on tiny shapes, with the CPU's kernels in Triton's place and the
simulator in CUDA's: a rehearsal, whose figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_kernels
from advmoe.models import create_model, list_models, record_routing
from advmoe.routers import Router
from advmoe.tables import table
from moe_kernels import BackendUnavailable, backends, fuse, use_backend
from moe_kernels.backends import native

from .contenders import SHAPES, ComputeAllAndMask, Dense, Floor, IndexSelect, Routed, Shape
from .timing import geometric_mean

__all__ = ["Budget", "Clock", "main", "measure_layer", "measure_models", "summarize_layers", "table_for_auto"]

ROOT = Path(__file__).resolve().parents[1]
EXPERTS = 2
WIDE_SHAPES = (Shape(80, 80, 32, 1), Shape(160, 160, 16, 1), Shape(320, 320, 8, 1))  # WRN-28-10's at r = 0.5
LAYER_BATCHES = (128, 1024, 512, 8, 1)  # in the order of measuring
MODEL_BATCHES = (128, 1024, 1, 32, 512)
TRAIN_BATCHES = (512, 128)
KINDS = ("dense", "s_dense")  # beside "moe" with each backend
DIRECTIONS = ("forward", "grad_input", "train")
BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpu", "cuda_sim")}  # by the device's type; the latter: a rehearsal
# "routed" is the backend that "auto" takes, "moe" a model with it, and "fused" what moe_kernels.fuse makes of that.
TARGETS = {
    "layers, bf16 forward, B >= 128, graph: routed/floor": ("at most", 1.15),
    **{f"layers, bf16 {d}, B >= 128, graph: cuda/floor": ("at most", 1.3) for d in DIRECTIONS},
    **{f"layers, bf16 {d}, B <= 16, eager: cuda/triton": ("below", 1.0) for d in DIRECTIONS},
    "resnet18 inference, B = 128, graph: dense/moe": ("at least", 1.7),
    "resnet18 inference, B = 1024, graph: dense/moe": ("at least", 2.0),
    "resnet18 training step, B = 512, graph: dense/moe": ("at least", 1.5),
    "resnet18 inference, B = 128, graph: dense compiled/fused": ("at least", 2.0),
    "resnet18 inference, B = 1024, graph: dense compiled/fused": ("at least", 2.5),
}
Row = dict[str, Any]
# RuntimeWarning: main() makes an error of the library's warning that a call runs in its slow loop
_FAULTS = (RuntimeError, ValueError, RuntimeWarning)


# Beside Routed with each backend.
CONTENDERS: dict[str, type[Any]] = {
    "floor": Floor,
    "dense": Dense,
    "all and mask": ComputeAllAndMask,
    "loop": IndexSelect,
    "floor again": Floor,  # how far the same function is from itself
}
_NO_GRAPH = ("loop",)  # asks the device how many samples each expert has
# (at most so many samples, the class's name): what "auto" could tell apart
_BATCH_CLASSES = ((1, "1"), (16, "2 .. 16"), (128, "17 .. 128"), (sys.maxsize, "129 .."))


class Budget:
    """Seconds of wall clock, and what was left out for want of them."""

    def __init__(self, seconds: float, start: float | None = None) -> None:
        self.start = time.monotonic() if start is None else start
        self.seconds = seconds
        self.left_out: list[str] = []

    def spent(self) -> float:
        return time.monotonic() - self.start

    def left(self) -> float:
        return self.seconds - self.spent()

    def allows(self, what: str, seconds: float = 0.0) -> bool:
        """Whether more than ``seconds`` are left; what does not fit is written down."""
        if self.left() > seconds:
            return True
        self.left_out.append(what)
        return False


class Clock:
    """Times calls on one device: by events on CUDA, by the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self.cache_bytes = 1 << 16
        if self.cuda:
            self.cache_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(2 * self.cache_bytes, dtype=torch.int8, device=device)
        self._stream = torch.cuda.Stream(device) if self.cuda else None

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """One stream for all: autograd runs a backward where its forward ran, and the default one cannot be captured."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def copies(self, size: int, most: int) -> int:
        """How many inputs of ``size`` bytes one timing reads: twice the cache in all, 2 at least and ``most`` at most."""
        return max(2, min(most, math.ceil(2 * self.cache_bytes / max(size, 1))))

    def seconds(self, call: Callable[[], object]) -> float:
        """One timing; nothing that it reads is in the cache. The writing also gives the host time to launch ahead."""
        self._flush.zero_()
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def paired(self, calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """Seconds of each call, ``rounds`` times in turn, after one untimed call each."""
        for call in calls.values():
            call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(self.seconds(call))
        return times

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        """``call`` as a CUDA graph. It has run before: kernels are compiled, cuDNN has chosen, optimizers have state."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            call()
        return graph.replay


@dataclasses.dataclass(frozen=True)
class Scope:
    """What is measured, and how often."""

    shapes: tuple[Shape, ...] = SHAPES + WIDE_SHAPES
    layer_batches: tuple[int, ...] = LAYER_BATCHES
    model_batches: tuple[int, ...] = MODEL_BATCHES
    train_batches: tuple[int, ...] = TRAIN_BATCHES
    width: int | None = None  # of the models
    image_size: int = 32
    rounds: int = 9
    copies: int = 32  # at most so many inputs a timing of a layer
    model_copies: int = 4

    @classmethod
    def of(cls, device: torch.device, quick: bool) -> Scope:
        if device.type != "cuda":
            tiny = (Shape(8, 4, 8, 1), Shape(4, 8, 8, 2))
            return cls(tiny, (2,), (2,), (4,), width=8, image_size=8, rounds=3, copies=2, model_copies=2)
        return cls(SHAPES[::4], (128,), (128,), (128,), rounds=3) if quick else cls()


def _row(times: Sequence[float], calls: int, **of: Any) -> Row:
    """Median and quartiles, in microseconds of one call."""
    each = [t / calls * 1e6 for t in times]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
    return {**of, "n": len(each), "median_us": middle, "low_us": low, "high_us": high}


def _timed(
    clock: Clock, functions: dict[str, Callable[[], object]], calls: int, rounds: int, no_graph: Sequence[str], **of: Any
) -> list[Row]:
    """Rows of the eager calls and of their graphs. A function that fails is a row that says so."""
    rows: list[Row] = []
    modes: dict[str, dict[str, Callable[[], object]]] = {"eager": {}, "graph": {}}
    for name, function in functions.items():
        mode = "eager"
        try:
            function()
            modes[mode][name] = function
            if clock.cuda and name not in no_graph:
                mode = "graph"
                modes[mode][name] = clock.capture(function)
        except _FAULTS as error:
            rows.append({**of, "contender": name, "mode": mode, "failed": _first_line(error)})
    for mode, ready in modes.items():
        for name, times in clock.paired(ready, rounds).items():
            rows.append(_row(times, calls, **of, contender=name, mode=mode))
    return rows


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


# --- layers -------------------------------------------------------------------------------------------------------------


def _dtype_name(dtype: torch.dtype) -> str:
    if dtype != torch.float32:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    return "float32 (tf32)" if torch.backends.cudnn.allow_tf32 else "float32"


def contenders(names: Sequence[str], direction: str) -> list[str]:
    """The backends, and what they are held against."""
    others = [name for name in CONTENDERS if direction != "grad_input" or CONTENDERS[name] is Floor]
    return [*names, *others]


def _with(name: str) -> contextlib.AbstractContextManager[None]:
    """The backend of that name in use, if it is one."""
    return use_backend(name) if any(name in known for known in BACKENDS.values()) else contextlib.nullcontext()


def make_layer(
    name: str, shape: Shape, batch: int, dtype: torch.dtype, direction: str, device: torch.device, copies: int
) -> Callable[[], object]:
    """A function that runs a contender on ``copies`` inputs, one after the other: forward without a gradient, the input
    gradient alone of a layer with frozen weights, or forward with the gradients of input and weight. As many samples for
    each expert, in no order."""
    torch.manual_seed(0)
    module = CONTENDERS.get(name, Routed)(shape, EXPERTS).to(device, dtype).to(memory_format=torch.channels_last)
    memory = torch.randn(copies, batch, shape.size, shape.size, module.widen * shape.in_channels, device=device)
    inputs = memory.to(dtype).permute(0, 1, 4, 2, 3).unbind(0)  # each [B, C, H, W], channels_last
    expert = (torch.arange(batch) % EXPERTS)[torch.randperm(batch)].to(device)
    if direction == "forward":
        module.eval()

        def forward() -> None:
            with torch.no_grad(), _with(name):
                for x in inputs:
                    module(x, expert)

        return forward
    leaves = [x.detach().requires_grad_() for x in inputs]
    if direction == "grad_input":
        module.eval().requires_grad_(False)
        with _with(name):
            outputs = [module(x, expert) for x in leaves]
        grad = torch.randn_like(outputs[0])

        def grad_input() -> None:
            with _with(name):
                for x, y in zip(leaves, outputs, strict=True):
                    torch.autograd.grad(y, x, grad, retain_graph=True)

        return grad_input
    with _with(name):
        dy = torch.randn_like(module(leaves[0], expert))

    def train() -> None:
        with _with(name):
            for x in leaves:
                torch.autograd.grad(module(x, expert), (x, module.weight), dy)

    return train


def measure_layer(
    clock: Clock, scope: Scope, names: Sequence[str], shape: Shape, batch: int, dtype: torch.dtype, direction: str
) -> list[Row]:
    size = batch * shape.in_channels * shape.size**2 * dtype.itemsize
    copies = clock.copies(size, scope.copies)
    of = {"section": "layers", "dtype": _dtype_name(dtype), "direction": direction, "batch": batch, "shape": str(shape)}
    functions, rows = {}, []
    for name in contenders(names, direction):
        try:
            functions[name] = make_layer(name, shape, batch, dtype, direction, clock.device, copies)
        except _FAULTS as error:  # one that fails takes no other with it
            rows.append({**of, "contender": name, "mode": "eager", "failed": _first_line(error)})
    return rows + _timed(clock, functions, copies, scope.rounds, _NO_GRAPH, **of)


def _measure_layers(clock: Clock, scope: Scope, budget: Budget, dtype: torch.dtype, direction: str, record: Row) -> None:
    rows = record["rows"]
    for batch in scope.layer_batches:
        for done, shape in enumerate(scope.shapes):
            what = f"layers, {_dtype_name(dtype)} {direction}, B = {batch}"
            if not budget.allows(f"{what}: {len(scope.shapes) - done} of {len(scope.shapes)} shapes", 5):
                break
            try:
                rows += measure_layer(clock, scope, record["backends"], shape, batch, dtype, direction)
            except _FAULTS as error:
                rows.append({"section": "layers", "case": f"{what}, {shape}", "failed": _first_line(error)})
        else:
            _progress(budget, what)


def summarize_layers(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Geometric means over the shapes, for each dtype, direction and batch; ratios of medians. ``names``: the backends,
    of which the first is "routed"."""
    cases: dict[tuple[str, str, int], dict[str, dict[tuple[str, str], float]]] = {}
    for r in rows:
        if r["section"] == "layers" and "median_us" in r:
            shapes = cases.setdefault((r["dtype"], r["direction"], r["batch"]), {})
            shapes.setdefault(r["shape"], {})[r["contender"], r["mode"]] = r["median_us"]
    pairs = [("routed", "floor"), *((name, "floor") for name in names)]
    pairs += [(one, other) for one in names for other in names if one != other]
    pairs += [(name, "routed") for name in ("dense", "all and mask", "loop")]
    found = []
    for (dtype, direction, batch), shapes in cases.items():
        row: Row = {"dtype": dtype, "direction": direction, "batch": batch, "shapes": len(shapes)}
        for mode in ("graph", "eager"):
            for pair in pairs:
                one, other = (names[0] if name == "routed" and names else name for name in pair)
                row[f"{pair[0]}/{pair[1]} {mode}"] = _mean_ratio(shapes, (one, mode), (other, mode))
            row[f"A/A {mode}"] = _mean_ratio(shapes, ("floor again", mode), ("floor", mode))
        found.append(row)
    return found


def fastest_backends(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Of each case of a layer that several backends computed, the fastest; microseconds of a call of each."""
    cases: dict[tuple[Any, ...], dict[str, float]] = {}
    of = ("dtype", "direction", "batch", "shape", "mode")
    for r in rows:
        if r["section"] == "layers" and "median_us" in r and r["contender"] in names:
            cases.setdefault(tuple(r[name] for name in of), {})[r["contender"]] = r["median_us"]
    return [
        {**dict(zip(of, case, strict=True)), "us": times, "fastest": min(times, key=lambda name: times[name])}
        for case, times in cases.items()
        if len(times) > 1
    ]


def table_for_auto(record: Row) -> dict[tuple[str, str], str]:
    """(direction, class of batches) to the backend with the least geometric mean, over dtypes and shapes, of the time of
    an eager call: what ``auto`` could choose by. Classes that were not measured with all backends are left out."""
    classes: dict[tuple[str, str], dict[str, list[float]]] = {}
    for r in record["fastest"]:
        if r["mode"] == "eager" and set(r["us"]) == set(record["backends"]):
            name = next(name for most, name in _BATCH_CLASSES if r["batch"] <= most)
            times = classes.setdefault((r["direction"], name), {})
            for backend, value in r["us"].items():
                times.setdefault(backend, []).append(value)
    return {
        key: min(times, key=lambda name, of=times: geometric_mean(of[name]))  # type: ignore[misc]
        for key, times in classes.items()
    }


def _mean_ratio(
    shapes: dict[str, dict[tuple[str, str], float]], of: tuple[str, str], to: tuple[str, str]
) -> float | None:
    ratios = [values[of] / values[to] for values in shapes.values() if of in values and to in values]
    return geometric_mean(ratios) if ratios else None


# --- models -------------------------------------------------------------------------------------------------------------


def make_model(arch: str, kind: str, scope: Scope, device: torch.device) -> nn.Module:
    """``kind`` is "dense" (or "dense compiled"), "s_dense", or "moe" or "fused" and a backend's name, which is to be in
    use."""
    torch.manual_seed(0)
    routed = kind.startswith(("moe", "fused"))
    model = create_model(
        arch,
        "moe" if routed else kind.split()[0],
        num_experts=EXPERTS,
        ratio=0.5,
        router="light",
        width=scope.width,
        image_size=scope.image_size,
    )
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if routed:
        _balance(model.eval(), _images(scope, 256 if device.type == "cuda" else 8, torch.float32, device))
    return model.train()


def _images(scope: Scope, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.rand(batch, 3, scope.image_size, scope.image_size, device=device)
    x = x * torch.rand(batch, 3, 1, 1, device=device)  # of different colours: a router must have something to tell apart
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _balance(model: nn.Module, x: Tensor) -> None:
    """Moves each router's bias so that its two experts are chosen about equally often: an untrained one may well choose
    the same for all samples, which is not what is to be timed."""

    def centre(router: nn.Module, args: Any, scores: Tensor) -> Tensor:
        half = (scores[:, 0] - scores[:, 1]).median() / 2
        middle = torch.stack([half, -half])
        router.linear.bias -= middle  # type: ignore[operator, union-attr]
        return scores - middle

    handles = [module.register_forward_hook(centre) for module in model.modules() if isinstance(module, Router)]
    model(x)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def _largest_share(model: nn.Module, x: Tensor) -> float:
    """Of the samples that go to one expert, over all layers."""
    with record_routing(model) as routings:
        model(x)
    counts = [torch.bincount(r.expert.cpu(), minlength=r.num_experts) for r in routings.values()]
    return max(float(c.max()) / max(int(c.sum()), 1) for c in counts)


def _inference(model: Callable[[Tensor], Tensor], inputs: Sequence[Tensor]) -> Callable[[], object]:
    def run() -> None:
        with torch.no_grad():
            for x in inputs:
                model(x)

    return run


def _training(
    model: nn.Module, inputs: Sequence[Tensor], targets: Sequence[Tensor], losses: list[Tensor]
) -> Callable[[], object]:
    """Forward and loss under bf16 autocast, backward, and a step of SGD on float32 weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)
    device = inputs[0].device.type

    def run() -> None:
        for x, target in zip(inputs, targets, strict=True):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
        losses[:] = [loss.detach()]

    return run


def _call_with(backend: str, call: Callable[[], object]) -> object:
    with _with(backend):
        return call()


def measure_models(clock: Clock, scope: Scope, names: Sequence[str], arch: str, batch: int, direction: str) -> list[Row]:
    """The kinds of one architecture in turn, "moe" with each backend: inference in bf16, or a training step. With
    inference the fused forms too, and the dense network as torch.compile makes it."""
    functions: dict[str, Callable[[], object]] = {}
    kinds = [*(f"moe {name}" for name in names), *KINDS]
    if direction == "inference":
        kinds += [*(f"fused {name}" for name in names), *(["dense compiled"] if clock.cuda else [])]
    losses: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    share = 0.0
    copies = scope.model_copies if direction == "inference" else 2
    for kind in kinds:
        moe, backend = kind.startswith(("moe", "fused")), kind.partition(" ")[2]
        with _with(backend):
            model = make_model(arch, kind, scope, clock.device)
            if direction == "inference":
                model = model.to(torch.bfloat16).eval()
                inputs = [_images(scope, batch, torch.bfloat16, clock.device) for _ in range(copies)]
                form: Callable[[Tensor], Tensor] = model
                if kind.startswith("fused"):
                    form = fuse(model, inputs[0])
                elif kind == "dense compiled":
                    form = torch.compile(model)
                call = _inference(form, inputs)
                if not all(bool(model(x).isfinite().all()) for x in inputs):
                    raise RuntimeError(f"{arch} {kind}: logits that are not finite")
                share = _largest_share(model, inputs[0]) if moe else share
            else:
                inputs = [_images(scope, batch, torch.float32, clock.device) for _ in range(copies)]
                targets = [torch.randint(10, (batch,), device=clock.device) for _ in range(copies)]
                share = _largest_share(model.eval(), inputs[0]) if moe else share
                call = _training(model.train(), inputs, targets, losses[kind])
        functions[kind] = functools.partial(_call_with, backend, call)
    of = {"arch": arch, "direction": direction, "batch": batch, "dtype": "bf16", "largest_share": share}
    rows = _timed(clock, functions, copies, scope.rounds, (), section="models", **of)
    for kind, last in losses.items():
        # a NaN would reach the routers, and samples that go to no expert cost nothing
        if last and not bool(last[0].isfinite()):
            raise RuntimeError(f"{arch} {kind}: the training's loss is not finite; its times would mean nothing")
    return rows


def _measure_all_models(
    clock: Clock, scope: Scope, budget: Budget, arch: str, batches: Sequence[int], direction: str, record: Row
) -> None:
    rows = record["rows"]
    for batch in batches:
        what = f"{arch} {direction}, B = {batch}"
        if not budget.allows(what, 10):
            continue
        try:
            rows += measure_models(clock, scope, record["backends"], arch, batch, direction)
        except _FAULTS as error:
            rows.append({"section": "models", "case": what, "failed": _first_line(error)})
        _progress(budget, what)


def summarize_models(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Milliseconds of "moe" with each backend, and ratios to the first one's."""
    cases: dict[tuple[str, str, int, str], dict[str, float]] = {}
    shares: dict[tuple[str, str, int, str], float] = {}
    for r in rows:
        if r["section"] == "models" and "median_us" in r:
            key = (r["arch"], r["direction"], r["batch"], r["mode"])
            cases.setdefault(key, {})[r["contender"]] = r["median_us"]
            shares[key] = r["largest_share"]
    found = []
    for key in sorted(cases, key=lambda k: (k[0], k[1], k[3], k[2])):
        arch, direction, batch, mode = key
        times = cases[key]
        moe = times.get(f"moe {names[0]}") if names else None
        row: Row = {"arch": arch, "direction": direction, "batch": batch, "mode": mode, "largest_share": shares[key]}
        row["moe_us"] = {name: times.get(f"moe {name}") for name in names}
        for kind in KINDS:
            row[f"{kind}/moe"] = times[kind] / moe if moe and kind in times else None
        fused, compiled = (times.get(f"fused {names[0]}") if names else None), times.get("dense compiled")
        row["fused_us"] = {name: times.get(f"fused {name}") for name in names}
        row["dense compiled/fused"] = compiled / fused if compiled and fused else None
        found.append(row)
    return found


# --- before the figures: building, tests, compiling ---------------------------------------------------------------------


def _start(command: Sequence[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """A process group of its own, whose output goes to ``log``; ``environment`` in addition to this process's."""
    with log.open("w") as out:
        return subprocess.Popen(
            command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True,
            env={**os.environ, **(environment or {})},
        )  # fmt: skip


def _finish(process: subprocess.Popen[str], seconds: float) -> int | None:
    """The exit status, or None for a process that took longer and was ended."""
    try:
        return process.wait(max(seconds, 0.1))
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


class Build(NamedTuple):
    command: list[str]
    environment: dict[str, str]


def _build(device: torch.device, notes: list[str]) -> Build | None:
    """What gives this Python's native module the CUDA kernels, for this device's architecture alone; None where it has
    them, or where there is no compiler for them. A simulator that it has is kept."""
    has = {name: getattr(native.module, name, None) is not None for name in ("cuda", "cuda_sim")}
    nvcc = _nvcc()
    if has["cuda"]:
        return None
    if nvcc is None:
        notes.append("backend cuda: not built, nvcc is in none of CUDACXX, CUDA_HOME, PATH and /usr/local/cuda")
        if native.module is not None:
            return None
    environment = {"MOE_KERNELS_CUDA": "0" if nvcc is None else "1", "MOE_KERNELS_SIMULATOR": str(int(has["cuda_sim"]))}
    if nvcc is not None and not os.environ.get("MOE_KERNELS_CUDA_ARCHS"):
        major, minor = torch.cuda.get_device_capability(device)
        environment["MOE_KERNELS_CUDA_ARCHS"] = f"{major}{minor}-real"
    return Build([sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."], environment)


def _nvcc() -> str | None:
    """Where CMakeLists.txt looks for it."""
    home = os.environ.get("CUDA_HOME")
    places = [str(Path(home, "bin"))] if home else []
    places.append(os.environ.get("PATH", os.defpath))
    places += [] if home else ["/usr/local/cuda/bin"]
    return os.environ.get("CUDACXX") or shutil.which("nvcc", path=os.pathsep.join(places))


_OUTCOMES = {"PASSED": "passed", "FAILED": "failed", "SKIPPED": "skipped", "ERROR": "failed"}


def count_tests(log: str) -> Row:
    """Passed, failed and skipped out of pytest's verbose lines, also of a run that was cut short."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[str] = []
    for line in log.splitlines():
        if re.match(r"=+ (FAILURES|ERRORS|warnings summary|short test summary info)", line):
            break
        found = re.search(r"\b(PASSED|FAILED|SKIPPED|ERROR)\b", line)
        test = re.search(r"tests/\S+::.*?(?= (?:PASSED|FAILED|SKIPPED|ERROR)\b|$)", line)
        if found and test:
            outcome = _OUTCOMES[found.group(1)]
            counts[outcome] += 1
            if outcome == "failed":
                failures.append(test.group(0).strip())
    return {**counts, "failures": failures}


def _parallel(least: int) -> int:
    return max(least, min(6, (os.cpu_count() or 2) // 3))


def _prepare(options: argparse.Namespace, device: torch.device, budget: Budget, record: Row) -> bool:
    """Builds, tests and compiles side by side: none of it is timed. Whether the native module was built."""
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder)
        build = _build(device, record["notes"])
        building = None if build is None else _start(build.command, logs / "build", build.environment)
        testing, workers = {}, []
        available = moe_kernels.available_backends()
        if available["triton"] is None:
            if not options.skip_tests:
                testing["triton"] = _start_tests("triton", logs)
            count = 0 if options.quick else _parallel(1)
            for index in range(count):
                part = [sys.executable, "-m", "bench.gpu", "--compile-part", f"{index}/{count}"]
                workers.append(_start(part, logs / f"compile{index}"))
        end = budget.spent() + options.test_seconds
        built = False
        if build is not None and building is not None:
            built = _finish(building, end - budget.spent()) == 0
            state = "built" if built else f"not built ({_last_line(logs / 'build')}); Triton needs none"
            asked = " ".join(f"{name}={value}" for name, value in build.environment.items())
            record["notes"].append(f"native module moe_kernels._C, {asked}: {state}")
        with_cuda = build is not None and build.environment["MOE_KERNELS_CUDA"] == "1"
        if not options.skip_tests and (available["cuda"] is None or (built and with_cuda)):
            testing["cuda"] = _start_tests("cuda", logs)
        for name, process in testing.items():
            status = _finish(process, end - budget.spent())
            record.setdefault("tests", {})[name] = _test_record(name, _log_of(name, logs), status, budget)
        statuses = [_finish(worker, end - budget.spent()) for worker in workers]
        for index, status in enumerate(statuses):
            if status != 0:
                why = "took too long" if status is None else _last_line(logs / f"compile{index}")
                record["notes"].append(f"compiling ahead, process {index}: {why}; its kernels compile when timed")
        record["seconds"]["prepare"] = budget.spent()
        _progress(budget, "building, tests, compiling")
        return built


def _start_tests(backend: str, logs: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:  # the compiler is what they wait for
        command += ["-n", str(_parallel(1))]
    return _start(command, logs / f"tests_{backend}", {"MOE_KERNELS_BACKEND": backend})


def _log_of(backend: str, logs: Path) -> str:
    return (logs / f"tests_{backend}").read_text(errors="replace")


def _test_record(backend: str, log: str, status: int | None, budget: Budget) -> Row:
    found: Row = {**count_tests(log), "status": status}
    counted = found["passed"] + found["failed"] + found["skipped"]
    if status is None:
        budget.left_out.append(f"the tests of {backend} that were not done when their time was over ({counted} were)")
    if status != 0:
        found["tail"] = log.splitlines()[-60:]
    return found


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "rror" in line]
    return (errors or lines or ["no output"])[-1][:200]


def _compile_part(part: str, scope: Scope, device: torch.device) -> None:
    """Runs every so-manieth case of Triton's once, which leaves its kernels in Triton's cache on disk."""
    index, count = (int(v) for v in part.split("/"))
    jobs: list[Callable[[], object]] = []
    for dtype in (torch.bfloat16, torch.float32):
        for batch in scope.layer_batches:
            for shape in scope.shapes:
                arguments = ("triton", shape, batch, dtype)
                for direction in ("forward", "train"):  # whose kernels are those of the input gradient too
                    jobs.append(functools.partial(_run_layer, *arguments, direction, device))
    jobs += [functools.partial(_run_model, batch, False, scope, device) for batch in scope.model_batches]
    jobs += [functools.partial(_run_model, batch, True, scope, device) for batch in scope.train_batches]
    for job in jobs[index::count]:
        with contextlib.suppress(*_FAULTS):  # what fails here fails again when it is timed, and is named there
            job()


def _run_layer(name: str, shape: Shape, batch: int, dtype: torch.dtype, direction: str, device: torch.device) -> None:
    make_layer(name, shape, batch, dtype, direction, device, 1)()


def _run_model(batch: int, train: bool, scope: Scope, device: torch.device) -> None:
    with use_backend("triton"):
        model = make_model("resnet18", "moe", scope, device)
        x = _images(scope, batch, torch.float32, device)
        if train:
            _training(model, [x], [torch.zeros(batch, dtype=torch.int64, device=device)], [])()
        else:
            _inference(model.to(torch.bfloat16).eval(), [x.to(torch.bfloat16)])()


# --- the command --------------------------------------------------------------------------------------------------------


def describe(device: torch.device) -> Row:
    """What the figures were measured on."""
    found: Row = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
        "moe_kernels": moe_kernels.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return triton.__version__


def _driver_version() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0]
    return None


def measured_backends(device: torch.device, notes: list[str]) -> list[str]:
    """Those that compute on ``device``, that of "auto" first; of the others it is noted why not."""
    found = []
    for name in BACKENDS[device.type]:
        try:
            with use_backend(name):
                backends.choose(device)
        except BackendUnavailable as error:
            notes.append(f"not measured, backend {error}")
        else:
            found.append(name)
    auto = backends.automatic(device.type)
    return sorted(found, key=lambda name: name != auto)


def targets(layers: Sequence[Row], models: Sequence[Row]) -> list[Row]:
    """Each target with what was measured; None where nothing was."""

    def mean(direction: str, column: str, fits: Callable[[int], bool]) -> float | None:
        cases = [r for r in layers if r["dtype"] == "bf16" and r["direction"] == direction and fits(r["batch"])]
        ratios = [r[column] for r in cases if r.get(column) is not None]
        return geometric_mean(ratios) if ratios else None

    values = [mean("forward", "routed/floor graph", lambda batch: batch >= 128)]
    values += [mean(direction, "cuda/floor graph", lambda batch: batch >= 128) for direction in DIRECTIONS]
    values += [mean(direction, "cuda/triton eager", lambda batch: batch <= 16) for direction in DIRECTIONS]
    for direction, batch, column in (
        ("inference", 128, "dense/moe"),
        ("inference", 1024, "dense/moe"),
        ("training step", 512, "dense/moe"),
        ("inference", 128, "dense compiled/fused"),
        ("inference", 1024, "dense compiled/fused"),
    ):
        values.append(
            next(
                (
                    r[column]
                    for r in models
                    if (r["arch"], r["direction"], r["batch"], r["mode"]) == ("resnet18", direction, batch, "graph")
                ),
                None,
            )
        )
    found = []
    for (name, (bound, limit)), value in zip(TARGETS.items(), values, strict=True):
        met = None
        if value is not None:
            met = {"at most": value <= limit, "below": value < limit, "at least": value >= limit}[bound]
        found.append({"target": name, "bound": bound, "limit": limit, "measured": value, "met": met})
    return found


def _progress(budget: Budget, what: str) -> None:
    print(f"{budget.spent():5.0f} s  {what}", file=sys.stderr, flush=True)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def report(record: Row) -> Iterator[str]:
    """What is printed at the end, line by line."""
    machine = record["machine"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("driver", "cuda", "cudnn", "torch", "triton") if machine.get(name)
    )
    yield f"{machine['device']}, {versions}, Python {machine['python']}, {machine['date']}"
    if not record.get("tests"):
        yield "tests/gpu: not run"
    for name, tests in record.get("tests", {}).items():
        how = {0: "", None: ", cut short"}.get(tests["status"], f", pytest's status {tests['status']}")
        yield f"tests/gpu, {name}: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped{how}"
        yield from (f"  FAILED {test}" for test in tests["failures"][:8])
        if len(tests["failures"]) > 8:
            yield f"  and {len(tests['failures']) - 8} more, in the JSON"
    names = record["backends"]
    layers, models = record["layers"], record["models"]
    if layers:
        yield (
            f"\nLayers: geometric means over shapes of ratios of medians, n = {record['rounds']}; channels_last, "
            f"N = {EXPERTS}; graph where it is not said; routed: {names[0] if names else 'nothing'}"
        )
        columns = [f"{name}/floor {mode}" for mode in ("graph", "eager") for name in names]
        columns += [f"{other}/{names[0]} eager" for other in names[1:]]
        columns += ["dense/routed graph", "all and mask/routed graph", "loop/routed eager", "A/A graph"]
        header = ["", "B", "shapes", *(c.removesuffix(" graph").removeprefix("all and ") for c in columns)]
        cells = [
            [f"{r['dtype']} {r['direction']}", str(r["batch"]), str(r["shapes"]), *(_ratio(r[c]) for c in columns)]
            for r in sorted(layers, key=lambda r: (r["dtype"], r["direction"], r["batch"]))
        ]
        yield table(header, cells)
    if models:
        yield f"\nModels: bf16 (training: autocast), channels_last, light routers; medians of n = {record['rounds']}"
        header = ["", "B", "mode", *(f"{form} {name} ms" for form in ("MoE", "fused") for name in names)]
        header += ["Dense/MoE", "S-Dense/MoE", "Dense compiled/fused", "largest share"]
        cells = [
            [
                f"{r['arch']} {r['direction']}", str(r["batch"]), r["mode"],
                *("-" if v is None else f"{v / 1e3:.3f}" for v in (*r["moe_us"].values(), *r["fused_us"].values())),
                _ratio(r["dense/moe"]), _ratio(r["s_dense/moe"]), _ratio(r["dense compiled/fused"]),
                f"{r['largest_share']:.2f}",
            ]
            for r in models
        ]  # fmt: skip
        yield table(header, cells)
    fastest = [f"{direction}, B {batches}: {name}" for (direction, batches), name in table_for_auto(record).items()]
    if fastest:
        yield f"\nFastest, eager: {'; '.join(fastest)}"
    yield "\nTargets:"
    for t in record["targets"]:
        state = "not measured" if t["met"] is None else f"{t['measured']:.2f}, {'met' if t['met'] else 'not met'}"
        yield f"  {t['target']}: {t['bound']} {t['limit']}: {state}"
    failed = [r for r in record["rows"] if "failed" in r]
    for r in failed[:5]:
        case = r.get("case") or " ".join(str(r[k]) for k in ("dtype", "direction", "batch", "shape", "arch") if k in r)
        yield f"failed: {case} {r.get('contender', '')} {r.get('mode', '')}: {r['failed']}"
    if len(failed) > 5:
        yield f"failed: {len(failed) - 5} more, in the JSON"
    yield from record["notes"]
    yield "left out: " + ("; ".join(record["left_out"]) or "nothing")
    yield f"{record['seconds']['total']:.0f} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--quick", action="store_true", help="few shapes, batches and rounds")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--budget", type=float, default=460.0, help="seconds of wall clock; what does not fit is named")
    parser.add_argument("--test-seconds", type=float, default=150.0, help="for the tests and the compiling, at most")
    parser.add_argument("--device", default="cuda", help="cpu: a rehearsal on tiny shapes, with --quick")
    parser.add_argument(
        "--compile-part", metavar="I/N", help="only compile one part of the kernels; the command's own use"
    )
    parser.add_argument("--prepared", type=Path, help="go on from that state; the command's own use")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.gpu: torch sees no CUDA device; nothing was measured", file=sys.stderr)
        return 2
    if device.type != "cuda" and not options.quick:
        parser.error(f"--device {options.device}: a rehearsal, expected with --quick")
    scope = Scope.of(device, options.quick)
    warnings.filterwarnings("error", message="moe_kernels", category=RuntimeWarning)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if options.compile_part:
        _compile_part(options.compile_part, scope, device)
        return 0
    budget = Budget(options.budget)
    record: Row = {
        "machine": describe(device), "experts": EXPERTS, "rounds": scope.rounds, "quick": options.quick, "notes": [],
        "seconds": {}, "rows": [], "layers": [], "models": [], "fastest": [],
    }  # fmt: skip
    if options.prepared:
        state = json.loads(options.prepared.read_text())
        budget, record = Budget(options.budget, state["start"]), {**record, **state["record"]}
        budget.left_out = state["left_out"]
    elif device.type == "cuda" and _prepare(options, device, budget, record):
        return _go_on(sys.argv[1:] if arguments is None else arguments, budget, record)
    clock = Clock(device)
    record["backends"] = measured_backends(device, record["notes"])
    with clock.stream():
        _measure(options, clock, scope, budget, record)
    print("\n".join(report(record)))
    return 1 if any(tests["failed"] for tests in record.get("tests", {}).values()) else 0


def _go_on(arguments: Sequence[str], budget: Budget, record: Row) -> int:
    """The measuring in a process that imports the module just built: this one has the former, or none."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "prepared.json")
        path.write_text(json.dumps({"start": budget.start, "left_out": budget.left_out, "record": record}))
        return subprocess.call([sys.executable, "-m", "bench.gpu", *arguments, "--prepared", str(path)])


def _measure(options: argparse.Namespace, clock: Clock, scope: Scope, budget: Budget, record: Row) -> None:
    rows, names = record["rows"], record["backends"]
    bf16, float32 = torch.bfloat16, torch.float32
    # the targets first
    sections: list[tuple[str, Callable[[], None]]] = [
        ("layers, bf16 forward", lambda: _measure_layers(clock, scope, budget, bf16, "forward", record)),
        ("inference", lambda: _models(clock, scope, budget, scope.model_batches, "inference", record)),
        ("training step", lambda: _models(clock, scope, budget, scope.train_batches, "training step", record)),
        ("layers, bf16 grad_input", lambda: _measure_layers(clock, scope, budget, bf16, "grad_input", record)),
        ("layers, bf16 train", lambda: _measure_layers(clock, scope, budget, bf16, "train", record)),
        ("layers, float32 forward", lambda: _measure_layers(clock, scope, budget, float32, "forward", record)),
        ("layers, float32 train", lambda: _measure_layers(clock, scope, budget, float32, "train", record)),
    ]
    for name, section in sections:
        before = budget.spent()
        section()
        record["seconds"][name] = budget.spent() - before
        record |= {"layers": summarize_layers(rows, names), "models": summarize_models(rows, names)}
        record |= {"fastest": fastest_backends(rows, names), "left_out": budget.left_out}
        record["targets"] = targets(record["layers"], record["models"])
        record["seconds"]["total"] = budget.spent()
        if options.json:  # after each section: a run that is ended from outside leaves what it has
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(record, indent=1) + "\n")


def _models(clock: Clock, scope: Scope, budget: Budget, batches: Sequence[int], direction: str, record: Row) -> None:
    _measure_all_models(clock, scope, budget, "resnet18", batches, direction, record)
    if "wrn28_10" in list_models():
        few = [b for b in batches if b in (1, 128)]  # the large ones alone would take minutes
        _measure_all_models(clock, scope, budget, "wrn28_10", few, direction, record)
    else:
        note = "WRN-28-10 whole model: not there yet (the backbone is not registered)"
        if note not in record["notes"]:
            record["notes"].append(note)


if __name__ == "__main__":
    raise SystemExit(main())
