# SPDX-License-Identifier: Apache-2.0
"""What is certain of a linear router: how far an image may go before it is routed otherwise, and how fast its softmax
moves. See docs/certified.md."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.base import Normalize
from ..routers import LinearRouter, routers_of

__all__ = ["distances", "linear_map", "route_radii", "softmax_constants"]

_DUAL = {"linf": 1, "l2": 2}


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


def route_radii(weight: Tensor, scores: Tensor, norm: str = "linf", top_k: int = 1) -> Tensor:
    """The greatest radius within which no image of the ball is routed otherwise: float64 ``[n]``.

    ``min (s_i - s_j) / |W_i - W_j|`` over the chosen experts i and all others j, in the dual norm (L1 for ``"linf"``, L2
    for ``"l2"``), in units of the pixel range. The ball is not cut to [0, 1]: for images in that box it is a lower bound,
    hence a certificate still. Infinite where the scores differ by a constant, or all experts are chosen.

    Args:
        weight: ``[N, D]`` of the map from pixels to scores, :func:`linear_map`.
        scores: ``[n, N]``.
        norm: ``"linf"`` or ``"l2"``.
        top_k: so many experts are chosen, in any order.
    """
    scores = scores.double().to(weight.device)
    lengths = distances(weight, norm)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(top_k, 1).indices, True)
    gaps = scores[:, :, None] - scores[:, None]  # [n, N, N]
    gaps = torch.where(lengths > 0, gaps / lengths, torch.inf)
    return gaps.masked_fill(~(chosen[:, :, None] & ~chosen[:, None]), torch.inf).amin((1, 2))


def softmax_constants(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Lipschitz constants of the softmax a of ``W x`` over k experts: of each coordinate, ``[..., k]``, and of
    ``sum_i (a_i(x') - a_i(x)) h_i`` for any h in [-1, 1], ``[...]``.

    ``a_i`` has the gradient ``a_i (1 - a_i) (W_i - a mean of the other W_j)``: its length is at most a quarter of the
    greatest ``|W_i - W_j|``, and comes as near to that as one likes if the differences are linearly independent. The sum
    has the covariance of h and the ``W_i`` for its gradient, at most half of the greatest ``|W_i - W_j|`` of all (Grüss).

    Args:
        lengths: ``[..., k, k]``, :func:`distances`.
    """
    return lengths.amax(-1) / 4, lengths.amax((-2, -1)) / 2


def distances(weight: Tensor, norm: str) -> Tensor:
    """``|W_i - W_j|`` of the rows of ``weight [N, D]`` in the dual norm of ``norm``: ``[N, N]``, float64."""
    weight = weight.double()
    return torch.stack([(weight - row).norm(_DUAL[norm], dim=1) for row in weight])
