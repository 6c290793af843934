# SPDX-License-Identifier: Apache-2.0
"""Lipschitz constants of networks: upper bounds over all inputs or in a ball, and estimates. See docs/certified.md."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attacks.balls import NORMS
from ..registry import unknown_name
from .network import Add, Affine, Cat, Dense, Network, Node, Unary
from .norms import SLACK

__all__ = ["METHODS", "Lipschitz", "LipschitzBounds", "lipschitz"]

METHODS = {  # each with whether it is an upper bound
    "product": True,
    "interval": True,
    "power": False,
}


# of a node, by its index, from what is behind it to what is before it, of this shape
_Through = Callable[[int, list[Tensor], tuple[int, ...]], list[Tensor]]


@dataclass(frozen=True)
class Lipschitz:
    """Constants of a network's scores ``z [C]`` over all inputs, or of each of n balls.

    Args:
        value: float64 ``[]`` or ``[n]``: ``|z(x) - z(x')| <= value * |x - x'|``, both sides in ``norm``.
        differences: float64 ``[C, C]`` or ``[n, C, C]``: the same of ``z_a - z_b``, a number.
        norm: ``"linf"`` or ``"l2"``.
        method: of :data:`METHODS`.
        upper_bound: whether the constants are upper bounds (in exact arithmetic, rounding of float64 allowed for), or
            estimates from which no certificate follows.
        radius: of the balls in which they hold; infinite: everywhere.
    """

    value: Tensor
    differences: Tensor
    norm: str
    method: str
    upper_bound: bool
    radius: float = math.inf


def lipschitz(
    network: nn.Module,
    norm: str = "linf",
    method: str = "product",
    center: Tensor | None = None,
    radius: float | None = None,
    shape: tuple[int, ...] | None = None,
) -> Lipschitz:
    """The Lipschitz constants of a convolutional network in eval mode.

    Args:
        network: ``forward(x [n, *shape]) -> scores [n, C]`` of convolutions, linear layers, BatchNorm, ReLU, pooling,
            sums and concatenations.
        norm: of inputs and outputs.
        method: ``"product"``: of the layers' norms (L2: the Fourier bound, L-inf: exact row sums), a sum of two branches
            having the sum of their constants; ``"interval"``: bounds of the Jacobian's entries by interval arithmetic,
            with ReLUs whose sign cannot change in the ball as they are; never above ``"product"``, which it takes where
            that is less; ``"power"``: the product of estimates by power iteration, L2 alone, no upper bound.
        center, radius: ``[n, *shape]`` and what may be added to it; with method ``"interval"`` alone. By default all
            inputs.
        shape: of one input; by default that of ``center``, or of the images of a network of ``create_model``.

    Raises:
        ValueError: for an unknown name, a combination that there is none of, or a network that has no bound
            (:meth:`Network.of`).
    """
    if (center is None) != (radius is None) or (center is not None and method != "interval"):
        raise ValueError("center, radius: expected both, with method 'interval', or neither")
    if shape is None:
        shape = _shape_of(network) if center is None else tuple(center.shape[1:])
    bounds = LipschitzBounds(network, norm, method, shape)
    where = None if center is None else torch.full((len(center),), float(radius or 0), dtype=torch.float64)
    (classes,) = bounds.network.nodes[-1].shape
    pairs = torch.combinations(torch.arange(classes))
    heads = torch.cat([torch.eye(classes), _pairs(pairs, classes)]).double()
    found = bounds.of(heads, center, where)  # [n, C + P]
    each, between = found[:, :classes], found[:, classes:]
    value = (each.amax(1) if norm == "linf" else each.norm(dim=1)).clamp_max(bounds.whole)
    differences = torch.zeros(len(found), classes, classes, dtype=torch.float64)
    differences[:, pairs[:, 0], pairs[:, 1]] = between
    differences += differences.mT.clone()
    if center is None:
        value, differences = value[0], differences[0]
    return Lipschitz(value, differences, norm, method, METHODS[method], math.inf if radius is None else radius)


def _pairs(pairs: Tensor, classes: int) -> Tensor:
    """``e_a - e_b`` for each row ``(a, b)``."""
    return torch.eye(classes)[pairs[:, 0]] - torch.eye(classes)[pairs[:, 1]]


def _shape_of(network: nn.Module) -> tuple[int, ...]:
    size = getattr(getattr(network, "spec", None), "image_size", None)
    if size is None:
        raise ValueError("shape: expected the shape of one input; the network does not say it")
    return 3, size, size


class LipschitzBounds:
    """A network's constants, by one method in one norm, asked for again and again.

    Raises:
        ValueError: as :func:`lipschitz`.
    """

    def __init__(
        self,
        network: nn.Module,
        norm: str,
        method: str,
        shape: tuple[int, ...],
    ) -> None:
        for name, value, known in (("norm", norm, NORMS), ("method", method, METHODS)):
            if value not in known:
                raise unknown_name(name, value, tuple(known))
        if method == "power" and norm != "l2":
            raise ValueError(f"method: power iteration estimates norms in l2, got norm {norm!r}")
        self.norm, self.method = norm, method
        self.network = Network.of(network, shape)

    @functools.cached_property
    def _norms(self) -> list[_Lengths]:
        """Of each node's step, of one input (sums and concatenations: 0)."""
        net, estimate = self.network, self.method == "power"
        return [
            _Lengths(*(node.step.norm(norm, estimate, net.shape_of(node.reads[0])) for norm in NORMS))
            if isinstance(node.step, Unary)
            else _Lengths(0.0, 0.0)
            for node in net.nodes
        ]

    @functools.cached_property
    def _products(self) -> list[_Lengths]:
        """How far every node's features are moved at most by a step of length 1, from the input to the output."""
        found = [self._start(1.0)]
        for node, norms in zip(self.network.nodes, self._norms, strict=True):
            found.append(self._behind(node, norms, [found[i] for i in node.reads]))
        return found

    def _start(self, radius: Any) -> _Lengths:
        """Of a move of the input by ``radius``; a cube lies in a ball."""
        wide = math.sqrt(math.prod(self.network.shape)) if self.norm == "linf" else 1.0
        return _Lengths(radius, wide * radius)

    def _behind(self, node: Node, norms: _Lengths, before: list[_Lengths]) -> _Lengths:
        """How far a step's output is moved if what it reads is moved so far."""
        if isinstance(node.step, Add):
            return _Lengths(before[0].linf + before[1].linf, before[0].l2 + before[1].l2)
        if isinstance(node.step, Cat):
            return _Lengths(functools.reduce(_most, (b.linf for b in before)), sum(b.l2**2 for b in before) ** 0.5)
        moved = _Lengths(norms.linf * before[0].linf, norms.l2 * before[0].l2)
        # an estimate stays what it is called: the product of the layers' L2 norms
        return moved if self.method == "power" else moved.joined(math.prod(node.shape))

    @property
    def whole(self) -> float:
        """Of all scores, over all inputs, by the product."""
        return SLACK * float(getattr(self._products[-1], self.norm))

    @torch.no_grad()
    def of(
        self, heads: Tensor, center: Tensor | None = None, radius: Tensor | None = None, plain: bool = False
    ) -> Tensor:
        """Constants, float64 ``[n, M]``, of the combinations ``heads @ z``.

        Args:
            heads: ``[M, C]``, or ``[n, M, C]`` of each center's own.
            center, radius: ``[n, *shape]`` and ``[n]``; None: all inputs (n is 1, or that of the heads), which is what
                the methods but ``"interval"`` take in any case.
            plain: by the product alone, also of method ``"interval"``.
        """
        heads = heads.double()
        if heads.dim() == 2:
            heads = heads.expand(1 if center is None else len(center), -1, -1)
        bounds = self._by_product(heads)
        if plain or self.method != "interval":
            return bounds
        seen = None if center is None or radius is None else self._seen(center.double(), radius.double())
        bounds = torch.minimum(bounds, self._by_interval(heads, seen))
        return bounds if seen is None else torch.minimum(bounds, self._around_one(heads, seen))

    def _by_product(self, heads: Tensor) -> Tensor:
        last = self.network.nodes[-1]
        before = self._products[-1]
        if isinstance(last.step, Dense):  # the combination of the last layer's rows
            heads, before = heads @ last.step.weight, self._products[last.reads[0]]
        by = before.l2 * heads.norm(2, dim=-1)
        return SLACK * (by if self.method == "power" else torch.minimum(by, before.linf * heads.norm(1, dim=-1)))

    def _by_interval(self, heads: Tensor, seen: _Seen | None) -> Tensor:
        """Bounds of each entry of the gradient."""

        def through(i: int, behind: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
            step = self.network.nodes[i].step
            assert isinstance(step, Unary)
            return list(step.pull(behind[0], behind[1], None if seen is None else seen.boxes[i], shape))

        flat = heads.flatten(0, 1)
        low, high = self._back([flat, flat], through)
        largest = torch.maximum(low.abs(), high.abs()).flatten(1)
        return SLACK * largest.norm(self._dual, dim=1).unflatten(0, heads.shape[:2])

    def _around_one(self, heads: Tensor, seen: _Seen) -> Tensor:
        """One gradient of the ball's, and how far, in L1 and in L2, any other is from it."""

        def through(i: int, behind: list[Tensor], shape: tuple[int, ...]) -> list[Tensor]:
            node, norms = self.network.nodes[i], self._norms[i]
            assert isinstance(node.step, Unary)
            g, far = behind[0], _Lengths(behind[1], behind[2])
            before, other = node.step.turn(g, seen.boxes[i], seen.values[node.reads[0]])
            size = g.flatten(1)
            one, two = (SLACK - 1) * size.norm(1, dim=1), (SLACK - 1) * size.norm(2, dim=1)  # rounding
            if other is not None:
                one, two = one + other.flatten(1).norm(1, dim=1), two + other.flatten(1).norm(2, dim=1)
            # the transposed step's norms in L1 and L2 are the step's own in L-inf and L2
            far = _Lengths(norms.linf * (far.linf + one), norms.l2 * (far.l2 + two))
            return [before, *far.transposed(math.prod(shape))]

        flat = heads.flatten(0, 1)
        nothing = torch.zeros(len(flat), dtype=torch.float64)
        g, one, two = self._back([flat, nothing, nothing], through)
        far = one if self.norm == "linf" else two
        return SLACK * (g.flatten(1).norm(self._dual, dim=1) + far).unflatten(0, heads.shape[:2])

    @property
    def _dual(self) -> int:
        return 1 if self.norm == "linf" else 2

    def _back(self, behind: list[Tensor], through: _Through) -> list[Tensor]:
        """From behind the last node to the input: what goes through a step by ``through``, is added up where a node is
        read by several, and taken apart where several are concatenated (of lengths each part has the whole's)."""
        net = self.network
        held: list[list[Tensor] | None] = [*([None] * len(net.nodes)), behind]
        for i in reversed(range(len(net.nodes))):
            node, here = net.nodes[i], held[i + 1]
            if here is None:
                continue
            held[i + 1] = None  # its memory
            shapes = [net.shape_of(j) for j in node.reads]
            if isinstance(node.step, Add):
                parts = [here, here]
            elif isinstance(node.step, Cat):
                dim = node.step.dim
                sizes = [shape[dim - 1] for shape in shapes]
                split = [each.split(sizes, dim) if each.dim() > 1 else [each] * len(sizes) for each in here]
                parts = [list(part) for part in zip(*split, strict=True)]
            else:
                parts = [through(i, here, shapes[0])]
            for j, part in zip(node.reads, parts, strict=True):
                others = held[j]
                held[j] = part if others is None else [a + b for a, b in zip(others, part, strict=True)]
        assert held[0] is not None
        return held[0]

    def _seen(self, center: Tensor, radius: Tensor) -> _Seen:
        """Every node's features over each ball: how far, in L-inf and in L2, they are moved at most is turned into a
        bound of each entry by the lengths of a layer's rows; whichever is less, that or interval arithmetic, holds."""
        net = self.network
        wide = _like(radius, center)
        values, boxes, moved = [center], [(center - wide, center + wide)], [self._start(radius)]
        for node, norms in zip(net.nodes, self._norms, strict=True):
            reads = [boxes[j] for j in node.reads]
            if isinstance(node.step, Add | Cat):
                low, high = (node.step(*(each[side] for each in reads)) for side in (0, 1))
            else:
                low, high = node.step.bounds(*reads[0])
            at = node.step(*(values[j] for j in node.reads))
            far = self._behind(node, norms, [moved[j] for j in node.reads])
            near = _like(far.linf, at)
            if isinstance(node.step, Affine):
                lengths = node.step.lengths(net.shape_of(node.reads[0]))
                if lengths is not None:
                    near = torch.minimum(near, lengths * _like(moved[node.reads[0]].l2, at))
            near = SLACK * near + (SLACK - 1) * _like(at.abs().flatten(1).amax(1), at)  # rounding
            low, high = torch.maximum(low, at - near), torch.minimum(high, at + near)
            # what infinities have made undetermined is anything
            low, high = low.masked_fill(low.isnan(), -math.inf), high.masked_fill(high.isnan(), math.inf)
            off = torch.maximum(high - at, at - low).flatten(1)
            values.append(at)
            boxes.append((low, high))
            moved.append(
                _Lengths(
                    *(
                        _least(f, o).nan_to_num(math.inf, math.inf)
                        for f, o in zip(far, (off.amax(1), off.norm(dim=1)), strict=True)
                    )
                )
            )
        return _Seen(values, [boxes[node.reads[0]] for node in net.nodes])


class _Lengths(NamedTuple):
    """How long a vector is at most in each norm, a number or one for each sample."""

    linf: Any
    l2: Any

    def joined(self, entries: int) -> _Lengths:
        """By what each says of the other, of a vector of so many entries."""
        return _Lengths(_least(self.linf, self.l2), _least(self.l2, math.sqrt(entries) * self.linf))

    def transposed(self, entries: int) -> _Lengths:
        """The same of gradients, where the first is their L1 norm."""
        return _Lengths(_least(self.linf, math.sqrt(entries) * self.l2), _least(self.l2, self.linf))


@dataclass(frozen=True)
class _Seen:
    """values: of each node at the centers, behind the input's; boxes: bounds of what each node's step reads."""

    values: list[Tensor]
    boxes: list[tuple[Tensor, Tensor]]


def _like(a: Tensor, x: Tensor) -> Tensor:
    return a.reshape(-1, *(1,) * (x.dim() - 1))


def _least(a: Any, b: Any) -> Any:
    return torch.minimum(a, b) if isinstance(a, Tensor) else min(a, b)


def _most(a: Any, b: Any) -> Any:
    return torch.maximum(a, b) if isinstance(a, Tensor) else max(a, b)
