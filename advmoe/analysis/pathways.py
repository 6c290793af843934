# SPDX-License-Identifier: Apache-2.0
"""How much an image's pathway has in common with a static mask (AdvMoE, figure 6)."""

from __future__ import annotations

import math

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from moe_kernels import ExpertSlices, RoutedConv2d

from ..sparse import MaskedConv2d, masked_convolutions
from . import style
from .finding import Finding
from .observation import Observation

__all__ = ["overlaps", "pathways"]

BINS = 30


def overlaps(observed: Observation, model: nn.Module, sparse: nn.Module) -> tuple[Tensor, Tensor, float, int, int]:
    """Intersection over union of each image's pathway with the mask, over the channels of all layers that both have.

    A pathway is the set of output channels that are computed for the image, in the coordinates of the dense network's
    layer: of expert e in the windows layout its window, in the partition layout channels ``e * w : (e + 1) * w``, which
    are the dense layer's only where N experts of w channels are as many as it has. Layers are matched by their names.

    Returns:
        IoU float64 ``[n]`` on clean and on attacked images; what a mask would have that is drawn by chance (the ratio of
        the expected intersection and union); how many layers are compared; how many of either model are left out because
        the other has none of the name (or chooses nothing there).

    Raises:
        ValueError: if the models do not fit: no layer in common, another width, experts that are no channels of the dense
            layer, a choice for each token, or a mask that removes nothing.
    """
    masked = masked_convolutions(sparse)
    if not masked:
        raise ValueError("against: expected a run of kind sparse, got a model without masks")
    if all(bool(conv.mask.all()) for conv in masked.values()):
        raise ValueError("against: expected masks that remove channels, got none that does; no mask is learned yet")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoutedConv2d)}
    followed = {layer: choice for choice in observed.routed() for layer in choice.layers}
    common = [name for name in layers if name in masked and name in followed]
    if not common:
        raise ValueError(
            f"against: expected routed and masked convolutions of the same names, got {_some(layers)} and {_some(masked)}"
        )
    intersections = [torch.zeros(len(observed)) for _ in range(2)]
    unions = [torch.zeros(len(observed)) for _ in range(2)]
    by_chance = [0.0, 0.0]
    for name in common:
        slices, conv, choice = layers[name].out_slices, masked[name], followed[name]
        shared = _shared(name, slices, choice.num_experts, conv)
        kept, width = float(conv.mask.sum()), slices.width
        for at, chosen in enumerate((choice.clean, choice.attacked)):
            if chosen[0].numel() != 1:
                raise ValueError(
                    f"model: expected one expert for each image, got {chosen[0].numel()} choices in {name}: "
                    "each has channels of its own"
                )
            both = shared[chosen.reshape(-1).long()]
            intersections[at] += both
            unions[at] += width + kept - both
        expected = width * kept / conv.out_channels
        by_chance[0] += expected
        by_chance[1] += width + kept - expected
    clean, attacked = (i.double() / u for i, u in zip(intersections, unions, strict=True))
    left_out = len(layers.keys() | masked.keys()) - len(common)
    return clean, attacked, by_chance[0] / by_chance[1], len(common), left_out


def _shared(name: str, slices: ExpertSlices, num_experts: int, conv: MaskedConv2d) -> Tensor:
    """How many channels each expert has in common with the mask, ``[N]``."""
    if slices.total != conv.out_channels:
        how = f"{slices.total} channels of {num_experts} experts of {slices.width}"
        why = "another width"
        if slices.is_partition and num_experts > 1:
            why = "in the partition layout experts are parts of a dense layer only where N times their width is its own"
        raise ValueError(f"model: expected the {conv.out_channels} channels of the masked {name}, got {how}: {why}")
    starts = slices.starts if len(slices.starts) == num_experts else slices.starts * num_experts
    mask = conv.mask.detach().float().cpu()
    return torch.stack([mask[start : start + slices.width].sum() for start in starts])


def _some(names: object) -> str:
    listed = list(names)  # type: ignore[call-overload]
    return f"{', '.join(listed[:3])}{', …' if len(listed) > 3 else ''}" if listed else "none"


def pathways(observed: Observation, model: nn.Module, sparse: nn.Module) -> Finding:
    """The distribution of :func:`overlaps` over the images (AdvMoE, figure 6).

    Columns: ``images`` (clean or attacked), ``statistic``, ``from`` and ``to``, ``value``. Rows ``density`` are a
    histogram, whose bars' areas sum to 1; ``mean``, ``sd``, ``min`` and ``max`` are of the images' values; ``chance`` is
    what a mask has that knows nothing of the pathways.

    Raises:
        ValueError: as :func:`overlaps`.
    """
    clean, attacked, by_chance, common, left_out = overlaps(observed, model, sparse)
    values = {"clean": clean.numpy(), "attacked": attacked.numpy()}
    both = np.concatenate(list(values.values()))
    room = max(0.02, 0.08 * float(np.ptp(both)))  # all images may have one value
    edges = np.linspace(max(0.0, both.min() - room), min(1.0, both.max() + room), BINS + 1)
    rows: list[tuple] = []
    for name, each in values.items():
        density, _ = np.histogram(each, edges, density=True)
        bars = zip(edges[:-1].tolist(), edges[1:].tolist(), density.tolist(), strict=True)
        rows += [(name, "density", *bar) for bar in bars]
        sd = float(each.std(ddof=1)) if len(each) > 1 else math.nan
        summary = {"mean": each.mean(), "sd": sd, "min": each.min(), "max": each.max()}
        rows += [(name, statistic, None, None, float(value)) for statistic, value in summary.items()]
    rows.append(("either", "chance", None, None, by_chance))

    def draw() -> Figure:
        with style.figure(6.4, 3.8) as (fig, axis):
            for at, (name, each) in enumerate(values.items()):
                density = [row[4] for row in rows if row[:2] == (name, "density")]
                colour = style.COLOURS[at]
                axis.stairs(density, edges, color=colour, linewidth=1.0, alpha=0.9, fill=False)
                axis.stairs(density, edges, color=colour, alpha=0.18, fill=True)
                look = style.line_style(at) | {"marker": "none"}
                curve = _smooth(each, edges)
                x, y = curve if curve is not None else ([], [])
                axis.plot(x, y, label=f"{name}: mean {each.mean():.3f}", **look)
            axis.axvline(by_chance, color="black", linestyle=":", linewidth=1.4, label=f"by chance: {by_chance:.3f}")
            axis.set_xlabel("IoU of the pathway and the mask")
            axis.set_ylabel("density")
            axis.set_title("Pathways against the static mask", loc="left")
            fig.legend(loc="outside lower center", ncols=3)
            return fig

    note = (
        f"{observed.note()}. {common} convolutions are compared by name, {left_out} are in one of the models only and "
        "left out. Channels are matched by their places in the dense layer (in the partition layout expert e has those "
        "from e * w on): two networks trained apart have nothing else in common there. Curves: Gaussian "
        "kernels, Silverman's width; none where all images have one value. The paper's figure 6"
    )
    columns = ("images", "statistic", "from", "to", "value")
    return Finding("pathways", "Pathways and a static mask: IoU", columns, rows, draw, note)


def _smooth(values: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """A kernel density over the histogram's range; None where the values do not differ."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    if spread < 1e-9:
        return None
    width = 1.06 * spread * len(values) ** -0.2
    x = np.linspace(edges[0], edges[-1], 201)
    y = np.zeros_like(x)
    for part in np.array_split(values, math.ceil(len(values) / 1000)):  # of all at once there may be millions
        y += np.exp(-0.5 * ((x[:, None] - part) / width) ** 2).sum(1)
    return x, y / (len(values) * width * math.sqrt(2 * math.pi))
