# SPDX-License-Identifier: Apache-2.0
"""How far an image may be moved before a linear router chooses otherwise: exactly, without an attack."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ..models.base import Normalize
from ..routers import LinearRouter, routers_of
from . import style
from .finding import Finding
from .observation import Observation

__all__ = ["linear_map", "radius", "route_radii"]


def linear_map(model: nn.Module) -> Tensor:
    """The weight ``[N, 3 * S * S]``, float64, from pixels in [0, 1] to the scores that a model's linear router chooses by
    in eval mode: normalisation of the image, standardisation of the scores and temperature are linear and part of it.

    Raises:
        ValueError: if the model does not have one router, ``"linear"``, of its ``normalize``\\ d image.
    """
    routers = list(routers_of(model).values())
    if len(routers) != 1 or type(routers[0]) is not LinearRouter:
        found = sorted({type(router).__name__ for router in routers}) or ["none"]
        raise ValueError(
            f"model: expected one router, linear, of the whole image; got {len(routers)}: {', '.join(found)}"
        )
    router = routers[0]
    assert isinstance(router, LinearRouter)
    if router.only is not None:
        raise ValueError(f"model: expected a router that chooses, got one that sends all to expert {router.only}")
    weight = router.linear.weight.detach().double()
    normalize = getattr(model, "normalize", None)
    if isinstance(normalize, Normalize):
        std = normalize.std.double().expand(1, router.in_channels, router.image_size, router.image_size)
        weight = weight / std.flatten()
    elif not isinstance(normalize, nn.Identity):
        raise ValueError(f"model: expected a normalize of kind Normalize or Identity, got {type(normalize).__name__}")
    if router.score_norm is not None:
        var = router.score_norm.running_var
        assert var is not None
        weight = weight * (var.double() + router.score_norm.eps).rsqrt()[:, None]
    return weight / router.options.temperature


def route_radii(weight: Tensor, scores: Tensor) -> Tensor:
    """The greatest L-infinity radius within which no image of the ball is routed otherwise: float64 ``[n]``.

    ``min_j (s_i - s_j) / ||W_i - W_j||_1`` over the experts j beside the chosen i, in units of the pixel range. The ball
    is not cut to [0, 1]: for images in that box it is a lower bound, hence a certificate still. Infinite where the scores
    differ by a constant.

    Args:
        weight: ``[N, D]`` of the map from pixels to scores, :func:`linear_map`.
        scores: ``[n, N]``.
    """
    scores = scores.double().to(weight.device)
    best, chosen = scores.max(1, keepdim=True)
    lengths = torch.stack([(weight - row).abs().sum(1) for row in weight])[chosen[:, 0]]  # [n, N]
    gaps = torch.where(lengths > 0, (best - scores) / lengths, torch.inf)
    return gaps.amin(1)


def radius(observed: Observation, model: nn.Module) -> Finding:
    """The share of images whose expert no perturbation of a radius can change, against the radius.

    Columns: ``radius`` in units of the pixel range, from 0 to the largest image's or four times epsilon, epsilon itself
    among them; ``certified``: the share of images of a larger radius.

    Raises:
        ValueError: as :func:`linear_map`.
    """
    weight = linear_map(model)
    (choice,) = observed.routed()
    assert choice.scores is not None
    radii = route_radii(weight, choice.scores).cpu()
    epsilon = observed.epsilon
    finite = radii[radii.isfinite()]
    far = max(float(finite.max()) if len(finite) else 0.0, epsilon)
    far = min(far, 4 * epsilon) if epsilon else far
    grid = sorted({*torch.linspace(0, far, 101, dtype=torch.float64).tolist(), epsilon})
    rows = [(each, float((radii > each).double().mean())) for each in grid]
    certified = float((radii > epsilon).double().mean())
    kept = 1 - float(observed.flipped().double().mean())

    def draw() -> Figure:
        with style.figure(6.0, 3.9) as (fig, axis):
            axis.plot(
                [255 * row[0] for row in rows], [100 * row[1] for row in rows], color=style.COLOURS[0], label="certified"
            )
            axis.axvline(255 * epsilon, color="black", linestyle=":", linewidth=1.2, label="the attack's radius")
            axis.plot([255 * epsilon], [100 * kept], label="kept its expert under the attack", **style.points("attacked"))
            axis.set_xlim(0, None)
            style.percent_axis(axis, "images, %", 104)
            axis.set_xlabel("L-inf radius, in 1/255 of the pixel range")
            axis.set_title("Images whose expert cannot change", loc="left")
            fig.legend(loc="outside lower center", ncols=3)
            return fig

    note = (
        f"{observed.note()}. Exact radius of the linear router, without the box [0, 1]: median "
        f"{255 * float(radii.median()):.2f}/255, least {255 * float(radii.min()):.2f}/255; at {255 * epsilon:.2f}/255 "
        f"{100 * certified:.1f} % of the images are certified to keep their expert, under the attack on the prediction "
        f"{100 * kept:.1f} % did"
    )
    return Finding("radius", "Certified radius of the routing", ("radius", "certified"), rows, draw, note)
