# SPDX-License-Identifier: Apache-2.0
"""Where the routers send images: usage of the experts, classes, entropy, and what an attack changes."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure
from torch import Tensor

from . import style
from .finding import Finding
from .observation import Choice, Observation

__all__ = ["classes", "entropy", "flips", "usage"]


def usage(observed: Observation) -> Finding:
    """Each expert's share of the choices, clean and attacked.

    Columns: ``layer`` (the first of those that share a choice), ``layers`` (how many do), ``expert``, ``clean`` and
    ``attacked`` (shares of all choices: of images, and where tokens are routed or several experts chosen, of those).

    Raises:
        ValueError: for a model without routed layers.
    """
    choices = observed.routed()
    rows = []
    for choice in choices:
        shares = zip(choice.usage().tolist(), choice.usage(attacked=True).tolist(), strict=True)
        rows += [(choice.layers[0], len(choice.layers), e, clean, attacked) for e, (clean, attacked) in enumerate(shares)]

    def draw() -> Figure:
        most = max(choice.num_experts for choice in choices)
        height = style.height_of_rows(len(choices), 1.7)
        with style.figure(7.6, height, ncols=2, sharey=True) as (fig, axes):
            colours = style.shades(most)
            for axis, attacked in zip(axes, (False, True), strict=True):
                for at, choice in enumerate(choices):
                    left = 0.0
                    for expert, share in enumerate((100 * choice.usage(attacked)).tolist()):
                        axis.barh(
                            at, share, left=left, height=0.8, color=colours[expert], edgecolor="white", linewidth=0.8
                        )
                        left += share
                axis.set_xlim(0, 100)
                axis.set_xlabel("share of the choices, %")
                axis.set_title("attacked images" if attacked else "clean images", loc="left")
                axis.grid(visible=False)
            style.layer_axis(axes[0], [choice.name for choice in choices])
            style.expert_legend(fig, colours)
            return fig

    return Finding(
        "usage",
        "Usage of the experts",
        ("layer", "layers", "expert", "clean", "attacked"),
        rows,
        draw,
        observed.note(),
    )


def classes(observed: Observation) -> Finding:
    """How each class's images are spread over the experts: a heat-map for each choice.

    Columns: ``layer``, ``class``, ``expert``, ``images`` (of the class), ``clean`` and ``attacked``: the expert's share
    of the choices for the class's images. Classes without an image are left out. The picture is of the clean images.

    Raises:
        ValueError: for a model without routed layers.
    """
    choices = observed.routed()
    present = observed.labels.unique()
    counts = [int((observed.labels == label).sum()) for label in present]
    maps = [(_by_class(c, c.clean, observed.labels), _by_class(c, c.attacked, observed.labels)) for c in choices]
    rows = [
        (choice.layers[0], int(label), e, count, clean[at, e].item(), attacked[at, e].item())
        for choice, (clean, attacked) in zip(choices, maps, strict=True)
        for at, (label, count) in enumerate(zip(present, counts, strict=True))
        for e in range(choice.num_experts)
    ]

    def draw() -> Figure:
        across = min(len(choices), 4)
        down = math.ceil(len(choices) / across)
        tall = 0.35 + min(max(0.13 * len(present), 1.1 if down > 1 else 2.2), 2.6)
        top = 100 * max(float(clean.max()) for clean, _ in maps)
        with style.figure(1.75 * max(across, 2) + 1.2, tall * down + 0.8, nrows=down, ncols=across, squeeze=False) as (
            fig,
            axes,
        ):
            image = None
            for at, axis in enumerate(axes.flat):
                if at >= len(choices):
                    axis.set_visible(False)
                    continue
                clean, _ = maps[at]
                image = axis.imshow(100 * clean.numpy(), cmap=style.SEQUENTIAL, vmin=0, vmax=top, aspect="auto")
                axis.set_title(choices[at].name, fontsize=8, loc="left")
                axis.grid(visible=False)
                axis.tick_params(labelsize=7, length=2)
                experts = choices[at].num_experts
                axis.set_xticks(range(experts) if experts <= 10 else range(0, experts, math.ceil(experts / 8)))
                step = 1 if len(present) <= 10 else math.ceil(len(present) / 8)
                ticks = range(0, len(present), step)
                # of the smallest panels every second class would not fit either
                axis.set_yticks(ticks, [str(int(present[t])) for t in ticks] if at % across == 0 else [])
            assert image is not None
            fig.suptitle("Classes and experts, clean images", x=0.01, ha="left", fontsize=11)
            fig.supxlabel("expert", fontsize=9)
            fig.supylabel("class", fontsize=9)
            fig.colorbar(image, ax=axes, label="share of the class's choices, %", shrink=min(1.0, 3 / (tall * down)))
            return fig

    return Finding(
        "classes",
        "Classes and experts",
        ("layer", "class", "expert", "images", "clean", "attacked"),
        rows,
        draw,
        f"{observed.note()}. The picture: clean images; a row of a panel is a class and sums to 100 %",
    )


def _by_class(choice: Choice, chosen: Tensor, labels: Tensor) -> Tensor:
    """Shares float64 ``[classes that are there, N]``; each row sums to 1."""
    present, index = labels.unique(return_inverse=True)
    flat = (index[:, None, None] * choice.num_experts + chosen.long()).reshape(-1)
    counts = torch.bincount(flat, minlength=len(present) * choice.num_experts).double()
    counts = counts.view(len(present), choice.num_experts)
    return counts / counts.sum(1, keepdim=True)


def entropy(observed: Observation) -> Finding:
    """How evenly a layer's experts are used, and how decided its router is.

    Columns: ``layer``; ``usage_clean`` and ``usage_attacked``: the entropy of the experts' shares over its greatest,
    log N: 1 where all are used alike, 0 where one takes everything; ``router_clean`` and ``router_attacked``: the mean
    over the images of the entropy of the softmax of the router's scores, over log N: 1 where it has no preference (empty
    where no scores are known). With one expert both are 0.

    Raises:
        ValueError: for a model without routed layers.
    """
    choices = observed.routed()
    rows = []
    for choice in choices:
        most = math.log(max(choice.num_experts, 2))
        spread = [_entropy(choice.usage(attacked)) / most for attacked in (False, True)]
        decided = [None, None] if choice.entropy is None else [float(each.mean()) / most for each in choice.entropy]
        rows.append((choice.layers[0], *spread, *decided))

    def draw() -> Figure:
        with style.figure(7.6, style.height_of_rows(len(rows), 1.7), ncols=2, sharey=True, sharex=True) as (fig, axes):
            for axis, first, title in ((axes[0], 1, "usage of the experts"), (axes[1], 3, "the router's softmax")):
                for column, name in ((first, "clean"), (first + 1, "attacked")):
                    values = [math.nan if row[column] is None else row[column] for row in rows]
                    axis.plot(values, range(len(rows)), label=name, **style.points(name))
                axis.set_xlim(-0.03, 1.03)
                axis.set_title(title, loc="left")
                axis.set_xlabel("entropy / log N")
            style.layer_axis(axes[0], [choice.name for choice in choices])
            for axis in axes:
                axis.grid(axis="y", visible=True)  # leads the eye from the name to the point
            fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
            return fig

    return Finding(
        "entropy",
        "Entropy of the routing",
        ("layer", "usage_clean", "usage_attacked", "router_clean", "router_attacked"),
        rows,
        draw,
        f"{observed.note()}. Entropies over log N: 1 is an even use of the experts, and a router without preference",
    )


def _entropy(shares: Tensor) -> float:
    return float(torch.special.entr(shares).sum())


def flips(observed: Observation) -> Finding:
    """Which layers' choices an attack changes.

    Columns: ``layer`` (of the last row ``any``), ``images``: the share of images with any changed choice there;
    ``choices``: the share of choices that changed, which is less where an image has one for each token.

    Raises:
        ValueError: for a model without routed layers.
    """
    choices = observed.routed()
    rows = []
    for choice in choices:
        flipped = choice.flipped()
        rows.append((choice.layers[0], float(flipped.any(1).double().mean()), float(flipped.double().mean())))
    every = torch.cat([choice.flipped().reshape(-1) for choice in choices])
    rows.append(("any", float(observed.flipped().double().mean()), float(every.double().mean())))
    tokens = any(choice.clean.shape[1] > 1 for choice in choices)

    def draw() -> Figure:
        with style.figure(6.4, style.height_of_rows(len(rows), 1.5 if tokens else 1.2)) as (fig, axis):
            bars = range(len(rows))
            colours = [style.COLOURS[0]] * len(choices) + ["#444444"]
            axis.barh(bars, [100 * row[1] for row in rows], height=0.75, color=colours)
            if tokens:
                axis.plot([100 * row[2] for row in rows], bars, label="of all choices", **style.points("attacked"))
                fig.legend(loc="outside lower center")
            for at, row in enumerate(rows):
                offset = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
                axis.annotate(f"{100 * row[1]:.1f}", (100 * row[1], at), **offset)
            style.layer_axis(axis, [*(choice.name for choice in choices), "any of them"])
            axis.set_xlim(0, min(110, max(1.0, 115 * max(row[1] for row in rows))))
            axis.set_xlabel("images whose choice the attack changes, %")
            axis.set_title("Flipped choices", loc="left")
            return fig

    return Finding(
        "flips",
        "Choices that the attack changes",
        ("layer", "images", "choices"),
        rows,
        draw,
        observed.note(),
    )
