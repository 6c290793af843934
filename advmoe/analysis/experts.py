# SPDX-License-Identifier: Apache-2.0
"""Each expert of a layer by itself, attacked anew: the fixed-expert sweep of Pavlitska et al. (arXiv 2509.05086)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor, nn
from tqdm import tqdm

from ..data import Split
from ..evaluation import sign_test, wilson
from ..models.placed import Mixture, matches
from ..registry import unknown_name
from ..routers import Router, only_expert, routers_of
from . import style
from .finding import Finding
from .observation import Attack, Observation, observe

__all__ = ["Alone", "FixedExperts", "experts_alone", "fixed_experts", "layer_routers"]


@dataclass(frozen=True)
class Alone:
    """A model in which one layer always uses one expert, or the gated model itself.

    Args:
        layer: that the router routes; expert: its number; both None for the gated model.
        num_experts: N of the layer.
        share: of the clean images that the gate gives the expert (of the tokens, where those are routed); they sum to
            its top_k.
        right, robust: bool ``[n]``: right on the clean image, and on the attacked one too.
        loss: mean cross-entropy of the attacked images.
    """

    layer: str | None
    num_experts: int | None
    expert: int | None
    share: float | None
    right: Tensor
    robust: Tensor
    loss: float

    @property
    def sa(self) -> float:
        return float(self.right.double().mean())

    @property
    def ra(self) -> float:
        return float(self.robust.double().mean())


@dataclass(frozen=True)
class FixedExperts:
    """One model's sweep; ``note``: images and attack."""

    gated: Alone
    alone: tuple[Alone, ...]
    note: str

    def robust(self, each: Alone) -> bool:
        """The paper's word: an expert that alone has a higher RA than the gated model."""
        return int(each.robust.sum()) > int(self.gated.robust.sum())

    def chance(self, each: Alone) -> float:
        """How often chance alone lets the expert stand on so many more of the images on which it and the gated model
        differ: a one-sided sign test."""
        more, less = each.robust & ~self.gated.robust, self.gated.robust & ~each.robust
        return sign_test(int(more.sum()), int(less.sum()))


def layer_routers(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, Router]:
    """The routers of layers, by what they route.

    Args:
        patterns: of the names, as ``moe_at``; by default all of kinds block_moe and conv_moe.

    Raises:
        ValueError: for a pattern that names none, if the model has none, or, without patterns, if it is of another kind.
    """
    found = {r.routes: r for r in routers_of(model).values() if r.level == "layer" and r.routes and r.num_experts > 1}
    if not found:
        raise ValueError("layers: expected a model whose layers have routers of their own and several experts, got none")
    if patterns is None:
        found = {name: r for name, r in found.items() if isinstance(model.get_submodule(name), Mixture)}
        if not found:
            raise ValueError("layers: --layers says which; all are taken of kinds block_moe and conv_moe alone")
        return found
    for pattern in patterns:
        if not any(matches(name, (pattern,)) for name in found):
            raise unknown_name("layers", pattern, found)
    return {name: router for name, router in found.items() if matches(name, patterns)}


def fixed_experts(
    model: nn.Module,
    split: Split,
    attack: Attack,
    layers: Sequence[str] | None = None,
    gated: Observation | None = None,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool = False,
) -> FixedExperts:
    """Fixes the expert of one layer after the other; the other layers stay gated. Each such model is attacked anew, in
    eval mode, from the same random starts.

    Args:
        layers: patterns for :func:`layer_routers`.
        gated: what :func:`observe` gives of the model as it is, with the same images, attack, batches and seed; made here
            by default.

    Raises:
        ValueError: as :func:`layer_routers` and :func:`observe`.
        NonFiniteGradientError: as the attack.
    """
    routers = layer_routers(model, layers)
    if gated is None:
        gated = observe({"": model}, split, attack, batch_size, seed)[""]
    todo = [(name, router, expert) for name, router in routers.items() for expert in range(router.num_experts)]
    alone = []
    for name, router, expert in tqdm(todo, "experts", unit="expert", disable=None if progress else True, leave=False):
        with only_expert(router, expert):
            seen = observe({"": model}, split, attack, batch_size, seed)[""]
        alone.append(_alone(seen, name, router.num_experts, expert, _share(gated, name, expert)))
    return FixedExperts(_alone(gated), tuple(alone), gated.note())


def _alone(
    seen: Observation,
    layer: str | None = None,
    num_experts: int | None = None,
    expert: int | None = None,
    share: float | None = None,
) -> Alone:
    assert seen.losses is not None
    right = seen.clean == seen.labels
    robust = right & (seen.attacked == seen.labels)
    return Alone(layer, num_experts, expert, share, right, robust, float(seen.losses.double().mean()))


def _share(gated: Observation, layer: str, expert: int) -> float | None:
    for choice in gated.choices:
        if choice.layers[0] == layer or choice.layers[0].startswith(f"{layer}."):
            return float((choice.clean == expert).any(2).double().mean())
    return None


def experts_alone(sweeps: Mapping[str, FixedExperts]) -> Finding:
    """SA and RA of each expert of a layer alone, beside the gated model's.

    Args:
        sweeps: of each model, by label.

    Columns: ``model``, ``layer``, ``experts`` (N), ``expert``, ``share`` (of the images that the gate gives it),
    ``images``, ``sa`` and ``ra`` with their 95 % intervals, ``loss`` on attacked images, ``robust`` (0 or 1: RA above the
    gated model's), ``p`` (how often chance gives that much more). A model's first row is the gated one's: its ``layer``,
    ``share``, ``robust`` and ``p`` are empty.

    Raises:
        ValueError: if there is nothing.
    """
    if not sweeps:
        raise ValueError("sweeps: expected at least one model's, got none")
    rows: list[tuple[Any, ...]] = []
    for label, sweep in sweeps.items():
        rows.append((label, None, None, "gated", None, *_figures(sweep.gated), None, None))
        for each in sweep.alone:
            verdict = int(sweep.robust(each)), sweep.chance(each)
            rows.append((label, each.layer, each.num_experts, each.expert, each.share, *_figures(each), *verdict))
    layers = list(dict.fromkeys(each.layer for sweep in sweeps.values() for each in sweep.alone))

    def draw() -> Figure:
        across = min(len(layers), 3)
        down = math.ceil(len(layers) / across)
        size = max(2.9 * across, 5.2) + 0.4, 2.7 * down + 0.9
        with style.figure(*size, nrows=down, ncols=across, squeeze=False, sharey=True) as (fig, axes):
            for axis, layer in zip(axes.flat, layers, strict=False):
                if len(sweeps) == 1:
                    _over_shares(axis, next(iter(sweeps.values())), layer)
                else:
                    _over_runs(axis, sweeps, layer)
                axis.set_title(layer, loc="left", fontsize=9)
            for axis in list(axes.flat)[len(layers) :]:
                axis.set_visible(False)
            for row in axes:
                style.percent_axis(row[0], "accuracy, %")
            fig.legend(handles=_legend(), loc="outside lower center", ncols=3)
            fig.suptitle("Each expert alone", x=0.01, ha="left", fontsize=11)
            return fig

    count = sum(sweep.robust(each) for sweep in sweeps.values() for each in sweep.alone)
    total = sum(len(sweep.alone) for sweep in sweeps.values())
    note = (
        f"{next(iter(sweeps.values())).note}; anew for each layer and expert, the other layers gated. RA: right on the "
        f"clean and the attacked image. Robust, an RA above the gated model's: {count} of {total}; p: how often chance "
        "gives as much (sign test, one-sided, not corrected for so many experts). With top_k > 1 the gated model mixes, "
        "and an expert alone does not"
    )
    columns = (
        "model", "layer", "experts", "expert", "share", "images", "sa", "sa_low", "sa_high", "ra", "ra_low", "ra_high",
        "loss", "robust", "p",
    )  # fmt: skip
    return Finding("experts_alone", "SA and RA of each expert alone", columns, rows, draw, note)


def _figures(each: Alone) -> tuple[Any, ...]:
    n = len(each.right)
    sa, ra = wilson(int(each.right.sum()), n), wilson(int(each.robust.sum()), n)
    return n, each.sa, *sa, each.ra, *ra, each.loss


_GATED = {"SA": "-", "RA": "--"}  # lines of the gated model
_ROBUST = style.points("attacked") | {"markerfacecolor": style.COLOURS[1]}


def _legend() -> list[Line2D]:
    points = {
        "SA, expert alone": style.points("clean"),
        "RA, expert alone": style.points("attacked"),
        "RA, robust expert": _ROBUST,
    }
    lines = {f"{name}, gated": {"color": "black", "linestyle": dash, "linewidth": 1.2} for name, dash in _GATED.items()}
    return [Line2D([], [], label=label, **look) for label, look in (points | lines).items()]


def _scatter(axis: Any, sweep: FixedExperts, each: Alone, x: float) -> None:
    axis.plot([x], [100 * each.sa], **style.points("clean"))
    axis.plot([x], [100 * each.ra], **(_ROBUST if sweep.robust(each) else style.points("attacked")))


def _over_shares(axis: Any, sweep: FixedExperts, layer: str | None) -> None:
    for value, dash in zip((sweep.gated.sa, sweep.gated.ra), _GATED.values(), strict=True):
        axis.axhline(100 * value, color="black", linestyle=dash, linewidth=1.2)
    for each in sweep.alone:
        if each.layer != layer:
            continue
        x = 100 * (each.share or 0.0)
        _scatter(axis, sweep, each, x)
        axis.annotate(str(each.expert), (x, 100 * each.sa), xytext=(5, 4), textcoords="offset points", fontsize=7)
    axis.set_xlabel("images that the gate gives it, %")
    axis.margins(x=0.08)


def _over_runs(axis: Any, sweeps: Mapping[str, FixedExperts], layer: str | None) -> None:
    """One place for each run that has the layer, by its number of experts."""
    own = {label: [each for each in sweep.alone if each.layer == layer] for label, sweep in sweeps.items()}
    sizes = {label: each[0].num_experts or 0 for label, each in own.items() if each}
    ordered = sorted(sizes, key=sizes.__getitem__)
    for at, label in enumerate(ordered):
        sweep = sweeps[label]
        for value, dash in zip((sweep.gated.sa, sweep.gated.ra), _GATED.values(), strict=True):
            axis.hlines(100 * value, at - 0.35, at + 0.35, color="black", linestyle=dash, linewidth=1.2)
        for each in own[label]:
            _scatter(axis, sweep, each, at)
    if len(set(sizes.values())) == len(sizes):
        axis.set_xticks(range(len(ordered)), [str(sizes[label]) for label in ordered])
        axis.set_xlabel("experts")
    else:
        names = [f"{label}, N = {sizes[label]}" for label in ordered]
        axis.set_xticks(range(len(ordered)), names, fontsize=7, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.6, len(ordered) - 0.4)
