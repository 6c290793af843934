# SPDX-License-Identifier: Apache-2.0
"""Epoch by epoch: accuracy and loss (AdvMoE, figure A2), those of several runs (RT-ER, figures 2 and 5), and how the
experts are used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from . import style
from .finding import Finding

__all__ = ["collapse", "history", "stability"]

_ACCURACIES = {  # a run's names: how they are called in the picture
    "validation_sa": "SA, validation",
    "validation_ra": "RA, validation",
    "train_sa": "SA, training",
    "train_ra": "RA, training",
}


def history(
    metrics: Sequence[Mapping[str, Any]], phases: Mapping[int, str] | None = None, attack: str | None = None
) -> Finding:
    """SA, RA and losses of every epoch (AdvMoE, figure A2), from the lines of a run's ``metrics.jsonl``.

    Args:
        metrics: a mapping for each epoch, with ``epoch``, ``validation_sa`` and ``validation_ra`` (shares of the
            validation images), ``train_sa`` or ``train_ra``, and losses, whose names end with ``loss``.
        phases: what begins behind an epoch; drawn as a line there.
        attack: of the validation, by name.

    Columns: ``epoch`` and what of the above any line has; empty where a line has it not.

    Raises:
        ValueError: if there is no line.
    """
    if not metrics:
        raise ValueError("metrics: expected the lines of at least one epoch, got none")
    known = dict.fromkeys(name for line in metrics for name in line)
    losses = [name for name in known if name.endswith("loss")]
    accuracies = [name for name in _ACCURACIES if name in known]
    columns = ("epoch", *accuracies, *losses)
    rows: list[tuple[Any, ...]] = [tuple(line.get(name) for name in columns) for line in metrics]

    def draw() -> Figure:
        epochs = [row[0] for row in rows]
        with style.figure(6.6, 5.4, nrows=2, sharex=True, height_ratios=(3, 2)) as (fig, (top, bottom)):
            for axis, names, scale in ((top, accuracies, 100), (bottom, losses, 1)):
                for at, name in enumerate(names):
                    values = [
                        math.nan if row[columns.index(name)] is None else scale * row[columns.index(name)] for row in rows
                    ]
                    look = style.line_style(at) | ({"marker": "none"} if len(rows) > 40 else {})
                    axis.plot(epochs, values, label=_ACCURACIES.get(name, name.replace("_", " ")), **look)
                _mark(axis, epochs, phases, named=axis is top)
                axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
            style.percent_axis(top, "accuracy, %")
            bottom.set_ylabel("loss, training")
            bottom.set_xlabel("epoch")
            bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
            fig.suptitle("Accuracy and loss over the epochs", x=0.01, ha="left", fontsize=11)
            return fig

    under = f" under {attack}" if attack else ""
    note = (
        f"SA and RA{under} on images held out of the training set, not on test images; training's are counted on its "
        "batches meanwhile. Losses are means over an epoch's steps. The paper's figure A2"
    )
    return Finding("training", "Accuracy and loss over the epochs", columns, rows, draw, note)


def stability(metrics: Mapping[str, Sequence[Mapping[str, Any]]], attack: str | None = None) -> Finding:
    """Validation SA and RA of several runs over their epochs: which climb and which fall (arXiv 2502.06832, figures 2 and
    5).

    Args:
        metrics: of each run, by label, the lines of its ``metrics.jsonl``.
        attack: of the validations, by name.

    Columns: ``model``, ``epoch``, ``sa``, ``ra``, and ``fall``: how far RA lies below the run's highest up to then.

    Raises:
        ValueError: if a run has no line.
    """
    rows: list[tuple[Any, ...]] = []
    for label, lines in metrics.items():
        if not lines:
            raise ValueError(f"metrics: expected the lines of at least one epoch of {label}, got none")
        best = 0.0
        for line in lines:
            best = max(best, line["validation_ra"])
            sa, ra = line["validation_sa"], line["validation_ra"]
            rows.append((label, line["epoch"], sa, ra, best - ra))

    def draw() -> Figure:
        with style.figure(6.6, 5.4 + 0.2 * math.ceil(len(metrics) / 2), nrows=2, sharex=True) as (fig, (top, bottom)):
            for axis, column, name in ((top, 2, "SA, %"), (bottom, 3, "RA, %")):
                for at, label in enumerate(metrics):
                    own = [row for row in rows if row[0] == label]
                    look = style.line_style(at) | ({"marker": "none"} if len(own) > 40 else {})
                    axis.plot([row[1] for row in own], [100 * row[column] for row in own], label=label, **look)
                style.percent_axis(axis, name)
            bottom.set_xlabel("epoch")
            bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
            fig.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2)
            fig.suptitle("SA and RA of each run over its epochs", x=0.01, ha="left", fontsize=11)
            return fig

    falls = {label: max(row[4] for row in rows if row[0] == label) for label in metrics}
    under = f" under {attack}" if attack else ""
    note = (
        f"On images held out of the training set{under}. The largest fall of RA below a run's highest so far, in points: "
        + ", ".join(f"{label} {100 * fall:.1f}" for label, fall in falls.items())
    )
    columns = ("model", "epoch", "sa", "ra", "fall")
    return Finding("stability", "Stability of training", columns, rows, draw, note)


def collapse(
    metrics: Sequence[Mapping[str, Any]],
    shared: Mapping[str, str] | None = None,
    phases: Mapping[int, str] | None = None,
) -> Finding:
    """How evenly each layer's experts are used after every epoch, and how much the most used one takes.

    Args:
        metrics: the lines of a run's ``metrics.jsonl``, with ``expert_usage``: each routed layer's shares of the choices
            for validation images without an attack, in eval mode.
        shared: which router a routed layer follows, by name; of layers of one router the first is shown. All by default.
        phases: what begins behind an epoch; drawn as a line there.

    Columns: ``layer``, ``epoch``, ``experts`` (N), ``entropy`` over log N (1: all are used alike, 0: one takes
    everything; 0 with one expert), ``top`` (the share of the most used expert), ``top_expert``. Of k choices for each
    image an expert's share of all choices is 1 / k at most, and the entropy log k / log N at least.

    Raises:
        ValueError: if no line has ``expert_usage``.
    """
    sites: dict[str, str] = {}  # the first layer of each router
    rows: list[tuple[Any, ...]] = []
    for line in metrics:
        for layer, usage in line.get("expert_usage", {}).items():
            router = (shared or {}).get(layer, layer)
            if sites.setdefault(router, layer) != layer:
                continue
            entropy = sum(u * math.log(1 / u) for u in usage if u > 0) / math.log(max(len(usage), 2))
            top = max(usage)
            rows.append((layer, line["epoch"], len(usage), entropy, top, usage.index(top)))
    if not rows:
        raise ValueError("metrics: expected lines with expert_usage, of a run with routed layers; got none")
    layers = list(sites.values())

    def draw() -> Figure:
        tall = max(5.0, 0.17 * len(layers) + 0.8)
        with style.figure(7.6, tall, nrows=2, sharex=True) as (fig, (top, bottom)):
            shades = style.shades(len(layers))
            for at, layer in enumerate(layers):
                own = [row for row in rows if row[0] == layer]
                look = style.line_style(at) | ({"color": shades[at]} if len(layers) > len(style.COLOURS) else {})
                look |= {"marker": "none"} if len(own) > 40 else {}
                epochs = [row[1] for row in own]
                top.plot(epochs, [row[3] for row in own], label=layer, **look)
                bottom.plot(epochs, [100 * row[4] for row in own], **look)
            for axis in (top, bottom):
                _mark(axis, [row[1] for row in rows if row[0] == layers[0]], phases, named=axis is top)
            top.set_ylim(-0.03, 1.03)
            top.set_ylabel("entropy / log N")
            style.percent_axis(bottom, "most used expert, %", 104)
            bottom.set_xlabel("epoch")
            bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
            fig.legend(*top.get_legend_handles_labels(), loc="outside right center", fontsize=7)
            fig.suptitle("Use of the experts over the epochs", x=0.01, ha="left", fontsize=11)
            return fig

    last = [row for row in rows if row[1] == rows[-1][1]]
    low, high = 100 * min(row[4] for row in last), 100 * max(row[4] for row in last)
    sizes = ", ".join(map(str, sorted({row[2] for row in last})))
    note = (
        "Choices for images held out of the training set, without an attack, in eval mode, after each epoch. At the end "
        f"the most used expert takes {low:.1f} % to {high:.1f} % of a layer's choices (N = {sizes})"
    )
    columns = ("layer", "epoch", "experts", "entropy", "top", "top_expert")
    return Finding("collapse", "Use of the experts over the epochs", columns, rows, draw, note)


def _mark(axis: Any, epochs: Sequence[int], phases: Mapping[int, str] | None, named: bool) -> None:
    """A line behind each epoch at which a phase begins; ``named``: with what it is called."""
    for epoch, what in (phases or {}).items():
        if not epochs[0] <= epoch < epochs[-1]:
            continue
        axis.axvline(epoch + 0.5, color="#555555", linestyle=":", linewidth=1.2)
        if named:
            axis.annotate(
                what,
                (epoch + 0.5, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=8,
                annotation_clip=False,
            )
