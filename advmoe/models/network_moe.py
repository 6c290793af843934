# SPDX-License-Identifier: Apache-2.0
"""A mixture of whole networks (the output-level MoE of RT-ER and JTDMoE, arXiv 2502.06832): one choice for an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moe_kernels import Routing

from ..registry import unknown_name
from ..routers import Router, RouterOptions, build_router
from .base import ModelSpec, Normalize, build, create_model, register_kind
from .layers import Backbone, Path

__all__ = ["MIXES", "NetworkMoE"]

MIXES = ("logits", "probabilities")
_COUNT = "num_batches_tracked"  # one for a BatchNorm, and one for each channel of a routed one


class Experts(nn.Module):
    """N networks of one architecture, ``network``, whose layers have a slice for each."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        network = build(dataclasses.replace(spec, normalize=False, router_options=RouterOptions()))
        assert isinstance(network, Backbone)
        self.network = network

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Normalised images ``[B, 3, S, S]`` and one choice for each, or an expanded one for B * k, to their logits."""
        return self.network.run(x, Path.following(routing))


@register_kind("network_moe")
class NetworkMoE(nn.Module):
    """N networks of one architecture as one, and a router that looks at the image once.

    Every layer of the networks, the first and the last too, is a routed one with a slice for each expert, BatchNorm with
    its statistics, LayerNorm and positions as well: what :meth:`expert` gives out computes the same by itself. In
    training an expert's batch statistics are those of its own samples.

    One expert answers for an image with its logits, as in the released code, or ``top_k`` of them, mixed once at the
    output with the router's softmax over them; with ``top_k`` the number of experts the soft mixture of all. A
    straight-through gate, where there is one, multiplies the output too.

    Attributes:
        experts: the networks: ``experts(x, routing)`` of the normalised image, with one choice for each of the ``[B]``
            samples, or an expanded one for ``[B * k]``.
        router: of :mod:`advmoe.routers`, by the normalised image. With ``frozen_router`` it stays as it was drawn, as
            released: its parameters take no gradient, its scores are not standardised unless that is asked for, and a
            single choice has no gate, so that none leads an attack either.

    Raises:
        ValueError: for an unknown ``mix``; for a softmax gate of a single choice with mix ``"probabilities"``, where the
            mixture of one expert is that expert's.
    """

    router: Router

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        options = spec.router_options
        if spec.mix not in MIXES:
            raise unknown_name("mix", spec.mix, MIXES)
        if options.top_k == 1 and spec.mix == "probabilities" and options.gate == "softmax":
            raise ValueError("gate: of probabilities, the softmax gate of a single choice cancels; use straight_through")
        if spec.frozen_router:
            gate = "none" if options.top_k == 1 and options.gate != "softmax" else options.gate
            options = dataclasses.replace(options, gate=gate, standardize=bool(options.standardize))
        self.spec = spec
        self.num_experts = spec.num_experts
        self.normalize = Normalize(spec.mean, spec.std) if spec.normalize else nn.Identity()
        self.experts = Experts(spec)
        self.router = build_router(spec.router, 3, spec.num_experts, options, spec.image_size)
        self.router.frozen = spec.frozen_router
        if spec.frozen_router:
            self.router.requires_grad_(False)

    def forward(self, images: Tensor, routing: Routing | None = None) -> Tensor:
        """Images ``[B, 3, S, S]`` in [0, 1] to logits ``[B, num_classes]``; with mix ``"probabilities"`` to logarithms of
        the mixture of the experts' softmax outputs.

        Args:
            routing: ``[B]`` or ``[B, k]`` in place of the router's.
        """
        x = self.normalize(images)
        if routing is None:
            routing = self.router.route(x)
        y = self.experts(x, routing.expand())
        if self.spec.mix == "logits":
            return routing.combine(y)
        if routing.top_k == 1:
            return routing.combine(y).log_softmax(1)
        log_p = y.log_softmax(1).unflatten(0, (-1, routing.top_k))  # [B, k, classes]
        if routing.gate is not None:
            gate = routing.gate.to(log_p.dtype)
            log_p = log_p + gate.clamp_min(torch.finfo(gate.dtype).tiny).log().unsqueeze(2)
        # of gates that do not add up to 1, such as none, too
        return log_p.logsumexp(1).log_softmax(1)

    def scores(self, images: Tensor) -> Tensor:
        """The router's, as it chooses by them: ``[B, N]``."""
        return self.router.scores(self.normalize(images))

    def route(self, images: Tensor) -> Routing:
        """The router's choice: ``[B]``, or ``[B, k]``."""
        return self.router.route(self.normalize(images))

    @torch.no_grad()
    def expert(self, index: int) -> nn.Module:
        """A copy of one expert as an ordinary network, of kind dense: images in [0, 1] to its logits.

        Raises:
            IndexError: if there is none of this index.
        """
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert: expected 0 to {self.num_experts - 1}, got {index}")
        with torch.random.fork_rng(devices=[]):  # what is drawn here is no part of anybody's experiment
            network = build(dataclasses.replace(self.spec.dense(), router_options=RouterOptions()))
        like = next(self.experts.parameters())
        network.to(like.device, like.dtype)
        state = {name: value.chunk(self.num_experts)[index] for name, value in self.experts.network.state_dict().items()}
        network.load_state_dict({name: v.max() if name.endswith(_COUNT) else v for name, v in state.items()})
        return network.train(self.training)

    @classmethod
    @torch.no_grad()
    def from_experts(cls, models: Sequence[nn.Module], router: str = "linear", **options: Any) -> NetworkMoE:
        """The mixture of given networks of :func:`create_model`, kind dense, all of one form.

        Args:
            router: of the mixture, newly drawn.
            options: of kind network_moe, such as ``top_k`` and ``mix``.

        Raises:
            ValueError: if there is none, or one is of another form than the first.
        """
        specs = [getattr(model, "spec", None) for model in models]
        if not specs or not isinstance(specs[0], ModelSpec) or specs[0].kind != "dense":
            raise ValueError("models: expected networks of create_model, kind dense")
        for i, spec in enumerate(specs):
            if spec != specs[0]:
                raise ValueError(f"models[{i}]: expected the form of the first, {specs[0]}, got {spec}")
        s = specs[0]
        moe = create_model(
            s.arch, "network_moe", s.num_classes, s.image_size, len(models), width=s.width, router=router,
            normalize=s.normalize, mean=s.mean, std=s.std, stem=s.stem, **options,
        )  # fmt: skip
        assert isinstance(moe, cls)
        like = next(models[0].parameters())
        moe.to(like.device, like.dtype)
        states = [model.state_dict() for model in models]
        joined = {}
        for name, own in moe.experts.network.state_dict().items():
            parts = [state[name] for state in states]
            if name.endswith(_COUNT):
                parts = [part.expand(len(own) // len(models)) for part in parts]
            joined[name] = torch.cat(parts)
        moe.experts.network.load_state_dict(joined)
        return moe.train(models[0].training)
