# SPDX-License-Identifier: Apache-2.0
"""What the tests hold moe_kernels against: a hand-written loop in float64, a tolerance from theory, random cases.

The loop shares no code with the library: slices are cut here, by ``starts``, with ``F.conv2d``.
"""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from moe_kernels import ExpertSlices, Routing, backends, functional

BACKENDS = ("cpu", "reference")  # test_gpu_kernels.py holds the others against the same cases
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "sliced", "sliced_channels_last", "transposed", "repeated")
CHANNELS = (1, 2, 3, 4, 6, 8, 12, 16, 17, 31, 33)


@dataclass(frozen=True)
class Case:
    """One routed convolution: everything but the numbers, which ``seed`` decides."""

    out_slices: ExpertSlices
    in_slices: ExpertSlices
    batch: int = 3
    top_k: int = 1
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    size: tuple[int, int] = (5, 6)
    bias: bool = True
    gate: bool = True
    own_in_routing: bool = False
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def num_experts(self) -> int:
        sides = (self.out_slices, self.in_slices)
        return next((s.num_experts for s in sides if not s.is_whole), 2)

    @property
    def virtual(self) -> int:
        return self.batch * self.top_k

    @property
    def convolution(self) -> dict[str, Any]:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    @property
    def out_size(self) -> tuple[int, int]:
        rows, columns = (
            (self.size[a] + 2 * self.padding[a] - self.dilation[a] * (self.kernel[a] - 1) - 1) // self.stride[a] + 1
            for a in (0, 1)
        )
        return rows, columns

    # How many products are summed for one element.
    @property
    def terms_forward(self) -> int:
        return self.in_slices.width // self.groups * math.prod(self.kernel) + 1

    @property
    def terms_input(self) -> int:
        return self.out_slices.width // self.groups * math.prod(self.kernel) * self.top_k

    @property
    def terms_weight(self) -> int:
        return max(self.virtual, 1) * math.prod(self.out_size)

    @property
    def terms_gate(self) -> int:
        return self.out_slices.width * math.prod(self.out_size) + self.terms_forward


@dataclass
class Numbers:
    """The tensors of a case; those that are differentiated are leaves."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    gate: Tensor | None
    expert: Tensor  # [B] or [B, k]
    in_expert: Tensor | None  # [B], where the input side has a choice of its own
    grad: Tensor  # [B, w_out, P, Q]
    scale: Tensor = field(default_factory=lambda: torch.empty(0))
    shift: Tensor = field(default_factory=lambda: torch.empty(0))
    residual: Tensor = field(default_factory=lambda: torch.empty(0))

    def routing(self, case: Case) -> Routing:
        return Routing(self.expert, self.gate, num_experts=case.num_experts)

    def in_routing(self, case: Case) -> Routing | None:
        return None if self.in_expert is None else Routing(self.in_expert, num_experts=case.in_slices.num_experts)

    def leaves(self) -> dict[str, Tensor]:
        named = {"input": self.x, "weight": self.weight, "bias": self.bias, "gate": self.gate}
        return {name: t for name, t in named.items() if t is not None}


def arrange(x: Tensor, layout: str) -> Tensor:
    """``x [B, C, H, W]`` with the same values, laid out in memory otherwise."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "repeated":  # stride 0 over the batch
        return x[:1].expand_as(x) if x.shape[0] else x
    b, c, h, w = x.shape
    bigger = torch.full((b + 2, c + 3, h + 1, w + 2), math.nan, dtype=x.dtype)
    if layout == "sliced_channels_last":
        bigger = bigger.contiguous(memory_format=torch.channels_last)
    part = bigger[1 : b + 1, 2 : c + 2, :h, 1 : w + 1]
    part.copy_(x)
    return part


def numbers(case: Case) -> Numbers:
    g = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(case.dtype)

    n, b = case.num_experts, case.batch
    shape = (b,) if case.top_k == 1 else (b, case.top_k)
    weight_shape = (case.out_slices.total, case.in_slices.total // case.groups, *case.kernel)
    in_expert = None
    if case.own_in_routing:
        in_expert = torch.randint(case.in_slices.num_experts, (b,), generator=g)
    values = Numbers(
        x=arrange(random(b, case.in_slices.width, *case.size), case.layout),
        weight=arrange(random(*weight_shape), case.weight_layout),
        bias=random(case.out_slices.total) if case.bias else None,
        gate=random(*shape) if case.gate else None,
        expert=torch.randint(n, shape, generator=g),
        in_expert=in_expert,
        grad=random(b, case.out_slices.width, *case.out_size),
        scale=random(case.out_slices.total),
        shift=random(case.out_slices.total),
        residual=random(b, case.out_slices.width, *case.out_size),
    )
    for leaf in values.leaves().values():
        leaf.requires_grad_()
    return values


def loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    expert: Tensor,
    in_expert: Tensor | None,
    case: Case,
) -> Tensor:
    """``y[i] = sum over k of gate[i] * (conv2d(x[i], W[slice_i]) + b[slice_i])``, one sample after the other."""
    k = case.top_k
    expert = expert.reshape(-1)
    inner = expert if in_expert is None else in_expert.reshape(-1).repeat_interleave(k)
    gates = None if gate is None else gate.reshape(-1)
    out = []
    for i in range(x.shape[0]):
        total: Tensor | None = None
        for j in range(k):
            v = i * k + j
            o = 0 if case.out_slices.is_whole else case.out_slices.starts[int(expert[v])]
            c = 0 if case.in_slices.is_whole else case.in_slices.starts[int(inner[v])]
            width = case.in_slices.width // case.groups
            w = weight[o : o + case.out_slices.width, c : c + width]
            b = None if bias is None else bias[o : o + case.out_slices.width]
            y = F.conv2d(x[i : i + 1], w, b, **case.convolution)
            y = y if gates is None else gates[v] * y
            total = y if total is None else total + y
        out.append(total)
    return torch.cat(out) if out else x.new_zeros(0, case.out_slices.width, *case.out_size)


def truth(case: Case, values: Numbers) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients in float64, and for each the same sum over absolute values: ``|x| conv |w|``.

    The convolution, the bias and the gate are linear each, so that the gradients of the loop
    over absolute values are the sums of the absolute values.
    """
    both = []
    for convert in (lambda t: t, torch.abs):
        leaves = {name: convert(t.detach().double()).requires_grad_() for name, t in values.leaves().items()}
        y = loop(
            leaves["input"],
            leaves["weight"],
            leaves.get("bias"),
            leaves.get("gate"),
            values.expert,
            values.in_expert,
            case,
        )
        grads = [torch.zeros_like(t) for t in leaves.values()]
        if y.requires_grad:
            cotangent = convert(values.grad.double())
            grads = list(
                torch.autograd.grad(y, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True)
            )
        both.append({"output": y.detach(), **dict(zip(leaves, grads, strict=True))})
    return both[0], both[1]


def assert_within(
    actual: Tensor,
    expected: Tensor,
    magnitude: Tensor,
    terms: int,
    roundings: int = 1,
    what: str = "",
    rounded: float = 0.0,
) -> None:
    """``|err| <= 4 * eps(accumulator) * sqrt(K) * (|x| conv |w|)`` and one eps(dtype) for each rounding to the dtype.

    The accumulator is float32 at least: for bfloat16 and float16 far tighter than 4 * eps(dtype) * sqrt(K).
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    accumulator = torch.finfo(torch.promote_types(actual.dtype, torch.float32)).eps
    info = torch.finfo(actual.dtype)
    relative = 4 * accumulator * math.sqrt(terms) + roundings * info.eps + rounded
    bound = relative * magnitude + roundings * info.tiny * info.eps  # the latter: one step below the normal numbers
    error = (actual.detach().double() - expected).abs()
    bad = ~(error <= bound)  # true for NaN also
    if bad.any():
        worst = (error / bound).nan_to_num(math.inf).max().item()
        raise AssertionError(f"{what}: {int(bad.sum())} of {bad.numel()} beyond the bound, at worst {worst:.3g} times")


def run(case: Case, values: Numbers) -> Tensor:
    """The library's output."""
    return functional.routed_conv2d(
        values.x,
        values.weight,
        values.routing(case),
        values.bias,
        out_slices=case.out_slices,
        in_slices=case.in_slices,
        in_routing=values.in_routing(case),
        **case.convolution,
    )


def check(case: Case) -> None:
    """Values and every gradient of the library against the loop, its outputs poisoned with NaN before."""
    values = numbers(case)
    expected, magnitude = truth(case, values)
    with poisoned():
        y = run(case, values)
        leaves = values.leaves()
        grads = torch.autograd.grad(y, list(leaves.values()), values.grad) if y.requires_grad else []
    assert y.dtype == case.dtype
    # with one pixel or one channel both formats have the same memory, and the input does not say which was meant
    says = values.x.is_contiguous() != values.x.is_contiguous(memory_format=torch.channels_last)
    if says and case.layout in ("contiguous", "channels_last") and y.numel():
        assert y.is_contiguous(memory_format=getattr(torch, f"{case.layout}_format", torch.channels_last))
    compare(case, {"output": y, **dict(zip(leaves, grads, strict=True))}, expected, magnitude)


def compare(
    case: Case,
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    magnitude: dict[str, Tensor],
    more: int = 0,
    rounded: float = 0.0,
) -> None:
    """An output and gradients, of any device, against :func:`truth`; ``more``: roundings of each value over the usual;
    ``rounded``: relative error of each product before it is summed."""
    terms = {
        "output": case.terms_forward,
        "input": case.terms_input,
        "weight": case.terms_weight,
        "bias": case.terms_weight,
        "gate": case.terms_gate,
    }
    # to the dtype are rounded: the convolution, bias, gate and every further choice; the cotangent times the gate; ...
    roundings = {"output": 2 + case.top_k, "input": 2, "weight": 2, "bias": 3, "gate": 3}
    for name, value in actual.items():
        assert value.dtype == case.dtype, f"{name}: {value.dtype}"
        assert_within(
            value.detach().cpu(), expected[name], magnitude[name], terms[name], roundings[name] + more, name, rounded
        )


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Every floating tensor of ``torch.empty`` is full of NaN: what a kernel leaves unwritten shows."""
    empty = torch.empty

    def full_of_nan(*args: Any, **kwargs: Any) -> Tensor:
        out = empty(*args, **kwargs)
        return out.fill_(math.nan) if out.is_floating_point() else out

    with mock.patch.object(torch, "empty", full_of_nan):
        yield


@contextlib.contextmanager
def products(precision: str = "ieee") -> Iterator[None]:
    """float32 by full products ("ieee") or rounded to "tf32": the switch that convolutions obey on a GPU and in the
    simulator."""
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, conv.fp32_precision = conv.fp32_precision, precision
    try:
        yield
    finally:
        conv.fp32_precision = before


class CallCounter(collections.Counter[str]):
    """Counts the calls of a backend, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str = "cpu") -> None:
        super().__init__()
        counted = backends._BACKENDS[backend]
        for name in (
            "forward",
            "grad_input",
            "grad_weight",
            "pack",
            *(("plan", "grad_input_gated") if counted.plans else ()),
        ):
            monkeypatch.setattr(counted, name, self._counted(name, getattr(counted, name)))

    def _counted(self, name: str, call: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self[name] += 1
            return call(*args, **kwargs)

        return counted


# --- random cases --------------------------------------------------------------------------------------------------


def _side(draw: st.DrawFn, kind: str, num_experts: int, channels: tuple[int, ...]) -> ExpertSlices:
    width = draw(st.sampled_from(channels))
    if kind == "whole":
        return ExpertSlices.whole(width)
    if kind == "partition":
        return ExpertSlices.partition(width, num_experts)
    if kind == "windows":
        return ExpertSlices.windows(width, draw(st.sampled_from((0.3, 0.5, 0.75, 1.0))), num_experts)
    total = width + draw(st.integers(0, 5))  # slices anywhere, also the same for several experts
    starts = st.lists(st.integers(0, total - width), min_size=num_experts, max_size=num_experts)
    return ExpertSlices(total, width, tuple(draw(starts)))


_STRIDES = st.sampled_from((1, 2, 3, 5))
_DILATIONS = st.sampled_from((1, 2, 7))


@st.composite
def cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    top_k: tuple[int, ...] = (1, 1, 1, 2, 3),
    small: bool = False,  # for kernels that are interpreted
    channels: tuple[int, ...] = CHANNELS,
) -> Case:
    num_experts = draw(st.integers(1, 6))
    kinds = st.sampled_from(("whole", "partition", "windows", "anywhere"))
    groups, own_in_routing = 1, False
    if draw(st.integers(0, 3)) == 0:
        groups = draw(st.sampled_from((2, 3) if small else (2, 3, 4, 6, 12, 31)))
        # also depthwise: one channel a group; and depthwise with a multiplier
        multipliers = st.sampled_from((1, 1, 2, 3)) if groups < 12 else st.just(1)
        in_slices = ExpertSlices.whole(groups * draw(multipliers))
        width = groups * draw(multipliers)
        whole = draw(st.booleans())
        out_slices = ExpertSlices.whole(width) if whole else ExpertSlices.partition(width, num_experts)
    else:
        out_slices = _side(draw, draw(kinds), num_experts, channels)
        own_in_routing = draw(st.booleans())
        in_slices = _side(draw, draw(kinds), draw(st.integers(1, 4)) if own_in_routing else num_experts, channels)
        own_in_routing = own_in_routing and not in_slices.is_whole
    kernels = ((1, 1), (3, 3), (5, 5), (7, 7), (1, 3), (3, 1), (2, 3), (5, 2))
    kernel = draw(st.sampled_from([k for k in kernels if not small or max(k) <= 3]))
    stride, dilation = draw(st.tuples(_STRIDES, _STRIDES)), draw(st.tuples(_DILATIONS, _DILATIONS))
    borders = st.sampled_from((0, 1, 2) if small else (0, 1, 2, 3, 9))  # 9: outputs that see nothing but padding
    padding = draw(st.tuples(borders, borders))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    size = tuple(
        draw(st.integers(max(1, r - 2 * p), max(1, r - 2 * p) + (3 if small else 8)))
        for r, p in zip(reach, padding, strict=True)
    )
    return Case(
        out_slices,
        in_slices,
        batch=draw(st.sampled_from((0, 1, 2, 3) if small else (0, 1, 2, 3, 5))),
        top_k=draw(st.sampled_from(top_k)),
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        size=(size[0], size[1]),
        bias=draw(st.booleans()),
        gate=draw(st.booleans()),
        own_in_routing=own_in_routing,
        layout=draw(st.sampled_from(LAYOUTS)),
        weight_layout=draw(st.sampled_from(("contiguous", "contiguous", "channels_last", "sliced"))),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**31)),
    )


# --- named cases: one of each kind, small --------------------------------------------------------------------------

whole, partition, windows = ExpertSlices.whole, ExpertSlices.partition, ExpertSlices.windows

NAMED: dict[str, Case] = {
    "partition": Case(partition(3, 2), whole(2), padding=(1, 1)),
    "partition both sides": Case(partition(3, 3), partition(2, 3), stride=(2, 2), padding=(1, 1)),
    "windows": Case(windows(5, 0.6, 3), windows(4, 0.5, 3), padding=(1, 0)),
    "own choice of the input": Case(partition(2, 2), windows(5, 0.5, 3), own_in_routing=True),
    "whole output": Case(whole(3), partition(2, 2), kernel=(1, 3), bias=False),
    "whole both sides": Case(whole(3), whole(2), kernel=(2, 2), gate=False),
    "pointwise": Case(partition(4, 2), whole(3), kernel=(1, 1), bias=False, gate=False),
    "groups and dilation": Case(partition(4, 2), whole(6), groups=2, dilation=(2, 1), size=(6, 4), padding=(1, 1)),
    "depthwise": Case(partition(3, 2), whole(3), groups=3, padding=(1, 1), stride=(2, 1)),
    "top 2": Case(partition(2, 3), whole(2), top_k=2, padding=(1, 1)),
    "top 2 without gates": Case(windows(4, 0.5, 3), whole(2), top_k=2, gate=False, kernel=(1, 1)),
    "channels_last": Case(partition(3, 2), whole(2), layout="channels_last", padding=(1, 1)),
    "part of a larger weight": Case(partition(3, 2), whole(2), kernel=(1, 1), weight_layout="sliced"),
}


def named(*without: str, **changes: Any) -> Any:
    """A parametrisation over the named cases, changed."""
    chosen = {name: replace(case, **changes) for name, case in NAMED.items() if name not in without}
    return pytest.mark.parametrize("case", list(chosen.values()), ids=list(chosen))
