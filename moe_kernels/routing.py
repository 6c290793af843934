# SPDX-License-Identifier: Apache-2.0
"""Which expert each sample goes to, and with what gate."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from . import checks
from .rows import sum_choices
from .tracing import fusing

__all__ = ["GATES", "Routing", "choose"]

GATES = ("straight_through", "softmax", "raw_straight_through", "none")


class _StraightThrough(torch.autograd.Function):
    """Value exactly 1, derivative 1. ``1 + p - p.detach()`` would round."""

    @staticmethod
    def forward(probability: Tensor) -> Tensor:
        return torch.ones_like(probability)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Routing:
    """The experts a router chose for a batch.

    A pytree: it passes through ``torch.compile`` and ``torch.export`` as an argument.

    Args:
        expert: int64 ``[B]``, or ``[B, k]`` for k experts a sample.
        gate: floating ``[B]`` or ``[B, k]``, or None for gates of exactly 1.
        num_experts: how many experts there are to choose from.

    Raises:
        TypeError: if ``expert`` is not int64 or ``gate`` not floating.
        ValueError: if the shapes do not agree or ``num_experts`` is not positive.

    Indices are checked where the CPU's backends use them, and by :meth:`validate` on any device; a GPU's kernels answer
    an index out of range with NaN for its sample.
    """

    __slots__ = ("choices", "expert", "gate", "num_experts", "plans", "unit_gate")

    expert: Tensor  # int64 [B] or [B, k]
    gate: Tensor | None  # floating, shaped as expert
    num_experts: int
    unit_gate: bool  # the gate's value is exactly 1 and only its gradient matters
    choices: int  # k of the routing that expand() made this one from; 1 otherwise
    plans: dict[Any, Any]  # kept by planning.py; shared by the routings that make the same choice

    def __init__(self, expert: Tensor, gate: Tensor | None = None, *, num_experts: int) -> None:
        checks.routing(expert, gate, num_experts)
        self.expert = expert
        self.gate = gate
        self.num_experts = num_experts
        self.unit_gate = False
        self.choices = 1
        self.plans = {}
        if _debug():
            self.validate()

    @classmethod
    def _make(
        cls,
        expert: Tensor,
        gate: Tensor | None,
        num_experts: int,
        unit_gate: bool = False,
        choices: int = 1,
        plans: dict[Any, Any] | None = None,
    ) -> Routing:
        """No checks: what the pytree rebuilds may hold placeholders instead of tensors."""
        self = cls.__new__(cls)
        self.expert, self.gate, self.num_experts = expert, gate, num_experts
        self.unit_gate, self.choices = unit_gate, choices
        self.plans = {} if plans is None else plans
        return self

    @classmethod
    def from_scores(
        cls, scores: Tensor, top_k: int = 1, gate: str = "straight_through", expert: Tensor | None = None
    ) -> Routing:
        """Chooses the ``top_k`` highest scores of each sample; of equal scores the lowest index.

        Args:
            scores: floating ``[B, num_experts]``.
            top_k: experts a sample.
            gate: ``"straight_through"``: value exactly 1, gradient of the chosen expert's softmax probability.
                ``"softmax"``: that probability (for k > 1 renormalised over the k chosen).
                ``"raw_straight_through"``: value 1, gradient onto the chosen score alone, as AdvMoE's released code
                does; it diverges easily. ``"none"``: no gate.
            expert: int64 ``[B]``, or ``[B, top_k]`` for more than one: another choice than the highest scores, such as
                one under a limit of each expert's samples; the gates are these experts'. On the scores' device.

        Raises:
            ValueError: if a score is NaN (on the CPU in eager mode; on other devices that sample's expert is
                ``num_experts``, out of range), ``top_k`` does not fit, the gate is unknown, or a straight-through gate is
                asked for with ``top_k > 1``.
        """
        checks.scores(scores, top_k, gate, GATES)
        num_experts = scores.shape[1]
        if expert is not None:
            checks.choice_of(expert, scores, top_k)
        elif top_k == 1:
            expert = choose(scores.detach()) if fusing() else _first_argmax(scores.detach())
        else:
            expert = torch.argsort(scores.detach(), dim=1, descending=True, stable=True)[:, :top_k].contiguous()
        index = expert.unsqueeze(1) if top_k == 1 else expert
        if scores.device.type != "cpu" and not (fusing() and top_k == 1):
            # A NaN score cannot raise here without a synchronisation. Its sample gets an index out of range instead: the
            # layers answer with NaN, and validate() raises. Looking up such an index would end the process.
            expert = torch.where(scores.detach().isnan().any(1).view(-1, *[1] * (expert.dim() - 1)), num_experts, expert)
        if scores.device.type != "cpu":
            index = index.clamp(0, num_experts - 1)
        value, unit = None, False
        if gate == "softmax":
            value = scores.softmax(1).gather(1, index) if top_k == 1 else scores.gather(1, index).softmax(1)
            value = value.squeeze(1) if top_k == 1 else value
        elif gate != "none" and torch.is_grad_enabled():  # elsewhere a gate of 1 whose gradient nobody can ask for
            chosen = scores if gate == "raw_straight_through" else scores.softmax(1)
            value, unit = _StraightThrough.apply(chosen.gather(1, index).squeeze(1)), True
        routing = cls._make(expert, value, num_experts, unit)
        return routing.validate() if _debug() else routing

    @property
    def top_k(self) -> int:
        return 1 if self.expert.dim() == 1 else self.expert.shape[1]

    @property
    def batch_size(self) -> int:
        return self.expert.shape[0]

    def ungated(self) -> Routing:
        """The same choice without gates."""
        return Routing._make(self.expert, None, self.num_experts, choices=self.choices, plans=self.plans)

    def expand(self) -> Routing:
        """``[B, k]`` as ``B * k`` virtual samples, without gates: sample ``v`` is choice ``v % k`` of input ``v // k``.

        A routed layer given the ``B`` inputs reads input ``v // k`` without a copy; one given ``B * k`` reads one to one.
        """
        choices = self.top_k * self.choices
        return Routing._make(self.expert.reshape(-1), None, self.num_experts, choices=choices, plans=self.plans)

    def combine(self, y: Tensor) -> Tensor:
        """``[B * k, ...]`` to ``[B, ...]``: applies the gates and sums over the k choices.

        Raises:
            ValueError: if the first dimension of ``y`` is not ``B * k``.
        """
        k = self.top_k
        if y.shape[0] != self.batch_size * k:
            raise ValueError(
                f"y: expected {self.batch_size} * {k} = {self.batch_size * k} virtual samples, got shape {tuple(y.shape)}"
            )
        if self.gate is not None:
            y = apply_gate(y, self.gate.reshape(-1), self.unit_gate)
        return sum_choices(y, k)

    def validate(self) -> Routing:
        """Raises ValueError if an index is out of range or a gate is not finite; synchronises on CUDA. Returns self."""
        if self.expert.numel():
            low, high = self.expert.min().item(), self.expert.max().item()
            if low < 0 or high >= self.num_experts:
                raise ValueError(
                    f"expert: expected indices in 0 .. {self.num_experts - 1}, got values from {low} to {high}"
                )
        if self.gate is not None and not bool(torch.isfinite(self.gate).all()):
            raise ValueError("gate: expected finite values, got NaN or infinity")
        return self

    def __getstate__(self) -> tuple[Any, ...]:
        return self.expert, self.gate, self.num_experts, self.unit_gate, self.choices

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.expert, self.gate, self.num_experts, self.unit_gate, self.choices = state
        self.plans = {}

    def __repr__(self) -> str:
        gate = "None" if self.gate is None else "1 (straight-through)" if self.unit_gate else str(self.gate.dtype)
        return f"Routing(expert={list(self.expert.shape)}, gate={gate}, num_experts={self.num_experts})"


def _first_argmax(scores: Tensor) -> Tensor:
    # max() returns the first index on the CPU; on other devices argmax promises nothing about ties, so the lowest index
    # among the maxima is taken explicitly.
    if scores.device.type == "cpu":
        return scores.max(1).indices
    index = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(scores == scores.amax(1, keepdim=True), index, scores.shape[1] - 1).amin(1)


def _choose(scores: Tensor) -> Tensor:
    checks.no_nan("scores", scores)
    expert = _first_argmax(scores)
    return expert if scores.device.type == "cpu" else torch.where(scores.isnan().any(1), scores.shape[1], expert)


def _choose_fake(scores: Tensor) -> Tensor:
    return torch.empty(scores.shape[0], dtype=torch.int64, device=scores.device)


# The choice of one expert as one operator, for graphs that are to be fused: the highest of scores [B, N], the lowest
# index of equals; a NaN raises on the CPU, and gives index N elsewhere.
_lib = torch.library.Library("moe_kernels", "FRAGMENT")
_lib.define("choose(Tensor scores) -> Tensor")
_lib.impl("choose", _choose, "CompositeExplicitAutograd")
torch.library.register_fake("moe_kernels::choose", _choose_fake, lib=_lib)
choose = torch.ops.moe_kernels.choose.default


def _debug() -> bool:
    return os.environ.get("MOE_KERNELS_DEBUG", "") == "1" and not torch.compiler.is_compiling()


class _Gate(torch.autograd.Function):
    """``gate[v] * y[v]``; where the gate's value is known to be 1, y itself. Backward ``d gate = <y, dy>``, from the
    ungated values: a division by the gate would lose it at 0."""

    @staticmethod
    def forward(y: Tensor, gate: Tensor, unit: bool) -> Tensor:
        return y.view_as(y) if unit else y * gate.to(y.dtype).view(-1, *[1] * (y.dim() - 1))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        y, gate, ctx.unit = inputs
        ctx.save_for_backward(y, gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        y, gate = ctx.saved_tensors
        grad_y = apply_gate(grad, gate, ctx.unit) if ctx.needs_input_grad[0] else None
        grad_gate = sample_dot(y, grad).to(gate.dtype) if ctx.needs_input_grad[1] else None
        return grad_y, grad_gate, None


def apply_gate(y: Tensor, gate: Tensor, unit: bool) -> Tensor:
    """``y [V, ...]`` times ``gate [V]``; ``unit`` says that the gate's value is 1 and costs no multiplication."""
    if torch.is_grad_enabled() and gate.requires_grad:
        return _Gate.apply(y, gate, unit)
    return y if unit else y * gate.to(y.dtype).view(-1, *[1] * (y.dim() - 1))


def sample_dot(a: Tensor, b: Tensor) -> Tensor:
    """``<a[v], b[v]>`` over all but the first dimension, accumulated in float32 at least: ``[V]``.

    Summed one dimension at a time: a sum down to a single number would be split among the threads, and its bits would
    then depend on how many there are.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    total = a.to(wide) * b.to(wide)
    if total.dim() == 4 and not total.is_contiguous():
        total = total.permute(0, 2, 3, 1)  # the order of memory of channels_last
    while total.dim() > 1:
        total = total.sum(-1)
    return total


def _flatten(routing: Routing) -> tuple[list[Tensor | None], tuple[int, bool, int]]:
    return [routing.expert, routing.gate], (routing.num_experts, routing.unit_gate, routing.choices)


def _unflatten(values: Any, context: tuple[int, bool, int]) -> Routing:
    expert, gate = values
    return Routing._make(expert, gate, *context)


def _flatten_with_keys(routing: Routing) -> tuple[list[Any], tuple[int, bool, int]]:
    values, context = _flatten(routing)
    return [(pytree.GetAttrKey(name), value) for name, value in zip(("expert", "gate"), values, strict=True)], context


pytree.register_pytree_node(
    Routing,
    _flatten,
    _unflatten,
    serialized_type_name="moe_kernels.Routing",
    to_dumpable_context=lambda context: list(context),
    from_dumpable_context=lambda context: tuple(context),
    flatten_with_keys_fn=_flatten_with_keys,
)
# A file of torch.export holds example inputs, and torch loads it with weights_only; a Routing is only tensors.
torch.serialization.add_safe_globals([Routing])
