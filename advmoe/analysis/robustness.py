# SPDX-License-Identifier: Apache-2.0
"""Accuracy against the attack's radius (AdvMoE, figure 2), and of models on each other's adversarial images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from . import style
from .finding import Finding
from .observation import Observation

__all__ = ["epsilons", "transfer"]


def epsilons(observed: Mapping[str, Sequence[Observation]]) -> Finding:
    """RA against the attack's radius, a line for each model (AdvMoE, figure 2).

    Args:
        observed: of each model, by label, one observation for each radius, all of the same images. At radius 0 stands SA.

    Columns: ``model``, ``epsilon`` in units of the pixel range, ``ra``: the share of images right clean and attacked,
    ``no_gradient``: the share of images that gave the attack no gradient.

    Raises:
        ValueError: if there is nothing.
    """
    if not any(observed.values()):
        raise ValueError("observed: expected at least one model with an observation, got none")
    rows: list[tuple] = []
    for label, each in observed.items():
        rows.append((label, 0.0, each[0].sa, None))
        ordered = sorted(each, key=lambda o: o.epsilon)
        rows += [(label, o.epsilon, o.ra, float(o.zero_gradient.double().mean())) for o in ordered]

    def draw() -> Figure:
        lines = {label: [(e, ra) for name, e, ra, _ in rows if name == label] for label in observed}
        with style.figure(6.0, 3.9 + 0.2 * math.ceil(len(lines) / 2)) as (fig, axis):
            for at, (label, line) in enumerate(lines.items()):
                axis.plot([255 * e for e, _ in line], [100 * ra for _, ra in line], label=label, **style.line_style(at))
            style.over_radius(fig, axis)
            return fig

    one = max((o for each in observed.values() for o in each), key=lambda o: o.epsilon)
    note = (
        f"{len(one)} images, the same for each model and radius; {one.attack} and likewise for the other radii. "
        "At radius 0: SA. The paper's figure 2"
    )
    return Finding(
        "epsilons", "RA against the radius of the attack", ("model", "epsilon", "ra", "no_gradient"), rows, draw, note
    )


def transfer(observed: Mapping[str, Observation]) -> Finding:
    """Robust accuracy of every model on the images that were attacked on every other one.

    Args:
        observed: by label, made with ``cross``: all models on the same images.

    Columns: ``attacked_on``, ``judged_by``, ``ra``: the share of all images that ``judged_by`` classifies rightly clean
    and as they were attacked on ``attacked_on``. The diagonal is each model's own RA.

    Raises:
        ValueError: for fewer than two models.
    """
    labels = list(observed)
    if len(labels) < 2:
        raise ValueError(f"models: expected at least two, got {len(labels)}")
    rows = []
    for source, each in observed.items():
        for judge in labels:
            right = (observed[judge].clean == each.labels) & (each.others[judge] == each.labels)
            rows.append((source, judge, float(right.double().mean())))

    def draw() -> Figure:
        matrix = 100 * np.array([row[2] for row in rows]).reshape(len(labels), len(labels))
        longest = max(len(label) for label in labels)
        side = 0.85 * len(labels) + 0.075 * longest
        with style.figure(side + 2.6, side + 1.3) as (fig, axis):
            image = axis.imshow(matrix, cmap=style.SEQUENTIAL, vmin=0, vmax=max(matrix.max(), 1))
            for i, j in np.ndindex(matrix.shape):
                dark = matrix[i, j] < 0.55 * matrix.max()
                axis.text(j, i, f"{matrix[i, j]:.1f}", ha="center", va="center", color="white" if dark else "black")
            slant = {} if longest <= 8 else {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
            axis.set_xticks(range(len(labels)), labels, fontsize=9, **slant)
            axis.set_yticks(range(len(labels)), labels, fontsize=9)
            axis.grid(visible=False)
            axis.set_ylabel("images attacked on")
            axis.set_xlabel("judged by")
            axis.set_title("RA of each on the others' images", loc="left")
            fig.colorbar(image, ax=axis, label="RA, %", shrink=0.8)
            return fig

    one = next(iter(observed.values()))
    note = (
        f"{len(one)} images, the same for all models; {one.attack}. RA: right on the clean and the attacked image; the "
        "diagonal is a model under its own attack"
    )
    return Finding(
        "transfer", "Attacks that transfer between models", ("attacked_on", "judged_by", "ra"), rows, draw, note
    )
